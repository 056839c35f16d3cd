"""The kernels of stepwise.py: a step of a cell each, forward or backward.

A program owns ``ROWS`` batch rows x ``UNITS`` hidden units. It multiplies its rows of the previous
h with the weights of its units, all gates at once, and goes on with the gates, the state and what
backward will need while the sums are in registers. docs/triton.md reads one line by line.

Rows of different lengths: a step takes part in ``rows`` rows. Of these, the first ``held`` have a
step before this one, which lies at row ``held_first`` of the packed tensors; the others begin here,
from h0 and c0. The first ``next_rows`` have a step after this one, at ``next_first``; the others
end here and write h_n and c_n. In backward the words before and after mean the same steps.

Shapes as in csrc/core/params.h. ``state``, where a cell carries one, is float32: c of the LSTM, h
of 16-bit GRUs (whose ``output`` is rounded). Products read h and gradients as rounded to the dtype
of the tensors. ``None`` stands for a tensor that is absent or not wanted; the code for it compiles
away.
"""

# mypy: disable-error-code="no-untyped-def"
# The arguments of a device function are pointers, blocks or compile-time constants: no types.

from __future__ import annotations

import triton
import triton.language as tl

from . import cells as cell_math

# What differs from step to step. Not specialised: a kernel is compiled once, not for the steps
# whose numbers happen to be 1 or multiples of 16.
_STEP = ["first", "rows", "held", "held_first", "next_rows", "next_first"]

# --- what the kernels share -----------------------------------------------------------------------


