"""The C++ backend for CPUs: hands raw pointers of contiguous tensors to ``rnnlm_kernels._C``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..build import import_error, native
from ..options import BUILT_OPTIONS, Plan, Problem, RecurrenceOptions

# Forward keeps the activated gates (16-bit dtypes: their pre-activations) for backward.
SAVES_GATES = True

# Forward gets x and W_ih: the projected gates of a few steps stay in the cache, and a call touches
# no memory for all of them (docs/performance-log.md). Or gates_x, where the input came projected.
PROJECTS_INPUT = True

# Codes of DType in csrc/core/params.h.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def available() -> tuple[bool, str]:
    if native is None:
        return False, f"the extension rnnlm_kernels._C is missing ({import_error})"
    try:
        info = native.cpu_info()
    except ValueError as error:
        return False, str(error)
    return True, f"C++ kernels, {info['isa']}"


def supports(problem: Problem) -> tuple[bool, str]:
    missing = problem.options.unsupported(BUILT_OPTIONS)
    if missing:
        return False, f"options not built: {', '.join(missing)}"
    if problem.device_type != "cpu":
        return False, f"tensors are on {problem.device_type}"
    if problem.dtype not in _DTYPES:
        return False, f"no kernel for {problem.dtype}"
    return True, "C++ kernels cover every size of this cell and dtype"


def plan(problem: Problem) -> Plan:
    info = native.cpu_info()
    arithmetic = "float64" if problem.dtype == torch.float64 else "float32"
    return Plan(
        "cpu",
        f"fused {problem.cell}, {arithmetic} arithmetic",
        f"{info['isa']}, torch's threads ({info['threads_from']})",
        supports(problem)[1],
    )


Call = Callable[..., Any]
"""Who gets the arguments of a call, where it is not the native function."""


def together(name: str, first: tuple[Any, ...], second: tuple[Any, ...]) -> None:
    """Two calls of the function ``name`` below, on threads side by side where that pays."""
    function = globals()[name]
    native_pair = getattr(native, f"cpu_{name}_pair")
    native_pair(function(*first, call=_arguments), function(*second, call=_arguments))


def stacked(name: str, layers: Sequence[tuple[Any, ...]]) -> None:
    """Calls of the function ``name`` below for layers each of which takes the one before's output.

    A layer runs some steps behind the one before, on other threads, where that pays.
    """
    function = globals()[name]
    native_stack = getattr(native, f"cpu_{name}_stack")
    native_stack([function(*layer, call=_arguments) for layer in layers])


def _arguments(*arguments: int) -> tuple[int, ...]:
    return arguments


# The calls below write out what a helper could do for all: such helpers cost 1 us of a call of 20.


def lstm_forward(
    x: Tensor,
    w_ih: Tensor | None,
    b_ih: Tensor | None,
    gates_x: Tensor | None,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    options: RecurrenceOptions,
    output: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    cells: Tensor | None,
    saved: Tensor | None,
    call: Call | None = None,
) -> Any:
    """Fill output, h_n, c_n and, where wanted, cells and saved."""
    return (call or native.cpu_lstm_forward)(
        _DTYPES[h0.dtype],
        torch.get_num_threads(),
        (x if batch_sizes is None else batch_sizes).shape[0],
        h0.shape[-2],
        0 if batch_sizes is None else batch_sizes.data_ptr(),
        options.reverse,
        c0.shape[-1],
        0 if w_hr is None else w_hr.shape[0],
        x.shape[-1],
        x.data_ptr(),
        0 if w_ih is None else w_ih.data_ptr(),
        0 if b_ih is None else b_ih.data_ptr(),
        0 if gates_x is None else gates_x.data_ptr(),
        w_hh.data_ptr(),
        0 if b_hh is None else b_hh.data_ptr(),
        0 if w_hr is None else w_hr.data_ptr(),
        h0.data_ptr(),
        c0.data_ptr(),
        output.data_ptr(),
        h_n.data_ptr(),
        c_n.data_ptr(),
        0 if cells is None else cells.data_ptr(),
        0 if saved is None else saved.data_ptr(),
    )


def lstm_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    w_hh: Tensor,
    w_hr: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    output: Tensor,
    cells: Tensor,
    saved: Tensor,
    batch_sizes: Tensor | None,
    options: RecurrenceOptions,
    dgates: Tensor,
    dh0: Tensor | None,
    dc0: Tensor | None,
    dproj: Tensor | None,
    unprojected: Tensor | None,
    call: Call | None = None,
) -> Any:
    """Fill dgates, dh0 and dc0 (both or neither) and, with a projection, dproj and unprojected."""
    return (call or native.cpu_lstm_backward)(
        _DTYPES[h0.dtype],
        torch.get_num_threads(),
        (output if batch_sizes is None else batch_sizes).shape[0],
        h0.shape[-2],
        0 if batch_sizes is None else batch_sizes.data_ptr(),
        options.reverse,
        c0.shape[-1],
        0 if w_hr is None else w_hr.shape[0],
        0 if grad_output is None else grad_output.data_ptr(),
        0 if grad_h_n is None else grad_h_n.data_ptr(),
        0 if grad_c_n is None else grad_c_n.data_ptr(),
        0 if grad_cells is None else grad_cells.data_ptr(),
        w_hh.data_ptr(),
        0 if w_hr is None else w_hr.data_ptr(),
        c0.data_ptr(),
        cells.data_ptr(),
        saved.data_ptr(),
        dgates.data_ptr(),
        0 if dh0 is None else dh0.data_ptr(),
        0 if dc0 is None else dc0.data_ptr(),
        0 if dproj is None else dproj.data_ptr(),
        0 if unprojected is None else unprojected.data_ptr(),
    )


def gru_forward(
    x: Tensor,
    w_ih: Tensor | None,
    b_ih: Tensor | None,
    gates_x: Tensor | None,
    w_hh: Tensor,
    b_hh: Tensor | None,
    h0: Tensor,
    batch_sizes: Tensor | None,
    options: RecurrenceOptions,
    output: Tensor,
    h_n: Tensor,
    saved: Tensor | None,
    call: Call | None = None,
) -> Any:
    """Fill output, h_n and, where wanted, saved."""
    return (call or native.cpu_gru_forward)(
        _DTYPES[h0.dtype],
        torch.get_num_threads(),
        (x if batch_sizes is None else batch_sizes).shape[0],
        h0.shape[-2],
        0 if batch_sizes is None else batch_sizes.data_ptr(),
        options.reverse,
        h0.shape[-1],
        options.reset == "before",
        x.shape[-1],
        x.data_ptr(),
        0 if w_ih is None else w_ih.data_ptr(),
        0 if b_ih is None else b_ih.data_ptr(),
        0 if gates_x is None else gates_x.data_ptr(),
        w_hh.data_ptr(),
        0 if b_hh is None else b_hh.data_ptr(),
        h0.data_ptr(),
        output.data_ptr(),
        h_n.data_ptr(),
        0 if saved is None else saved.data_ptr(),
    )


def gru_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    w_hh: Tensor,
    h0: Tensor,
    output: Tensor,
    saved: Tensor,
    batch_sizes: Tensor | None,
    options: RecurrenceOptions,
    dgates: Tensor,
    candidate: Tensor,
    dh0: Tensor | None,
    call: Call | None = None,
) -> Any:
    """Fill dgates, dh0 and candidate (see csrc/core/params.h)."""
    return (call or native.cpu_gru_backward)(
        _DTYPES[h0.dtype],
        torch.get_num_threads(),
        (output if batch_sizes is None else batch_sizes).shape[0],
        h0.shape[-2],
        0 if batch_sizes is None else batch_sizes.data_ptr(),
        options.reverse,
        h0.shape[-1],
        options.reset == "before",
        0 if grad_output is None else grad_output.data_ptr(),
        0 if grad_h_n is None else grad_h_n.data_ptr(),
        w_hh.data_ptr(),
        h0.data_ptr(),
        output.data_ptr(),
        saved.data_ptr(),
        dgates.data_ptr(),
        candidate.data_ptr(),
        0 if dh0 is None else dh0.data_ptr(),
    )


# Multiply-adds that a call of a library's GEMM costs by itself, several times over: so little work
# is best done in one call of our own.
_LITTLE_WORK = 2_000_000


def multiplies(dtype: torch.dtype, work: int) -> bool:
    """Whether :func:`linear` and the gradients below are faster than PyTorch's products.

    ``work``: multiply-adds. That was measured to be so on AMD's CPUs, and is so where oneDNN has no
    product for a 16-bit dtype.
    """
    pays = work <= _LITTLE_WORK or native.cpu_products_pay()
    return bool(pays or not _onednn_multiplies(dtype))


@functools.cache
def _onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether PyTorch's products of a dtype are not its own, slow ones, as far as that is known."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    # Without oneDNN (on a Mac) the question does not exist.
    supported = name and getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return bool(supported()) if supported else True


def linear(x: Tensor, w: Tensor, out: Tensor) -> None:
    """``out = x w^T``; x [N, I], w [V, I], contiguous."""
    native.cpu_linear(
        *(_DTYPES[x.dtype], torch.get_num_threads(), len(x), x.shape[1], len(w)),
        *(x.data_ptr(), w.data_ptr(), out.data_ptr()),
    )


def linear_gradients(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    dx: Tensor | None,
    dw: Tensor | None,
    *,
    scale: float = 1.0,
    accumulates: bool = False,
) -> None:
    """``dx = scale grad w`` and ``dw = scale grad^T x``, or, if it accumulates, ``dw`` plus that.

    grad [N, V], x [N, I], w [V, I]; all contiguous.
    """
    native.cpu_layer_gradients(
        *(_DTYPES[x.dtype], torch.get_num_threads(), 1, len(x), 0, False, len(x)),
        *(1, grad.shape[1], 0, x.shape[1], False, scale, accumulates),
        *(grad.data_ptr(), 0, 0, 0, x.data_ptr(), 0, 0, w.data_ptr()),
        0 if dx is None else dx.data_ptr(),
        0 if dw is None else dw.data_ptr(),
        *(0, 0, 0, 0),
    )


def layer_gradients(
    dgates: Tensor,
    candidate: Tensor | None,
    dproj: Tensor | None,
    unprojected: Tensor | None,
    x: Tensor,
    h0: Tensor,
    output: Tensor,
    w_ih: Tensor | None,
    batch_sizes: Tensor | None,
    options: RecurrenceOptions,
    dx: Tensor | None,
    dw_ih: Tensor | None,
    dw_hh: Tensor | None,
    dw_hr: Tensor | None,
    db_ih: Tensor | None,
    db_hh: Tensor | None,
    call: Call | None = None,
) -> Any:
    """Fill the gradients that are not None (see csrc/core/params.h)."""
    hidden = (output if unprojected is None else unprojected).shape[-1]
    return (call or native.cpu_layer_gradients)(
        _DTYPES[x.dtype],
        torch.get_num_threads(),
        (x if batch_sizes is None else batch_sizes).shape[0],
        h0.shape[-2],
        0 if batch_sizes is None else batch_sizes.data_ptr(),
        options.reverse,
        dgates.numel() // dgates.shape[-1],
        dgates.shape[-1] // hidden,
        hidden,
        0 if dproj is None else dproj.shape[-1],
        x.shape[-1],
        options.reset == "before",
        1.0,
        False,
        dgates.data_ptr(),
        0 if candidate is None else candidate.data_ptr(),
        0 if dproj is None else dproj.data_ptr(),
        0 if unprojected is None else unprojected.data_ptr(),
        x.data_ptr(),
        h0.data_ptr(),
        output.data_ptr(),
        0 if w_ih is None else w_ih.data_ptr(),
        0 if dx is None else dx.data_ptr(),
        0 if dw_ih is None else dw_ih.data_ptr(),
        0 if dw_hh is None else dw_hh.data_ptr(),
        0 if dw_hr is None else dw_hr.data_ptr(),
        0 if db_ih is None else db_ih.data_ptr(),
        0 if db_hh is None else db_hh.data_ptr(),
    )


def supports_cross_entropy(dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    """Whether the head's kernel runs on such logits, and why (not)."""
    if device.type != "cpu":
        return False, f"tensors are on {device.type}"
    return available() if dtype in _DTYPES else (False, f"no kernel for {dtype}")


