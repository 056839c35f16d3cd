"""One launch for every step of a layer (GRU with reset before: two), forward and backward.

Each step's result is in memory when the next launch begins; that is all the synchronisation there
is, so any size, length and dtype will do. Here are the loops over the steps, steps.py has the
kernels. The loops ask nothing of the device: a CUDA graph captures them with everything else.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import tiles
from .launch import Limits, Run
from .steps import (
    gru_after_step,
    gru_candidate_step,
    gru_reset_step,
    gru_reset_step_backward,
    gru_step_backward,
    lstm_step,
    lstm_step_backward,
    projection_step,
    state_step_backward,
)
from .tiles import Tile


@dataclass(frozen=True)
class _Step:
    """What differs from step to step; in words at the top of steps.py."""

    first: int
    rows: int
    held: int
    held_first: int
    next_rows: int
    next_first: int


def _steps(run: Run, steps: int, batch: int) -> list[_Step]:
    """In the order of forward."""
    counts = [batch] * steps if run.batch_sizes is None else run.batch_sizes.tolist()
    firsts = [0, *accumulate(counts)]
    nothing = (0, 0)
    forward = []
    for t, rows in enumerate(counts):
        earlier = (rows, firsts[t - 1]) if t else nothing
        later = (counts[t + 1], firsts[t + 1]) if t + 1 < steps else nothing
        held, following = (later, earlier) if run.reverse else (earlier, later)
        forward.append(_Step(firsts[t], rows, *held, *following))
    return forward[::-1] if run.reverse else forward


def _launch(
    kernel: Any, tile: Tile, run: Run, rows: int, units: int, *args: Any, **constants: Any
) -> None:
    """One program for every tile of ``rows`` x ``units``."""
    kernel[(-(-rows // tile.rows), -(-units // tile.units))](
        *args,
        **constants,
        ROWS=tile.rows,
        UNITS=tile.units,
        DEPTH=tile.depth,
        PRECISION=run.precision,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def describe(
    cell: str, backward: bool, dtype: torch.dtype, batch: int, hidden: int, limits: Limits
) -> str:
    """The tile of a problem, for people."""
    return str(tiles.choose("stepwise", cell, backward, dtype, batch, hidden, limits))


def _choose(run: Run, cell: str, backward: bool, like: Tensor, hidden: int) -> Tile:
    if run.tile is not None:
        return run.tile
    batch = like.shape[-2]
    return tiles.choose("stepwise", cell, backward, like.dtype, batch, hidden, run.limits)


def _is_16_bit(tensor: Tensor) -> bool:
    return tensor.dtype.itemsize == 2


def lstm_forward(
    run: Run,
    gates_x: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    output: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    cells: Tensor | None,
    saved: Tensor | None,
) -> None:
    """Fill output, h_n, c_n and, where wanted, cells and saved; shapes as in csrc/core/params.h."""
    hidden, width, batch = c0.shape[-1], h0.shape[-1], h0.shape[-2]
    tile = _choose(run, "lstm", False, h0, hidden)
    state = cells
    if state is None:
        state = c0.new_empty((batch, hidden), dtype=torch.float32)
    wide = None if w_hr is None else h0.new_empty((batch, hidden))
    h_out, last = (output, h_n) if wide is None else (wide, None)
    for s in _steps(run, _count(run, output), batch):
        _launch(
            lstm_step,
            tile,
            run,
            s.rows,
            hidden,
            *(gates_x, w_hh, b_hh, h0, c0, output, state, h_out, last, c_n, saved),
            *(s.first, s.rows, s.held, s.held_first, s.next_rows),
            HIDDEN=hidden,
            WIDTH=width,
            CELLS=cells is not None,
            PRE=_is_16_bit(h0),
        )
        if wide is not None:
            _launch(
                projection_step,
                tile,
                run,
                s.rows,
                width,
                *(wide, w_hr, output, h_n, s.first, s.rows, s.next_rows),
                HIDDEN=hidden,
                WIDTH=width,
            )


def lstm_backward(
    run: Run,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    w_hh: Tensor,
    w_hr: Tensor | None,
    c0: Tensor,
    cells: Tensor,
    saved: Tensor,
    dgates: Tensor,
    dh0: Tensor | None,
    dc0: Tensor | None,
    dproj: Tensor | None,
    unprojected: Tensor | None,
) -> None:
    """Fill dgates, dh0 and dc0 (both or neither) and, with a projection, dproj and unprojected."""
    hidden, width, batch = c0.shape[-1], w_hh.shape[-1], c0.shape[-2]
    tile = _choose(run, "lstm", True, c0, hidden)
    carry = c0.new_empty((batch, hidden), dtype=torch.float32)
    gates = {"COLUMNS": width, "STRIDE": 4 * hidden, "A_TERMS": 4 * hidden, "B_TERMS": 0}
    for s in reversed(_steps(run, _count(run, cells), batch)):
        if dproj is None:
            source: tuple[Tensor | None, ...] = (dgates, w_hh, grad_output, grad_h_n)
            followed, terms = (s.next_rows, s.next_first), 4 * hidden
        else:
            _launch(
                state_step_backward,
                tile,
                run,
                s.rows,
                width,
                *(dgates, None, w_hh, None, grad_output, grad_h_n, dproj),
                *(0, s.rows, s.first, s.next_rows, s.next_first),
                **gates,
            )
            source = (dproj, w_hr, None, None)
            followed, terms = (s.rows, s.first), width
        _launch(
            lstm_step_backward,
            tile,
            run,
            s.rows,
            hidden,
            *(*source, grad_c_n, grad_cells, c0, cells, saved, dgates, carry, dc0, unprojected),
            *(*followed, s.first, s.rows, s.held, s.held_first, s.next_rows),
            HIDDEN=hidden,
            TERMS=terms,
            PRE=_is_16_bit(c0),
        )
        if dh0 is not None and s.held < s.rows:
            _launch(
                state_step_backward,
                tile,
                run,
                s.rows - s.held,
                width,
                *(dgates, None, w_hh, None, None, None, dh0),
                *(s.held, s.rows, 0, s.rows, s.first),
                **gates,
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
    """Fill output, h_n and, where wanted, saved, for cell ``"gru"`` or ``"gru-before"``."""
    hidden, batch = h0.shape[-1], h0.shape[-2]
    tile = _choose(run, cell, False, h0, hidden)

    def float32() -> Tensor:
        return h0.new_empty((batch, hidden), dtype=torch.float32)

    state = float32() if _is_16_bit(h0) else None
    constants = {"HIDDEN": hidden, "PRE": _is_16_bit(h0)}
    if cell == "gru-before":
        z_gate, reset_h = float32(), h0.new_empty((batch, hidden))
    for s in _steps(run, _count(run, output), batch):
        weights, at = (gates_x, w_hh, b_hh, h0, output, state), astuple(s)
        if cell == "gru":
            _launch(
                gru_after_step,
                tile,
                run,
                s.rows,
                hidden,
                *(*weights, h_n, saved, *at[:5]),
                **constants,
            )
        else:
            _launch(
                gru_reset_step,
                tile,
                run,
                s.rows,
                hidden,
                *(*weights, saved, z_gate, reset_h, *at[:4]),
                **constants,
            )
            _launch(
                gru_candidate_step,
                tile,
                run,
                s.rows,
                hidden,
                *(*weights, h_n, saved, z_gate, reset_h, *at[:5]),
                **constants,
            )


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
    """Fill dgates, candidate and dh0, for cell ``"gru"`` or ``"gru-before"``."""
    hidden, batch = h0.shape[-1], h0.shape[-2]
    tile, after = _choose(run, cell, True, h0, hidden), cell == "gru"
    carry = h0.new_empty((batch, hidden), dtype=torch.float32)
    constants = {"HIDDEN": hidden, "PRE": _is_16_bit(h0)}
    for s in reversed(_steps(run, _count(run, output), batch)):
        at = astuple(s)
        _launch(
            gru_step_backward,
            tile,
            run,
            s.rows,
            hidden,
            *(w_hh, grad_output, grad_h_n, h0, output, saved, dgates, candidate, carry, *at),
            AFTER=after,
            **constants,
        )
        if not after:
            _launch(
                gru_reset_step_backward,
                tile,
                run,
                s.rows,
                hidden,
                *(w_hh, h0, output, saved, dgates, candidate, carry, *at[:4]),
                **constants,
            )
        if dh0 is not None and s.held < s.rows:
            _launch(
                state_step_backward,
                tile,
                run,
                s.rows - s.held,
                hidden,
                *(dgates, candidate if after else None, w_hh, carry, None, None, dh0),
                *(s.held, s.rows, 0, s.rows, s.first),
                COLUMNS=hidden,
                STRIDE=3 * hidden,
                A_TERMS=2 * hidden,
                B_TERMS=hidden if after else 0,
            )


def _count(run: Run, sequence: Tensor) -> int:
    """Steps of a dense [T, B, *] or packed [N, *] tensor."""
    return len(sequence if run.batch_sizes is None else run.batch_sizes)
