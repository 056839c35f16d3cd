"""The recurrent layers in plain PyTorch, written as the equations read.

These are the oracle of every kernel, the fallback where no kernel runs, and the source of second
derivatives. They work in any dtype, on any device, and can be differentiated any number of times.
16-bit inputs are computed in float32 and rounded once, on output, as the kernels do.

Gate order is PyTorch's: LSTM ``i, f, g, o``; GRU ``r, z, n``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state and arithmetic for tensors of ``dtype``: float32 for 16-bit floats."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def lstm_cell(
    gates_x: Tensor,
    h: Tensor,
    c: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One LSTM step (Hochreiter & Schmidhuber, 1997; projection: Sak et al., 2014).

    Args:
        gates_x: input part of the gates, ``x W_ih^T + b_ih``, ``[B, 4H]``.
        h: previous (projected) hidden state ``[B, R]``; R is H without projection.
        c: previous cell state ``[B, H]``.
        w_hh: ``[4H, R]``. b_hh: ``[4H]`` or None. w_hr: projection ``[R, H]`` or None.

    Returns:
        The new ``h [B, R]`` and ``c [B, H]``.

    Example:
        >>> h, c = torch.zeros(1, 1), torch.ones(1, 1)
        >>> h, c = lstm_cell(torch.zeros(1, 4), h, c, w_hh=torch.ones(4, 1))
        >>> c
        tensor([[0.5000]])
    """
    i, f, g, o = (gates_x + F.linear(h, w_hh, b_hh)).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if w_hr is None else F.linear(h, w_hr)), c


def gru_cell(
    gates_x: Tensor,
    h: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None = None,
    reset: str = "after",
) -> Tensor:
    """One GRU step.

    Args:
        gates_x: input part of the gates, ``x W_ih^T + b_ih``, ``[B, 3H]``.
        h: previous hidden state ``[B, H]``. w_hh: ``[3H, H]``. b_hh: ``[3H]`` or None.
        reset: ``"after"``: ``n = tanh(x_n + r * (W_hn h + b_hn))`` (PyTorch, cuDNN);
            ``"before"``: ``n = tanh(x_n + W_hn (r * h) + b_hn)`` (Cho et al., 2014).

    Returns:
        The new ``h [B, H]``.

    Example:
        >>> gru_cell(torch.zeros(1, 3), torch.ones(1, 1), torch.zeros(3, 1))
        tensor([[0.5000]])
    """
    x_r, x_z, x_n = gates_x.chunk(3, dim=-1)
    if reset == "after":
        h_r, h_z, h_n = F.linear(h, w_hh, b_hh).chunk(3, dim=-1)
        r = (x_r + h_r).sigmoid()
        z = (x_z + h_z).sigmoid()
        n = (x_n + r * h_n).tanh()
    elif reset == "before":
        hidden = h.size(-1)
        w_rz, w_n = w_hh.split([2 * hidden, hidden])
        b_rz, b_n = (None, None) if b_hh is None else b_hh.split([2 * hidden, hidden])
        h_r, h_z = F.linear(h, w_rz, b_rz).chunk(2, dim=-1)
        r = (x_r + h_r).sigmoid()
        z = (x_z + h_z).sigmoid()
        n = (x_n + F.linear(r * h, w_n, b_n)).tanh()
    else:
        raise ValueError(f"reset should be 'after' or 'before', got {reset!r}")
    return (1 - z) * n + z * h


def _scan(
    step: Callable[[Tensor, State], State],
    gates_x: Tensor,
    state: State,
    batch_sizes: Tensor | None,
    reverse: bool,
) -> tuple[list[State], State]:
    """Run ``step`` over time; returns the state of every step, in time order, and the last one.

    Dense ``gates_x`` is ``[T, B, *]``, packed ``[N, *]`` with ``batch_sizes [T]``: step t then
    touches rows ``0 .. batch_sizes[t]`` only, and the other rows keep their state. That is all
    that variable lengths need, in either direction.
    """
    if batch_sizes is None:
        steps = list(gates_x.unbind(0))
    else:
        # Not tolist(): under torch.func, torch 2.6 cannot read a whole tensor.
        steps = list(gates_x.split([rows.item() for rows in batch_sizes]))
    trace: list[State] = []
    for gates in reversed(steps) if reverse else steps:
        rows = gates.size(0)
        new = step(gates, tuple(s[:rows] for s in state))
        trace.append(new)
        if rows == state[0].size(0):
            state = new
        else:
            state = tuple(torch.cat([n, s[rows:]]) for n, s in zip(new, state, strict=True))
    if reverse:
        trace.reverse()
    return trace, state


def _join(trace: list[State], index: int, packed: bool) -> Tensor:
    steps = [state[index] for state in trace]
    return torch.cat(steps) if packed else torch.stack(steps)


def _to(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.to(dtype) for t in tensors]


def lstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One LSTM layer in one direction.

    Args:
        x: ``[T, B, I]``, or packed ``[N, I]`` together with ``batch_sizes``.
        h0: ``[B, R]``. c0: ``[B, H]``. w_hh: ``[4H, R]``.
        w_ih: ``[4H, I]``; None where x is projected already, ``[T, B, 4H]`` or ``[N, 4H]``.
        b_ih, b_hh: ``[4H]`` or None. w_hr: ``[R, H]`` or None (then R = H).
        batch_sizes: rows of each step of a packed input, int64 ``[T]`` on the CPU.
        reverse: run from each row's last step to step 0.

    Returns:
        ``output [T, B, R]`` (packed ``[N, R]``), ``h_n [B, R]``, ``c_n [B, H]`` and the cell state
        of every step ``[T, B, H]`` (packed ``[N, H]``).
    """
    dtype = x.dtype
    gates_x = x if w_ih is None else F.linear(x, w_ih, b_ih)
    gates_x, h0, c0, w_hh, b_hh, w_hr = _to(state_dtype(dtype), gates_x, h0, c0, w_hh, b_hh, w_hr)

    def step(gates: Tensor, state: State) -> State:
        h, c = state
        return lstm_cell(gates, h, c, w_hh, b_hh, w_hr)

    trace, (h_n, c_n) = _scan(step, gates_x, (h0, c0), batch_sizes, reverse)
    packed = batch_sizes is not None
    output, cells = _join(trace, 0, packed), _join(trace, 1, packed)
    return output.to(dtype), h_n.to(dtype), c_n.to(dtype), cells.to(dtype)


def gru(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reset: str = "after",
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One GRU layer in one direction; see :func:`gru_cell` for ``reset``, :func:`lstm` for shapes.

    Returns:
        ``output [T, B, H]`` (packed ``[N, H]``) and ``h_n [B, H]``.
    """
    dtype = x.dtype
    gates_x = x if w_ih is None else F.linear(x, w_ih, b_ih)
    gates_x, h0, w_hh, b_hh = _to(state_dtype(dtype), gates_x, h0, w_hh, b_hh)

    def step(gates: Tensor, state: State) -> State:
        return (gru_cell(gates, state[0], w_hh, b_hh, reset),)

    trace, (h_n,) = _scan(step, gates_x, (h0,), batch_sizes, reverse)
    return _join(trace, 0, batch_sizes is not None).to(dtype), h_n.to(dtype)
