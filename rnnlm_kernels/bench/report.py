"""What a reader sees: a markdown page and a plot, made from a result file alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import write_atomically
from .contenders import TORCH_COMPILE, rival_of
from .plot import ratio_plot
from .results import FURTHER_RIVALS, OK, Group, Measurement, Results, geomeans
from .targets import judge
from .workload import SHORT_DTYPES

MIB = 2**20

_FOOTNOTE = (
    "*Ratio*: the rival's median time over ours, above 1 we are faster. The rival is `torch.nn`; "
    "for `gru-before`, which torch lacks, the equations in plain PyTorch. Times are medians of "
    "interleaved samples with their 20 % and 80 % quantiles. *Roofline*: the share of the time "
    "that is needed at the rates measured beside it, of products or of reading the recurrent "
    "weights once per step. Shapes are T,B,I,H. How everything is measured, and the formula behind "
    "GFLOP/s: `docs/benchmarking.md`."
)


@dataclass(frozen=True)
class Written:
    """The files of a report; ``plot`` is None when there was nothing to draw or no matplotlib."""

    markdown: Path
    plot: Path | None


def write(results: Results, folder: Path, name: str) -> Written:
    """Write ``<name>.md`` and ``<name>.png`` into a folder, atomically."""
    plot = ratio_plot(results)
    plot_path = None
    if plot is not None:
        plot_path = folder / f"{name}.png"
        write_atomically(plot_path, plot)
    markdown = folder / f"{name}.md"
    write_atomically(markdown, to_markdown(results, plot=plot_path.name if plot_path else None))
    return Written(markdown, plot_path)


def to_markdown(results: Results, plot: str | None = None) -> str:
    """The report as one markdown page."""
    parts = [f"# Benchmark on {machine_line(results)}", provenance(results)]
    if not results.complete:
        parts.append("**This run was interrupted: what follows is what was measured until then.**")
    if results.left_out:
        parts.append(
            f"**The time given ({results.settings['total_s']:g} s) did not reach the last "
            f"{results.left_out} problems of the grid.**"
        )
    if results.disturbed:
        parts.append(f"**{load_warning(results)}**")
    if plot:
        parts.append(f"![Speed relative to torch.nn, by problem]({plot})")
    parts += [
        _section("Goals of this stage", _targets(results)),
        _section("Geometric means", _geomeans(results)),
        _section("Geometric means against further rivals", _further_rivals(results)),
        _section("What torch.compile made of torch's layer", _compiled(results)),
        _section("Every problem", _problems(results)),
        _section("Memory of training", _memory(results)),
        _section("Not measured", _unmeasured(results)),
    ]
    parts.append(_FOOTNOTE)
    return "\n\n".join(part for part in parts if part) + "\n"


def machine_line(results: Results) -> str:
    """The machine in one line."""
    machine = results.machine
    gpus = machine.get("gpus")
    memory = machine.get("memory_gib")
    parts = [
        *(gpus or []),
        f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_isa']}",
        f"{memory:g} GiB" if memory else "",
    ]
    return ", ".join(part for part in parts if part)


def load_warning(results: Results) -> str:
    return (
        f"The machine was busy when this run began (load {results.load_before:g} on "
        f"{results.machine['cores']} cores): its times say little."
    )


def provenance(results: Results) -> str:
    """Date, versions, commit and command, as a list."""
    commit = "not run from a repository"
    if results.commit:
        changed = " with local changes" if results.commit.get("modified") else ""
        commit = f"{results.commit['commit']}{changed}"
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    features = ", ".join(results.machine.get("features", [])) or "unknown"
    lines = [
        f"- Date: {results.created}",
        f"- Command: `{results.command or 'from Python'}` (grid: {results.grid})",
        f"- Versions: {versions}",
        f"- Commit: {commit}",
        f"- Vector features: {features}",
    ]
    if gpu := results.machine.get("gpu"):
        facts = ", ".join(f"{name} {value}" for name, value in gpu.items())
        lines.append(f"- GPU: {facts}")
    return "\n".join(lines)


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A markdown table whose first ``left`` columns hold words; empty when there are no rows."""
    lines = ["| " + " | ".join(_escape(cell) for cell in row) + " |" for row in rows]
    if not lines:
        return ""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(["| " + " | ".join(header) + " |", "|" + "|".join(rule) + "|", *lines])


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def format_time(us: float | None) -> str:
    """Microseconds, milliseconds or seconds with three digits.

    Example:
        >>> format_time(12.34), format_time(5678.0), format_time(2.5e6)
        ('12.3 us', '5.68 ms', '2.50 s')
    """
    if us is None:
        return "-"
    for bound, scale, unit in ((1e3, 1.0, "us"), (1e6, 1e3, "ms")):
        if us < bound:
            return f"{_three_digits(us / scale)} {unit}"
    return f"{_three_digits(us / 1e6)} s"