def cross_entropy(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    class_weight_sum: float,
    ignore_index: int,
    label_smoothing: float,
    upstream: Tensor | None,
    gradient: bool,
    losses: Tensor,
    bias_grad: Tensor | None,
) -> None:
    """Fill losses, turn logits into their gradient, add to bias_grad (see csrc/core/params.h)."""
    native.cpu_cross_entropy(
        _DTYPES[logits.dtype],
        torch.get_num_threads(),
        len(logits),
        logits.shape[1],
        logits.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        target.data_ptr(),
        0 if class_weight is None else class_weight.data_ptr(),
        class_weight_sum,
        ignore_index,
        label_smoothing,
        0 if upstream is None else upstream.data_ptr(),
        gradient,
        losses.data_ptr(),
        0 if bias_grad is None else bias_grad.data_ptr(),
    )


def supports_dropout(dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    """Whether the kernel runs on such tensors, and why (not)."""
    return supports_cross_entropy(dtype, device)


def dropout(x: Tensor, p: float, seed: int, out: Tensor) -> None:
    """Fill out with what is kept of x, scaled (see csrc/core/params.h)."""
    native.cpu_dropout(
        _DTYPES[x.dtype],
        torch.get_num_threads(),
        x.numel(),
        seed,
        p,
        1.0 / (1.0 - p) if p < 1.0 else 0.0,
        x.data_ptr(),
        out.data_ptr(),
    )
