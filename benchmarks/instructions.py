"""Counts the instructions of our layers and of their rivals, which no busy machine can disturb.

    python benchmarks/instructions.py                                     # inference, five shapes
    python benchmarks/instructions.py --mode training --cell gru
    python benchmarks/instructions.py --shape 35,20,200,200 --out instructions.json

Contenders: ours (backend ``cpu``), torch.nn, and ONNX Runtime where it is installed. All run in one
process of one thread under ``valgrind --tool=callgrind``, which counts only between two marks: a
call as a user makes it, Python included, after calls that warm it up. Needs valgrind with its
headers and a C compiler (for the marks).

Valgrind knows neither AVX-512 nor AMX. All sides are therefore held to AVX2 by the environment
(RNNLM_CPU_ISA, ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_ENABLE_INSTRUCTIONS); ONNX Runtime asks
the processor, as which valgrind presents itself, and finds AVX2. The counts compare the work of two
programs on such a machine. They are no times: an instruction that waits for memory counts as one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from rnnlm_kernels.bench import onnx_runtime
from rnnlm_kernels.bench.contenders import (
    ONNX,
    TORCH,
    Contender,
    ContenderError,
    onnx_contender,
    ours,
    torch_contender,
)
from rnnlm_kernels.bench.grids import custom_grid, parse_shape
from rnnlm_kernels.bench.machine import commit, describe, versions
from rnnlm_kernels.bench.results import geomean
from rnnlm_kernels.bench.workload import Workload, setup, trial

# The shapes of the timed grids with fewer steps: a count needs no long run.
SHAPES = (
    (35, 20, 200, 200),
    (16, 32, 256, 256),
    (16, 1, 512, 512),
    (50, 8, 64, 64),
    (1, 1, 64, 64),
)
OURS = "cpu"
WARM_UP, CALLS = 2, 1
AVX2 = {
    "RNNLM_CPU_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
MARKS = """
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_ZERO_STATS; CALLGRIND_START_INSTRUMENTATION; }
void end(const char* name) { CALLGRIND_STOP_INSTRUMENTATION; CALLGRIND_DUMP_STATS_AT(name); }
"""


def parse_profile(text: str) -> tuple[str, int] | None:
    """The mark's name and the number of instructions of one of callgrind's files.

    None for the file without a mark, which callgrind writes when the program ends.

    Example:
        >>> parse_profile("desc: Trigger: Client Request: 3 torch\\nevents: Ir\\ntotals: 1200\\n")
        ('3 torch', 1200)
    """
    name = re.search(r"^desc: Trigger: Client Request: (.+)$", text, re.MULTILINE)
    total = re.search(r"^totals: (\d+)", text, re.MULTILINE)
    return (name.group(1), int(total.group(1))) if name and total else None


def contenders() -> list[Contender]:
    """Ours, torch's, and ONNX Runtime's where it is installed."""
    further = [] if onnx_runtime.missing_packages() else [onnx_contender()]
    return [ours(OURS), torch_contender(), *further]


def run_marked(grid: list[Workload], marks: Path) -> None:
    """Inside valgrind: every contender on every workload, between marks ``<index> <contender>``."""
    library = ctypes.CDLL(str(marks))
    for index, workload in enumerate(grid):
        inputs = setup(workload)
        for contender in contenders():
            try:
                step = trial(contender.build(inputs), inputs).step
            except ContenderError:
                continue
            for _ in range(WARM_UP):
                step()
            library.begin()
            for _ in range(CALLS):
                step()
            library.end(f"{index} {contender.name}".encode())


def count(command: list[str]) -> dict[tuple[int, str], float]:
    """Instructions of one call, by workload and contender, of a command that runs marked code.

    Args:
        command: everything but the option that names the marks.

    Raises:
        SystemExit: a tool is missing, or the run failed.
    """
    compiler = os.environ.get("CC") or "cc"
    for tool in ("valgrind", compiler):
        if shutil.which(tool) is None:
            raise SystemExit(f"error: {tool} was not found; counting needs valgrind and a compiler")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, marks = folder / "marks.c", folder / "marks.so"
        source.write_text(MARKS)
        build = [compiler, "-O1", "-shared", "-fPIC", "-o", str(marks), str(source)]
        if subprocess.run(build).returncode:
            raise SystemExit("error: the marks do not compile; are valgrind's headers installed?")
        profile = f"--callgrind-out-file={folder / 'profile'}"
        valgrind = ["valgrind", "-q", "--tool=callgrind", "--instr-atstart=no", profile]
        done = subprocess.run(
            [*valgrind, *command, "--marks", str(marks)],
            env={**os.environ, **AVX2, "OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            raise SystemExit(f"error: the run under valgrind ended with {done.returncode}")
        counts = {}
        for file in folder.glob("profile.*"):
            if found := parse_profile(file.read_text(errors="replace")):
                index, _, contender = found[0].partition(" ")
                counts[int(index), contender] = found[1] / CALLS
    return counts


def rows_of(grid: list[Workload], counts: dict[tuple[int, str], float]) -> list[dict[str, object]]:
    """A row per workload: of each contender instructions per call, per step, and per step and unit
    of the batch; and of each rival how many times ours."""
    rows: list[dict[str, object]] = []
    for index, workload in enumerate(grid):
        own = {name: n for (i, name), n in counts.items() if i == index}
        steps = workload.seq_len
        units = steps * workload.batch * workload.hidden_size
        rows.append(
            {
                "workload": workload.to_dict(),
                "contenders": {
                    name: {
                        "instructions": round(n),
                        "per step": round(n / steps, 1),
                        "per step and unit": round(n / units, 3),
                    }
                    for name, n in own.items()
                },
                "ratios": {
                    name: round(n / own[OURS], 3)
                    for name, n in own.items()
                    if name != OURS and OURS in own
                },
            }
        )
    return rows


def summary(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Geometric means of the ratios: of each cell to each rival."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for rival, ratio in row["ratios"].items():
            cell = found.setdefault(row["workload"]["cell"], {})
            cell.setdefault(rival, []).append(ratio)
    return {
        cell: {rival: round(geomean(ratios), 3) for rival, ratios in rivals.items()}
        for cell, rivals in found.items()
    }


def table(rows: list[dict]) -> str:
    """Instructions per step and unit, and the ratios, as markdown."""
    lines = [
        "| problem | mode | ours | torch | ONNX Runtime | torch / ours | ONNX Runtime / ours |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        workload = Workload.from_dict(row["workload"])
        found = row["contenders"]
        cells = [
            f"{found[name]['per step and unit']:.1f}" if name in found else "-"
            for name in (OURS, TORCH, ONNX)
        ]
        cells += [
            f"{row['ratios'][name]:.2f}x" if name in row["ratios"] else "-"
            for name in (TORCH, ONNX)
        ]
        lines.append("| " + " | ".join([workload.label, workload.mode, *cells]) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line, counts, prints a table and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", type=parse_shape, metavar="T,B,I,H")
    parser.add_argument("--cell", action="append", choices=["lstm", "gru", "gru-before"])
    parser.add_argument("--mode", default="inference", choices=["inference", "training"])
    parser.add_argument("--out", type=Path, help="where the result is written, as JSON")
    parser.add_argument("--marks", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    cells = given.cell or ["lstm", "gru"]
    grid = custom_grid(given.shape or SHAPES, cells=cells, modes=[given.mode])
    torch.set_num_threads(1)
    if given.marks:
        run_marked(grid, given.marks)
        return
    words = [word for shape in given.shape or () for word in ("--shape", ",".join(map(str, shape)))]
    words += [word for cell in cells for word in ("--cell", cell)]
    counts = count([sys.executable, __file__, *words, "--mode", given.mode])
    rows = rows_of(grid, counts)
    print(table(rows))
    print(json.dumps(summary(rows), indent=1))
    if given.out is not None:
        result = {
            "machine": describe(),
            "versions": versions() | onnx_runtime.versions(),
            "commit": commit(),
            "environment": AVX2,
            "calls": CALLS,
            "summary": summary(rows),
            "rows": rows,
        }
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
