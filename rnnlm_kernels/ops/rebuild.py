"""What forward would have saved for backward, from x and the h of every step: a few GEMMs.

Once every h is known nothing here is sequential. With ``memory="low"`` a layer keeps no gates
between forward and backward, and backward starts with this; so does backward of a layer whose
forward did not expect one (traced, exported). The result has the layout that every backend saves
in (csrc/device/cell.h): activated gates, for 16-bit dtypes their pre-activations.

Everything is computed inside the one tensor that is returned. Besides it there are at most two of
the size of h, so that the peak of a backward pass, which comes when the gradients of the gates
join their values, is what it is without rebuilding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import state_dtype
from .products import previous_hidden


def lstm_saved(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    output: Tensor,
) -> Tensor:
    """The gates i, f, g, o of an LSTM layer, ``[T, B, 4H]`` or packed ``[N, 4H]``.

    Arguments are those of the operator and its ``output``, the (projected) h of every step.
    """
    hidden = w_hh.shape[0] // 4
    saved = x.new_empty((*x.shape[:-1], 4 * hidden))
    gates = saved.flatten(0, -2)
    _project(x, w_ih, _sum(b_ih, b_hh), gates)
    for rows, h in previous_hidden(output, h0, batch_sizes, reverse):
        gates[rows].addmm_(h, w_hh.t())
    if _saves_activated(x):
        gates[:, : 2 * hidden].sigmoid_()
        gates[:, 2 * hidden : 3 * hidden].tanh_()
        gates[:, 3 * hidden :].sigmoid_()
    return saved


def gru_saved(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    batch_sizes: Tensor | None,
    reset: str,
    reverse: bool,
    output: Tensor,
) -> Tensor:
    """r, z, n and with reset-after ``W_hn h + b_hn`` of a GRU layer, ``[T, B, 3H or 4H]``.

    Arguments are those of the operator and its ``output``; packed it is ``[N, 3H or 4H]``.
    """
    hidden, after = h0.size(-1), reset == "after"
    saved = x.new_empty((*x.shape[:-1], (4 if after else 3) * hidden))
    gates = saved.flatten(0, -2)
    rz, n = gates[:, : 2 * hidden], gates[:, 2 * hidden : 3 * hidden]
    w_rz, w_n = w_hh[: 2 * hidden], w_hh[2 * hidden :]
    b_n = None
    if after and b_hh is not None:  # W_hn h takes b_hn along: it is multiplied by r
        b_n, b_hh = b_hh[2 * hidden :], b_hh.clone()
        b_hh[2 * hidden :] = 0
    _project(x, w_ih, _sum(b_ih, b_hh), gates[:, : 3 * hidden])
    before = previous_hidden(output, h0, batch_sizes, reverse)
    for rows, h in before:
        rz[rows].addmm_(h, w_rz.t())
    activated = _saves_activated(x)
    if activated:
        rz.sigmoid_()
    for rows, h in before:
        r = rz[rows, :hidden] if activated else rz[rows, :hidden].sigmoid()
        if after:
            recurrent = gates[rows, 3 * hidden :]
            _project(h, w_n, b_n, recurrent)
            n[rows].addcmul_(r, recurrent)
        else:
            n[rows].addmm_(r * h if activated else r.mul_(h), w_n.t())
    if activated:
        n.tanh_()
    return saved


def _saves_activated(x: Tensor) -> bool:
    """Whether gates are saved activated; near 1 a 16-bit sigmoid has no bits left for 1 - s."""
    return state_dtype(x.dtype) is x.dtype


def _project(x: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """``out = x weight^T + bias``; x is ``[*, I]``, out ``[N, O]``, of rows that may lie apart.

    Without weight x is projected already.
    """
    rows = x.flatten(0, -2)
    if weight is None:
        out.copy_(rows)
        if bias is not None:
            out.add_(bias)
    elif bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)


def _sum(b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor | None:
    if b_ih is None or b_hh is None:
        return b_hh if b_ih is None else b_ih
    return b_ih + b_hh
