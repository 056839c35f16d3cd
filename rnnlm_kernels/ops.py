"""The recurrent layers as PyTorch operators: one operator call per layer and direction.

``torch.ops.rnnlm_kernels.lstm`` and ``.gru`` span the input projection and the recurrence of one
layer in one direction; ``.lstm_backward`` and ``.gru_backward`` return all gradients. Everything
that is one big parallel operation (the projection, the weight gradients) is a PyTorch GEMM here;
only the sequential part is handed to a backend. This module alone allocates outputs, checks
tensors and knows about autograd.

Spanning the projection is what lets backward recompute: the input is saved anyway (for the weight
gradient), so second derivatives and low-memory training need nothing else.

Second derivatives: the backward operators are differentiable themselves, through the plain PyTorch
:mod:`rnnlm_kernels.reference`. That code runs only when a second derivative is really taken.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch, reference
from .backends import BACKENDS
from .options import Problem, RecurrenceOptions
from .reference import state_dtype

_NAMESPACE = "rnnlm_kernels"
_library = torch.library.Library(_NAMESPACE, "DEF")

# Number of differentiable inputs: x, states, weights; they come first in every schema.
_LSTM_INPUTS = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
_GRU_INPUTS = ("x", "h0", "w_ih", "w_hh", "b_ih", "b_hh")

_LSTM_ARGUMENTS = (
    "Tensor x, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
    "Tensor? w_hr, Tensor? batch_sizes"
)
_GRU_ARGUMENTS = (
    "Tensor x, Tensor h0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? batch_sizes"
)


# --- public entry points ------------------------------------------------------------------------


def lstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    *,
    reverse: bool = False,
    return_cells: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One LSTM layer in one direction; shapes as in :func:`rnnlm_kernels.reference.lstm`.

    All tensors share one floating-point dtype and one device; 16-bit dtypes keep their state and
    arithmetic in float32.

    Args:
        x: ``[T, B, I]``, or the ``data [N, I]`` of a ``PackedSequence`` with its ``batch_sizes``.
        h0, c0: ``[B, R]``, ``[B, H]``. w_ih: ``[4H, I]``. w_hh: ``[4H, R]``. b_ih, b_hh: ``[4H]``.
        w_hr: projection ``[R, H]``; None means R = H.
        batch_sizes: int64 ``[T]`` on the CPU, or None for dense input.
        reverse: run from each row's own last step to step 0.
        return_cells: also return the cell state of every step.
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
    if torch._C._are_functorch_transforms_active():
        # torch.func differentiates and batches plain PyTorch, not autograd formulas of operators.
        values = reference.lstm(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse)
        return *values[:3], (values[3] if return_cells else None)
    save = torch.is_grad_enabled() and _will_differentiate(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    run: Callable[..., tuple[Any, ...]] = torch.ops.rnnlm_kernels.lstm.default
    if _nobody_watches(x, w_ih):
        run = _EagerLSTM.apply if save else _lstm
    output, h_n, c_n, cells, _ = run(
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse, save, return_cells, backend
    )
    return output, h_n, c_n, (cells.to(x.dtype) if return_cells else None)


def gru(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    *,
    reset: str = "after",
    reverse: bool = False,
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
    if torch._C._are_functorch_transforms_active():  # see lstm
        return reference.gru(x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse)
    save = torch.is_grad_enabled() and _will_differentiate(x, h0, w_ih, w_hh, b_ih, b_hh)
    run: Callable[..., tuple[Any, ...]] = torch.ops.rnnlm_kernels.gru.default
    if _nobody_watches(x, w_ih):
        run = _EagerGRU.apply if save else _gru
    output, h_n, _ = run(x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse, save, backend)
    return output, h_n


def _will_differentiate(*tensors: Tensor | None) -> bool:
    """Whether forward should save for backward. (If it does not, backward runs it again.)"""
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            # What is traced or exported is meant for inference.
            return torch._C._get_tracing_state() is None and not _is_exporting()
    return False


# torch 2.6 does not tell; it then saves what an exported program may not need.
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


# --- checks -------------------------------------------------------------------------------------


def _expect_shape(name: str, shape: Sequence[int], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise RuntimeError(f"{name} should have shape {list(expected)}, got {list(shape)}")


def _check(
    gates: int,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
) -> None:
    """Everything the kernels take for granted about their tensors."""
    dtype, device = x.dtype, x.device
    if not dtype.is_floating_point:
        raise ValueError(f"x should be a floating-point tensor, got {dtype}")
    for tensor in (h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr):
        if tensor is not None and (tensor.dtype != dtype or tensor.device != device):
            names = {"h0": h0, "c0": c0, "w_ih": w_ih, "w_hh": w_hh}
            names.update({"b_ih": b_ih, "b_hh": b_hh, "w_hr": w_hr})
            name = next(n for n, t in names.items() if t is tensor)
            if tensor.device != device:
                raise RuntimeError(
                    f"{name} should be on the device of x ({device}), got {tensor.device}"
                )
            raise ValueError(f"{name} should have the dtype of x ({dtype}), got {tensor.dtype}")
    # .shape once per tensor: .size(i) is five times slower, and a call may take 10 us in all.
    x_shape, w_shape, h_shape = x.shape, w_hh.shape, h0.shape
    dims = 3 if batch_sizes is None else 2
    if len(x_shape) != dims:
        kind = "dense x [T, B, I]" if batch_sizes is None else "packed x [N, I]"
        raise RuntimeError(f"{kind} should have {dims} dimensions, got {len(x_shape)}")
    if len(w_shape) != 2 or w_shape[0] % gates:
        raise RuntimeError(f"w_hh should be [{gates}H, R], got {list(w_shape)}")
    rows, width = w_shape
    hidden = rows // gates
    if w_hr is not None:
        _expect_shape("w_hr", w_hr.shape, (width, hidden))
    elif width != hidden:
        _expect_shape("w_hh", w_shape, (rows, hidden))
    _expect_shape("w_ih", w_ih.shape, (rows, x_shape[-1]))
    if b_ih is not None:
        _expect_shape("b_ih", b_ih.shape, (rows,))
    if b_hh is not None:
        _expect_shape("b_hh", b_hh.shape, (rows,))
    if len(h_shape) != 2:
        raise RuntimeError(f"h0 should be [B, {width}], got {list(h_shape)}")
    batch = x_shape[1] if batch_sizes is None else h_shape[0]
    _expect_shape("h0", h_shape, (batch, width))
    if c0 is not None:
        _expect_shape("c0", c0.shape, (batch, hidden))
    if batch_sizes is None:
        if x_shape[0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        return
    if batch_sizes.device.type != "cpu" or batch_sizes.dtype != torch.int64:
        raise RuntimeError(
            "batch_sizes should be an int64 tensor on the CPU, got "
            f"{batch_sizes.dtype} on {batch_sizes.device}"
        )
    if batch_sizes.dim() != 1 or batch_sizes.size(0) == 0:
        raise RuntimeError(f"batch_sizes should be [T] with T > 0, got {list(batch_sizes.shape)}")


def _check_batch_sizes(x: Tensor, h0: Tensor, batch_sizes: Tensor) -> None:
    """The values of ``batch_sizes``; apart from :func:`_check` since fake tensors have none."""
    largest, smallest, total = int(batch_sizes[0]), int(batch_sizes[-1]), int(batch_sizes.sum())
    if smallest < 1 or bool((batch_sizes[1:] > batch_sizes[:-1]).any()):
        raise RuntimeError("batch_sizes should be positive and never increase from step to step")
    if largest != h0.size(0):
        raise RuntimeError(f"h0 should have batch_sizes[0] = {largest} rows, got {h0.size(0)}")
    if total != x.size(0):
        raise RuntimeError(f"x should have sum(batch_sizes) = {total} rows, got {x.size(0)}")


# --- planning -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _choose(
    cell: str,
    input_size: int,
    gate_rows: int,
    h_width: int,
    dtype: torch.dtype,
    device_type: str,
    save: bool,
    reset: str,
    reverse: bool,
    packed: bool,
    return_cells: bool,
    proj: bool,
    backend: str | None,
    environment: str | None,
) -> tuple[ModuleType, RecurrenceOptions]:
    """The backend of a layer. It may not depend on T or B: under torch.compile those are symbols.

    ``environment`` is the value of RNNLM_BACKEND, for :func:`dispatch.plan` reads it too.
    """
    del environment
    options = RecurrenceOptions(reset, reverse, packed, return_cells)
    problem = Problem(
        cell=cell,
        input_size=input_size,
        hidden_size=gate_rows // (4 if cell == "lstm" else 3),
        proj_size=h_width if proj else 0,
        dtype=dtype,
        device=device_type,
        training=save,
        options=options,
    )
    return BACKENDS[dispatch.plan(problem, backend).backend], options


def _plan_lstm(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    save: bool,
    return_cells: bool,
    backend: str | None,
) -> tuple[ModuleType, RecurrenceOptions]:
    return _choose(
        "lstm",
        int(w_ih.shape[1]),
        int(w_hh.shape[0]),
        int(w_hh.shape[1]),
        x.dtype,
        x.device.type,
        save,
        "after",
        reverse,
        batch_sizes is not None,
        return_cells,
        w_hr is not None,
        backend,
        os.environ.get(dispatch.ENVIRONMENT),
    )


def _plan_gru(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    batch_sizes: Tensor | None,
    reset: str,
    reverse: bool,
    save: bool,
    backend: str | None,
) -> tuple[ModuleType, RecurrenceOptions]:
    return _choose(
        "gru",
        int(w_ih.shape[1]),
        int(w_hh.shape[0]),
        int(w_hh.shape[1]),
        x.dtype,
        x.device.type,
        save,
        reset,
        reverse,
        batch_sizes is not None,
        False,
        False,
        backend,
        os.environ.get(dispatch.ENVIRONMENT),
    )


def _nobody_watches(x: Tensor, w_ih: Tensor) -> bool:
    """Whether an eager call may skip PyTorch's dispatcher.

    The dispatcher and its Python autograd wrapper cost 9 us of a call without gradients and 45 us
    of one with them, where the kernel may take 2. Skipping is right when nothing could intercept
    the call: no compiler, tracer, profiler, dispatch mode, tensor subclass or
    forward-mode AD. (The callers have ruled out functional transforms.)
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and type(w_ih) in _PLAIN
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and not torch._C._autograd._profiler_enabled()
    )


