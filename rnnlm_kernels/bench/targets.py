"""What this stage of the project promises, as data; the report says which promises are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .contenders import REFERENCE, RIVALS
from .results import WRONG, Measurement, geomean


@dataclass(frozen=True)
class Target:
    """A bound on a figure of some of a run's measurements.

    Args:
        title: what a reader calls it.
        figure: ``"geomean"`` or ``"least"`` of the ratios (rival's time over ours, so at least
            ``bound`` is wanted), or ``"most saved"``, the largest ratio of saved bytes (ours over
            the rival's, so at most ``bound`` is wanted).
        cell, kind, dtype, mode: which measurements; None for all.
        projection: False leaves projected LSTMs out, which torch does not run on oneDNN.
    """

    title: str
    figure: Literal["geomean", "least", "most saved"]
    bound: float
    cell: str | None = None
    kind: str | None = None
    dtype: str | None = None
    mode: str | None = None
    projection: bool = True

    def selects(self, measurement: Measurement) -> bool:
        workload = measurement.workload
        if workload.proj_size and not self.projection:
            return False
        return all(
            wanted is None or wanted == found
            for wanted, found in (
                (self.cell, workload.cell),
                (self.kind, workload.kind),
                (self.dtype, workload.dtype),
                (self.mode, workload.mode),
            )
        )


@dataclass(frozen=True)
class Verdict:
    """A target on one contender and thread count.

    ``value`` is None when nothing was measured. ``refused`` counts the measurements that are
    missing because the kernel was wrong; with any of those a target is not met.
    """

    target: Target
    contender: str
    threads: int
    value: float | None
    refused: int
    met: bool

    @property
    def word(self) -> str:
        if self.refused:
            return f"missed, {self.refused} refused"
        return "met" if self.met else "missed"


# A call of 0.7 times torch's duration is a ratio of 1 / 0.7.
TARGETS = (
    Target("GRU float32 inference, mean", "geomean", 1.2, "gru", "dense", "float32", "inference"),
    Target("GRU float32 training, mean", "geomean", 1.5, "gru", "dense", "float32", "training"),
    Target("LSTM packed training", "least", 5.0, "lstm", "packed", "float32", "training"),
    Target("LSTM float32, slowest", "least", 0.8, "lstm", "dense", "float32"),
    Target(
        "One step of one row, slowest",
        "least",
        1 / 0.7,
        kind="latency",
        dtype="float32",
        mode="inference",
    ),
    Target(
        "LSTM float32 bytes saved for backward, most",
        "most saved",
        0.5,
        "lstm",
        "dense",
        "float32",
        "training",
        projection=False,
    ),
)


def judge(measurements: Sequence[Measurement]) -> list[Verdict]:
    """Hold every target against every fused contender and thread count of a run.

    A measurement that was refused because it was wrong fails its target. A target that nothing in
    the run speaks about gives no verdict.
    """
    racers = [m for m in measurements if m.contender not in (*RIVALS, REFERENCE)]
    verdicts = []
    for target in TARGETS:
        for contender, threads in dict.fromkeys((m.contender, m.threads) for m in racers):
            chosen = [
                m
                for m in racers
                if (m.contender, m.threads) == (contender, threads) and target.selects(m)
            ]
            if chosen:
                verdicts.append(_verdict(target, contender, threads, chosen))
    return verdicts


def _verdict(
    target: Target, contender: str, threads: int, chosen: Sequence[Measurement]
) -> Verdict:
    saved = target.figure == "most saved"
    found = [m.saved_ratio if saved else m.ratio for m in chosen]
    values = [value for value in found if value is not None]
    value = None
    if values:
        value = geomean(values) if target.figure == "geomean" else (max if saved else min)(values)
    refused = sum(m.status == WRONG for m in chosen)
    met = False
    if value is not None and not refused:
        met = value <= target.bound if saved else value >= target.bound
    return Verdict(target, contender, threads, value, refused, met)
