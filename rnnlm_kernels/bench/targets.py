"""What this stage of the project promises, as data; the report says which promises are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .contenders import ONNX, REFERENCE, RIVALS, TORCH_COMPILE
from .results import WRONG, Measurement, geomean


@dataclass(frozen=True)
class Target:
    """A bound on a figure of some of a run's measurements.

    Args:
        title: what a reader calls it.
        figure: ``"geomean"`` or ``"least"`` of the ratios (rival's time over ours, so at least
            ``bound`` is wanted), or ``"most saved"``, the largest ratio of saved bytes, or ``"mean
            peak"``, the geometric mean of the ratios of peak memory (ours over the rival's, so at
            most ``bound`` is wanted).
        cell, kind, dtype, mode: which measurements; None for all.
        projection: False leaves projected LSTMs out, which torch does not run on oneDNN.
        device: ``"cpu"`` or ``"cuda"``.
        dtypes: any of these; empty for all.
        over: only hidden sizes above this one.
        cudnn_is_persistent: True for the problems that cuDNN runs in one persistent kernel.
        rival: whose ratios, where it is not the workload's own rival.
    """

    title: str
    figure: Literal["geomean", "least", "most saved", "mean peak"]
    bound: float
    cell: str | None = None
    kind: str | None = None
    dtype: str | None = None
    mode: str | None = None
    projection: bool = True
    device: str = "cpu"
    dtypes: tuple[str, ...] = ()
    over: int = 0
    cudnn_is_persistent: bool | None = None
    rival: str | None = None

    @property
    def at_most(self) -> bool:
        """Whether the bound is an upper one."""
        return self.figure in ("most saved", "mean peak")

    def selects(self, measurement: Measurement) -> bool:
        workload = measurement.workload
        if workload.proj_size and not self.projection:
            return False
        if self.device != ("cuda" if workload.on_cuda else "cpu"):
            return False
        if self.dtypes and workload.dtype not in self.dtypes:
            return False
        if workload.hidden_size <= self.over:
            return False
        return all(
            wanted is None or wanted == found
            for wanted, found in (
                (self.cell, workload.cell),
                (self.kind, workload.kind),
                (self.dtype, workload.dtype),
                (self.mode, workload.mode),
                (self.cudnn_is_persistent, workload.cudnn_is_persistent),
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


def _gpu_targets() -> list[Target]:
    """What the CUDA kernels are to reach against cuDNN."""
    targets = []
    for mode, bound in (("inference", 3.0), ("training", 2.5)):
        for title, selection in (
            ("LSTM bfloat16", {"cell": "lstm", "dtypes": ("bfloat16",)}),
            ("GRU bfloat16", {"cell": "gru", "dtypes": ("bfloat16",)}),
            ("GRU float16, H > 192", {"cell": "gru", "dtypes": ("float16",), "over": 192}),
        ):
            targets.append(
                Target(
                    f"{title} on a GPU, {mode}, mean",
                    "geomean",
                    bound,
                    kind="dense",
                    mode=mode,
                    device="cuda",
                    **selection,
                )
            )
    for mode in ("inference", "training"):
        persistent = Target(
            f"LSTM float16 where cuDNN is persistent, {mode}, mean",
            "geomean",
            1.3,
            kind="dense",
            mode=mode,
            device="cuda",
            cudnn_is_persistent=True,
        )
        floats = replace(
            persistent,
            title=f"float32 and TF32 on a GPU, {mode}, mean",
            bound=1.5,
            dtypes=("float32", "tf32"),
            cudnn_is_persistent=None,
        )
        targets += [persistent, floats]
    return [
        *targets,
        Target("Any problem on a GPU, slowest", "least", 1.0, device="cuda"),
        Target(
            "Training on a GPU, peak memory, mean",
            "mean peak",
            0.6,
            kind="dense",
            mode="training",
            device="cuda",
        ),
    ]


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
        "A few steps of few rows, training, slowest", "least", 1.0, kind="short", mode="training"
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
    *(
        Target(
            f"Against {rival}, float32 inference, mean",
            "geomean",
            1.0,
            dtype="float32",
            mode="inference",
            rival=rival,
        )
        for rival in (TORCH_COMPILE, ONNX)
    ),
    *_gpu_targets(),
)


def judge(measurements: Sequence[Measurement]) -> list[Verdict]:
    """Hold every target against every fused contender and thread count of a run.

    A measurement that was refused because it was wrong fails its target. A target that nothing in
    the run speaks about gives no verdict, nor does one against a rival that did not run.
    """
    racers = [m for m in measurements if m.contender not in (*RIVALS, REFERENCE)]
    verdicts = []
    for target in TARGETS:
        if target.rival and not any(m.contender == target.rival for m in measurements):
            continue
        for contender, threads in dict.fromkeys((m.contender, m.threads) for m in racers):
            chosen = [
                m
                for m in racers
                if (m.contender, m.threads) == (contender, threads)
                and target.selects(m)
                and (target.rival is None or m.status == WRONG or m.ratio_to(target.rival))
            ]
            if chosen:
                verdicts.append(_verdict(target, contender, threads, chosen))
    return verdicts


_FIGURES: dict[
    str, tuple[Callable[[Measurement, Target], float | None], Callable[[list[float]], float]]
] = {
    "geomean": (lambda m, target: m.ratio_to(target.rival), geomean),
    "least": (lambda m, target: m.ratio_to(target.rival), min),
    "most saved": (lambda m, target: m.saved_ratio, max),
    "mean peak": (lambda m, target: m.peak_ratio, geomean),
}


def _verdict(
    target: Target, contender: str, threads: int, chosen: Sequence[Measurement]
) -> Verdict:
    quantity, summary = _FIGURES[target.figure]
    values = [value for m in chosen if (value := quantity(m, target)) is not None]
    value = summary(values) if values else None
    refused = sum(m.status == WRONG for m in chosen)
    met = False
    if value is not None and not refused:
        met = value <= target.bound if target.at_most else value >= target.bound
    return Verdict(target, contender, threads, value, refused, met)
