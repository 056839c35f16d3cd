"""Which workloads are run: the default grid (under three minutes), the full one, the one for
further rivals, the one for GPUs, or your own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

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
# So few rows in all that a weight is used but a few times: online training, short windows.
SHORT_SHAPES = ((4, 3, 130, 130), (8, 1, 512, 512))


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
        *custom_grid(SHORT_SHAPES, cells=cells, modes=["training"], device=device),
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
        *custom_grid(SHORT_SHAPES, cells=cells, dtypes=floats, modes=["training"], device=device),
    ]


def rivals_grid(device: str = "cpu") -> list[Workload]:
    """The full grid's inference in float32 of layers that ONNX has as well."""
    chosen = select(full_grid(device), dtypes=["float32"], modes=["inference"], lengths=["dense"])
    return [workload for workload in chosen if not workload.proj_size]


def gpu_grid(device: str = "cuda") -> list[Workload]:
    """Sizes around which kernels for GPUs change their ways, the most telling first.

    A run with a time limit drops the end of it: usual sizes come before small batches, large
    batches and the largest layers, those before CUDA graphs, stacks, packing and short sequences.
    """
    cells, both = ("lstm", "gru"), ("inference", "training")
    halves, precisions = ("bfloat16", "float16"), ("bfloat16", "float16", "tf32", "float32")
    long, short = 512, 64

    def part(
        steps: int,
        hidden: Sequence[int],
        batches: Sequence[int],
        dtypes: Sequence[str] = halves,
        modes: Sequence[str] = both,
        **options: Any,
    ) -> list[Workload]:
        """Sizes outermost, so that wherever the run stops, cells and dtypes have the same ones."""
        return [
            workload
            for size, batch in product(hidden, batches)
            for workload in custom_grid(
                [(steps, batch, size, size)],
                cells=cells,
                dtypes=dtypes,
                modes=modes,
                device=device,
                **options,
            )
        ]

    return [
        *part(long, (512, 1024), (16, 64), precisions),
        *part(long, (256, 768), (16, 64), precisions),
        *part(long, (256, 512, 1024), (1,), precisions),
        *part(long, (512, 1024), (16,), runner="graph"),
        *part(long, (512,), (16,), num_layers=2),
        *part(long, (512,), (16,), bidirectional=True),
        *part(long, (128, 1536, 2048), (16,), precisions),
        *part(long, (512,), (16, 64), lengths=("packed",)),
        *part(long, (512, 1024), (8, 32)),
        *part(short, (512, 1024), (128, 256), ("bfloat16", "float16", "tf32")),
        *part(short, (256, 512, 1024), (1, 16, 64)),
        *part(long, (512, 1024), (16,), modes=("forward",)),
        *part(long, (256,), (16,), runner="graph"),
        *part(long, (1024,), (16,), num_layers=2, bidirectional=True),
        *part(long, (768,), (1,)),
        *part(long, (1536, 2048), (1, 64)),
        *part(short, (128, 2048), (128, 256)),
        *part(1, (512, 1024), (1,), modes=("inference",)),
        *custom_grid(
            [(short, 16, 512, 512)], cells=["gru-before"], dtypes=["bfloat16"], device=device
        ),
    ]


NAMED = {"default": default_grid, "full": full_grid, "rivals": rivals_grid, "gpu": gpu_grid}


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
    runner: str = "eager",
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
            runner=runner,
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