def _three_digits(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _with_quantiles(m: Measurement) -> str:
    if m.median_us is None or m.q20_us is None or m.q80_us is None:
        return "-"
    return f"{format_time(m.median_us)} ({format_time(m.q20_us)} to {format_time(m.q80_us)})"


def format_ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def format_roofline(m: Measurement) -> str:
    """The fraction, and what bounds the roof."""
    return "-" if m.roofline is None else f"{m.roofline:.0%} of {m.bound}"


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / MIB:.1f}"


def group_name(group: Group) -> str:
    kind = "" if group.kind == "dense" else f" {group.kind}"
    return f"{group.cell} {SHORT_DTYPES[group.dtype]}{kind} {group.mode}"


def _targets(results: Results) -> str:
    rows = []
    for verdict in judge(results.measurements):
        target = verdict.target
        rows.append(
            (
                target.title,
                verdict.contender,
                str(verdict.threads),
                f"{'at most' if target.at_most else 'at least'} {target.bound:.2f}x",
                format_ratio(verdict.value),
                verdict.word if verdict.met else f"**{verdict.word}**",
            )
        )
    return _table(("Goal", "Backend", "Threads", "Wanted", "Measured", ""), rows, left=2)


def _geomeans(results: Results) -> str:
    rows = [
        (
            group_name(group),
            group.contender,
            str(group.threads),
            str(count),
            format_ratio(mean),
        )
        for group, (mean, count) in geomeans(results.measurements).items()
    ]
    return _table(("Group", "Backend", "Threads", "Problems", "Ratio"), rows, left=2)


def _further_rivals(results: Results) -> str:
    rows = [
        (group_name(group), rival, group.contender, str(group.threads), str(n), format_ratio(mean))
        for rival in FURTHER_RIVALS
        for group, (mean, n) in geomeans(results.measurements, rival).items()
    ]
    return _table(("Group", "Rival", "Backend", "Threads", "Problems", "Ratio"), rows, left=3)


def _compiled(results: Results) -> str:
    """How often the compiled layer ends in an operator that torch's own layer calls as well."""
    seen = Counter(
        (m.workload.cell, m.workload.mode, m.plan if m.status == OK else m.status)
        for m in results.measurements
        if m.contender == TORCH_COMPILE
    )
    rows = [(*key, str(count)) for key, count in seen.items()]
    return _table(("Cell", "Mode", "It runs", "Measurements"), rows, left=3)


def _problems(results: Results) -> str:
    rows = [
        (
            m.workload.label,
            m.workload.mode,
            m.contender + (" (rival)" if m.contender == rival_of(m.workload) else ""),
            str(m.threads),
            _with_quantiles(m),
            _three_digits(m.us_per_step or 0.0),
            _three_digits(m.gflops or 0.0),
            format_roofline(m),
            format_ratio(m.ratio),
        )
        for m in results.measurements
        if m.status == OK
    ]
    header = (
        "Problem",
        "Mode",
        "Backend",
        "Threads",
        "Time",
        "us/step",
        "GFLOP/s",
        "Roofline",
        "Ratio",
    )
    return _table(header, rows, left=3)


def _memory(results: Results) -> str:
    rows = [
        (
            m.workload.label,
            m.contender,
            str(m.threads),
            _mib(m.saved_bytes),
            _mib(m.workspace_bytes),
            _mib(m.peak_bytes),
            format_ratio(m.saved_ratio),
            format_ratio(m.peak_ratio),
        )
        for m in results.measurements
        if m.status == OK and m.workload.mode == "training"
    ]
    header = (
        "Problem",
        "Backend",
        "Threads",
        "Saved MiB",
        "of it workspace",
        "Peak MiB",
        "Saved / rival's",
        "Peak / rival's",
    )
    return _table(header, rows, left=2)


def _unmeasured(results: Results) -> str:
    rows = [
        (m.workload.label, m.workload.mode, m.contender, m.status, m.note)
        for m in results.measurements
        if m.status != OK
    ]
    return _table(("Problem", "Mode", "Backend", "Why", "Detail"), rows, left=5)
