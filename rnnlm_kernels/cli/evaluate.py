"""``rnnlm-kernels eval`` and ``score``: how well a trained model predicts a text."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from torch import Tensor

from rnnlm_kernels import lm
from rnnlm_kernels.lm.data import read_text

from .lm_session import chosen_device, fail, load_model, one_line_errors, thread_count
from .tables import console, table

Folder = Annotated[Path, typer.Argument(help="Folder that rnnlm-kernels train wrote to (--out).")]
Text = Annotated[Path, typer.Argument(help="UTF-8 text file.")]
Which = Annotated[
    Literal["best", "last"] | None,
    typer.Option(
        help="Which of the two checkpoints.", show_default="the best, or the last if none is best"
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads.", show_default="torch's choice")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, ...", show_default="a GPU if there is one")
]


def parse_cache(text: str) -> lm.CacheConfig:
    """Reads ``"window,flatness,share"``.

    Raises:
        ValueError: not three numbers, or out of range.
    """
    parts = text.split(",")
    try:
        window, flatness, share = int(parts[0]), float(parts[1]), float(parts[2])
    except (ValueError, IndexError):
        raise ValueError(
            f"--cache should be window,flatness,share such as 500,0.6,0.1; got {text!r}"
        ) from None
    return lm.CacheConfig(window, flatness, share)


def parse_dynamic(text: str) -> tuple[float, float]:
    """Reads ``"lr"`` or ``"lr,decay"``.

    Raises:
        ValueError: not one or two numbers.
    """
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise ValueError(f"--dynamic should be lr or lr,decay such as 0.1,0.01; got {text!r}")
    return numbers[0], numbers[1] if len(numbers) == 2 else 0.0


def evaluate(
    folder: Folder,
    text: Text,
    which: Which = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Rows read side by side, each from a zero state.")
    ] = 1,
    sentences: Annotated[
        bool, typer.Option("--sentences", help="Every line for itself, from a zero state.")
    ] = False,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Continuous cache: window,flatness,share, e.g. 500,0.6,0.1.", show_default="none"
        ),
    ] = None,
    dynamic: Annotated[
        str | None,
        typer.Option(
            help="Learn from every 20 tokens once they are predicted: lr or lr,decay, e.g. 0.1.",
            show_default="none",
        ),
    ] = None,
    gradient_flow: Annotated[
        Path | None,
        typer.Option(
            help="Also plot how far gradients reach back in time to this PNG file.",
            show_default="none",
        ),
    ] = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """How well a trained model predicts a text: loss, perplexity, bits per character.

    Every token but the first is predicted exactly once, from all tokens before it (the state is
    carried through the whole text; there is no window and no stride). Words the model does not know
    are <unk>, whose share is printed: perplexities of different vocabularies do not compare.
    """
    with one_line_errors(), thread_count(threads):
        memory = None if cache is None else parse_cache(cache)
        learning = None if dynamic is None else parse_dynamic(dynamic)
        if sum((sentences, memory is not None, learning is not None)) > 1:
            fail("--sentences, --cache and --dynamic exclude each other")
        if learning is not None and batch > 1:
            fail("--dynamic reads one row: leave out --batch")
        model, tokenizer = load_model(folder, which, chosen_device(device))
        content = read_text(text)
        tokens = tokenizer.encode(content)
        if len(tokens) < 2:
            fail(f"{text} is too short: {len(tokens)} token; one prediction takes 2")
        if learning is not None:
            found = lm.evaluate_dynamically(model, tokens, lr=learning[0], decay=learning[1])
        elif sentences:
            if tokenizer.eos is None:
                fail("this model has no token that ends a line, and so no sentences")
            found = lm.evaluate_sentences(model, tokens, tokenizer.eos, batch=batch)
        else:
            found = lm.evaluate(model, tokens, batch=batch, cache=memory)
        if gradient_flow is not None:
            _plot_gradient_flow(model, tokens, gradient_flow)
        out = table(f"{text.name}, {found.tokens:,} {tokenizer.unit} tokens predicted", ("figure",))
        out.add_column("value", justify="right")
        out.add_row("loss (nats per token)", f"{found.loss:.4f}")
        out.add_row("perplexity", f"{found.perplexity:.3f}")
        out.add_row("bits per token", f"{found.bits:.4f}")
        if tokenizer.lossless:
            characters = max(1, len(content) - 1)
            out.add_row("bits per character", f"{found.total / math.log(2) / characters:.4f}")
        if tokenizer.unk is not None:
            share = float((tokens == tokenizer.unk).double().mean())
            out.add_row("<unk> among the tokens", f"{share:.2%}")
        console().print(out)


def _plot_gradient_flow(model: lm.RNNLanguageModel, tokens: Tensor, path: Path) -> None:
    rows = min(10, len(tokens) // 2)
    steps = min(100, len(tokens) // rows - 1)
    window = tokens[: rows * (steps + 1)].view(rows, -1).T.to(next(model.parameters()).device)
    flow = lm.gradient_flow(model, window[:-1].contiguous(), window[-1])
    flow.save_plot(path, f"{path.stem}: gradient of the last loss")


def score(
    folder: Folder,
    text: Annotated[Path, typer.Argument(help="UTF-8 text file; - reads standard input.")],
    which: Which = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """What a trained model thinks of every token of a text: a line of tab-separated values each.

    Columns: number of the token, the token (with escapes for line end and tab), its negative
    log-likelihood in nats given all tokens before it, and its probability. The first token has
    nothing before it and is not scored. The last line is the sum.
    """
    with one_line_errors(), thread_count(threads):
        model, tokenizer = load_model(folder, which, chosen_device(device))
        content = sys.stdin.read() if str(text) == "-" else read_text(text)
        tokens = tokenizer.encode(content)
        if len(tokens) < 2:
            fail(f"{text} is too short: {len(tokens)} token; one prediction takes 2")
        losses = lm.token_losses(model, tokens).tolist()
        typer.echo("position\ttoken\tnats\tprobability")
        for position, (number, nats) in enumerate(zip(tokens[1:].tolist(), losses, strict=True), 1):
            token = tokenizer.token(number).replace("\n", "\\n").replace("\t", "\\t")
            typer.echo(f"{position}\t{token}\t{nats:.5f}\t{math.exp(-nats):.6g}")
        typer.echo(f"sum\t{len(losses)} tokens\t{math.fsum(losses):.5f}\t")
