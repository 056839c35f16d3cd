"""``rnnlm-kernels bench``: run the benchmark, and turn a result file into a table and a plot."""

from __future__ import annotations

import shlex
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
from typer import Argument, Option

from ..bench import grids, harness, machine, onnx_runtime, report, targets
from ..bench.contenders import RIVALS, contenders, rival_of
from ..bench.measure import TimingOptions
from ..bench.results import (
    FAILED,
    FURTHER_RIVALS,
    OK,
    WRONG,
    Measurement,
    Results,
    fill_ratios,
    geomeans,
)
from ..bench.workload import Workload
from .arguments import check_backends, check_device, parse_threads
from .errors import INTERRUPTED, one_line_errors, terminate_as_interrupt
from .tables import console, table

NOT_RIGHT = 1
KEEP_EVERY_S = 15.0

bench_app = typer.Typer(invoke_without_command=True, rich_markup_mode="rich")


@bench_app.callback(invoke_without_command=True)
@one_line_errors
def bench(
    ctx: typer.Context,
    full: Annotated[
        bool, Option("--full", help="The same as --grid full: tens of minutes.")
    ] = False,
    grid_name: Annotated[
        str, Option("--grid", help=f"Which problems: {', '.join(grids.NAMED)}.")
    ] = "default",
    cell: Annotated[
        list[str] | None, Option(help="Only lstm, gru or gru-before. Repeatable.")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        Option(help="Only float32, tf32, bfloat16, float16 or float64. Repeatable."),
    ] = None,
    mode: Annotated[
        list[str] | None, Option(help="Only inference, forward or training. Repeatable.")
    ] = None,
    lengths: Annotated[list[str] | None, Option(help="Only dense or packed.")] = None,
    shape: Annotated[
        list[str] | None,
        Option(metavar="T,B,I,H", help="These sizes instead of the grid's. Repeatable."),
    ] = None,
    layers: Annotated[int, Option(help="Number of layers, with --shape.")] = 1,
    device: Annotated[str, Option(help="A torch device.")] = "cpu",
    backend: Annotated[
        list[str] | None, Option(help="Which of our backends. Default: every fused one built.")
    ] = None,
    threads: Annotated[
        str, Option(metavar="1,2", help="Thread counts. Default: torch's own.")
    ] = "",
    compile_torch: Annotated[
        bool, Option("--compile", help="Also time torch.compile of torch's layer, if it compiles.")
    ] = False,
    compile_limit: Annotated[float, Option(min=1.0, help="Seconds allowed to compile one.")] = 60.0,
    onnx: Annotated[
        bool, Option("--onnx", help="Also time ONNX Runtime's layer, if it is installed.")
    ] = False,
    budget: Annotated[float, Option(min=0.0, help="Seconds of timing for each problem.")] = 3.0,
    samples: Annotated[int, Option(min=0, help="This many samples instead of a budget.")] = 0,
    budget_seconds: Annotated[
        float | None, Option(min=0.0, help="Begin no problem after so many seconds in all.")
    ] = None,
    check_steps: Annotated[
        int | None, Option(min=1, help="Of longer sequences, check only so many steps.")
    ] = None,
    out: Annotated[
        Path | None,
        Option(help="Folder for the results. Default: benchmarks/results/ in the repository."),
    ] = None,
    list_only: Annotated[bool, Option("--list", help="List the problems and exit.")] = False,
) -> None:
    """Time our layers against torch.nn, interleaved, and measure what they keep for backward.

    Nothing wrong is timed: a layer whose output or gradients fail the check is refused, and the
    exit code is 1. Ctrl-C (or SIGTERM) writes what was measured so far. Results: JSON, CSV, a
    markdown report and a plot.
    """
    if ctx.invoked_subcommand is not None:
        return
    counts = parse_threads(threads)
    check_device(device)
    check_backends(backend or ())
    grid, name = _grid(
        "full" if full else grid_name,
        cells=cell or (),
        dtypes=dtype or (),
        modes=mode or (),
        lengths=lengths or (),
        shapes=shape or (),
        layers=layers,
        device=device,
    )
    if list_only:
        _list(grid)
        return
    stderr = Console(stderr=True)
    if onnx and (missing := onnx_runtime.missing_packages()):
        packages = escape("pip install 'rnnlm-kernels[rivals]'")
        stderr.print(
            f"[yellow]without ONNX Runtime: {' and '.join(missing)} not installed; "
            f"{packages} brings what it needs[/yellow]",
            soft_wrap=True,
        )
        onnx = False
    chosen = contenders(
        backend, compile_torch=compile_torch, compile_limit_s=compile_limit, onnx=onnx
    )
    options = TimingOptions(budget_s=budget)
    if torch.device(device).type == "cuda":  # no neighbour's threads to sit out
        options = replace(options, min_sample_s=0.003)
    if samples:
        options = replace(options, budget_s=0.0, min_samples=samples, max_samples=samples)
    folder = out or default_folder(device)
    folder.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is known now
    results = harness.new_results(command=_command(ctx), grid=name, options=options)

    if onnx:
        results.versions |= onnx_runtime.versions()
    if results.disturbed:
        stderr.print(f"[yellow]{report.load_warning(results)}[/yellow]", soft_wrap=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    interrupted = False
    try:
        with terminate_as_interrupt(), Progress(*columns, console=stderr, transient=True) as bar:
            task = bar.add_task("starting", total=len(grid) * max(1, len(counts)))
            started, kept = False, time.monotonic()

            def progress(workload: Workload, count: int) -> None:
                nonlocal started, kept
                if time.monotonic() - kept > KEEP_EVERY_S and results.measurements:
                    # A device that hangs lets nobody write at the end.
                    fill_ratios(results.measurements)
                    results.save(folder / f"{name}.json")
                    kept = time.monotonic()
                bar.advance(task, 1 if started else 0)
                started = True
                bar.update(task, description=f"{workload.label} {workload.mode} t={count}")

            harness.run(
                grid,
                chosen,
                threads=counts,
                options=options,
                results=results,
                progress=progress,
                total_s=budget_seconds,
                check_steps=check_steps,
            )
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if results.measurements:
            written = save(results, folder)
    if not results.measurements:
        raise typer.Exit(INTERRUPTED)
    _show(results)
    for path in written:
        typer.echo(f"wrote {path}")
    if interrupted:
        typer.echo("interrupted: the files hold what was measured until then", err=True)
        raise typer.Exit(INTERRUPTED)
    if any(m.status in (WRONG, FAILED) and m.contender not in RIVALS for m in results.measurements):
        raise typer.Exit(NOT_RIGHT)


@bench_app.command("report")
@one_line_errors
def bench_report(
    result: Annotated[Path, Argument(metavar="RESULT.json", help="What `bench` wrote.")],
    out: Annotated[Path | None, Option(help="Folder. Default: beside the result.")] = None,
) -> None:
    """Make the markdown table and the plot of a result file."""
    results = Results.load(result)
    written = report.write(results, out or result.parent, result.stem)
    typer.echo(f"wrote {written.markdown}")
    if written.plot is not None:
        typer.echo(f"wrote {written.plot}")


def default_folder(device: str, start: Path | None = None) -> Path:
    """``benchmarks/results/<machine>`` inside this project's repository, else a folder here."""
    here = start or Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "rnnlm_kernels" / "bench").is_dir() and (folder / "benchmarks").is_dir():
            name = machine.short_name(machine.describe(), device)
            return folder / "benchmarks" / "results" / name
    return here / "rnnlm-bench-results"


