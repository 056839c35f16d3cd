"""The course of a training on disk: a CSV table, TensorBoard events, and a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .records import EvalRecord, Record, StepRecord

CSV_NAME = "metrics.csv"
CURVE_NAME = "curve.png"
_COLUMNS = ("step", "epoch", "loss", "valid_loss", "grad_norm", "lr", "tokens", "seconds")


class CsvLog:
    """One row per update and per evaluation in a CSV file.

    Args:
        path: the file. One that is there is continued.
        parts: names of the penalties and auxiliary losses, a column each.
        step: updates made so far; rows of later ones, of a run that ended without saving, go.
    """

    def __init__(self, path: str | Path, parts: Sequence[str] = (), step: int = 0) -> None:
        self.path = Path(path)
        self._columns = [*_COLUMNS, *parts]
        rows = [row for row in read_log(self.path) if int(row["step"]) <= step] if step else []
        self._file = open(self.path, "w", newline="", encoding="utf-8")  # noqa: SIM115
        self._writer = csv.DictWriter(self._file, self._columns, restval="", extrasaction="ignore")
        self._writer.writeheader()
        self._writer.writerows(rows)

    def add(self, record: Record) -> None:
        """Writes a row."""
        row: dict[str, Any] = {"step": record.step, "epoch": record.epoch, "lr": record.lr}
        if isinstance(record, StepRecord):
            row |= {name: getattr(record, name) for name in ("loss", "tokens", "seconds")}
            row |= {"grad_norm": record.grad_norm, **record.parts}
        else:
            row["valid_loss"] = record.valid.loss
        self._writer.writerow(row)
        if isinstance(record, EvalRecord) or record.step % 100 == 0:
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_log(path: str | Path) -> list[dict[str, str]]:
    """The rows of a log; none where there is no file."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            # A last row that a power cut left half written is not one.
            return [row for row in csv.DictReader(file) if all(v is not None for v in row.values())]
    except FileNotFoundError:
        return []


class TensorBoardLog:
    """The same for TensorBoard.

    Args:
        folder: where the events go.
        step: updates made so far; events of later ones are marked void.

    Raises:
        ModuleNotFoundError: the package tensorboard is missing.
    """

    def __init__(self, folder: str | Path, step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "TensorBoard logs need the package tensorboard: pip install 'rnnlm-kernels[lm]'"
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def add(self, record: Record) -> None:
        """Writes the values of a record."""
        if isinstance(record, StepRecord):
            values = {
                "train/loss": record.loss,
                "train/grad_norm": record.grad_norm,
                "train/lr": record.lr,
                "train/tokens_per_second": record.tokens / record.seconds,
            }
            values |= {f"train/{name}": value for name, value in record.parts.items()}
        else:
            values = {"valid/loss": record.valid.loss, "valid/perplexity": record.valid.perplexity}
        for name, value in values.items():
            self._writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        """Writes what is still held back."""
        self._writer.close()


def save_curve(log: str | Path, path: str | Path, title: str = "") -> None:
    """Plots training and validation loss of a CSV log against the updates.

    Args:
        log: the CSV file.
        path: the PNG file.
        title: above the plot.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the loss curve needs matplotlib: pip install 'rnnlm-kernels[lm]'"
        ) from None
    rows = read_log(log)
    train = [(int(row["step"]), float(row["loss"])) for row in rows if row["loss"]]
    valid = [(int(row["step"]), float(row["valid_loss"])) for row in rows if row["valid_loss"]]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # Means over stretches, so that the line shows the course and not every window.
    stretch = max(1, len(train) // 200)
    groups = [train[first : first + stretch] for first in range(0, len(train), stretch)]
    axes.plot(
        [group[-1][0] for group in groups],
        [sum(loss for _, loss in group) / len(group) for group in groups],
        color="tab:blue",
        alpha=0.7,
        label="training (with dropout)",
    )
    if valid:
        axes.plot(
            *zip(*valid, strict=True), "o-", markersize=3, color="tab:red", label="validation"
        )
    axes.set_xlabel("update")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    Path(path).write_bytes(buffer.getvalue())
