"""One launch for the whole sequence of a layer whose weights fill many multiprocessors.

Experimental: it runs only where ``RNNLM_TRITON_KERNEL=persistent`` asks for it. Forward of LSTM and
GRU (reset after); backward runs stepwise.

The batch falls into groups of ROWS rows, which have nothing to do with each other. In a group,
program p owns units p * UNITS .. of every gate and holds their rows of W_hh through all steps. A
step of a program needs h of all units, so the programs of a group meet between steps: each stores
its part of h in ``output``, says so and waits for the others (:func:`meet`), then reads all of it.
The rest (packed rows, blocks of gates, loads a step ahead) is as in sequence.py.

To meet, all programs of a launch have to be on the device together: the launch is a cooperative
one, which the driver refuses where they are not, and :func:`fits` admits one program for each
multiprocessor. Should a program wait in vain all the same, it gives up after POLLS looks and tells
the others. From then on the launch writes NaN, in ``output`` and all that follows from it.
"""

# mypy: disable-error-code="no-untyped-def"
# The arguments of kernels are pointers, numbers, blocks and constants; none has a type.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cells, stepwise, tiles
from .launch import Limits, Run
from .sequence import (
    apart4,
    beside4,
    biases,
    columns,
    count_steps,
    put,
    span,
    take,
    version,
    weights,
)

# Looks at the counter until a wait is given up. One takes about a microsecond.
POLLS = 1 << 22
# What a program that gives up adds to the counter of its group.
GIVEN_UP = tl.constexpr(1 << 60)
# int64 words between the counters of two groups: a line of the L2 cache.
_COUNTER_STRIDE = 16


@triton.jit
def meet(counter, expected, POLLS: tl.constexpr):
    """Wait until ``expected`` programs in all have come here; False if that is given up.

    What a program stored before, any of them may load afterwards.
    """
    tl.debug_barrier()  # every thread of the program has stored
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    polls = 0
    while (seen < expected) & (polls < POLLS):
        seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        polls += 1
    if seen < expected:
        tl.atomic_add(counter, GIVEN_UP, sem="relaxed", scope="gpu")
    tl.debug_barrier()
    return (seen >= expected) & (seen < GIVEN_UP)


@triton.jit
def previous(output, h0, first, held, rows, hidden, column, own):
    """h of all units before a step: of the step before, which has rows ``first ..``, or h0."""
    offset = rows * hidden + column
    # From the L2 cache, where the other programs' parts are.
    h = tl.load(output + first * hidden + offset, own & (rows < held), 0.0, cache_modifier=".cg")
    start = tl.load(h0 + offset, own & (rows >= held), 0.0)
    return tl.where(rows < held, h, start)


