"""Print the README's table from a result file: geometric means of torch's time over ours.

python benchmarks/readme_table.py benchmarks/results/<machine>/default.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROWS = {
    "LSTM float32": ("lstm", "dense", "float32"),
    "LSTM bfloat16": ("lstm", "dense", "bfloat16"),
    "GRU float32": ("gru", "dense", "float32"),
    "GRU bfloat16": ("gru", "dense", "bfloat16"),
    "LSTM float32, packed rows of different lengths": ("lstm", "packed", "float32"),
    "LSTM, one step of one row (latency)": ("lstm", "latency", "float32"),
    "GRU, one step of one row (latency)": ("gru", "latency", "float32"),
}


def ratio_text(ratio: float | None) -> str:
    """Two digits that matter; where we lose stands out."""
    if ratio is None:
        return ""
    text = f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2f}x"
    return text if ratio >= 1 else f"**{text}**"


def table(results: dict) -> str:
    ratios = {
        (g["cell"], g["kind"], g["dtype"], g["mode"]): g["ratio"] for g in results["geomeans"]
    }
    lines = ["| times faster than torch.nn | inference | training |", "|---|---:|---:|"]
    for name, group in ROWS.items():
        cells = [ratio_text(ratios.get((*group, mode))) for mode in ("inference", "training")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text("utf-8"))))
