"""Which backend runs a layer, and whether a call may skip PyTorch's dispatcher."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import dispatch
from ..backends import BACKENDS
from ..options import Problem, RecurrenceOptions


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

    ``environment`` is the value of RNNLM_BACKEND, for :func:`dispatch.choose` reads it too.
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
    return BACKENDS[dispatch.choose(problem, backend)], options


def plan_layer(
    cell: str,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    batch_sizes: Tensor | None,
    reverse: bool,
    save: bool,
    backend: str | None,
    *,
    reset: str = "after",
    return_cells: bool = False,
    proj: bool = False,
) -> tuple[ModuleType, RecurrenceOptions]:
    """The backend module that runs a layer, and the options to hand it."""
    gate_rows, h_width = w_hh.shape
    return _choose(
        cell,
        int(w_ih.shape[1]),
        int(gate_rows),
        int(h_width),
        x.dtype,
        x.device.type,
        save,
        reset,
        reverse,
        batch_sizes is not None,
        return_cells,
        proj,
        backend,
        dispatch.from_environment() if backend is None else None,
    )


def nobody_watches(*tensors: Tensor | None) -> bool:
    """Whether an eager call on ``tensors`` may skip PyTorch's dispatcher.

    The dispatcher and its Python autograd wrapper cost 9 us of a call without gradients and 45 us
    of one with them, where the kernel may take 2. Skipping is right when nothing could intercept
    the call: no compiler, tracer, profiler, dispatch mode or tensor subclass. (Functional
    transforms and forward-mode AD never come here: see :func:`must_be_plain`.)
    """
    return nobody_intercepts(*tensors) and not torch._C._autograd._profiler_enabled()


def nobody_intercepts(*tensors: Tensor | None) -> bool:
    """Whether kernels see ``tensors`` as they are; a profiler changes nothing about that."""
    return (
        not torch.compiler.is_compiling()
        and PLAIN.issuperset(map(type, tensors))
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


def are_batched(*grads: Tensor | None) -> bool:
    """Whether backward got several gradients at once (``is_grads_batched=True``).

    They have no memory of their own; the dispatcher runs an operator on one after the other.
    """
    return any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads)


PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})


def must_be_plain() -> bool:
    """Whether a layer has to be computed by the plain PyTorch reference, without operators.

    ``torch.func`` and forward-mode AD differentiate and batch PyTorch's own operations; an operator
    of ours has no rule for them and would lose a tangent silently.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0
