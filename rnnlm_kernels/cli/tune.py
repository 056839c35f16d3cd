"""``rnnlm-kernels tune``: measure which way of running a layer is the fastest on this GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typer import Option

from .. import tuning
from ..backends import tunable
from ..bench.measure import TimingOptions
from ..bench.tune import Outcome, problems, tune
from .arguments import check_backends
from .errors import INTERRUPTED, terminate_as_interrupt
from .tables import console, table

NOT_RIGHT = 1


def tune_command(
    backend: Annotated[str, Option(help=f"One of {', '.join(tunable())}.")] = "cuda",
    cell: Annotated[
        list[str] | None,
        Option(help="lstm, gru or gru-before. Repeatable. Default: lstm and gru."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        Option(help="bfloat16, float16, tf32 or float32. Repeatable. Default: bfloat16."),
    ] = None,
    hidden: Annotated[
        list[int] | None, Option(min=1, help="Repeatable. Default: 256, 512, 1024.")
    ] = None,
    batch: Annotated[list[int] | None, Option(min=1, help="Repeatable. Default: 4, 32.")] = None,
    steps: Annotated[list[int] | None, Option(min=1, help="Repeatable. Default: 64.")] = None,
    lengths: Annotated[
        list[str] | None, Option(help="dense or packed. Repeatable. Default: dense.")
    ] = None,
    budget: Annotated[float, Option(min=0.0, help="Seconds of timing for each pass.")] = 1.0,
    samples: Annotated[int, Option(min=0, help="This many samples instead of a budget.")] = 0,
    budget_seconds: Annotated[
        float | None, Option(min=0.0, help="Begin no problem after so many seconds in all.")
    ] = None,
    out: Annotated[
        Path | None, Option(help="Folder for the table. Default: where layers look for it.")
    ] = None,
) -> None:
    """Find out which tier or tile is the fastest for your layers on this GPU, and remember it.

    Of every problem, forward and backward each: all candidates are checked against the float64
    oracle, and those that are right are timed in turn. The table is written after every problem;
    layers of later programs use it, as long as GPU, driver, versions and kernels are the same.
    """
    if backend not in tunable():
        raise ValueError(
            f"--backend should be one of {', '.join(tunable())}, got {backend!r}: others have "
            "nothing to choose from"
        )
    check_backends([backend])
    if out is None and tuning.switched_off():
        raise ValueError(f"{tuning.ENVIRONMENT}={tuning.OFF} leaves tables alone; --out is needed")
    module, folder = tunable()[backend], out or tuning.user_folder()
    grid = problems(
        module.DEVICE_TYPE,
        cells=cell or ("lstm", "gru"),
        dtypes=dtype or ("bfloat16",),
        hidden=hidden or (256, 512, 1024),
        batch=batch or (4, 32),
        steps=steps or (64,),
        lengths=lengths or ("dense",),
    )
    options = TimingOptions(budget_s=budget)
    if torch.device(module.DEVICE_TYPE).type == "cuda":
        options = replace(options, min_sample_s=0.003)
    if samples:
        options = replace(options, budget_s=0.0, min_samples=samples, max_samples=samples)
    folder.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is known now
    identity = module.identity(module.current_device())

    outcomes: list[Outcome] = []
    path, left_out, interrupted = None, 0, False
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    start = time.monotonic()
    try:
        with (
            terminate_as_interrupt(),
            Progress(*columns, console=Console(stderr=True), transient=True) as bar,
        ):
            task = bar.add_task("starting", total=len(grid))
            for index, workload in enumerate(grid):
                if budget_seconds is not None and time.monotonic() - start >= budget_seconds:
                    left_out = len(grid) - index
                    break
                bar.update(task, description=workload.label)
                for outcome in tune(workload, backend, options=options):
                    outcomes.append(outcome)
                    if entry := outcome.entry():
                        path = tuning.save(folder, backend, identity, [entry])
                bar.advance(task)
    except KeyboardInterrupt:
        interrupted = True
    _show(outcomes, left_out)
    typer.echo("nothing was measured" if path is None else f"wrote {path}")
    if interrupted:
        typer.echo("interrupted: the table holds what was measured until then", err=True)
        raise typer.Exit(INTERRUPTED)
    if any(outcome.refused or outcome.note.startswith("failed") for outcome in outcomes):
        raise typer.Exit(NOT_RIGHT)


def _show(outcomes: Sequence[Outcome], left_out: int) -> None:
    output = console()
    shown = table(
        "Candidates, and which of them was chosen",
        ("problem", "candidate", "in words"),
        ("us", "times the usual", "verdict"),
    )
    for outcome in outcomes:
        usual = next(iter(outcome.candidates), "")
        for name, words in outcome.candidates.items() if not outcome.note else ():
            us = outcome.us.get(name)
            share = us / outcome.us[usual] if us is not None and usual in outcome.us else None
            verdict = "[green]chosen[/green]" if name == outcome.choice else ""
            if name in outcome.refused:
                verdict = "[red]refused[/red]"
            shown.add_row(
                outcome.case.label if name == usual else "",
                name,
                words,
                "" if us is None else f"{us:.1f}",
                "" if share is None else f"{share:.2f}",
                verdict,
            )
    if shown.row_count:
        output.print(shown)
        output.print("The first candidate of each is the usual one: what runs without a table.")
    for outcome in outcomes:
        if outcome.note:
            output.print(f"{outcome.case.label}: {escape(outcome.note)}", highlight=False)
        for name, why in outcome.refused.items():
            output.print(f"[red]{outcome.case.label}: {name}: {escape(why)}[/red]")
    if left_out:
        output.print(f"{left_out} problems were left out: the time was over")
