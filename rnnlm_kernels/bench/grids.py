"""Which workloads are run: the default grid (under three minutes), the full one, or your own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

from .workload import CELLS, DTYPES, LENGTHS, MODES, Workload

# (T, B, I, H): a small language model, the shape most kernels are tuned on, one long sequence of
# one row (nothing to batch), long sequences of tiny steps (all overhead) ...
DEFAULT_SHAPES = (
    (35, 20, 200, 200),
    (128, 32, 256, 256),
    (256, 1, 512, 512),
    (1000, 8, 64, 64),
)
# ... and two where one layer does 17 and 80 GFLOP forward: a matrix product's game.
BIG_SHAPES = (
    (64, 16, 1024, 1024),
    (70, 80, 400, 1150),
)
BFLOAT16_SHAPE = (128, 32, 256, 256)
PACKED_SHAPE = (1000, 8, 64, 64)
LATENCY_SHAPES = ((1, 1, 64, 64), (1, 1, 256, 256))


def default_grid(device: str = "cpu") -> list[Workload]:
    """The workloads behind the project's published numbers."""
    cells = ("lstm", "gru")
    return [
        *custom_grid(DEFAULT_SHAPES, cells=cells, device=device),
        *custom_grid([BFLOAT16_SHAPE], cells=cells, dtypes=["bfloat16"], device=device),
        *custom_grid(
            [PACKED_SHAPE], cells=["lstm"], modes=["training"], lengths=["packed"], device=device
        ),
        *custom_grid(LATENCY_SHAPES, cells=cells, modes=["inference"], device=device),
    ]


def full_grid(device: str = "cpu") -> list[Workload]:
    """Every shape, mode and variant worth a table; takes tens of minutes on two cores."""
    cells = ("lstm", "gru")
    floats = ("float32", "bfloat16")
    middle = [BFLOAT16_SHAPE]
    return [
        *custom_grid(
            DEFAULT_SHAPES + BIG_SHAPES, cells=cells, dtypes=floats, modes=MODES, device=device
        ),
        *custom_grid(DEFAULT_SHAPES, cells=["gru-before"], device=device),
        *custom_grid(middle, cells=cells, dtypes=["float64", "float16"], device=device),
        *custom_grid([PACKED_SHAPE, *middle], cells=cells, lengths=["packed"], device=device),
        *custom_grid(middle, cells=cells, num_layers=2, bidirectional=True, device=device),
        *custom_grid(middle, cells=["lstm"], proj_size=128, device=device),
        *custom_grid(
            [*LATENCY_SHAPES, (1, 1, 1024, 1024)],
            cells=cells,
            dtypes=floats,
            modes=["inference"],
            device=device,
        ),
    ]


def custom_grid(
    shapes: Sequence[tuple[int, int, int, int]],
    *,
    cells: Sequence[str] = ("lstm", "gru"),
    dtypes: Sequence[str] = ("float32",),
    modes: Sequence[str] = ("inference", "training"),
    lengths: Sequence[str] = ("dense",),
    num_layers: int = 1,
    bidirectional: bool = False,
    proj_size: int = 0,
    device: str = "cpu",
) -> list[Workload]:
    """Every combination of what is given, cell by cell, the modes of one layer side by side."""
    return [
        Workload(
            cell=cell,
            seq_len=seq_len,
            batch=batch,
            input_size=input_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            bidirectional=bidirectional,
            proj_size=proj_size,
            dtype=dtype,
            device=device,
            lengths=length,
            mode=mode,
        )
        for cell, dtype, length, (seq_len, batch, input_size, hidden_size), mode in product(
            cells, dtypes, lengths, shapes, modes
        )
    ]


def select(
    grid: Iterable[Workload],
    *,
    cells: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    modes: Sequence[str] = (),
    lengths: Sequence[str] = (),
) -> list[Workload]:
    """The workloads of a grid that match every filter; an empty filter matches all.

    Raises:
        ValueError: a filter names something unknown, or nothing is left.
    """
    for name, wanted, known in (
        ("cell", cells, CELLS),
        ("dtype", dtypes, DTYPES),
        ("mode", modes, MODES),
        ("lengths", lengths, LENGTHS),
    ):
        for value in wanted:
            if value not in known:
                raise ValueError(f"{name} should be one of {', '.join(known)}, got {value!r}")
    chosen = [
        w
        for w in grid
        if (not cells or w.cell in cells)
        and (not dtypes or w.dtype in dtypes)
        and (not modes or w.mode in modes)
        and (not lengths or w.lengths in lengths)
    ]
    if not chosen:
        raise ValueError("no problem of the grid matches these filters; see --list, or use --shape")
    return chosen


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """Read ``"T,B,I,H"``.

    Raises:
        ValueError: it is not four positive integers.

    Example:
        >>> parse_shape("35,20,200,200")
        (35, 20, 200, 200)
    """
    parts = text.replace("x", ",").split(",")
    try:
        steps, batch, inputs, hidden = (int(part) for part in parts)
    except ValueError:
        raise ValueError(
            f"a shape is four integers T,B,I,H such as 35,20,200,200; got {text!r}"
        ) from None
    return steps, batch, inputs, hidden
