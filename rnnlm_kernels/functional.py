"""Whole LSTM and GRU stacks from one-layer operators.

:func:`lstm` and :func:`gru` take the weights of every layer and direction and do what lies
between the single operator calls of :mod:`rnnlm_kernels.ops`: stacking, joining two directions
(which a GPU may run at the same time), dropout between layers, ``batch_first``, default initial
states, and autocast. They keep no state; the modules in :mod:`rnnlm_kernels.nn` are thin callers of
them.

Shapes use T (steps), B (batch), I (input size), H (hidden size), R (``proj_size``, or H without a
projection), L (layers), D (1, or 2 when bidirectional). Packed input is the ``data`` of a
:class:`~torch.nn.utils.rnn.PackedSequence``, [N, I], with its ``batch_sizes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .ops.lookup import projected_rows
from .ops.planning import known_plans, look_of, remember

LayerWeights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""``(w_ih, w_hh, b_ih, b_hh, w_hr)`` of one layer and direction, None where absent."""


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[LayerWeights],
    *,
    num_layers: int = 1,
    has_biases: bool = True,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    index: Tensor | None = None,
    proj_size: int = 0,
    return_cells: bool = False,
    memory: str = "fast",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Run a stack of LSTM layers over a sequence.

    Args:
        input: [T, B, I], with ``batch_first`` [B, T, I], packed [N, I]. Any floating dtype.
        hx: ``(h_0, c_0)``, [L*D, B, R] and [L*D, B, H], in the dtype and on the device of
            ``input``. None means zeros. Packed: rows in the packed (length-sorted) order.
        weights: one tuple per layer and direction, forward before reverse:
            ``w_ih`` [4H, I or D*R], ``w_hh`` [4H, R], ``b_ih`` and ``b_hh`` [4H], ``w_hr`` [R, H].
        num_layers: L.
        has_biases: when False the bias entries of ``weights`` are ignored.
        bidirectional: also run every layer from each row's last step to its first.
        batch_first: dense ``input`` and ``output`` carry the batch first. The states never do.
        dropout: probability of zeroing an element of every layer's output but the last one's.
        training: dropout acts only when this is True.
        batch_sizes: int64 CPU tensor [T]; given exactly when ``input`` (or ``index``) is packed.
        index: integers [T, B], with ``batch_first`` [B, T], packed [N], where ``input`` is a table
            of different rows, [U, I]: the input of every position is ``input[index]``. The first
            layer's input projection is computed for the rows of the table alone; with few of them,
            as of the words of a text, that saves most of it, forward and backward.
        proj_size: P of ``w_hr``, 0 without projection.
        return_cells: also return the cell state of every step of the last layer.
        memory: what is kept between forward and backward, besides the input, the weights and the
            output. ``"fast"``: the cell state and the gates of every step, 4H values;
            ``"low"``: the cell state, and backward first rebuilds the gates with two GEMMs.
        backend: see :mod:`rnnlm_kernels.dispatch`.

    Returns:
        ``output`` [T, B, D*R] (transposed view with ``batch_first``; packed [N, D*R]), ``h_n``
        [L*D, B, R], ``c_n`` [L*D, B, H], and ``cells`` (shaped as ``output``, D*H wide) or None.

    Raises:
        ValueError: ``input`` and weights differ in dtype, ``weights`` has the wrong length, or
            ``memory`` is no policy.
        RuntimeError: an empty sequence, or tensors of different devices or dtypes.
        IndexError: a value of ``index`` is no row of ``input``.

    Under ``torch.autocast`` for the input's device, ``input``, states, and weights that are not
    float64 are cast to the autocast dtype, and the results have that dtype.

    Example:
        >>> import torch
        >>> x, w_ih, w_hh = torch.randn(7, 2, 3), torch.randn(20, 3), torch.randn(20, 5)
        >>> output, h_n, c_n, _ = lstm(x, None, [(w_ih, w_hh, None, None, None)])
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]), torch.Size([1, 2, 5]))
    """
    directions = 2 if bidirectional else 1
    if len(weights) != num_layers * directions:
        raise ValueError(_wrong_number_of_weights(len(weights), num_layers, directions))

    look = None
    # One dense layer on a CPU, one step of which may take less time than to check it.
    plain = has_biases and batch_sizes is None and index is None and not return_cells
    if len(weights) == 1 and input.is_cpu and plain:
        tensors = (input, *((None, None) if hx is None else hx), *weights[0])
        look = look_of(tensors, "lstm", batch_first, proj_size, memory, backend)
        if look is not None and (plan := known_plans.get(look)) is not None:
            return ops.lstm_layer.infer(plan, input, hx, weights[0], batch_first)

    autocast = _autocast_dtype("cpu" if input.is_cpu else input.device.type)
    if autocast is not None:
        # Off inside: all tensors are cast here, and the float32 arithmetic of an operator must
        # stay float32.
        with torch.autocast(input.device.type, enabled=False):
            return lstm(
                _cast(input, autocast),
                None if hx is None else (_cast(hx[0], autocast), _cast(hx[1], autocast)),
                [_cast_layer(layer, autocast) for layer in weights],
                num_layers=num_layers,
                has_biases=has_biases,
                bidirectional=bidirectional,
                batch_first=batch_first,
                dropout=dropout,
                training=training,
                batch_sizes=batch_sizes,
                index=index,
                proj_size=proj_size,
                return_cells=return_cells,
                memory=memory,
                backend=backend,
            )

    h0s: Sequence[Tensor]
    c0s: Sequence[Tensor]
    first = weights[0][0]
    if not _alike(first, input):
        _refuse_weights(input, first)
    if hx is None:
        batch = _batch_size(input if index is None else index, batch_sizes, batch_first)
        zeros = input.new_zeros(1, batch, weights[0][1].shape[0] // 4)
        c0s = (zeros,) * len(weights)
        # One tensor serves every layer: operators never write to a state.
        h0s = (input.new_zeros(1, batch, proj_size),) * len(weights) if proj_size else c0s
    else:
        h0, c0 = hx
        if not _alike(h0, input):
            _refuse_state("h_0", h0, input)
        if not _alike(c0, input):
            _refuse_state("c_0", c0, input)
        h0s, c0s = _by_layer(h0), _by_layer(c0)

    if not has_biases:
        weights = [(w_ih, w_hh, None, None, w_hr) for w_ih, w_hh, _, _, w_hr in weights]
    x = x_reverse = input.transpose(0, 1) if batch_first and batch_sizes is None else input
    if index is not None:
        positions = index.t() if batch_first and batch_sizes is None else index
        x, x_reverse, weights = _look_up(input, positions, weights, directions)
    last = len(weights) - directions  # index of the last layer's first direction
    finals_h: list[Tensor] = []
    finals_c: list[Tensor] = []
    cells: Tensor | None = None
    stack: Sequence[tuple[Any, ...]] = ()
    if num_layers > 1 and not bidirectional and not (dropout and training):
        stack = ops.lstm_stack(
            *(x, h0s, c0s, weights, batch_sizes),
            return_cells=return_cells,
            memory=memory,
            backend=backend,
        )
    for i in range(0, len(weights), directions):
        wants_cells = return_cells and i == last
        if bidirectional:
            forward, reverse = ops.lstm_both(
                (x, h0s[i], c0s[i], *weights[i], batch_sizes),
                (x_reverse, h0s[i + 1], c0s[i + 1], *weights[i + 1], batch_sizes),
                return_cells=wants_cells,
                memory=memory,
                backend=backend,
            )
            x = x_reverse = torch.cat((forward[0], reverse[0]), -1)
            finals_h += (forward[1], reverse[1])
            finals_c += (forward[2], reverse[2])
            cells = torch.cat((forward[3], reverse[3]), -1) if wants_cells else None
        elif stack:
            x, h_n, c_n, cells = stack[i]
            finals_h.append(h_n)
            finals_c.append(c_n)
        else:
            x, h_n, c_n, cells = ops.lstm(
                x,
                h0s[i],
                c0s[i],
                *weights[i],
                batch_sizes,
                return_cells=wants_cells,
                memory=memory,
                backend=backend,
            )
            finals_h.append(h_n)
            finals_c.append(c_n)
        if dropout and training and i != last:
            x = x_reverse = F.dropout(x, dropout, training=True)

    if batch_first and batch_sizes is None:
        x = x.transpose(0, 1)
        cells = None if cells is None else cells.transpose(0, 1)
    if look is not None and len(h0s) == len(c0s) == 1:
        remember(look, "lstm", input, h0s[0], c0s[0], weights[0], "after", batch_first, backend)
    return x, _stack(finals_h), _stack(finals_c), cells


def gru(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[LayerWeights],
    *,
    num_layers: int = 1,
    has_biases: bool = True,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    index: Tensor | None = None,
    reset: str = "after",
    memory: str = "fast",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a stack of GRU layers over a sequence.

    Args:
        input: [T, B, I], with ``batch_first`` [B, T, I], packed [N, I]. Any floating dtype.
        hx: ``h_0``, [L*D, B, H], in the dtype and on the device of ``input``. None means zeros.
            Packed: rows in the packed (length-sorted) order.
        weights: one tuple per layer and direction, forward before reverse: ``w_ih``
            [3H, I or D*H], ``w_hh`` [3H, H], ``b_ih`` and ``b_hh`` [3H], and None.
        reset: "after" applies the reset gate to ``W_hn h + b_hn`` (PyTorch, cuDNN), "before"
            applies it to ``h`` (Cho et al. 2014, https://arxiv.org/abs/1406.1078).
        memory: ``"fast"`` keeps 4H values a step for backward (3H with ``reset="before"``),
            ``"low"`` none but the output; see :func:`lstm`.
        num_layers, has_biases, bidirectional, batch_first, dropout, training, batch_sizes, index,
            backend: as for :func:`lstm`.

    Returns:
        ``output`` [T, B, D*H] (transposed view with ``batch_first``; packed [N, D*H]) and ``h_n``
        [L*D, B, H].

    Raises:
        ValueError: ``input`` and weights differ in dtype, ``weights`` has the wrong length, or
            ``memory`` is no policy.
        RuntimeError: an empty sequence, or tensors of different devices or dtypes.

    Autocast acts as for :func:`lstm`.

    Example:
        >>> import torch
        >>> x, w_ih, w_hh = torch.randn(7, 2, 3), torch.randn(15, 3), torch.randn(15, 5)
        >>> output, h_n = gru(x, None, [(w_ih, w_hh, None, None, None)])
        >>> output.shape, h_n.shape
        (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]))
    """
    directions = 2 if bidirectional else 1
    if len(weights) != num_layers * directions:
        raise ValueError(_wrong_number_of_weights(len(weights), num_layers, directions))

    look = None
    # One dense layer on a CPU, one step of which may take less time than to check it.
    plain = has_biases and batch_sizes is None and index is None
    if len(weights) == 1 and input.is_cpu and plain:
        look = look_of((input, hx, *weights[0]), "gru", batch_first, reset, memory, backend)
        if look is not None and (plan := known_plans.get(look)) is not None:
            return ops.gru_layer.infer(plan, input, hx, weights[0], batch_first)

    autocast = _autocast_dtype("cpu" if input.is_cpu else input.device.type)
    if autocast is not None:
        with torch.autocast(input.device.type, enabled=False):
            return gru(
                _cast(input, autocast),
                None if hx is None else _cast(hx, autocast),
                [_cast_layer(layer, autocast) for layer in weights],
                num_layers=num_layers,
                has_biases=has_biases,
                bidirectional=bidirectional,
                batch_first=batch_first,
                dropout=dropout,
                training=training,
                batch_sizes=batch_sizes,
                index=index,
                reset=reset,
                memory=memory,
                backend=backend,
            )

    h0s: Sequence[Tensor]
    first = weights[0][0]
    if not _alike(first, input):
        _refuse_weights(input, first)
    if hx is None:
        batch = _batch_size(input if index is None else index, batch_sizes, batch_first)
        h0s = (input.new_zeros(1, batch, weights[0][1].shape[1]),) * len(weights)
    else:
        if not _alike(hx, input):
            _refuse_state("hx", hx, input)
        h0s = _by_layer(hx)

    if not has_biases:
        weights = [(w_ih, w_hh, None, None, None) for w_ih, w_hh, *_ in weights]
    x = x_reverse = input.transpose(0, 1) if batch_first and batch_sizes is None else input
    if index is not None:
        positions = index.t() if batch_first and batch_sizes is None else index
        x, x_reverse, weights = _look_up(input, positions, weights, directions)
    last = len(weights) - directions
    finals: list[Tensor] = []
    stack: Sequence[tuple[Any, ...]] = ()
    if num_layers > 1 and not bidirectional and not (dropout and training):
        stack = ops.gru_stack(
            x, h0s, weights, batch_sizes, reset=reset, memory=memory, backend=backend
        )
    for i in range(0, len(weights), directions):
        w_ih, w_hh, b_ih, b_hh, _ = weights[i]
        if bidirectional:
            forward, reverse = ops.gru_both(
                (x, h0s[i], w_ih, w_hh, b_ih, b_hh, batch_sizes),
                (x_reverse, h0s[i + 1], *weights[i + 1][:4], batch_sizes),
                reset=reset,
                memory=memory,
                backend=backend,
            )
            x = x_reverse = torch.cat((forward[0], reverse[0]), -1)
            finals += (forward[1], reverse[1])
        elif stack:
            x, h_n = stack[i]
            finals.append(h_n)
        else:
            x, h_n = ops.gru(
                x,
                h0s[i],
                w_ih,
                w_hh,
                b_ih,
                b_hh,
                batch_sizes,
                reset=reset,
                memory=memory,
                backend=backend,
            )
            finals.append(h_n)
        if dropout and training and i != last:
            x = x_reverse = F.dropout(x, dropout, training=True)

    if batch_first and batch_sizes is None:
        x = x.transpose(0, 1)
    if look is not None and len(h0s) == 1:
        layer = (*weights[0][:4], None)
        remember(look, "gru", input, h0s[0], None, layer, reset, batch_first, backend)
    return x, _stack(finals)