def save(results: Results, folder: Path) -> list[Path]:
    """Write the JSON first, then what can be made from it again."""
    json_path, csv_path = folder / f"{results.grid}.json", folder / f"{results.grid}.csv"
    results.save(json_path)
    results.save_csv(csv_path)
    pages = report.write(results, folder, results.grid)
    return [json_path, csv_path, pages.markdown, *([pages.plot] if pages.plot else [])]


def _grid(
    name: str,
    *,
    cells: Sequence[str],
    dtypes: Sequence[str],
    modes: Sequence[str],
    lengths: Sequence[str],
    shapes: Sequence[str],
    layers: int,
    device: str,
) -> tuple[list[Workload], str]:
    if shapes:
        grid = grids.custom_grid(
            [grids.parse_shape(text) for text in shapes],
            cells=cells or ("lstm", "gru"),
            dtypes=dtypes or ("float32",),
            modes=modes or ("inference", "training"),
            lengths=lengths or ("dense",),
            num_layers=layers,
            device=device,
        )
        return grid, "custom"
    if layers != 1:
        raise ValueError("--layers goes with --shape; the grids say how many layers they have")
    if name not in grids.NAMED:
        raise ValueError(f"--grid should be one of {', '.join(grids.NAMED)}, got {name!r}")
    grid = grids.NAMED[name](device)
    chosen = grids.select(grid, cells=cells, dtypes=dtypes, modes=modes, lengths=lengths)
    # A part of a grid must not overwrite the results of the whole.
    return chosen, name if len(chosen) == len(grid) else "custom"


