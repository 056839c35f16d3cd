"""The whole sequence in one kernel, for layers whose recurrent weights fit one program.

A program owns ROWS rows of the batch and all units. It loads W_hh once and walks through the steps
by itself: nothing is exchanged between programs, and what a step costs is a product, the gates and
one pass of h through the program's own memory. Whatever the next step reads is loaded a step ahead,
since a load takes about as long as a step.

A block of one gate is [ROWS, UNITS]: UNITS is the power of two that holds the hidden size, and the
units beyond the hidden size, like the rows beyond the batch, are kept at zero. The gates that
one product makes lie side by side in a block [ROWS, GATES * UNITS]. On tensor cores a thread holds
the same few columns of every UNITS, so that the block comes apart into gates (:func:`apart4`)
without moving a value, and is read, written and multiplied as one piece.

A packed row takes part in the steps before its length, and its state stands still in the others.
This is all that lengths need: a row starts from h0 whenever its first step comes, and what it holds
after the loop is h_n. A program stops after the longest of its rows.

``saved`` is what stepwise.py saves, so that forward and backward need not run the same way.
"""

# mypy: disable-error-code="no-untyped-def"
# The arguments of kernels are pointers, numbers, blocks and constants; none has a type.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cells, tiles
from .launch import Limits, Run

# --- which rows, which steps ----------------------------------------------------------------------


@triton.jit
def count_steps(offsets, row, steps, PACKED: tl.constexpr, CHUNK: tl.constexpr = 256):
    """The number of steps in which ``row``, or any row after it, takes part."""
    count = steps
    if PACKED:
        count = steps * 0
        for start in range(0, steps, CHUNK):
            t = start + tl.arange(0, CHUNK)
            first = tl.load(offsets + t, mask=t < steps, other=0)
            end = tl.load(offsets + t + 1, mask=t < steps, other=0)
            count += tl.sum((end - first > row).to(tl.int32), 0)
    return count


@triton.jit
def span(offsets, s, count, batch, DOWN: tl.constexpr, PACKED: tl.constexpr):
    """Of the s-th step that a program takes: its first row in memory, and how many rows it has.

    ``DOWN``: the last step is taken first. A step beyond the program's last has no rows.
    """
    t = tl.minimum(s, count - 1)
    if DOWN:
        t = count - 1 - t
    if PACKED:
        first = tl.load(offsets + t)
        held = (tl.load(offsets + t + 1) - first).to(tl.int32)
    else:
        first = t.to(tl.int64) * batch
        held = batch
    return first, tl.where(s < count, held, 0)


# --- blocks ---------------------------------------------------------------------------------------


@triton.jit
def columns(gate, GATES: tl.constexpr, UNITS: tl.constexpr, start, hidden, END: tl.constexpr = 4):
    """Of units ``start ..`` of gates ``gate ..``, side by side: each column's place in a row of a
    tensor with END gates, and whether it has one; [1, GATES * UNITS]."""
    n = tl.arange(0, GATES * UNITS)
    gate += n // UNITS
    unit = start + n % UNITS
    return (gate * hidden + unit)[None, :], ((unit < hidden) & (gate < END))[None, :]


@triton.jit
def weights(
    w_hh,
    gate,
    GATES: tl.constexpr,
    UNITS: tl.constexpr,
    start,
    DEPTH: tl.constexpr,
    hidden,
    END: tl.constexpr = 4,
):
    """The rows of W_hh of the same, each a column: [DEPTH, GATES * UNITS], h's units down."""
    row, inside = columns(gate, GATES, UNITS, start, hidden, END)
    unit = tl.arange(0, DEPTH)[:, None]
    return tl.load(w_hh + row * hidden + unit, inside & (unit < hidden), 0.0)


