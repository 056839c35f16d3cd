"""The picture of a result: how many times faster than the rival, problem by problem; for the many
problems of a GPU, over the size of the layer."""

from __future__ import annotations

import io
import logging
from typing import Any

from .contenders import REFERENCE, RIVALS
from .results import Measurement, Results
from .workload import DTYPES, MODES, SHORT_DTYPES

log = logging.getLogger("rnnlm_kernels")

_COLOURS = {"lstm": "#2f6db3", "gru": "#d9822b", "gru-before": "#3a8f5c"}
_INK = "#333333"
_ROW_INCHES = 0.25
_WIDTH_INCHES = 9.0
_DPI = 130


def headline_contender(results: Results) -> str | None:
    """Whose ratios are drawn: the first fused backend, else whoever has any."""
    names = list(dict.fromkeys(m.contender for m in results.measurements if m.ratio is not None))
    fused = [n for n in names if n not in (*RIVALS, REFERENCE)]
    return next(iter(fused or names), None)


def ratio_plot(results: Results) -> bytes | None:
    """Draw the ratios as a PNG.

    One column per mode, one row of panels per thread count; bars start at 1.0, to the right we are
    faster. The axis is logarithmic, so that twice as fast and half as fast look alike. Of a GPU:
    one panel per cell, mode and dtype, in it a line per batch size over the hidden size.

    Returns:
        The PNG, or None when nothing has a ratio or matplotlib is not installed.
    """
    contender = headline_contender(results)
    drawn = [m for m in results.measurements if m.contender == contender and m.ratio is not None]
    if not drawn:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("no plot without matplotlib; pip install 'rnnlm-kernels[bench]' brings it")
        return None

    plain = [m for m in drawn if m.workload.on_cuda and _is_plain(m)]
    if plain:
        return _png(FigureCanvasAgg, _size_figure(Figure, plain, results, str(contender)))
    modes = [mode for mode in MODES if any(m.workload.mode == mode for m in drawn)]
    threads = sorted({m.threads for m in drawn})
    labels = list(dict.fromkeys(m.workload.label for m in drawn))
    figure = Figure(
        figsize=(_WIDTH_INCHES, 1.2 + len(threads) * (0.6 + _ROW_INCHES * len(labels))),
        dpi=_DPI,
        layout="constrained",
    )
    axes = figure.subplots(len(threads), len(modes), squeeze=False, sharex=True, sharey=True)
    low, high = _limits([m.ratio for m in drawn if m.ratio is not None])
    for row, count in enumerate(threads):
        for column, mode in enumerate(modes):
            axis = axes[row][column]
            shown = [m for m in drawn if m.threads == count and m.workload.mode == mode]
            _panel(axis, shown, labels)
            title = mode if len(threads) == 1 else f"{mode}, {_plural(count, 'thread')}"
            axis.set_title(title, fontsize=10, color=_INK, loc="left", fontweight="bold")
    axes[0][0].set_xlim(low, high)
    axes[0][0].set_ylim(len(labels) - 0.4, -0.6)
    axes[0][0].set_yticks(range(len(labels)), labels)
    figure.suptitle(_title(results, str(contender), threads), fontsize=9.5, color=_INK)
    figure.supxlabel("times faster than the rival (log scale)", fontsize=9, color=_INK)
    _legend(figure, drawn)
    return _png(FigureCanvasAgg, figure)


def _png(canvas: Any, figure: Any) -> bytes:
    image = io.BytesIO()
    canvas(figure).print_png(image)
    return image.getvalue()


def _is_plain(m: Measurement) -> bool:
    """One layer in one direction, called as it is: what a line over sizes can be drawn through."""
    w = m.workload
    return (
        w.kind == "dense"
        and w.num_layers == w.num_directions == 1
        and w.cell in ("lstm", "gru")
        and w.mode in ("inference", "training")
    )