def _look_up(
    table: Tensor, index: Tensor, weights: Sequence[LayerWeights], directions: int
) -> tuple[Tensor, Tensor, list[Any]]:
    """The input's part of the first layer's gates, ``[*index.shape, G*H]``, in either direction.

    And the weights of all layers, the first ones without those that are in it.
    """
    gates: list[Tensor] = []
    others: list[Any] = list(weights)
    for i, (w_ih, w_hh, b_ih, b_hh, w_hr) in enumerate(weights[:directions]):
        gates.append(projected_rows(table, index, w_ih, b_ih))
        others[i] = (None, w_hh, None, b_hh, w_hr)
    return gates[0], gates[-1], others


def _alike(tensor: Tensor, input: Tensor) -> bool:
    """Whether both have one dtype and device."""
    return tensor.dtype is input.dtype and tensor.device == input.device


def _by_layer(states: Tensor) -> Sequence[Tensor]:
    """``[L*D, B, R]`` as L*D tensors ``[1, B, R]``: for one layer without the cost of a view."""
    return (states,) if states.shape[0] == 1 else states.split(1)


def _stack(finals: list[Tensor]) -> Tensor:
    """Join the final states of all layers and directions: L*D of ``[1, B, R]``."""
    return finals[0] if len(finals) == 1 else torch.cat(finals)


