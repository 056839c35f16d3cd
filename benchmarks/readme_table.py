"""Print the README's tables from result files: geometric means of torch's time over ours.

python benchmarks/readme_table.py benchmarks/results/<machine>/full.json [<another machine's> ..]
python benchmarks/readme_table.py benchmarks/results/gpu-<name>/gpu.json
python benchmarks/readme_table.py        the table for GPUs as long as none has been measured
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROWS = {
    "LSTM float32": ("lstm", "dense", "float32"),
    "LSTM bfloat16": ("lstm", "dense", "bfloat16"),
    "GRU float32": ("gru", "dense", "float32"),
    "GRU bfloat16": ("gru", "dense", "bfloat16"),
    "LSTM float32, packed rows of different lengths": ("lstm", "packed", "float32"),
    "LSTM float32, a few steps of few rows": ("lstm", "short", "float32"),
    "GRU float32, a few steps of few rows": ("gru", "short", "float32"),
    "LSTM, one step of one row (latency)": ("lstm", "latency", "float32"),
    "GRU, one step of one row (latency)": ("gru", "latency", "float32"),
}
GPU_ROWS = {
    "LSTM bfloat16": ("lstm", "dense", "bfloat16"),
    "LSTM float16": ("lstm", "dense", "float16"),
    "LSTM float32, TF32 allowed": ("lstm", "dense", "tf32"),
    "LSTM float32, TF32 forbidden": ("lstm", "dense", "float32"),
    "GRU bfloat16": ("gru", "dense", "bfloat16"),
    "GRU float16": ("gru", "dense", "float16"),
    "GRU float32, TF32 allowed": ("gru", "dense", "tf32"),
    "GRU float32, TF32 forbidden": ("gru", "dense", "float32"),
}
UNMEASURED = "not yet measured"


def ratio_text(ratio: float) -> str:
    """Two digits that matter; where we lose stands out."""
    text = f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2f}x"
    return text if ratio >= 1 else f"**{text}**"


def ratios_of(results: dict) -> dict:
    return {(g["cell"], g["kind"], g["dtype"], g["mode"]): g["ratio"] for g in results["geomeans"]}


def rows_of(rows: dict, machines: list[dict], missing: str) -> list[str]:
    lines = []
    for name, group in rows.items():
        found = [of.get((*group, mode)) for of in machines for mode in ("inference", "training")]
        cells = [missing if ratio is None else ratio_text(ratio) for ratio in found]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


def machine_of(results: dict) -> str:
    """ "Intel Xeon", "AMD EPYC, one thread": as much of a CPU's name as matters."""
    name = re.sub(r"\((R|TM)\)|CPU.*|Processor.*|\d+-Core.*", "", results["machine"]["cpu"])
    threads = {group["threads"] for group in results["geomeans"]}
    return " ".join(name.split()) + (", one thread" if threads == {1} else "")


def table(machines: list[dict]) -> str:
    """Of the results of one or more CPUs."""
    names = [f"{machine_of(m)}, {mode}" for m in machines for mode in ("inference", "training")]
    if len(machines) == 1:
        names = ["inference", "training"]
    head = [f"| times faster than torch.nn | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    return "\n".join([*head, *rows_of(ROWS, [ratios_of(m) for m in machines], "")])


def gpu_table(results: dict | None) -> str:
    """Of a result of the grid for GPUs; None: nobody has measured one."""
    head = ["| times faster than torch.nn on a GPU | inference | training |", "|---|---:|---:|"]
    ratios = {} if results is None else ratios_of(results)
    return "\n".join([*head, *rows_of(GPU_ROWS, [ratios], UNMEASURED)])


def main(arguments: list[str]) -> None:
    results = [json.loads(Path(argument).read_text("utf-8")) for argument in arguments]
    if results and results[0]["grid"] != "gpu":
        print(table(results))
    else:
        print(gpu_table(results[0] if results else None))


if __name__ == "__main__":
    main(sys.argv[1:])
