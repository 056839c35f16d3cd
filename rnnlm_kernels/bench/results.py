"""What is written: measurements, their ratios and geometric means, as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..files import write_atomically
from .contenders import ONNX, RIVALS, TORCH_COMPILE, rival_of
from .workload import Workload

KIND = "rnnlm-kernels benchmark"
SCHEMA = 1

OK = "ok"
WRONG = "wrong"  # refused: its output or a gradient is not right
FAILED = "failed"
UNSUPPORTED = "unsupported"

# Further rivals, and the field that holds a measurement's ratio to each.
FURTHER_RIVALS = {TORCH_COMPILE: "compile_ratio", ONNX: "onnx_ratio"}


@dataclass
class Measurement:
    """One contender on one workload with one thread count.

    Args:
        status: ``"ok"``, or why there is no time: ``"wrong"`` (not timed because its result is
            not right), ``"unsupported"``, ``"does not compile"``, ``"failed"``.
        note: the reason, or what the correctness check found.
        ratio: rival's median over ours: above 1 we are faster. None for the rival itself.
        saved_ratio: our saved bytes over the rival's: below 1 we keep less. None likewise.
        peak_ratio: our peak memory over the rival's.
        compile_ratio, onnx_ratio: ``torch.compile``'s and ONNX Runtime's median over ours.
        roof_us: the least time that rates measured in the same run allow (:mod:`.roofline`).
        bound: which of them, ``"products"`` or ``"weights"``.
        roofline: ``roof_us`` over the median: 1 is as fast as can be.
    """

    workload: Workload
    threads: int
    contender: str
    status: str = OK
    note: str = ""
    plan: str = ""
    median_us: float | None = None
    q20_us: float | None = None
    q80_us: float | None = None
    samples: int = 0
    us_per_step: float | None = None
    gflops: float | None = None
    saved_bytes: int | None = None
    workspace_bytes: int | None = None
    peak_bytes: int | None = None
    ratio: float | None = None
    saved_ratio: float | None = None
    peak_ratio: float | None = None
    compile_ratio: float | None = None
    onnx_ratio: float | None = None
    roof_us: float | None = None
    bound: str = ""
    roofline: float | None = None

    def ratio_to(self, rival: str | None) -> float | None:
        """A rival's median over ours; None stands for the workload's own rival."""
        return self.ratio if rival is None else getattr(self, FURTHER_RIVALS[rival])

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        data["workload"] = self.workload.to_dict()
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Measurement:
        known = {f.name for f in fields(cls)}
        values = {name: value for name, value in data.items() if name in known}
        return cls(**{**values, "workload": Workload.from_dict(data["workload"])})


@dataclass(frozen=True)
class Group:
    """What a geometric mean is taken over: one contender on workloads of one sort."""

    contender: str
    device: str
    threads: int
    cell: str
    kind: str
    dtype: str
    mode: str


@dataclass
class Results:
    """A benchmark run: the measurements and all that is needed to read or repeat them.

    ``complete`` is False when the run was interrupted, ``left_out`` counts the problems of the grid
    that its time did not reach, ``load_before`` is the load average of the machine when it began.
    """

    created: str
    command: str
    grid: str
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: dict[str, Any] | None
    settings: dict[str, Any]
    load_before: float | None = None
    measurements: list[Measurement] = field(default_factory=list)
    complete: bool = False
    left_out: int = 0

    @property
    def disturbed(self) -> bool:
        """Whether others used the machine when the run began, so that its times mean little."""
        return self.load_before is not None and self.load_before > 0.3 * self.machine["cores"]

    def to_dict(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "measurements"}
        return {
            "kind": KIND,
            "schema": SCHEMA,
            **own,
            "geomeans": [
                {**asdict(group), "ratio": mean, "problems": count}
                for group, (mean, count) in geomeans(self.measurements).items()
            ],
            "further_rivals": [
                {"rival": rival, **asdict(group), "ratio": mean, "problems": count}
                for rival in FURTHER_RIVALS
                for group, (mean, count) in geomeans(self.measurements, rival).items()
            ],
            "measurements": [measurement.to_dict() for measurement in self.measurements],
        }

    @classmethod
    def from_dict(cls, data: Any) -> Results:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: it is something else, or of a newer schema.
        """
        if not isinstance(data, dict) or data.get("kind") != KIND:
            raise ValueError("not a result of `rnnlm-kernels bench`")
        if data.get("schema") != SCHEMA:
            raise ValueError(
                f"the result has schema {data.get('schema')!r}, this version reads {SCHEMA}"
            )
        names = {f.name for f in fields(cls)} - {"measurements"}
        optional = {"load_before", "complete", "left_out"}
        missing = sorted(names - optional - data.keys())
        if missing:
            raise ValueError(f"the result lacks {', '.join(missing)}")
        return cls(
            **{name: data[name] for name in names if name in data},
            measurements=[Measurement.from_dict(item) for item in data["measurements"]],
        )

    def save(self, path: Path | str) -> None:
        """Write JSON atomically: a reader sees the old file or the new one, never half of one."""
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Results:
        """Read a JSON result.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not a result.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        return cls.from_dict(data)

    def save_csv(self, path: Path | str) -> None:
        """Write one line per measurement, atomically."""
        write_atomically(Path(path), to_csv(self.measurements))


def to_csv(measurements: Iterable[Measurement]) -> str:
    """One line per measurement, the workload's fields first."""
    workload_columns = [f.name for f in fields(Workload)]
    own_columns = [f.name for f in fields(Measurement) if f.name != "workload"]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*workload_columns, *own_columns], lineterminator="\n")
    writer.writeheader()
    for measurement in measurements:
        row = measurement.to_dict()
        writer.writerow({**row.pop("workload"), **row})
    return text.getvalue()