def _batch_size(input: Tensor, batch_sizes: Tensor | None, batch_first: bool) -> int:
    if batch_sizes is not None:
        return int(batch_sizes[0])
    return input.shape[0 if batch_first else 1]


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype autocast asks for on this kind of device, or None where it is off."""
    # torch has no autocast for "meta" and raises when asked about it.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as autocast does: float64 and integers stay what they are."""
    if tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


def _cast_layer(layer: LayerWeights, dtype: torch.dtype) -> LayerWeights:
    w_ih, w_hh, b_ih, b_hh, w_hr = layer
    return (
        _cast(w_ih, dtype),
        _cast(w_hh, dtype),
        None if b_ih is None else _cast(b_ih, dtype),
        None if b_hh is None else _cast(b_hh, dtype),
        None if w_hr is None else _cast(w_hr, dtype),
    )


def _refuse_weights(input: Tensor, weight: Tensor) -> None:
    if input.dtype != weight.dtype:
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
        )
    raise RuntimeError(
        "Input and parameter tensors are not at the same device, found input tensor at "
        f"{input.device} and parameter tensor at {weight.device}"
    )


def _refuse_state(name: str, state: Tensor, input: Tensor) -> None:
    if state.dtype != input.dtype:
        raise RuntimeError(
            f"{name} has dtype {state.dtype}, expected {input.dtype} as the input has. "
            f"Convert it: {name}.to({input.dtype})"
        )
    raise RuntimeError(
        f"{name} is on {state.device}, expected {input.device} where the input is. "
        f'Move it: {name}.to("{input.device}")'
    )


def _wrong_number_of_weights(count: int, num_layers: int, directions: int) -> str:
    return (
        f"weights has {count} entries, expected {num_layers * directions}: one for each of "
        f"{num_layers} layers in {directions} direction(s)"
    )
