"""The recurrent layers as PyTorch operators: one operator call per layer and direction.

``torch.ops.rnnlm_kernels.lstm`` and ``.gru`` span the input projection and the recurrence of one
layer in one direction; ``.lstm_backward`` and ``.gru_backward`` return all gradients. Everything
that is one big parallel operation (the projection, the weight gradients) is a PyTorch GEMM here;
only the sequential part is handed to a backend. This package alone allocates outputs, checks
tensors and knows about autograd.

Spanning the projection is what lets backward recompute: the input is saved anyway (for the weight
gradient), so second derivatives and low-memory training (:mod:`.rebuild`) need nothing else.

Second derivatives: the backward operators are differentiable themselves, through the plain PyTorch
:mod:`rnnlm_kernels.reference`. That code runs only when a second derivative is really taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..options import checked_memory
from . import gru_layer, lstm_layer
from .directions import in_one_call, in_turn_or_on_streams, run_in_one_call
from .pairs import stacked
from .planning import must_be_plain, nobody_watches

_LSTM = torch.ops.rnnlm_kernels.lstm.default
_GRU = torch.ops.rnnlm_kernels.gru.default


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
    *,
    reverse: bool = False,
    return_cells: bool = False,
    memory: str = "fast",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One LSTM layer in one direction; shapes as in :func:`rnnlm_kernels.reference.lstm`.

    All tensors share one floating-point dtype and one device; 16-bit dtypes keep their state and
    arithmetic in float32.

    Args:
        x: ``[T, B, I]``, or the ``data [N, I]`` of a ``PackedSequence`` with its ``batch_sizes``.
        h0, c0: ``[B, R]``, ``[B, H]``, or as a one-layer module holds them, ``[1, B, R]`` and
            ``[1, B, H]``; h_n and c_n then have these shapes too.
        w_ih: ``[4H, I]``. w_hh: ``[4H, R]``. b_ih, b_hh: ``[4H]``. Without w_ih (None, as is then
            b_ih) x is the input's part of the gates: ``[T, B, 4H]``, packed ``[N, 4H]``.
        w_hr: projection ``[R, H]``; None means R = H.
        batch_sizes: int64 ``[T]`` on the CPU, or None for dense input.
        reverse: run from each row's own last step to step 0.
        return_cells: also return the cell state of every step.
        memory: ``"fast"`` keeps the gates of every step for backward, ``"low"`` only h and c; see
            :func:`rnnlm_kernels.functional.lstm`.
        backend: name, ``"auto"``, or None (``RNNLM_BACKEND``, then automatic).

    Returns:
        ``output [T, B, R]`` (packed ``[N, R]``), ``h_n [B, R]``, ``c_n [B, H]``, and
        ``cells [T, B, H]`` (packed ``[N, H]``) or None.

    Raises:
        RuntimeError, ValueError: a shape, dtype or device does not fit; the message names it.
        BackendError: the requested backend cannot run this problem.

    Example:
        >>> x, h0, c0 = torch.randn(5, 2, 3), torch.zeros(2, 4), torch.zeros(2, 4)
        >>> output, h_n, c_n, cells = lstm(x, h0, c0, torch.randn(16, 3), torch.randn(16, 4))
        >>> output.shape, cells
        (torch.Size([5, 2, 4]), None)
    """
    checked_memory(memory)
    if must_be_plain():
        values = lstm_layer.plain(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse)
        output, h_n, c_n, cells = values
        return output, h_n, c_n, (cells if return_cells else None)
    tensors = (x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    trains = torch.is_grad_enabled() and _will_differentiate(*tensors)
    run: Callable[..., tuple[Any, ...]] = _LSTM
    if nobody_watches(*tensors):
        run = lstm_layer.Eager.apply if trains else lstm_layer.forward
    low = trains and memory == "low"
    output, h_n, c_n, cells, _ = run(
        *tensors, batch_sizes, reverse, trains and not low, return_cells or low, backend
    )
    return output, h_n, c_n, (cells.to(x.dtype) if return_cells else None)


def lstm_both(
    forward: Sequence[Any],
    reverse: Sequence[Any],
    *,
    return_cells: bool = False,
    memory: str = "fast",
    backend: str | None = None,
) -> Sequence[tuple[Any, ...]]:
    """Both directions of an LSTM layer, at the same time where that pays.

    Args:
        forward, reverse: the tensors of either direction, as :func:`lstm` takes them:
            x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes. Both have one x, or
            each its projected one.
        return_cells, memory, backend: as for :func:`lstm`.

    Returns:
        The results of :func:`lstm` for ``forward``, then for ``reverse``.

    Example:
        >>> x, h0, c0 = torch.randn(5, 2, 3), torch.zeros(2, 4), torch.zeros(2, 4)
        >>> layer = x, h0, c0, torch.randn(16, 3), torch.randn(16, 4), None, None, None, None
        >>> (output, *_), (reverse_output, *_) = lstm_both(layer, layer)
        >>> output.shape, reverse_output.shape
        (torch.Size([5, 2, 4]), torch.Size([5, 2, 4]))
    """
    checked_memory(memory)
    trains = _both_will_differentiate(forward, reverse)
    if trains is None or not in_one_call(forward, reverse):
        return in_turn_or_on_streams(
            *("lstm", lstm, forward, reverse),
            return_cells=return_cells,
            memory=memory,
            backend=backend,
        )
    low = trains and memory == "low"
    flags = (trains and not low, return_cells or low, backend)
    directions = (*forward, False, *flags), (*reverse, True, *flags)
    return [
        (output, h_n, c_n, cells.to(output.dtype) if return_cells else None)
        for output, h_n, c_n, cells, _ in run_in_one_call(
            lstm_layer.forward, lstm_layer.Eager, trains, directions
        )
    ]


def lstm_stack(
    x: Tensor,
    h0s: Sequence[Tensor],
    c0s: Sequence[Tensor],
    weights: Sequence[Sequence[Tensor | None]],
    batch_sizes: Tensor | None = None,
    *,
    return_cells: bool = False,
    memory: str = "fast",
    backend: str | None = None,
) -> list[tuple[Any, ...]]:
    """The layers of an LSTM, at the same time where that pays.

    Args:
        x, batch_sizes, memory, backend: as for :func:`lstm`.
        h0s, c0s: the initial states of every layer.
        weights: w_ih, w_hh, b_ih, b_hh, w_hr of every layer.
        return_cells: also return the cell state of every step of the last layer.

    Returns:
        The results of :func:`lstm` for every layer; none where the layers have to be called one
        by one.

    Example:
        >>> x, states = torch.randn(5, 2, 3), [torch.zeros(2, 3)] * 2
        >>> weights = [(torch.randn(12, 3), torch.randn(12, 3), None, None, None)] * 2
        >>> with torch.no_grad():
        ...     (output, *_), (next_output, *_) = lstm_stack(x, states, states, weights)
        >>> output.shape, next_output.shape
        (torch.Size([5, 2, 3]), torch.Size([5, 2, 3]))
    """
    checked_memory(memory)
    if not _may_run_as_a_stack(x, *h0s, *c0s, *(w for layer in weights for w in layer)):
        return []
    last = len(weights) - 1
    layers = [
        (h0s[i], c0s[i], *layer, batch_sizes, False, False, return_cells and i == last, backend)
        for i, layer in enumerate(weights)
    ]
    return [
        (output, h_n, c_n, None if cells is None else cells.to(x.dtype))
        for output, h_n, c_n, cells, _ in stacked(lstm_layer.forward, x, layers)
    ]


def gru(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    *,
    reset: str = "after",
    reverse: bool = False,
    memory: str = "fast",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One GRU layer in one direction; arguments as in :func:`lstm` with 3 gates instead of 4.

    Args:
        reset: ``"after"`` (PyTorch, cuDNN) or ``"before"`` (Cho et al., 2014); see
            :func:`rnnlm_kernels.reference.gru_cell`.

    Returns:
        ``output [T, B, H]`` (packed ``[N, H]``) and ``h_n [B, H]``.

    Example:
        >>> x, h0 = torch.randn(5, 2, 3), torch.zeros(2, 4)
        >>> output, h_n = gru(x, h0, torch.randn(12, 3), torch.randn(12, 4), reset="before")
        >>> torch.equal(output[-1], h_n)
        True
    """
    checked_memory(memory)
    if must_be_plain():
        h_n: Tensor
        output, h_n = gru_layer.plain(x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse)
        return output, h_n
    trains = torch.is_grad_enabled() and _will_differentiate(x, h0, w_ih, w_hh, b_ih, b_hh)
    run: Callable[..., tuple[Any, ...]] = _GRU
    if nobody_watches(x, h0, w_ih, w_hh, b_ih, b_hh):
        run = gru_layer.Eager.apply if trains else gru_layer.forward
    save = trains and memory != "low"
    output, h_n, _ = run(x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse, save, backend)
    return output, h_n


def gru_both(
    forward: Sequence[Any],
    reverse: Sequence[Any],
    *,
    reset: str = "after",
    memory: str = "fast",
    backend: str | None = None,
) -> Sequence[tuple[Any, ...]]:
    """Both directions of a GRU layer, at the same time where that pays.

    Args:
        forward, reverse: the tensors of either direction, as :func:`gru` takes them:
            x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes. Both have one x, or
            each its projected one.
        reset, memory, backend: as for :func:`gru`.

    Returns:
        The results of :func:`gru` for ``forward``, then for ``reverse``.

    Example:
        >>> x, h0 = torch.randn(5, 2, 3), torch.zeros(2, 4)
        >>> layer = x, h0, torch.randn(12, 3), torch.randn(12, 4), None, None, None
        >>> (output, _), (reverse_output, _) = gru_both(layer, layer, reset="before")
        >>> output.shape, reverse_output.shape
        (torch.Size([5, 2, 4]), torch.Size([5, 2, 4]))
    """
    checked_memory(memory)
    trains = _both_will_differentiate(forward, reverse)
    if trains is None or not in_one_call(forward, reverse):
        return in_turn_or_on_streams(
            *("gru", gru, forward, reverse), reset=reset, memory=memory, backend=backend
        )
    save = trains and memory != "low"
    directions = (
        (*forward, reset, False, save, backend),
        (*reverse, reset, True, save, backend),
    )
    return [
        (output, h_n)
        for output, h_n, _ in run_in_one_call(
            gru_layer.forward, gru_layer.Eager, trains, directions
        )
    ]


def gru_stack(
    x: Tensor,
    h0s: Sequence[Tensor],
    weights: Sequence[Sequence[Tensor | None]],
    batch_sizes: Tensor | None = None,
    *,
    reset: str = "after",
    memory: str = "fast",
    backend: str | None = None,
) -> list[tuple[Any, ...]]:
    """The layers of a GRU, at the same time where that pays.

    Args:
        x, batch_sizes, reset, memory, backend: as for :func:`gru`.
        h0s: the initial state of every layer.
        weights: w_ih, w_hh, b_ih, b_hh of every layer; what follows those is ignored.

    Returns:
        The results of :func:`gru` for every layer; none where the layers have to be called one by
        one.

    Example:
        >>> x, states = torch.randn(5, 2, 3), [torch.zeros(2, 3)] * 2
        >>> weights = [(torch.randn(9, 3), torch.randn(9, 3), None, None)] * 2
        >>> with torch.no_grad():
        ...     (output, _), (next_output, _) = gru_stack(x, states, weights)
        >>> output.shape, next_output.shape
        (torch.Size([5, 2, 3]), torch.Size([5, 2, 3]))
    """
    checked_memory(memory)
    if not _may_run_as_a_stack(x, *h0s, *(w for layer in weights for w in layer[:4])):
        return []
    layers = [
        (h0s[i], *layer[:4], batch_sizes, reset, False, False, backend)
        for i, layer in enumerate(weights)
    ]
    return [(output, h_n) for output, h_n, _ in stacked(gru_layer.forward, x, layers)]


def _may_run_as_a_stack(*tensors: Tensor | None) -> bool:
    """Whether a backend may be called for all layers at once, given the tensors of all."""
    if torch.is_grad_enabled() and _will_differentiate(*tensors):
        return False
    return in_one_call(tensors)


def _both_will_differentiate(forward: Sequence[Any], reverse: Sequence[Any]) -> bool | None:
    """Whether forward should save for backward; None: in one direction only."""
    if not torch.is_grad_enabled():
        return False
    trains = _will_differentiate(*forward)
    return trains if trains == _will_differentiate(*reverse) else None


def _will_differentiate(*tensors: Tensor | None) -> bool:
    """Whether forward should save for backward. (If it does not, backward has more to do.)"""
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            # What is traced or exported is meant for inference.
            return torch._C._get_tracing_state() is None and not _is_exporting()
    return False


# torch 2.6 does not tell; it then saves what an exported program may not need.
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
