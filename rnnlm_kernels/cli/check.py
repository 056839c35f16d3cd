"""``rnnlm-kernels check``: every backend against the float64 oracle, beside torch's own error."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from typer import Option

from ..bench import grids
from ..bench.contenders import TORCH
from ..check import CheckResult, CheckRow, SkippedCheck, check_all, default_problems
from ..dispatch import BackendError, backends
from .arguments import check_backends, check_device
from .tables import console, table

NOT_RIGHT = 1


def check(
    backend: Annotated[
        list[str] | None, Option(help="Only this backend. Repeatable. Default: all available.")
    ] = None,
    cell: Annotated[
        list[str] | None, Option(help="Only lstm, gru or gru-before. Repeatable.")
    ] = None,
    dtype: Annotated[
        list[str] | None, Option(help="Only float32, float64, bfloat16 or float16. Repeatable.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        Option(metavar="T,B,I,H", help="These sizes instead of the built-in problems."),
    ] = None,
    device: Annotated[str, Option(help="A torch device.")] = "cpu",
    rows: Annotated[
        bool, Option("--rows", help="Show every tensor, not the worst of each problem.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Check outputs and all gradients of every backend against a float64 oracle.

    A backend passes when its error is at most twice that of torch's own layer in the same dtype,
    plus a floor of a few units in the last place. Exit code 1 when any check fails.
    """
    check_device(device)
    check_backends(backend or ())
    names = backend or [name for name, module in backends().items() if module.available()[0]]
    if shape:
        problems = grids.custom_grid(
            [grids.parse_shape(text) for text in shape],
            cells=cell or ("lstm", "gru", "gru-before"),
            dtypes=dtype or ("float32", "float64", "bfloat16", "float16"),
            modes=("training",),
            device=device,
        )
    else:
        problems = grids.select(default_problems(device), cells=cell or (), dtypes=dtype or ())

    found: list[CheckResult | SkippedCheck] = []
    stderr = Console(stderr=True)
    for problem in track(
        problems, "checking", console=stderr, transient=True, disable=not stderr.is_terminal
    ):
        found.extend(check_all([problem], names))
    results = [item for item in found if isinstance(item, CheckResult)]
    skipped = [item for item in found if isinstance(item, SkippedCheck)]
    wrong = [result for result in results if not result.ok]

    if as_json:
        typer.echo(json.dumps(_to_json(results, skipped), indent=1, allow_nan=False))
    else:
        _show(results, skipped, wrong, rows)
    if not results:
        raise BackendError(f"nothing was checked: {skipped[0].reason}")
    if wrong:
        raise typer.Exit(NOT_RIGHT)


def _show(
    results: Sequence[CheckResult],
    skipped: Sequence[SkippedCheck],
    wrong: Sequence[CheckResult],
    all_rows: bool,
) -> None:
    output = console()
    errors = table(
        "Largest and RMS error against the float64 oracle"
        + ("" if all_rows else ": of each problem the tensor nearest to its limit"),
        ("problem", "backend", "tensor"),
        ("error", "torch's", "allowed", "rms", "torch's", "verdict"),
    )
    for result in results:
        shown = result.rows if all_rows else (result.worst,)
        for row in shown:
            errors.add_row(*_cells(result, row))
    output.print(errors)
    if any(result.comparator != TORCH for result in results):
        output.print("* error of the equations in plain PyTorch, where torch has no such layer")
    for item in skipped:
        output.print(f"skipped {item.workload.label} on {item.backend}: {item.reason}")
    tensors = sum(len(result.rows) for result in results)
    verdict = f"[red]{len(wrong)} of {len(results)} problems failed[/red]"
    if not wrong:
        verdict = f"[green]all {len(results)} problems ok[/green]"
    output.print(f"{verdict}, {tensors} tensors compared, {len(skipped)} skipped")


def _cells(result: CheckResult, row: CheckRow) -> tuple[str, ...]:
    against = "" if result.comparator == TORCH else "*"
    return (
        result.workload.label,
        result.backend,
        row.name,
        f"{row.our_error:.2e}",
        f"{row.torch_error:.2e}{against}",
        f"{row.limit:.2e}",
        f"{row.our_rms:.2e}",
        f"{row.torch_rms:.2e}",
        _verdict(result, row),
    )


def _verdict(result: CheckResult, row: CheckRow) -> str:
    if row.ok:
        return "[green]ok[/green]"
    count = len(result.failures)
    note = row.note or f"{count} tensor{'s' if count > 1 else ''}"
    return f"[red]FAIL[/red] ({escape(note)})"


def _to_json(results: Sequence[CheckResult], skipped: Sequence[SkippedCheck]) -> dict[str, Any]:
    return {
        "ok": all(result.ok for result in results),
        "results": [
            {
                "problem": result.workload.to_dict(),
                "backend": result.backend,
                "comparator": result.comparator,
                "ok": result.ok,
                "rows": [_row_to_json(row) for row in result.rows],
            }
            for result in results
        ],
        "skipped": [
            {"problem": s.workload.to_dict(), "backend": s.backend, "reason": s.reason}
            for s in skipped
        ],
    }


def _row_to_json(row: CheckRow) -> dict[str, Any]:
    # JSON has no infinity: an error that could not be measured is null, and `note` says why.
    data = {
        name: value if not isinstance(value, float) or math.isfinite(value) else None
        for name, value in asdict(row).items()
    }
    return {**data, "ok": row.ok}