@triton.jit(do_not_specialize=["steps", "batch"])
def lstm_forward_kernel(
    gates_x,
    w_hh,
    b_hh,
    h0,
    c0,
    output,
    h_n,
    c_n,
    cell_states,
    saved,
    counters,
    offsets,
    steps,
    batch,
    hidden,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    PRE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
    POLLS: tl.constexpr,
    STRIDE: tl.constexpr,
):
    start, top = tl.program_id(0) * UNITS, tl.program_id(1) * ROWS
    counters += tl.program_id(1) * STRIDE
    count = count_steps(offsets, top, steps, PACKED)
    rows = top + tl.arange(0, ROWS)[:, None]
    every, every_inside = columns(0, 1, DEPTH, 0, hidden)
    unit, unit_inside = columns(0, 1, UNITS, start, hidden)
    gate, gate_inside = columns(0, 4, UNITS, start, hidden)
    own_every = (rows < batch) & every_inside
    own, own_gates = (rows < batch) & unit_inside, (rows < batch) & gate_inside
    w = weights(w_hh, 0, 4, UNITS, start, DEPTH, hidden)
    b = biases(b_hh, 0, 4, UNITS, start, hidden)
    h = take(h0, 0, batch, rows, hidden, unit, own)
    c = take(c0, 0, batch, rows, hidden, unit, own).to(tl.float32)

    expected = tl.num_programs(0).to(tl.int64)
    first, held = span(offsets, 0, count, batch, REVERSE, PACKED)
    first_1, held_1 = span(offsets, 1, count, batch, REVERSE, PACKED)
    before, held_before = first, held * 0
    x = take(gates_x, first, held, rows, 4 * hidden, gate, own_gates)
    for s in range(count):
        x_1 = take(gates_x, first_1, held_1, rows, 4 * hidden, gate, own_gates)
        first_2, held_2 = span(offsets, s + 2, count, batch, REVERSE, PACKED)
        h_all = previous(output, h0, before, held_before, rows, hidden, every, own_every)

        a = tl.dot(h_all, w, x.to(tl.float32) + b, input_precision=PRECISION)
        a_i, a_f, a_g, a_o = apart4(a, ROWS, UNITS)
        i, f, g, o = cells.lstm_activate(a_i, a_f, a_g, a_o)
        new_h, new_c = cells.lstm_forward(i, f, g, o, c)
        h = tl.where(own & (rows < held), new_h.to(h.dtype), h)
        c = tl.where(own & (rows < held), new_c, c)
        put(output, first, held, rows, hidden, unit, own, h)
        if cell_states is not None:
            put(cell_states, first, held, rows, hidden, unit, own, c)
        if saved is not None:
            if not PRE:
                a = beside4(i, f, g, o, ROWS, UNITS)
            put(saved, first, held, rows, 4 * hidden, gate, own_gates, a)

        if s + 1 < count:
            met = meet(counters, (s + 1) * expected, POLLS)
            h = tl.where(met, h.to(tl.float32), float("nan")).to(h.dtype)
            c = tl.where(met, c, float("nan"))
        before, held_before = first, held
        first, held, first_1, held_1, x = first_1, held_1, first_2, held_2, x_1
    put(h_n, 0, batch, rows, hidden, unit, own, h)
    put(c_n, 0, batch, rows, hidden, unit, own, c)