def _command(ctx: typer.Context) -> str:
    """The command that repeats this run, without the folder, which is this machine's business."""
    words = ["rnnlm-kernels", "bench"]
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        if parameter.name == "out" or source is None or source.name != "COMMANDLINE":
            continue
        value = ctx.params[str(parameter.name)]
        flag = max(parameter.opts, key=len)
        if value is True:
            words.append(flag)
        else:
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [word for item in values for word in (flag, str(item))]
    return shlex.join(words)


def _list(grid: Sequence[Workload]) -> None:
    listed = table(f"{len(grid)} problems", ("problem", "mode", "device"))
    for workload in grid:
        listed.add_row(workload.label, workload.mode, workload.device)
    console().print(listed)


def _show(results: Results) -> None:
    """The tables at the end of a run: problems, geometric means, goals."""
    output = console()
    problems = table(
        report.machine_line(results),
        ("problem", "mode", "backend"),
        ("threads", "rival", "ours", "ratio", "us/step", "GFLOP/s", "roofline"),
    )
    rivals = {
        (m.workload, m.threads): m
        for m in results.measurements
        if m.contender == rival_of(m.workload)
    }
    refusals = []
    for m in results.measurements:
        rival = rivals.get((m.workload, m.threads))
        if m is rival and m.status == OK:
            continue
        problems.add_row(*_cells(m, rival))
        if m.status != OK:
            refusals.append(f"{m.workload.label} {m.workload.mode} {m.contender}: {m.note}")
    output.print(problems)
    for refusal in refusals:
        output.print(f"[red]not timed[/red] {escape(refusal)}", soft_wrap=True, highlight=False)

    means = table(
        "Geometric means of the ratios (rival's time / ours)",
        ("group", "backend"),
        ("threads", "problems", "ratio"),
    )
    for group, (mean, count) in geomeans(results.measurements).items():
        name = report.group_name(group)
        means.add_row(name, group.contender, str(group.threads), str(count), _coloured(mean))
    if means.row_count:
        output.print(means)

    further = table(
        "Geometric means against further rivals (rival's time / ours)",
        ("group", "rival", "backend"),
        ("threads", "problems", "ratio"),
    )
    for other in FURTHER_RIVALS:
        for group, (mean, count) in geomeans(results.measurements, other).items():
            words = (report.group_name(group), other, group.contender, str(group.threads))
            further.add_row(*words, str(count), _coloured(mean))
    if further.row_count:
        output.print(further)

    goals = table("Goals of this stage", ("goal", "backend"), ("threads", "wanted", "measured", ""))
    for verdict in targets.judge(results.measurements):
        sign = "<=" if verdict.target.at_most else ">="
        goals.add_row(
            verdict.target.title,
            verdict.contender,
            str(verdict.threads),
            f"{sign} {verdict.target.bound:.2f}x",
            report.format_ratio(verdict.value),
            f"[{'green' if verdict.met else 'red'}]{verdict.word}[/]",
        )
    if goals.row_count:
        output.print(goals)


def _cells(m: Measurement, rival: Measurement | None) -> tuple[str, ...]:
    words = (m.workload.label, m.workload.mode, m.contender, str(m.threads))
    rival_time = report.format_time(rival.median_us if rival else None)
    if m.us_per_step is None or m.gflops is None:
        return (*words, rival_time, f"[red]{m.status}[/red]", "-", "-", "-", "-")
    return (
        *words,
        rival_time,
        report.format_time(m.median_us),
        _coloured(m.ratio),
        f"{m.us_per_step:.1f}",
        f"{m.gflops:.1f}",
        report.format_roofline(m),
    )


def _coloured(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return f"[{'green' if ratio >= 1 else 'yellow'}]{ratio:.2f}x[/]"