@triton.jit
def _tile(rows, HIDDEN: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """This program's rows [ROWS] and units [UNITS], and which pairs exist [ROWS, UNITS]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    return row, unit, (row < rows)[:, None] & (unit < HIDDEN)[None, :]


@triton.jit
def _at(tensor, row, unit, WIDTH: tl.constexpr):
    """Addresses [ROWS, UNITS] in a tensor [*, WIDTH]."""
    return tensor + row[:, None] * WIDTH + unit[None, :]


@triton.jit
def _read(address, mask):
    return tl.load(address, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_terms(address, mask, inside, WHOLE: tl.constexpr):
    """A block of a product's factor; ``inside`` matters where the last block is not whole."""
    if WHOLE:
        block = tl.load(address, mask=mask, other=0.0)
    else:
        block = tl.load(address, mask=mask & inside, other=0.0)
    return block


@triton.jit
def _before(sequence, held_first, held, initial, row, WIDTH: tl.constexpr):
    """Addresses [ROWS] of the rows as the step before left them, or of their initial state."""
    return tl.where(row < held, sequence + (held_first + row) * WIDTH, initial + row * WIDTH)


@triton.jit
def _product(
    acc,
    a,
    a_mask,
    w,
    w_mask,
    TERMS: tl.constexpr,
    STRIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc[r, n] + sum_k a[r][k] w[n][k * STRIDE]`` over TERMS k; a [ROWS] and w [N] point at k=0.

    STRIDE is 1 where n are rows of a weight matrix (forward), its width where they are columns.
    """
    k = tl.arange(0, DEPTH)
    a_block = a[:, None] + k[None, :]
    w_block = w[None, :] + k[:, None] * STRIDE
    for start in range(0, TERMS, DEPTH):
        inside = start + k < TERMS
        x = _load_terms(a_block, a_mask[:, None], inside[None, :], TERMS % DEPTH == 0)
        y = _load_terms(w_block, w_mask[None, :], inside[:, None], TERMS % DEPTH == 0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
        a_block += DEPTH
        w_block += DEPTH * STRIDE
    return acc


@triton.jit
def _gate_rows(w, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, UNITS: tl.constexpr, G: tl.constexpr):
    """Addresses of the weight rows of G gates of this program's units, gates innermost, and masks.

    Interleaved so that one ``tl.dot`` computes all gates of a unit side by side.
    """
    n = tl.arange(0, G * UNITS)
    unit = tl.program_id(1) * UNITS + n // G
    return w + (n % G * HIDDEN + unit).to(tl.int64) * WIDTH, unit < HIDDEN


@triton.jit
def _bias(b_hh, gate, unit, HIDDEN: tl.constexpr):
    """A gate's recurrent bias [1, UNITS], 0 without one."""
    value = tl.zeros_like(unit).to(tl.float32)
    if b_hh is not None:
        value = _read(b_hh + gate * HIDDEN + unit, unit < HIDDEN)
    return value[None, :]


@triton.jit
def _own(state, output, held_first, held, h0, row, unit, valid, HIDDEN: tl.constexpr):
    """h before the step of this program's own units, as exact as it is kept: float32 [R, U].

    ``state`` is [B, H]; None where ``output`` is float32 and holds the same numbers.
    """
    old = (row < held)[:, None]
    if state is None:
        carried = _read(_at(output, held_first + row, unit, HIDDEN), valid & old)
    else:
        carried = _read(_at(state, row, unit, HIDDEN), valid & old)
    return carried + _read(_at(h0, row, unit, HIDDEN), valid & (row >= held)[:, None])


# --- forward --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_STEP)
def lstm_step(
    gates_x,
    w_hh,
    b_hh,
    h0,
    c0,
    output,
    state,
    h_out,
    h_n,
    c_n,
    saved,
    first,
    rows,
    held,
    held_first,
    next_rows,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    CELLS: tl.constexpr,
    PRE: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A step of the LSTM. ``state`` is ``cells`` [N, H] (CELLS) or a workspace [B, H].

    With a projection, ``h_out`` is a workspace [B, H] and h_n is None: :func:`projection_step`
    writes output and h_n. Otherwise h_out is ``output`` itself.
    """
    row, unit, valid = _tile(rows, HIDDEN, ROWS, UNITS)
    h = _before(output, held_first, held, h0, row, WIDTH)
    w, w_mask = _gate_rows(w_hh, HIDDEN, WIDTH, UNITS, 4)
    acc = tl.zeros((ROWS, 4 * UNITS), tl.float32)
    acc = _product(acc, h, row < rows, w, w_mask, WIDTH, 1, DEPTH, PRECISION)
    # [R, 4U] -> [R, U, 2, 2]: splitting the last axis parts even gates from odd ones.
    even, odd = tl.split(tl.reshape(acc, (ROWS, UNITS, 2, 2)))
    a_i, a_g = tl.split(even)
    a_f, a_o = tl.split(odd)

    x = _at(gates_x, first + row, unit, 4 * HIDDEN)
    a_i += _read(x, valid) + _bias(b_hh, 0, unit, HIDDEN)
    a_f += _read(x + HIDDEN, valid) + _bias(b_hh, 1, unit, HIDDEN)
    a_g += _read(x + 2 * HIDDEN, valid) + _bias(b_hh, 2, unit, HIDDEN)
    a_o += _read(x + 3 * HIDDEN, valid) + _bias(b_hh, 3, unit, HIDDEN)
    i, f, g, o = cell_math.lstm_activate(a_i, a_f, a_g, a_o)
    if saved is not None:
        s = _at(saved, first + row, unit, 4 * HIDDEN)
        tl.store(s, a_i if PRE else i, mask=valid)
        tl.store(s + HIDDEN, a_f if PRE else f, mask=valid)
        tl.store(s + 2 * HIDDEN, a_g if PRE else g, mask=valid)
        tl.store(s + 3 * HIDDEN, a_o if PRE else o, mask=valid)

    c = _read(_at(c0, row, unit, HIDDEN), valid & (row >= held)[:, None])
    c += _read(
        _at(state, held_first + row if CELLS else row, unit, HIDDEN), valid & (row < held)[:, None]
    )
    h, c = cell_math.lstm_forward(i, f, g, o, c)
    last = valid & (row >= next_rows)[:, None]
    tl.store(_at(state, first + row if CELLS else row, unit, HIDDEN), c, mask=valid)
    tl.store(_at(c_n, row, unit, HIDDEN), c, mask=last)
    if h_n is None:
        tl.store(_at(h_out, row, unit, HIDDEN), h, mask=valid)
    else:
        tl.store(_at(h_out, first + row, unit, HIDDEN), h, mask=valid)
        tl.store(_at(h_n, row, unit, HIDDEN), h, mask=last)


@triton.jit(do_not_specialize=_STEP)
def projection_step(
    wide,
    w_hr,
    output,
    h_n,
    first,
    rows,
    next_rows,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The LSTM's projection of a step: ``output = wide W_hr^T``. Units are those of the output."""
    row, unit, valid = _tile(rows, WIDTH, ROWS, UNITS)
    acc = _product(
        tl.zeros((ROWS, UNITS), tl.float32),
        wide + row * HIDDEN,
        row < rows,
        w_hr + unit.to(tl.int64) * HIDDEN,
        unit < WIDTH,
        HIDDEN,
        1,
        DEPTH,
        PRECISION,
    )
    tl.store(_at(output, first + row, unit, WIDTH), acc, mask=valid)
    tl.store(_at(h_n, row, unit, WIDTH), acc, mask=valid & (row >= next_rows)[:, None])


@triton.jit(do_not_specialize=_STEP)
def gru_after_step(
    gates_x,
    w_hh,
    b_hh,
    h0,
    output,
    state,
    h_n,
    saved,
    first,
    rows,
    held,
    held_first,
    next_rows,
    HIDDEN: tl.constexpr,
    PRE: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A step of the GRU with reset after. ``saved`` [N, 4H] gets r, z, n and W_hn h + b_hn.

    Three gates are no power of two: one product for r and z, one for n, over the same h.
    """
    row, unit, valid = _tile(rows, HIDDEN, ROWS, UNITS)
    h = _before(output, held_first, held, h0, row, HIDDEN)
    w_rz, rz_mask = _gate_rows(w_hh, HIDDEN, HIDDEN, UNITS, 2)
    w_n = w_hh + (2 * HIDDEN + unit).to(tl.int64) * HIDDEN
    k = tl.arange(0, DEPTH)
    h_block = h[:, None] + k[None, :]
    rz_block = w_rz[None, :] + k[:, None]
    n_block = w_n[None, :] + k[:, None]
    rz = tl.zeros((ROWS, 2 * UNITS), tl.float32)
    hn = tl.zeros((ROWS, UNITS), tl.float32)
    for start in range(0, HIDDEN, DEPTH):
        inside = start + k < HIDDEN
        x = _load_terms(h_block, (row < rows)[:, None], inside[None, :], HIDDEN % DEPTH == 0)
        y = _load_terms(rz_block, rz_mask[None, :], inside[:, None], HIDDEN % DEPTH == 0)
        rz = tl.dot(x, y, rz, input_precision=PRECISION)
        y = _load_terms(n_block, (unit < HIDDEN)[None, :], inside[:, None], HIDDEN % DEPTH == 0)
        hn = tl.dot(x, y, hn, input_precision=PRECISION)
        h_block += DEPTH
        rz_block += DEPTH
        n_block += DEPTH
    a_r, a_z = tl.split(tl.reshape(rz, (ROWS, UNITS, 2)))

    x = _at(gates_x, first + row, unit, 3 * HIDDEN)
    a_r += _read(x, valid) + _bias(b_hh, 0, unit, HIDDEN)
    a_z += _read(x + HIDDEN, valid) + _bias(b_hh, 1, unit, HIDDEN)
    hn += _bias(b_hh, 2, unit, HIDDEN)
    r = cell_math.sigmoid(a_r)
    z = cell_math.sigmoid(a_z)
    a_n = _read(x + 2 * HIDDEN, valid) + r * hn
    n = cell_math.tanh(a_n)
    if saved is not None:
        s = _at(saved, first + row, unit, 4 * HIDDEN)
        tl.store(s, a_r if PRE else r, mask=valid)
        tl.store(s + HIDDEN, a_z if PRE else z, mask=valid)
        tl.store(s + 2 * HIDDEN, a_n if PRE else n, mask=valid)
        tl.store(s + 3 * HIDDEN, hn, mask=valid)

    own = _own(state, output, held_first, held, h0, row, unit, valid, HIDDEN)
    own = cell_math.gru_update(z, n, own)
    if state is not None:
        tl.store(_at(state, row, unit, HIDDEN), own, mask=valid)
    tl.store(_at(output, first + row, unit, HIDDEN), own, mask=valid)
    tl.store(_at(h_n, row, unit, HIDDEN), own, mask=valid & (row >= next_rows)[:, None])


@triton.jit(do_not_specialize=_STEP)
def gru_reset_step(
    gates_x,
    w_hh,
    b_hh,
    h0,
    output,
    state,
    saved,
    z_gate,
    reset_h,
    first,
    rows,
    held,
    held_first,
    HIDDEN: tl.constexpr,
    PRE: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """First half of a step of the GRU with reset before: z and r * h, for the second half.

    ``z_gate`` [B, H] is float32, ``reset_h`` [B, H] what W_hn will multiply, in the tensors' dtype.
    """
    row, unit, valid = _tile(rows, HIDDEN, ROWS, UNITS)
    h = _before(output, held_first, held, h0, row, HIDDEN)
    w, w_mask = _gate_rows(w_hh, HIDDEN, HIDDEN, UNITS, 2)
    acc = tl.zeros((ROWS, 2 * UNITS), tl.float32)
    acc = _product(acc, h, row < rows, w, w_mask, HIDDEN, 1, DEPTH, PRECISION)
    a_r, a_z = tl.split(tl.reshape(acc, (ROWS, UNITS, 2)))

    x = _at(gates_x, first + row, unit, 3 * HIDDEN)
    a_r += _read(x, valid) + _bias(b_hh, 0, unit, HIDDEN)
    a_z += _read(x + HIDDEN, valid) + _bias(b_hh, 1, unit, HIDDEN)
    r = cell_math.sigmoid(a_r)
    z = cell_math.sigmoid(a_z)
    if saved is not None:
        s = _at(saved, first + row, unit, 3 * HIDDEN)
        tl.store(s, a_r if PRE else r, mask=valid)
        tl.store(s + HIDDEN, a_z if PRE else z, mask=valid)
    own = _own(state, output, held_first, held, h0, row, unit, valid, HIDDEN)
    tl.store(_at(z_gate, row, unit, HIDDEN), z, mask=valid)
    tl.store(_at(reset_h, row, unit, HIDDEN), r * own, mask=valid)


@triton.jit(do_not_specialize=_STEP)
def gru_candidate_step(
    gates_x,
    w_hh,
    b_hh,
    h0,
    output,
    state,
    h_n,
    saved,
    z_gate,
    reset_h,
    first,
    rows,
    held,
    held_first,
    next_rows,
    HIDDEN: tl.constexpr,
    PRE: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Second half of a step of the GRU with reset before: the candidate n and the new h."""
    row, unit, valid = _tile(rows, HIDDEN, ROWS, UNITS)
    a_n = _product(
        tl.zeros((ROWS, UNITS), tl.float32),
        reset_h + row * HIDDEN,
        row < rows,
        w_hh + (2 * HIDDEN + unit).to(tl.int64) * HIDDEN,
        unit < HIDDEN,
        HIDDEN,
        1,
        DEPTH,
        PRECISION,
    )
    a_n += _read(_at(gates_x + 2 * HIDDEN, first + row, unit, 3 * HIDDEN), valid)
    a_n += _bias(b_hh, 2, unit, HIDDEN)
    n = cell_math.tanh(a_n)
    if saved is not None:
        s = _at(saved + 2 * HIDDEN, first + row, unit, 3 * HIDDEN)
        tl.store(s, a_n if PRE else n, mask=valid)

    z = _read(_at(z_gate, row, unit, HIDDEN), valid)
    own = _own(state, output, held_first, held, h0, row, unit, valid, HIDDEN)
    own = cell_math.gru_update(z, n, own)
    if state is not None:
        tl.store(_at(state, row, unit, HIDDEN), own, mask=valid)
    tl.store(_at(output, first + row, unit, HIDDEN), own, mask=valid)
    tl.store(_at(h_n, row, unit, HIDDEN), own, mask=valid & (row >= next_rows)[:, None])


# --- backward -------------------------------------------------------------------------------------


@triton.jit
def _handed_back(
    acc,
    a,
    b,
    w,
    row,
    mask,
    unit,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    A_TERMS: tl.constexpr,
    B_TERMS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a step's gradients of its gates hand to the h before it: ``[a b] W`` of rows ``row``.

    a [*, STRIDE] holds the factors of the first A_TERMS rows of W [*, COLUMNS], b [*, B_TERMS]
    those of the next; the GRU with reset after has its gates' gradients in two tensors.
    """
    w_mask = unit < COLUMNS
    acc = _product(
        acc, a + row * STRIDE, mask, w + unit, w_mask, A_TERMS, COLUMNS, DEPTH, PRECISION
    )
    if b is not None:
        w += A_TERMS * COLUMNS
        acc = _product(
            acc, b + row * B_TERMS, mask, w + unit, w_mask, B_TERMS, COLUMNS, DEPTH, PRECISION
        )
    return acc


@triton.jit
def _grad_of_result(
    grad_output, grad_last, first, next_rows, row, unit, valid, WIDTH: tl.constexpr
):
    """The loss's own gradients of a step's h or c: of every step's, and of a row's last one."""
    total = tl.zeros(valid.shape, tl.float32)
    if grad_output is not None:
        total += _read(_at(grad_output, first + row, unit, WIDTH), valid)
    if grad_last is not None:
        total += _read(_at(grad_last, row, unit, WIDTH), valid & (row >= next_rows)[:, None])
    return total


@triton.jit(do_not_specialize=["begin", "end", *_STEP])
def state_step_backward(
    a,
    b,
    w,
    carry,
    grad_output,
    grad_last,
    out,
    begin,
    end,
    first,
    next_rows,
    next_first,
    COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    A_TERMS: tl.constexpr,
    B_TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of a step's h for rows begin..end, where nothing else follows from it: dh0 of
    the rows that begin with the step after it, and ``dproj`` of an LSTM with a projection.

    ``out[first + row] = [a b] W (rows < next_rows) + carry + grad_output + grad_last``
    """
    row, unit, valid = _tile(end - begin, COLUMNS, ROWS, UNITS)
    row += begin
    followed = row < next_rows
    acc = tl.zeros((ROWS, UNITS), tl.float32)
    acc = _handed_back(
        acc,
        a,
        b,
        w,
        next_first + row,
        followed,
        unit,
        COLUMNS,
        STRIDE,
        A_TERMS,
        B_TERMS,
        DEPTH,
        PRECISION,
    )
    d_h = tl.where(followed[:, None], acc, 0.0)
    d_h += _grad_of_result(grad_output, grad_last, first, next_rows, row, unit, valid, COLUMNS)
    if carry is not None:
        d_h += _read(_at(carry, row, unit, COLUMNS), valid)
    tl.store(_at(out, first + row, unit, COLUMNS), d_h, mask=valid)


@triton.jit(do_not_specialize=["a_rows", "a_first", *_STEP])
def lstm_step_backward(
    a,
    w,
    grad_output,
    grad_h_n,
    grad_c_n,
    grad_cells,
    c0,
    cells,
    saved,
    dgates,
    carry,
    dc0,
    unprojected,
    a_rows,
    a_first,
    first,
    rows,
    held,
    held_first,
    next_rows,
    HIDDEN: tl.constexpr,
    TERMS: tl.constexpr,
    PRE: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A step of the LSTM. ``carry`` [B, H] is dc as the step after this one handed it back.

    The gradient of h comes through ``a w``: the next step's ``dgates`` and W_hh [4H, H] or, with a
    projection, this step's ``dproj`` and W_hr [R, H]. TERMS is the number of w's rows.
    """
    row, unit, valid = _tile(rows, HIDDEN, ROWS, UNITS)
    followed = row < a_rows
    acc = tl.zeros((ROWS, UNITS), tl.float32)
    acc = _handed_back(
        acc,
        a,
        None,
        w,
        a_first + row,
        followed,
        unit,
        HIDDEN,
        TERMS,
        TERMS,
        0,
        DEPTH,
        PRECISION,
    )
    d_h = tl.where(followed[:, None], acc, 0.0)
    d_h += _grad_of_result(grad_output, grad_h_n, first, next_rows, row, unit, valid, HIDDEN)
    d_c = _read(_at(carry, row, unit, HIDDEN), valid & (row < next_rows)[:, None])
    d_c += _grad_of_result(grad_cells, grad_c_n, first, next_rows, row, unit, valid, HIDDEN)

    s = _at(saved, first + row, unit, 4 * HIDDEN)
    i, f, g, o = cell_math.lstm_saved(
        _read(s, valid),
        _read(s + HIDDEN, valid),
        _read(s + 2 * HIDDEN, valid),
        _read(s + 3 * HIDDEN, valid),
        PRE,
    )
    begins = valid & (row >= held)[:, None]
    c = _read(_at(cells, first + row, unit, HIDDEN), valid)
    c_prev = _read(_at(cells, held_first + row, unit, HIDDEN), valid & (row < held)[:, None])
    c_prev += _read(_at(c0, row, unit, HIDDEN), begins)
    d_i, d_f, d_g, d_o, d_c = cell_math.lstm_backward(i, f, g, o, c_prev, c, d_h, d_c)

    d = _at(dgates, first + row, unit, 4 * HIDDEN)
    tl.store(d, d_i, mask=valid)
    tl.store(d + HIDDEN, d_f, mask=valid)
    tl.store(d + 2 * HIDDEN, d_g, mask=valid)
    tl.store(d + 3 * HIDDEN, d_o, mask=valid)
    tl.store(_at(carry, row, unit, HIDDEN), d_c, mask=valid)
    if dc0 is not None:
        tl.store(_at(dc0, row, unit, HIDDEN), d_c, mask=begins)
    if unprojected is not None:
        h = o * cell_math.tanh(c)
        tl.store(_at(unprojected, first + row, unit, HIDDEN), h, mask=valid)


@triton.jit(do_not_specialize=_STEP)
def gru_step_backward(
    w_hh,
    grad_output,
    grad_h_n,
    h0,
    output,
    saved,
    dgates,
    candidate,
    carry,
    first,
    rows,
    held,
    held_first,
    next_rows,
    next_first,
    HIDDEN: tl.constexpr,
    AFTER: tl.constexpr,
    PRE: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A step of the GRU; with reset before its first half, up to the gradients of z and n.

    ``carry`` [B, H] is what of dh the step after this one handed back without a product over all
    units, and is left so for the step before.
    """
    row, unit, valid = _tile(rows, HIDDEN, ROWS, UNITS)
    followed = row < next_rows
    acc = tl.zeros((ROWS, UNITS), tl.float32)
    acc = _handed_back(
        acc,
        dgates,
        candidate if AFTER else None,
        w_hh,
        next_first + row,
        followed,
        unit,
        HIDDEN,
        3 * HIDDEN,
        2 * HIDDEN,
        HIDDEN,
        DEPTH,
        PRECISION,
    )
    d_h = tl.where(followed[:, None], acc, 0.0)
    d_h += _read(_at(carry, row, unit, HIDDEN), valid & followed[:, None])
    d_h += _grad_of_result(grad_output, grad_h_n, first, next_rows, row, unit, valid, HIDDEN)

    s = _at(saved, first + row, unit, (4 if AFTER else 3) * HIDDEN)
    r, z, n = cell_math.gru_saved(
        _read(s, valid), _read(s + HIDDEN, valid), _read(s + 2 * HIDDEN, valid), PRE
    )
    h_prev = tl.load(
        _before(output, held_first, held, h0, row, HIDDEN)[:, None] + unit[None, :],
        mask=valid,
        other=0.0,
    ).to(tl.float32)
    d_z, d_n, d_h = cell_math.gru_update_backward(z, n, h_prev, d_h)
    d = _at(dgates, first + row, unit, 3 * HIDDEN)
    tl.store(d + HIDDEN, d_z, mask=valid)
    tl.store(d + 2 * HIDDEN, d_n, mask=valid)
    tl.store(_at(carry, row, unit, HIDDEN), d_h, mask=valid)
    if AFTER:
        d_r, d_hn = cell_math.gru_reset_after_backward(r, _read(s + 3 * HIDDEN, valid), d_n)
        tl.store(d, d_r, mask=valid)
        tl.store(_at(candidate, first + row, unit, HIDDEN), d_hn, mask=valid)


@triton.jit(do_not_specialize=_STEP)
def gru_reset_step_backward(
    w_hh,
    h0,
    output,
    saved,
    dgates,
    candidate,
    carry,
    first,
    rows,
    held,
    held_first,
    HIDDEN: tl.constexpr,
    PRE: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Second half of a step of the GRU with reset before: through W_hn to r and to ``r * h``."""
    row, unit, valid = _tile(rows, HIDDEN, ROWS, UNITS)
    w_n = w_hh + 2 * HIDDEN * HIDDEN
    d_rh = _handed_back(
        tl.zeros((ROWS, UNITS), tl.float32),
        dgates + 2 * HIDDEN,
        None,
        w_n,
        first + row,
        row < rows,
        unit,
        HIDDEN,
        3 * HIDDEN,
        HIDDEN,
        0,
        DEPTH,
        PRECISION,
    )
    r = _read(_at(saved, first + row, unit, 3 * HIDDEN), valid)
    if PRE:
        r = cell_math.sigmoid(r)
    h_prev = tl.load(
        _before(output, held_first, held, h0, row, HIDDEN)[:, None] + unit[None, :],
        mask=valid,
        other=0.0,
    ).to(tl.float32)
    d_r, direct = cell_math.gru_reset_before_backward(r, h_prev, d_rh)
    tl.store(_at(dgates, first + row, unit, 3 * HIDDEN), d_r, mask=valid)
    tl.store(_at(candidate, first + row, unit, HIDDEN), r * h_prev, mask=valid)
    kept = _at(carry, row, unit, HIDDEN)
    tl.store(kept, _read(kept, valid) + direct, mask=valid)