def fill_ratios(measurements: Iterable[Measurement]) -> None:
    """Set the ratios of every measurement that has a rival to compare with."""
    measurements = list(measurements)
    by_key = {(m.workload, m.threads, m.contender): m for m in measurements}
    for m in measurements:
        m.ratio = m.saved_ratio = m.peak_ratio = None
        rival_name = rival_of(m.workload)
        rival = by_key.get((m.workload, m.threads, rival_name))
        if rival is None or rival is m:
            continue
        if rival.median_us and m.median_us:
            m.ratio = rival.median_us / m.median_us
        if rival.saved_bytes and m.saved_bytes is not None:
            m.saved_ratio = m.saved_bytes / rival.saved_bytes
        if rival.peak_bytes and m.peak_bytes is not None:
            m.peak_ratio = m.peak_bytes / rival.peak_bytes
    for m in measurements:
        for name, ratio in FURTHER_RIVALS.items():
            further = by_key.get((m.workload, m.threads, name))
            found = None
            if m.contender not in RIVALS and further and further.median_us and m.median_us:
                found = further.median_us / m.median_us
            setattr(m, ratio, found)


def geomean(values: Iterable[float]) -> float:
    """Geometric mean, the mean under which "twice as fast" and "half as fast" cancel.

    Raises:
        ValueError: there are no values, or one is not positive.

    Example:
        >>> geomean([0.5, 2.0])
        1.0
    """
    logs = [math.log(value) for value in values]
    if not logs:
        raise ValueError("the geometric mean of nothing")
    return math.exp(sum(logs) / len(logs))


def group_of(measurement: Measurement) -> Group:
    workload = measurement.workload
    return Group(
        contender=measurement.contender,
        device=workload.device,
        threads=measurement.threads,
        cell=workload.cell,
        kind=workload.kind,
        dtype=workload.dtype,
        mode=workload.mode,
    )


def geomeans(
    measurements: Iterable[Measurement], rival: str | None = None
) -> dict[Group, tuple[float, int]]:
    """Geometric mean of the ratios of each group, and how many problems it spans.

    Args:
        measurements: of any groups.
        rival: one of ``FURTHER_RIVALS``; None for each workload's own.
    """
    ratios: dict[Group, list[float]] = {}
    for measurement in measurements:
        ratio = measurement.ratio_to(rival)
        if ratio is not None:
            ratios.setdefault(group_of(measurement), []).append(ratio)
    return {group: (geomean(values), len(values)) for group, values in ratios.items()}