@triton.jit
def biases(
    b_hh, gate, GATES: tl.constexpr, UNITS: tl.constexpr, start, hidden, END: tl.constexpr = 4
):
    """The same of b_hh, float32 [1, GATES * UNITS]; zeros where there is none."""
    b = tl.zeros([GATES * UNITS], tl.float32)
    if b_hh is not None:
        n = tl.arange(0, GATES * UNITS)
        gate += n // UNITS
        unit = start + n % UNITS
        inside = (unit < hidden) & (gate < END)
        b = tl.load(b_hh + gate * hidden + unit, inside, 0.0).to(tl.float32)
    return b[None, :]


@triton.jit
def apart2(block, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """Two gates that lie side by side."""
    return tl.split(tl.permute(tl.reshape(block, [ROWS, 2, UNITS]), (0, 2, 1)))


@triton.jit
def apart4(block, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """Four gates that lie side by side."""
    block = tl.permute(tl.reshape(block, [ROWS, 2, 2, UNITS]), (0, 3, 2, 1))
    left, right = tl.split(block)
    a, b = tl.split(left)
    c, d = tl.split(right)
    return a, b, c, d


@triton.jit
def beside2(a, b, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """What :func:`apart2` takes apart."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), [ROWS, 2 * UNITS])


@triton.jit
def beside4(a, b, c, d, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """What :func:`apart4` takes apart."""
    block = tl.join(tl.join(a, b), tl.join(c, d))
    return tl.reshape(tl.permute(block, (0, 3, 2, 1)), [ROWS, 4 * UNITS])


@triton.jit
def take(tensor, first, held, rows, width, column, own):
    """Of one step, rows that are ``width`` wide: the columns of the program's rows in that step."""
    return tl.load(tensor + first * width + rows * width + column, own & (rows < held), 0.0)


@triton.jit
def take_or_zeros(tensor, first, held, rows, width, column, own):
    """The same of a tensor that may be absent."""
    if tensor is not None:
        block = take(tensor, first, held, rows, width, column, own)
    else:
        block = tl.zeros_like(rows + column).to(tl.float32)
    return block


@triton.jit
def put(tensor, first, held, rows, width, column, own, block):
    """Store what :func:`take` would load."""
    at = tensor + first * width + rows * width + column
    tl.store(at, block.to(tensor.dtype.element_ty), own & (rows < held))


# --- LSTM -----------------------------------------------------------------------------------------


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
):
    top = tl.program_id(0) * ROWS
    count = count_steps(offsets, top, steps, PACKED)
    rows = top + tl.arange(0, ROWS)[:, None]
    unit, unit_inside = columns(0, 1, UNITS, 0, hidden)
    gate, gate_inside = columns(0, 4, UNITS, 0, hidden)
    own, own_gates = (rows < batch) & unit_inside, (rows < batch) & gate_inside
    w = weights(w_hh, 0, 4, UNITS, 0, UNITS, hidden)
    b = biases(b_hh, 0, 4, UNITS, 0, hidden)
    h = take(h0, 0, batch, rows, hidden, unit, own)
    c = take(c0, 0, batch, rows, hidden, unit, own).to(tl.float32)

    first, held = span(offsets, 0, count, batch, REVERSE, PACKED)
    first_1, held_1 = span(offsets, 1, count, batch, REVERSE, PACKED)
    x = take(gates_x, first, held, rows, 4 * hidden, gate, own_gates)
    for s in range(count):
        x_1 = take(gates_x, first_1, held_1, rows, 4 * hidden, gate, own_gates)
        first_2, held_2 = span(offsets, s + 2, count, batch, REVERSE, PACKED)

        a = tl.dot(h, w, x.to(tl.float32) + b, input_precision=PRECISION)
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

        first, held, first_1, held_1, x = first_1, held_1, first_2, held_2, x_1
    put(h_n, 0, batch, rows, hidden, unit, own, h)
    put(c_n, 0, batch, rows, hidden, unit, own, c)


@triton.jit(do_not_specialize=["steps", "batch"])
def lstm_backward_kernel(
    grad_output,
    grad_h_n,
    grad_c_n,
    grad_cells,
    w_hh,
    c0,
    cell_states,
    saved,
    dgates,
    dh0,
    dc0,
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
):
    # Steps are taken in the opposite order: what forward did just before step s is step s + 1, and
    # for a row without that step it is c0.
    DOWN: tl.constexpr = not REVERSE
    top = tl.program_id(0) * ROWS
    count = count_steps(offsets, top, steps, PACKED)
    rows = top + tl.arange(0, ROWS)[:, None]
    unit, unit_inside = columns(0, 1, UNITS, 0, hidden)
    gate, gate_inside = columns(0, 4, UNITS, 0, hidden)
    own, own_gates = (rows < batch) & unit_inside, (rows < batch) & gate_inside
    w = tl.trans(weights(w_hh, 0, 4, UNITS, 0, UNITS, hidden))
    c_first = take(c0, 0, batch, rows, hidden, unit, own).to(tl.float32)
    d_h = take_or_zeros(grad_h_n, 0, batch, rows, hidden, unit, own).to(tl.float32)
    d_c = take_or_zeros(grad_c_n, 0, batch, rows, hidden, unit, own).to(tl.float32)

    first, held = span(offsets, 0, count, batch, DOWN, PACKED)
    first_1, held_1 = span(offsets, 1, count, batch, DOWN, PACKED)
    first_2, held_2 = span(offsets, 2, count, batch, DOWN, PACKED)
    y = take(saved, first, held, rows, 4 * hidden, gate, own_gates)
    c = take(cell_states, first, held, rows, hidden, unit, own)
    c_1 = take(cell_states, first_1, held_1, rows, hidden, unit, own)
    g_h = take_or_zeros(grad_output, first, held, rows, hidden, unit, own)
    g_c = take_or_zeros(grad_cells, first, held, rows, hidden, unit, own)
    for s in range(count):
        y_1 = take(saved, first_1, held_1, rows, 4 * hidden, gate, own_gates)
        c_2 = take(cell_states, first_2, held_2, rows, hidden, unit, own)
        g_h_1 = take_or_zeros(grad_output, first_1, held_1, rows, hidden, unit, own)
        g_c_1 = take_or_zeros(grad_cells, first_1, held_1, rows, hidden, unit, own)
        first_3, held_3 = span(offsets, s + 3, count, batch, DOWN, PACKED)

        i, f, g, o = apart4(y.to(tl.float32), ROWS, UNITS)
        i, f, g, o = cells.lstm_saved(i, f, g, o, PRE)
        c_prev = tl.where(rows < held_1, c_1, c_first)
        d_i, d_f, d_g, d_o, new_d_c = cells.lstm_backward(
            i, f, g, o, c_prev, c, d_h + g_h.to(tl.float32), d_c + g_c
        )
        d = beside4(d_i, d_f, d_g, d_o, ROWS, UNITS).to(w.dtype)
        put(dgates, first, held, rows, 4 * hidden, gate, own_gates, d)
        new_d_h = tl.dot(d, w, input_precision=PRECISION)
        d_h = tl.where(own & (rows < held), new_d_h, d_h)
        d_c = tl.where(own & (rows < held), new_d_c, d_c)

        first, first_1, first_2 = first_1, first_2, first_3
        held, held_1, held_2 = held_1, held_2, held_3
        y, c, c_1, g_h, g_c = y_1, c_1, c_2, g_h_1, g_c_1
    if dh0 is not None:
        put(dh0, 0, batch, rows, hidden, unit, own, d_h)
        put(dc0, 0, batch, rows, hidden, unit, own, d_c)


# --- GRU ------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["steps", "batch"])
def gru_forward_kernel(
    gates_x,
    w_hh,
    b_hh,
    h0,
    output,
    h_n,
    saved,
    offsets,
    steps,
    batch,
    hidden,
    BEFORE: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    PRE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    SAVED: tl.constexpr = 3 if BEFORE else 4
    top = tl.program_id(0) * ROWS
    count = count_steps(offsets, top, steps, PACKED)
    rows = top + tl.arange(0, ROWS)[:, None]
    unit, unit_inside = columns(0, 1, UNITS, 0, hidden)
    pair, pair_inside = columns(0, 2, UNITS, 0, hidden)
    last, _ = columns(2, 1, UNITS, 0, hidden)
    last_pair, _ = columns(2, 2, UNITS, 0, hidden)
    own, own_pair = (rows < batch) & unit_inside, (rows < batch) & pair_inside
    w_rz = weights(w_hh, 0, 2, UNITS, 0, UNITS, hidden)
    w_n = weights(w_hh, 2, 1, UNITS, 0, UNITS, hidden)
    b_rz = biases(b_hh, 0, 2, UNITS, 0, hidden)
    b_n = biases(b_hh, 2, 1, UNITS, 0, hidden)
    h = take(h0, 0, batch, rows, hidden, unit, own).to(tl.float32)

    first, held = span(offsets, 0, count, batch, REVERSE, PACKED)
    first_1, held_1 = span(offsets, 1, count, batch, REVERSE, PACKED)
    x_rz = take(gates_x, first, held, rows, 3 * hidden, pair, own_pair)
    x_n = take(gates_x, first, held, rows, 3 * hidden, last, own)
    for s in range(count):
        x_rz_1 = take(gates_x, first_1, held_1, rows, 3 * hidden, pair, own_pair)
        x_n_1 = take(gates_x, first_1, held_1, rows, 3 * hidden, last, own)
        first_2, held_2 = span(offsets, s + 2, count, batch, REVERSE, PACKED)

        h_in = h.to(w_n.dtype)
        a_rz = tl.dot(h_in, w_rz, x_rz.to(tl.float32) + b_rz, input_precision=PRECISION)
        a_r, a_z = apart2(a_rz, ROWS, UNITS)
        r, z = cells.sigmoid(a_r), cells.sigmoid(a_z)
        x_n_wide = x_n.to(tl.float32)
        if BEFORE:
            u = (r * h).to(w_n.dtype)
            a_n = tl.dot(u, w_n, x_n_wide + b_n, input_precision=PRECISION)
        else:
            hn = tl.dot(h_in, w_n, input_precision=PRECISION) + b_n
            a_n = x_n_wide + r * hn
        n = cells.tanh(a_n)
        h = tl.where(own & (rows < held), cells.gru_update(z, n, h), h)
        put(output, first, held, rows, hidden, unit, own, h)
        if saved is not None:
            kept_rz, kept_n = a_rz, a_n
            if not PRE:
                kept_rz, kept_n = beside2(r, z, ROWS, UNITS), n
            put(saved, first, held, rows, SAVED * hidden, pair, own_pair, kept_rz)
            if BEFORE:
                put(saved, first, held, rows, SAVED * hidden, last, own, kept_n)
            else:
                kept = beside2(kept_n, hn, ROWS, UNITS)
                put(saved, first, held, rows, SAVED * hidden, last_pair, own_pair, kept)

        first, held, first_1, held_1 = first_1, held_1, first_2, held_2
        x_rz, x_n = x_rz_1, x_n_1
    put(h_n, 0, batch, rows, hidden, unit, own, h)


@triton.jit(do_not_specialize=["steps", "batch"])
def gru_backward_kernel(
    grad_output,
    grad_h_n,
    w_hh,
    h0,
    output,
    saved,
    dgates,
    candidate,
    dh0,
    offsets,
    steps,
    batch,
    hidden,
    BEFORE: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    PRE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    # Steps are taken in the opposite order, as in lstm_backward_kernel.
    DOWN: tl.constexpr = not REVERSE
    SAVED: tl.constexpr = 3 if BEFORE else 4
    SECOND: tl.constexpr = 1 if BEFORE else 2  # gates of `saved` after r and z: n, or n and hn
    top = tl.program_id(0) * ROWS
    count = count_steps(offsets, top, steps, PACKED)
    rows = top + tl.arange(0, ROWS)[:, None]
    unit, unit_inside = columns(0, 1, UNITS, 0, hidden)
    pair, pair_inside = columns(0, 2, UNITS, 0, hidden)
    last, _ = columns(2, 1, UNITS, 0, hidden)
    rest, rest_inside = columns(2, SECOND, UNITS, 0, hidden)
    own, own_pair = (rows < batch) & unit_inside, (rows < batch) & pair_inside
    own_rest = (rows < batch) & rest_inside
    w_rz = tl.trans(weights(w_hh, 0, 2, UNITS, 0, UNITS, hidden))
    w_n = tl.trans(weights(w_hh, 2, 1, UNITS, 0, UNITS, hidden))
    h_first = take(h0, 0, batch, rows, hidden, unit, own)
    d_h = take_or_zeros(grad_h_n, 0, batch, rows, hidden, unit, own).to(tl.float32)

    first, held = span(offsets, 0, count, batch, DOWN, PACKED)
    first_1, held_1 = span(offsets, 1, count, batch, DOWN, PACKED)
    first_2, held_2 = span(offsets, 2, count, batch, DOWN, PACKED)
    y_rz = take(saved, first, held, rows, SAVED * hidden, pair, own_pair)
    y_n = take(saved, first, held, rows, SAVED * hidden, rest, own_rest)
    g_h = take_or_zeros(grad_output, first, held, rows, hidden, unit, own)
    h_1 = take(output, first_1, held_1, rows, hidden, unit, own)
    for s in range(count):
        y_rz_1 = take(saved, first_1, held_1, rows, SAVED * hidden, pair, own_pair)
        y_n_1 = take(saved, first_1, held_1, rows, SAVED * hidden, rest, own_rest)
        g_h_1 = take_or_zeros(grad_output, first_1, held_1, rows, hidden, unit, own)
        h_2 = take(output, first_2, held_2, rows, hidden, unit, own)
        first_3, held_3 = span(offsets, s + 3, count, batch, DOWN, PACKED)

        a_r, a_z = apart2(y_rz.to(tl.float32), ROWS, UNITS)
        if BEFORE:
            a_n = y_n.to(tl.float32)
        else:
            a_n, hn = apart2(y_n.to(tl.float32), ROWS, UNITS)
        r, z, n = cells.gru_saved(a_r, a_z, a_n, PRE)
        h_prev = tl.where(rows < held_1, h_1, h_first).to(tl.float32)
        d_z, d_n, direct = cells.gru_update_backward(z, n, h_prev, d_h + g_h.to(tl.float32))
        put(dgates, first, held, rows, 3 * hidden, last, own, d_n)
        if BEFORE:
            put(candidate, first, held, rows, hidden, unit, own, r * h_prev)
            d_rh = tl.dot(d_n.to(w_n.dtype), w_n, input_precision=PRECISION)
            d_r, through_r = cells.gru_reset_before_backward(r, h_prev, d_rh)
            new_d_h = direct + through_r
        else:
            d_r, d_hn = cells.gru_reset_after_backward(r, hn, d_n)
            put(candidate, first, held, rows, hidden, unit, own, d_hn)
            new_d_h = tl.dot(d_hn.to(w_n.dtype), w_n, direct, input_precision=PRECISION)
        d_rz = beside2(d_r, d_z, ROWS, UNITS).to(w_rz.dtype)
        put(dgates, first, held, rows, 3 * hidden, pair, own_pair, d_rz)
        new_d_h = tl.dot(d_rz, w_rz, new_d_h, input_precision=PRECISION)
        d_h = tl.where(own & (rows < held), new_d_h, d_h)

        first, first_1, first_2 = first_1, first_2, first_3
        held, held_1, held_2 = held_1, held_2, held_3
        y_rz, y_n, g_h, h_1 = y_rz_1, y_n_1, g_h_1, h_2
    if dh0 is not None:
        put(dh0, 0, batch, rows, hidden, unit, own, d_h)


# --- the calls of backends/triton.py --------------------------------------------------------------

# The most units of which one program can hold the weights: in the registers of 8 warps, on their
# way through shared memory, with room to spare for a step's gates.
_MOST_UNITS = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}


def _gates(cell: str) -> int:
    return 4 if cell == "lstm" else 3


def version() -> tuple[int, ...]:
    """Triton's, (major, minor)."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def shared_bytes(cell: str, dtype: torch.dtype, rows: int, units: int) -> int:
    """The most shared memory that a program takes: the weights on their way to the registers, and
    blocks of a step on their way to another layout, which older compilers take more ways for."""
    ways = 8 if version() >= (3, 4) else 16
    return (_gates(cell) * units + ways * rows) * units * dtype.itemsize + 512


def fits(
    cell: str,
    backward: bool,
    dtype: torch.dtype,
    batch: int | None,
    hidden: int,
    limits: Limits,
) -> tuple[bool, str]:
    """Whether one program can hold the weights of a layer, and why (not)."""
    if (batch or 1) * 4 * hidden >= 1 << 31:
        return False, "a step has more elements than fit 32 bits"
    most = _MOST_UNITS[dtype]
    if hidden > most:
        name = str(dtype).removeprefix("torch.")
        return False, f"one program holds the {name} weights of {most} units, not of {hidden}"
    tile = tiles.choose("sequence", cell, backward, dtype, batch or 1, hidden, limits)
    needed = shared_bytes(cell, dtype, tile.rows, tile.units)
    if needed > limits.shared_per_block:
        has = limits.shared_per_block >> 10
        return False, f"needs {needed >> 10} KB of shared memory where a program may have {has} KB"
    return True, "one program holds all recurrent weights"


def describe(
    cell: str,
    backward: bool,
    dtype: torch.dtype,
    batch: int | None,
    hidden: int,
    limits: Limits,
) -> str:
    """The tile in words."""
    tile = tiles.choose("sequence", cell, backward, dtype, batch or 1, hidden, limits)
    return f"all steps in one launch, {tile.rows} rows a program, {tile.warps} warps"


def _launch(
    kernel: Any,
    run: Run,
    cell: str,
    backward: bool,
    steps: int,
    w_hh: Tensor,
    state: Tensor,
    tensors: tuple[Tensor | None, ...],
) -> None:
    """Launch ``kernel`` on its tensors. ``state`` is [B, H] or [1, B, H]."""
    batch, hidden = state.shape[-2:]
    tile = tiles.choose("sequence", cell, backward, w_hh.dtype, batch, hidden, run.limits)
    packed = run.batch_sizes is not None
    variant = {} if cell == "lstm" else {"BEFORE": cell == "gru-before"}
    kernel[(triton.cdiv(batch, tile.rows),)](
        *tensors,
        run.offsets if packed else None,
        steps if run.batch_sizes is None else run.batch_sizes.numel(),
        batch,
        hidden,
        **variant,
        REVERSE=run.reverse,
        PACKED=packed,
        PRE=w_hh.dtype.itemsize == 2,
        PRECISION=run.precision,
        ROWS=tile.rows,
        UNITS=tile.units,
        num_warps=tile.warps,
        num_stages=tile.stages,
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
    _launch(lstm_forward_kernel, run, "lstm", False, len(gates_x), w_hh, c0, tensors)


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
    """Fill dgates and, where wanted, dh0 and dc0 (both or neither)."""
    grads = (grad_output, grad_h_n, grad_c_n, grad_cells)
    tensors = (*grads, w_hh, c0, cells, saved, dgates, dh0, dc0)
    _launch(lstm_backward_kernel, run, "lstm", True, len(saved), w_hh, c0, tensors)


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
    """Fill output, h_n and, where wanted, saved. ``cell`` is ``"gru"`` or ``"gru-before"``."""
    tensors = (gates_x, w_hh, b_hh, h0, output, h_n, saved)
    _launch(gru_forward_kernel, run, cell, False, len(gates_x), w_hh, h0, tensors)


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
    """Fill dgates, candidate and, where wanted, dh0."""
    tensors = (grad_output, grad_h_n, w_hh, h0, output, saved, dgates, candidate, dh0)
    _launch(gru_backward_kernel, run, cell, True, len(saved), w_hh, h0, tensors)
