"""``rnnlm-kernels generate``: a trained model goes on writing."""

from __future__ import annotations

from typing import Annotated

import typer

from rnnlm_kernels import lm

from .evaluate import Device, Folder, Threads, Which
from .lm_session import chosen_device, fail, load_model, one_line_errors, thread_count


def generate(
    folder: Folder,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to go on from; several --prompt are continued side by side.",
            show_default="the beginning of a line",
        ),
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens to write, at most.")] = 200,
    temperature: Annotated[
        float, typer.Option(help="Below 1: likely tokens likelier; above 1: bolder.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Only the likeliest so many; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Only the likeliest that together have this probability.")
    ] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    beam: Annotated[
        int, typer.Option(min=0, help="Search for the likeliest text with so many hypotheses.")
    ] = 0,
    length_power: Annotated[
        float, typer.Option(help="With --beam: compare log-probability / length ** this.")
    ] = 0.0,
    stop: Annotated[bool, typer.Option("--stop", help="Stop at the end of a line.")] = False,
    unknown: Annotated[bool, typer.Option("--unknown", help="Allow <unk>.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 1,
    count: Annotated[int, typer.Option(min=1, help="Texts per prompt.")] = 1,
    which: Which = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Continues a text with a trained model.

    One prompt is written as it comes, token by token. The state is carried, so a token costs the
    same however long the text is.
    """
    with one_line_errors(), thread_count(threads):
        try:
            sampling = lm.Sampling(temperature, top_k, top_p, greedy, unknown, seed)
        except ValueError as error:
            fail(str(error))
        model, tokenizer = load_model(folder, which, chosen_device(device))
        if stop and tokenizer.eos is None:
            fail("--stop: this model has no token that ends a line")
        generator = lm.Generator(model, tokenizer)
        prompts = [each for each in prompt or [""] for _ in range(count)]
        if beam:
            for each in dict.fromkeys(prompts):
                found = generator.beam_search(
                    each,
                    length,
                    beam,
                    stop_at_eos=stop,
                    length_power=length_power,
                    unknown=unknown,
                )
                for text, log_p in found[:count]:
                    _write(text, f"log-probability {log_p:.3f}")
        elif len(prompts) == 1:
            for piece in generator.stream(prompts[0], length, sampling, stop_at_eos=stop):
                typer.echo(piece, nl=False)
            typer.echo()
        else:
            for index, text in enumerate(
                generator.generate(prompts, length, sampling, stop_at_eos=stop), 1
            ):
                _write(text, f"{index}")


def _write(text: str, title: str) -> None:
    typer.echo(f"--- {title} ---")
    typer.echo(text)