_PLAIN = frozenset({Tensor, torch.nn.Parameter})


# --- LSTM ---------------------------------------------------------------------------------------


def _lstm_outputs(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    save: bool,
    return_cells: bool,
    module: ModuleType,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Uninitialised output, h_n, c_n, cells, saved; the last two are None when not wanted."""
    steps, hidden = x.shape[:-1], c0.shape[1]
    cells = saved = None
    if save or return_cells:
        cells = x.new_empty((*steps, hidden), dtype=state_dtype(x.dtype))
    if save and module.SAVES_GATES:
        saved = x.new_empty((*steps, 4 * hidden))
    output = x.new_empty((*steps, h0.shape[1]))
    return output, _empty_like(h0), _empty_like(c0), cells, saved


def _lstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    save: bool,
    return_cells: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    _check(4, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes)
    if batch_sizes is not None:
        _check_batch_sizes(x, h0, batch_sizes)
    module, options = _plan_lstm(
        x, w_ih, w_hh, w_hr, batch_sizes, reverse, save, return_cells, backend
    )
    outputs = _lstm_outputs(x, h0, c0, save, return_cells, module)
    if module is BACKENDS["reference"]:
        values = reference.lstm(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse)
        for out, value in zip(outputs, values, strict=False):
            if out is not None:
                out.copy_(value)
    elif outputs[1].numel() or outputs[2].numel():
        module.lstm_forward(
            *_input_gates(module, x, w_ih, b_ih),
            *_contiguous(w_hh, b_hh, w_hr, h0, c0, batch_sizes),
            options,
            *outputs,
        )
    return outputs


def _lstm_fake(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    save: bool,
    return_cells: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    _check(4, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes)
    module, _ = _plan_lstm(x, w_ih, w_hh, w_hr, batch_sizes, reverse, save, return_cells, backend)
    return _lstm_outputs(x, h0, c0, save, return_cells, module)


def _lstm_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    output: Tensor,
    cells: Tensor,
    saved: Tensor,
    reverse: bool,
    return_cells: bool,
    backend: str | None,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    module, options = _plan_lstm(
        x, w_ih, w_hh, w_hr, batch_sizes, reverse, True, return_cells, backend
    )
    inputs = (x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    if module is BACKENDS["reference"]:
        return _empty_for_none(
            x,
            _reference_backward(
                functools.partial(reference.lstm, batch_sizes=batch_sizes, reverse=reverse),
                inputs,
                (grad_output, grad_h_n, grad_c_n, grad_cells),
                needs,
            ),
        )
    if x.size(0) and not saved.numel():
        # Forward ran without saving (traced or called without grad): run it again.
        again: Any = _lstm(*inputs, batch_sizes, reverse, True, return_cells, backend)
        output, _, _, cells, saved = again
    hidden, steps = c0.size(1), x.shape[:-1]
    dgates = x.new_empty((*steps, 4 * hidden))
    dh0, dc0 = _empty_like(h0), _empty_like(c0)
    # With a projection: the gradient of each step's projected h, and h before the projection.
    dproj: Any = None if w_hr is None else torch.empty_like(output)
    unprojected: Any = None if w_hr is None else x.new_empty((*steps, hidden))
    if h0.size(0):
        module.lstm_backward(
            *_contiguous(grad_output, grad_h_n, grad_c_n, grad_cells, w_hh, w_hr, h0, c0),
            *_contiguous(output, cells, saved, batch_sizes),
            options,
            dgates,
            dh0,
            dc0,
            dproj,
            unprojected,
        )
    dgates2d = dgates.flatten(0, -2)
    need_x, need_h0, need_c0, need_w_ih, need_w_hh, need_b_ih, need_b_hh, need_w_hr = needs
    db: Any = dgates2d.sum(0) if need_b_ih or need_b_hh else None
    return _empty_for_none(
        x,
        (
            (dgates2d @ w_ih).view(x.shape) if need_x else None,
            dh0 if need_h0 else None,
            dc0 if need_c0 else None,
            dgates2d.t() @ x.flatten(0, -2) if need_w_ih else None,
            _recurrent_weight_grad(output, h0, batch_sizes, reverse, dgates, _empty_like(w_hh))
            if need_w_hh
            else None,
            db if need_b_ih else None,
            (db.clone() if need_b_ih else db) if need_b_hh else None,
            dproj.flatten(0, -2).t() @ unprojected.flatten(0, -2) if need_w_hr else None,
        ),
    )


# --- GRU ----------------------------------------------------------------------------------------


def _gru_outputs(
    x: Tensor, h0: Tensor, save: bool, reset: str, module: ModuleType
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Uninitialised output, h_n, saved (r, z, n and, for reset-after, W_hn h + b_hn)."""
    steps, hidden = x.shape[:-1], h0.shape[1]
    saved = None
    if save and module.SAVES_GATES:
        saved = x.new_empty((*steps, (4 if reset == "after" else 3) * hidden))
    return x.new_empty((*steps, hidden)), _empty_like(h0), saved


def _gru(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    batch_sizes: Tensor | None,
    reset: str,
    reverse: bool,
    save: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    _check(3, x, h0, None, w_ih, w_hh, b_ih, b_hh, None, batch_sizes)
    if batch_sizes is not None:
        _check_batch_sizes(x, h0, batch_sizes)
    module, options = _plan_gru(x, w_ih, w_hh, batch_sizes, reset, reverse, save, backend)
    outputs = _gru_outputs(x, h0, save, reset, module)
    if module is BACKENDS["reference"]:
        values = reference.gru(x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse)
        outputs[0].copy_(values[0])
        outputs[1].copy_(values[1])
    elif outputs[1].numel():
        module.gru_forward(
            *_input_gates(module, x, w_ih, b_ih),
            *_contiguous(w_hh, b_hh, h0, batch_sizes),
            options,
            *outputs,
        )
    return outputs


def _gru_fake(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    batch_sizes: Tensor | None,
    reset: str,
    reverse: bool,
    save: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    _check(3, x, h0, None, w_ih, w_hh, b_ih, b_hh, None, batch_sizes)
    module, _ = _plan_gru(x, w_ih, w_hh, batch_sizes, reset, reverse, save, backend)
    return _gru_outputs(x, h0, save, reset, module)


def _gru_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    batch_sizes: Tensor | None,
    output: Tensor,
    saved: Tensor,
    reset: str,
    reverse: bool,
    backend: str | None,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    module, options = _plan_gru(x, w_ih, w_hh, batch_sizes, reset, reverse, True, backend)
    inputs = (x, h0, w_ih, w_hh, b_ih, b_hh)
    if module is BACKENDS["reference"]:
        layer = functools.partial(
            reference.gru, batch_sizes=batch_sizes, reset=reset, reverse=reverse
        )
        return _empty_for_none(
            x, _reference_backward(layer, inputs, (grad_output, grad_h_n), needs)
        )
    if x.size(0) and not saved.numel():
        # Forward ran without saving (traced or called without grad): run it again.
        again: Any = _gru(*inputs, batch_sizes, reset, reverse, True, backend)
        output, _, saved = again
    hidden = h0.size(1)
    dgates = x.new_empty((*x.shape[:-1], 3 * hidden))
    # reset-after: gradient of W_hn h + b_hn; reset-before: r * h, what W_hn was applied to.
    candidate = torch.empty_like(output)
    dh0 = _empty_like(h0)
    if h0.size(0):
        module.gru_backward(
            *_contiguous(grad_output, grad_h_n, w_hh, h0, output, saved, batch_sizes),
            options,
            dgates,
            candidate,
            dh0,
        )
    dgates2d, candidate2d = dgates.flatten(0, -2), candidate.flatten(0, -2)
    need_x, need_h0, need_w_ih, need_w_hh, need_b_ih, need_b_hh = needs
    db_ih: Any = dgates2d.sum(0) if need_b_ih or need_b_hh else None
    db_hh = dw_hh = None
    if need_b_hh:
        db_hh = db_ih.clone()
        if reset == "after":
            db_hh[2 * hidden :] = candidate2d.sum(0)
    if need_w_hh:
        dw_hh = _empty_like(w_hh)
        before = functools.partial(_recurrent_weight_grad, output, h0, batch_sizes, reverse)
        before(dgates[..., : 2 * hidden], dw_hh[: 2 * hidden])
        if reset == "after":
            before(candidate, dw_hh[2 * hidden :])
        else:
            torch.mm(dgates2d[:, 2 * hidden :].t(), candidate2d, out=dw_hh[2 * hidden :])
    return _empty_for_none(
        x,
        (
            (dgates2d @ w_ih).view(x.shape) if need_x else None,
            dh0 if need_h0 else None,
            dgates2d.t() @ x.flatten(0, -2) if need_w_ih else None,
            dw_hh,
            db_ih if need_b_ih else None,
            db_hh,
        ),
    )


# --- what both share ----------------------------------------------------------------------------


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    """Kernels take the address of the first element and assume the rest follows."""
    return [None if t is None else t.contiguous() for t in tensors]


def _input_gates(
    module: ModuleType, x: Tensor, w_ih: Tensor, b_ih: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x, w_ih, b_ih and the projection ``x W_ih^T + b_ih`` of all steps at once, ``[*, G*H]``.

    The projection is None where the backend takes so few rows upon itself.
    """
    features = x.shape[-1]
    if features and x.numel() <= module.PROJECTS_ROWS * features:
        x, w_ih, b_ih = _contiguous(x, w_ih, b_ih)
        return x, w_ih, b_ih, None
    return x, w_ih, b_ih, torch.nn.functional.linear(x, w_ih, b_ih).contiguous()


def _recurrent_weight_grad(
    output: Tensor,
    h0: Tensor,
    batch_sizes: Tensor | None,
    reverse: bool,
    dgates: Tensor,
    out: Tensor,
) -> Tensor:
    """``out = sum_t dgates_t^T h_{t-1}``, where the h before a row's first step is ``h0``."""
    if batch_sizes is not None:
        before = _packed_previous(output, h0, batch_sizes, reverse)
        return torch.mm(dgates.t(), before, out=out)
    first, rest, before = (
        (dgates[-1], dgates[:-1], output[1:]) if reverse else (dgates[0], dgates[1:], output[:-1])
    )
    torch.mm(first.t(), h0, out=out)
    if rest.size(0):
        out.addmm_(rest.flatten(0, 1).t(), before.flatten(0, 1))
    return out


def _packed_previous(output: Tensor, h0: Tensor, batch_sizes: Tensor, reverse: bool) -> Tensor:
    """h before each packed step, ``[N, R]``: gathered from ``output`` followed by ``h0``."""
    total, rows = output.size(0), int(batch_sizes[0])
    row = torch.cat([torch.arange(n) for n in batch_sizes.tolist()])
    start = torch.repeat_interleave(batch_sizes.cumsum(0) - batch_sizes, batch_sizes)
    if reverse:  # The step before t is t+1, which holds the first batch_sizes[t+1] rows.
        following = torch.cat([batch_sizes[1:], batch_sizes.new_zeros(1)])
        exists = row < torch.repeat_interleave(following, batch_sizes)
        index = start + torch.repeat_interleave(batch_sizes, batch_sizes) + row
    else:
        previous = torch.cat([batch_sizes.new_full((1,), rows), batch_sizes[:-1]])
        exists = start > 0
        index = start - torch.repeat_interleave(previous, batch_sizes) + row
    index = torch.where(exists, index, total + row)
    return torch.cat([output, h0]).index_select(0, index.to(output.device))


def _empty_for_none(x: Tensor, grads: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Operators return tensors: an empty one stands for a gradient nobody asked for."""
    return tuple(x.new_empty((0,)) if grad is None else grad for grad in grads)


def _reference_backward(
    layer: Callable[..., tuple[Any, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of ``layer(*inputs)`` with respect to the inputs that ``needs`` names.

    Runs inside an operator, below autograd, where only ``torch.func`` can differentiate.
    """
    positions = [i for i, need in enumerate(needs) if need]

    def wanted_to_graded(*wanted: Tensor) -> tuple[Tensor, ...]:
        arguments = list(inputs)
        for position, tensor in zip(positions, wanted, strict=True):
            arguments[position] = tensor
        outputs = layer(*arguments)
        return tuple(o for o, g in zip(outputs, grads, strict=True) if g is not None)

    outputs, vjp, *_ = torch.func.vjp(wanted_to_graded, *(inputs[i] for i in positions))
    given = [g for g in grads if g is not None]
    found = vjp(tuple(g.to(o.dtype) for g, o in zip(given, outputs, strict=True)))
    result: list[Tensor | None] = [None] * len(inputs)
    for position, grad in zip(positions, found, strict=True):
        result[position] = grad.contiguous()
    return result


def _second_derivative(
    layer: Callable[..., tuple[Any, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad_grads: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Backward of a backward operator, by differentiating the reference twice.

    Returns the gradients with respect to ``grads`` (the incoming gradients of the first backward)
    and to ``inputs``.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases cut the graph: one input may depend on another further up.
        def alias(tensor: Tensor | None) -> Any:
            if tensor is None:
                return None
            if create_graph and tensor.requires_grad:
                return tensor.view_as(tensor)
            return tensor.detach().requires_grad_()

        inputs = [alias(t) for t in inputs]
        grads = [alias(t) for t in grads]
        outputs = layer(*inputs)
        graded = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None]
        asked = [
            (t, gg)
            for t, gg, need in zip(inputs, grad_grads, needs, strict=True)
            if need and gg is not None
        ]
        if not graded or not asked:
            return [None] * len(grads), [None] * len(inputs)
        first = torch.autograd.grad(
            [o for o, _ in graded],
            [t for t, _ in asked if t is not None],
            [g for _, g in graded],
            create_graph=True,
            allow_unused=True,
        )
        pairs = [
            (value, gg)
            for value, (_, gg) in zip(first, asked, strict=True)
            if value is not None and value.requires_grad
        ]
        wanted = [t for t in (*grads, *inputs) if t is not None]
        found: Iterator[Tensor | None] = iter(())
        if pairs:
            found = iter(
                torch.autograd.grad(
                    [value for value, _ in pairs],
                    wanted,
                    [gg for _, gg in pairs],
                    create_graph=create_graph,
                    allow_unused=True,
                )
            )
        result = [None if t is None else next(found, None) for t in (*grads, *inputs)]
    return result[: len(grads)], result[len(grads) :]


# --- registration -------------------------------------------------------------------------------


def _backward_fake(num_grads: int, num_inputs: int) -> Callable[..., tuple[Any, ...]]:
    """Shapes of a backward operator's results: those of the layer's inputs."""

    def fake(*args: Any) -> tuple[Tensor, ...]:
        inputs, needs = args[num_grads : num_grads + num_inputs], args[-1]
        x = inputs[0]
        return tuple(
            x.new_empty(t.shape) if need else x.new_empty((0,))
            for t, need in zip(inputs, needs, strict=True)
        )

    return fake


def _register(
    name: str,
    inputs: tuple[str, ...],
    arguments: str,
    flags: str,
    outputs: int,
    forward: Callable[..., tuple[Any, ...]],
    fake: Callable[..., tuple[Any, ...]],
    backward: Callable[..., tuple[Any, ...]],
    layer: Callable[..., tuple[Any, ...]],
    grad_names: tuple[str, ...],
    saved_names: tuple[str, ...],
    flag_names: tuple[str, ...],
) -> type[torch.autograd.Function]:
    """Define a layer operator and its backward, and wire their autograd.

    Returns the same as an ``autograd.Function`` that reaches the implementation directly.

    ``grad_names`` are the differentiable outputs, ``saved_names`` the outputs backward reads.
    ``flag_names`` are the forward's non-tensor arguments that backward takes as well.
    """
    tags = (torch.Tag.pt2_compliant_tag,)
    num_inputs, num_grads, num_saved = len(inputs), len(grad_names), len(saved_names)
    results = ", ".join(["Tensor"] * outputs)
    _library.define(f"{name}({arguments}, {flags}) -> ({results})", tags=tags)
    incoming = ", ".join(f"Tensor? grad_{n}" for n in grad_names)
    kept = ", ".join(f"Tensor {n}" for n in saved_names)
    kept_flags = ", ".join(f for f in flags.split(", ") if f.split()[-1] in flag_names)
    results = ", ".join(["Tensor"] * num_inputs)
    _library.define(
        f"{name}_backward({incoming}, {arguments}, {kept}, {kept_flags}, bool[] needs)"
        f" -> ({results})",
        tags=tags,
    )

    def with_empties(function: Callable[..., Sequence[Tensor | None]]) -> Callable[..., Any]:
        # An operator returns tensors only: an empty one stands for what was not wanted.
        def operator(*args: Any) -> tuple[Tensor, ...]:
            results: Any = function(*args)
            return tuple(results[0].new_empty((0,)) if r is None else r for r in results)

        return operator

    direct_forward = with_empties(forward)
    _library.impl(name, direct_forward, "CompositeExplicitAutograd")
    _library.impl(f"{name}_backward", backward, "CompositeExplicitAutograd")
    qualified = f"{_NAMESPACE}::{name}"
    torch.library.register_fake(qualified, with_empties(fake), lib=_library)
    torch.library.register_fake(
        f"{qualified}_backward", _backward_fake(num_grads, num_inputs), lib=_library
    )
    backward_op = getattr(getattr(torch.ops, _NAMESPACE), f"{name}_backward").default
    all_flags = [f.split()[-1] for f in flags.split(", ")]
    kept_positions = [all_flags.index(n) for n in flag_names]
    # batch_sizes follows the differentiable inputs, the flags follow batch_sizes.
    num_tensors, w_ih = num_inputs + 1, inputs.index("w_ih")
    # The saved outputs, by their position among the forward's outputs.
    output_names = (*grad_names, "saved")
    saved_positions = [output_names.index(n) for n in saved_names]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[-1])
        ctx.save_for_backward(*inputs[:num_tensors], *(output[p] for p in saved_positions))
        ctx.flags = [inputs[num_tensors + p] for p in kept_positions]

    def autograd_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:num_inputs])
        if all(g is None for g in grads[:num_grads]):
            return (None,) * (num_tensors + len(all_flags))
        tensors = ctx.saved_tensors
        direct = not torch.is_grad_enabled() and _nobody_watches(tensors[0], tensors[w_ih])
        run = backward if direct else backward_op
        found = run(*grads[:num_grads], *tensors, *ctx.flags, needs)
        wanted = [g if need else None for g, need in zip(found, needs, strict=True)]
        return (*wanted, *([None] * (1 + len(all_flags))))

    torch.library.register_autograd(qualified, autograd_backward, setup_context=setup, lib=_library)

    def setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[: num_grads + num_tensors])
        ctx.flags = dict(
            zip(flag_names, inputs[num_grads + num_tensors + num_saved : -1], strict=True)
        )
        ctx.needs = inputs[-1]

    def autograd_double_backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        batch_sizes = tensors[-1]
        kwargs = {k: v for k, v in ctx.flags.items() if k in ("reset", "reverse")}
        grads, dinputs = _second_derivative(
            functools.partial(layer, batch_sizes=batch_sizes, **kwargs),
            tensors[num_grads:-1],
            tensors[:num_grads],
            ctx.needs,
            grad_grads,
        )
        return (*grads, *dinputs, *([None] * (1 + num_saved + len(flag_names) + 1)))

    torch.library.register_autograd(
        f"{qualified}_backward",
        autograd_double_backward,
        setup_context=setup_backward,
        lib=_library,
    )

    # In one step: with a setup_context of its own, apply() inspects signatures on every call.
    def forward_and_setup(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        output = direct_forward(*args)
        setup(ctx, args, output)
        return output

    return type(
        f"Eager{name.upper()}",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward_and_setup),
            "backward": staticmethod(autograd_backward),
        },
    )


_EagerLSTM = _register(
    "lstm",
    _LSTM_INPUTS,
    _LSTM_ARGUMENTS,
    "bool reverse, bool save, bool return_cells, str? backend",
    5,
    _lstm,
    _lstm_fake,
    _lstm_backward,
    reference.lstm,
    ("output", "h_n", "c_n", "cells"),
    ("output", "cells", "saved"),
    ("reverse", "return_cells", "backend"),
)
_EagerGRU = _register(
    "gru",
    _GRU_INPUTS,
    _GRU_ARGUMENTS,
    "str reset, bool reverse, bool save, str? backend",
    3,
    _gru,
    _gru_fake,
    _gru_backward,
    reference.gru,
    ("output", "h_n"),
    ("output", "saved"),
    ("reset", "reverse", "backend"),
)