def _size_figure(
    make: Any, measurements: list[Measurement], results: Results, contender: str
) -> Any:
    dtypes = [d for d in DTYPES if any(m.workload.dtype == d for m in measurements)]
    columns = [
        (cell, mode)
        for cell in ("lstm", "gru")
        for mode in MODES
        if any((m.workload.cell, m.workload.mode) == (cell, mode) for m in measurements)
    ]
    figure = make(
        figsize=(1.0 + 2.6 * len(columns), 1.4 + 1.9 * len(dtypes)), dpi=_DPI, layout="constrained"
    )
    axes = figure.subplots(len(dtypes), len(columns), squeeze=False, sharex=True, sharey=True)
    lines = sorted({(m.workload.batch, m.workload.seq_len) for m in measurements})
    shades = {batch: i for i, batch in enumerate(sorted({batch for batch, _ in lines}))}
    longest = max(steps for _, steps in lines)
    handles = {}
    for row, dtype in enumerate(dtypes):
        for column, (cell, mode) in enumerate(columns):
            axis = axes[row][column]
            for batch, steps in lines:
                points = sorted(
                    (m.workload.hidden_size, m.ratio or 1.0)
                    for m in measurements
                    if (m.workload.dtype, m.workload.cell, m.workload.mode) == (dtype, cell, mode)
                    and (m.workload.batch, m.workload.seq_len) == (batch, steps)
                )
                if points:
                    (handles[batch, steps],) = axis.plot(
                        *zip(*points, strict=True),
                        marker="o",
                        markersize=3,
                        linewidth=1.2,
                        linestyle="-" if steps == longest else "--",
                        color=_shade(shades[batch] / max(1, len(shades) - 1)),
                        label=f"B={batch}, T={steps}",
                    )
            axis.axhline(1.0, color=_INK, linewidth=1.0)
            axis.set_title(f"{cell} {SHORT_DTYPES[dtype]} {mode}", fontsize=8, color=_INK)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
            axis.tick_params(labelsize=7, colors=_INK)
            axis.grid(color="#dddddd", linewidth=0.6)
    figure.suptitle(
        f"rnnlm-kernels ({contender}) against torch.nn {results.versions.get('torch', '?')}\n"
        f"{', '.join(results.machine.get('gpus', [])[:1])}",
        fontsize=9.5,
        color=_INK,
    )
    figure.supxlabel("hidden size", fontsize=9, color=_INK)
    figure.supylabel("times faster than the rival", fontsize=9, color=_INK)
    figure.legend(
        handles=[handles[key] for key in sorted(handles)],
        loc="outside right upper",
        frameon=False,
        fontsize=7,
    )
    return figure


def _shade(position: float) -> tuple[float, float, float]:
    """From light to dark blue: the larger the batch, the darker."""
    light, dark = (0.62, 0.79, 0.93), (0.05, 0.16, 0.38)
    return tuple(a + (b - a) * position for a, b in zip(light, dark, strict=True))  # type: ignore[return-value]


def _panel(axis: Any, measurements: list[Measurement], labels: list[str]) -> None:
    """Bars of one mode and thread count; a problem that has none leaves its row empty."""
    for m in measurements:
        position = labels.index(m.workload.label)
        ratio = m.ratio or 1.0
        axis.barh(
            position,
            ratio - 1.0,
            left=1.0,
            height=0.68,
            color=_COLOURS[m.workload.cell],
            alpha=1.0 if ratio >= 1.0 else 0.45,
        )
        axis.annotate(
            f"{ratio:.2f}x",
            (max(ratio, 1.0), position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=_INK,
        )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.tick_params(axis="x", labelsize=8, colors=_INK)
    axis.tick_params(axis="y", labelsize=8, length=0, colors=_INK)
    axis.axvline(1.0, color=_INK, linewidth=1.0)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _limits(ratios: list[float]) -> tuple[float, float]:
    """Room for every bar, its number, and at least a factor of two on the right."""
    return min(0.5, 0.8 * min(ratios)), max(2.0, max(ratios)) * 1.9


def _legend(figure: Any, drawn: list[Measurement]) -> None:
    from matplotlib.patches import Patch

    cells = [cell for cell in _COLOURS if any(m.workload.cell == cell for m in drawn)]
    if len(cells) > 1:
        handles = [Patch(color=_COLOURS[cell], label=cell) for cell in cells]
        figure.legend(
            handles=handles, loc="outside lower right", ncols=len(cells), frameon=False, fontsize=8
        )


def _title(results: Results, contender: str, threads: list[int]) -> str:
    counts = "/".join(map(str, threads))
    return (
        f"rnnlm-kernels ({contender}) against torch.nn {results.versions.get('torch', '?')}\n"
        f"{results.machine['cpu']}, {results.machine['cores']} cores, "
        f"{counts} thread{'' if threads == [1] else 's'}"
    )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