@triton.jit(do_not_specialize=["steps", "batch"])
def gru_forward_kernel(
    gates_x,
    w_hh,
    b_hh,
    h0,
    output,
    h_n,
    saved,
    counters,
    offsets,
    steps,
    batch,
    hidden,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    PRE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
    POLLS: tl.constexpr,
    STRIDE: tl.constexpr,
):
    # The product has four blocks of columns: r, z, W_hn h + b_hn and, without weights, n's part
    # of x, which the reset gate does not touch.
    start, top = tl.program_id(0) * UNITS, tl.program_id(1) * ROWS
    counters += tl.program_id(1) * STRIDE
    count = count_steps(offsets, top, steps, PACKED)
    rows = top + tl.arange(0, ROWS)[:, None]
    every, every_inside = columns(0, 1, DEPTH, 0, hidden)
    unit, unit_inside = columns(0, 1, UNITS, start, hidden)
    gate, gate_inside = columns(0, 4, UNITS, start, hidden)
    own_every = (rows < batch) & every_inside
    own, own_gates = (rows < batch) & unit_inside, (rows < batch) & gate_inside
    block = (tl.arange(0, 4 * UNITS) // UNITS)[None, :]
    x_column = tl.where(block == 3, gate - hidden, gate)
    own_x = own_gates & (block != 2)
    w = weights(w_hh, 0, 4, UNITS, start, DEPTH, hidden, 3)
    b = biases(b_hh, 0, 4, UNITS, start, hidden, 3)
    h = take(h0, 0, batch, rows, hidden, unit, own).to(tl.float32)

    expected = tl.num_programs(0).to(tl.int64)
    first, held = span(offsets, 0, count, batch, REVERSE, PACKED)
    first_1, held_1 = span(offsets, 1, count, batch, REVERSE, PACKED)
    before, held_before = first, held * 0
    x = take(gates_x, first, held, rows, 3 * hidden, x_column, own_x)
    for s in range(count):
        x_1 = take(gates_x, first_1, held_1, rows, 3 * hidden, x_column, own_x)
        first_2, held_2 = span(offsets, s + 2, count, batch, REVERSE, PACKED)
        h_all = previous(output, h0, before, held_before, rows, hidden, every, own_every)

        a = tl.dot(h_all, w, x.to(tl.float32) + b, input_precision=PRECISION)
        a_r, a_z, hn, x_n = apart4(a, ROWS, UNITS)
        r, z = cells.sigmoid(a_r), cells.sigmoid(a_z)
        a_n = x_n + r * hn
        n = cells.tanh(a_n)
        h = tl.where(own & (rows < held), cells.gru_update(z, n, h), h)
        put(output, first, held, rows, hidden, unit, own, h)
        if saved is not None:
            if PRE:
                kept = beside4(a_r, a_z, a_n, hn, ROWS, UNITS)
            else:
                kept = beside4(r, z, n, hn, ROWS, UNITS)
            put(saved, first, held, rows, 4 * hidden, gate, own_gates, kept)

        if s + 1 < count:
            met = meet(counters, (s + 1) * expected, POLLS)
            h = tl.where(met, h, float("nan"))
        before, held_before = first, held
        first, held, first_1, held_1, x = first_1, held_1, first_2, held_2, x_1
    put(h_n, 0, batch, rows, hidden, unit, own, h)


# --- the calls of backends/triton.py --------------------------------------------------------------

# The largest DEPTH at which the weights of a program stay in the registers of its warps.
_MOST_DEPTH = {torch.float32: 512, torch.bfloat16: 1024, torch.float16: 1024}
# The first version of Triton with launch_cooperative_grid.
_LEAST_VERSION = (3, 3)


def shared_bytes(dtype: torch.dtype, tile: tiles.Tile) -> int:
    """The most shared memory that a program takes: weights on their way to registers, h, blocks of
    a step on their way to another layout."""
    factors = (4 * tile.units + tile.rows) * tile.depth * dtype.itemsize
    return factors + 4 * tile.units * tile.rows * 8


def _obstacle(cell: str, dtype: torch.dtype, batch: int, hidden: int, limits: Limits) -> str:
    """Why forward of a layer does not fit, or ""."""
    if cell == "gru-before":
        return "reset before needs h of all programs twice a step"
    if limits.warp_size != 32 or version() < _LEAST_VERSION:
        return "cooperative launches need an NVIDIA GPU and triton 3.3"
    tile = tiles.choose("persistent", cell, False, dtype, batch, hidden, limits)
    if tile.depth > _MOST_DEPTH[dtype]:
        return f"at most {_MOST_DEPTH[dtype]} units, not {hidden}, leave the weights in registers"
    needed = shared_bytes(dtype, tile)
    if needed > limits.shared_per_block:
        has = limits.shared_per_block >> 10
        return f"needs {needed >> 10} KB of shared memory where a program may have {has} KB"
    programs = triton.cdiv(hidden, tile.units) * triton.cdiv(batch, tile.rows)
    if programs > limits.multiprocessors:
        have = limits.multiprocessors
        return f"{programs} programs have to run at once on {have} multiprocessors"
    return ""


def fits(
    cell: str,
    backward: bool,
    dtype: torch.dtype,
    batch: int | None,
    hidden: int,
    limits: Limits,
) -> tuple[bool, str]:
    """Whether all programs of a layer run at once, and why (not). Backward always can: stepwise."""
    if backward:
        return True, "backward runs stepwise"
    obstacle = _obstacle(cell, dtype, batch or 1, hidden, limits)
    return not obstacle, obstacle or "a program for each multiprocessor, all at once"


def describe(
    cell: str,
    backward: bool,
    dtype: torch.dtype,
    batch: int | None,
    hidden: int,
    limits: Limits,
) -> str:
    """The tile in words."""
    if backward:
        return f"stepwise, {stepwise.describe(cell, True, dtype, batch or 1, hidden, limits)}"
    tile = tiles.choose("persistent", cell, False, dtype, batch or 1, hidden, limits)
    programs, groups = triton.cdiv(hidden, tile.units), triton.cdiv(batch or 1, tile.rows)
    return f"all steps in one launch, {groups} groups of {programs} programs, {tile.warps} warps"


def _launch(
    kernel: Any,
    run: Run,
    cell: str,
    steps: int,
    w_hh: Tensor,
    state: Tensor,
    tensors: tuple[Tensor | None, ...],
) -> None:
    """Launch ``kernel`` on its tensors. ``state`` is [B, H] or [1, B, H]."""
    batch, hidden = state.shape[-2:]
    tile = tiles.choose("persistent", cell, False, w_hh.dtype, batch, hidden, run.limits)
    groups = triton.cdiv(batch, tile.rows)
    counters = w_hh.new_zeros(groups * _COUNTER_STRIDE, dtype=torch.int64)
    packed = run.batch_sizes is not None
    kernel[(triton.cdiv(hidden, tile.units), groups)](
        *tensors,
        counters,
        run.offsets if packed else None,
        steps if run.batch_sizes is None else run.batch_sizes.numel(),
        batch,
        hidden,
        REVERSE=run.reverse,
        PACKED=packed,
        PRE=w_hh.dtype.itemsize == 2,
        PRECISION=run.precision,
        ROWS=tile.rows,
        UNITS=tile.units,
        DEPTH=tile.depth,
        POLLS=POLLS,
        STRIDE=_COUNTER_STRIDE,
        num_warps=tile.warps,
        num_stages=tile.stages,
        launch_cooperative_grid=True,
    )


def lstm_forward(
    run: Run,
    gates_x: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    output: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    cells: Tensor | None,
    saved: Tensor | None,
) -> None:
    """Fill output, h_n, c_n and, where wanted, cells and saved."""
    tensors = (gates_x, w_hh, b_hh, h0, c0, output, h_n, c_n, cells, saved)
    _launch(lstm_forward_kernel, run, "lstm", len(gates_x), w_hh, c0, tensors)


def lstm_backward(
    run: Run,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    w_hh: Tensor,
    c0: Tensor,
    cells: Tensor,
    saved: Tensor,
    dgates: Tensor,
    dh0: Tensor | None,
    dc0: Tensor | None,
) -> None:
    """Fill dgates and, where wanted, dh0 and dc0 (both or neither), step by step."""
    stepwise.lstm_backward(
        *(run, grad_output, grad_h_n, grad_c_n, grad_cells, w_hh, None, c0, cells, saved),
        *(dgates, dh0, dc0, None, None),
    )


def gru_forward(
    run: Run,
    cell: str,
    gates_x: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    h0: Tensor,
    output: Tensor,
    h_n: Tensor,
    saved: Tensor | None,
) -> None:
    """Fill output, h_n and, where wanted, saved."""
    tensors = (gates_x, w_hh, b_hh, h0, output, h_n, saved)
    _launch(gru_forward_kernel, run, cell, len(gates_x), w_hh, h0, tensors)


def gru_backward(
    run: Run,
    cell: str,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    w_hh: Tensor,
    h0: Tensor,
    output: Tensor,
    saved: Tensor,
    dgates: Tensor,
    candidate: Tensor,
    dh0: Tensor | None,
) -> None:
    """Fill dgates, candidate and, where wanted, dh0, step by step."""
    stepwise.gru_backward(
        *(run, cell, grad_output, grad_h_n, w_hh, h0, output, saved, dgates, candidate, dh0)
    )
