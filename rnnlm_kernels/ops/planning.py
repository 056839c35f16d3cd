"""Which backend runs a layer, and whether a call may skip PyTorch's dispatcher."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import dispatch
from ..backends import BACKENDS
from ..options import Problem, RecurrenceOptions
from .checks import check_alike, check_layer

Shape = torch.Size


@functools.lru_cache(maxsize=1024)
def _choose(
    cell: str,
    dtype: torch.dtype,
    device: torch.device,
    x: Shape,
    h0: Shape,
    c0: Shape | None,
    w_ih: Shape | None,
    w_hh: Shape,
    b_ih: Shape | None,
    b_hh: Shape | None,
    w_hr: Shape | None,
    batch_sizes: tuple[Shape, torch.dtype, torch.device] | None,
    reset: str,
    reverse: bool,
    save: bool,
    return_cells: bool,
    backend: str | None,
    environment: str | None,
) -> tuple[ModuleType, RecurrenceOptions]:
    """Check a layer's shapes and choose its backend.

    The choice may not depend on T or B: under torch.compile those are symbols. ``environment`` is
    the value of RNNLM_BACKEND, for :func:`dispatch.choose` reads it too.
    """
    del environment
    gates = 4 if cell == "lstm" else 3
    check_layer(gates, dtype, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes)
    options = RecurrenceOptions(reset, reverse, batch_sizes is not None, return_cells)
    problem = Problem(
        cell=cell,
        input_size=0 if w_ih is None else int(w_ih[1]),
        hidden_size=int(w_hh[0]) // gates,
        proj_size=0 if w_hr is None else int(w_hh[1]),
        dtype=dtype,
        device=device.type,
        training=save,
        options=options,
    )
    return BACKENDS[dispatch.choose(problem, backend)], options


def plan_layer(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reset: str,
    reverse: bool,
    save: bool,
    return_cells: bool,
    backend: str | None,
    symbolic: bool = False,
) -> tuple[ModuleType, RecurrenceOptions]:
    """Check a layer's tensors; the backend module that runs it, and the options to hand it.

    Both follow from dtype, device, shapes and options, and are worked out once for each combination
    of those: a lookup costs a third of the work. ``symbolic``: sizes may be symbols, which nobody
    can look up.
    """
    check_alike(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    choose = _choose.__wrapped__ if symbolic else _choose
    return choose(
        cell,
        x.dtype,
        x.device,
        x.shape,
        h0.shape,
        None if c0 is None else c0.shape,
        None if w_ih is None else w_ih.shape,
        w_hh.shape,
        None if b_ih is None else b_ih.shape,
        None if b_hh is None else b_hh.shape,
        None if w_hr is None else w_hr.shape,
        None if batch_sizes is None else (batch_sizes.shape, batch_sizes.dtype, batch_sizes.device),
        reset,
        reverse,
        save,
        return_cells,
        backend,
        dispatch.from_environment() if backend is None else None,
    )


Plan = tuple[ModuleType, RecurrenceOptions]

# How calls of one layer run, by how they look (look_of). A step of a small layer takes 15 us, and a
# third of that would go into checks that a call before has passed. None for calls that have to go
# the ordinary way: the backend gets copies of their tensors, they have no results, or they are for
# another backend than the CPU's.
known_plans: dict[tuple[Any, ...], Plan | None] = {}


def look_of(tensors: tuple[Tensor | None, ...], *options: Any) -> tuple[Any, ...] | None:
    """All that checks and choices of an inference call go by, or None where somebody watches it.

    The values and the addresses of its tensors are not part of how a call looks.
    """
    if (
        torch.compiler.is_compiling()  # first: a compiler could not trace the others
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch._C._autograd._profiler_enabled()
        or must_be_plain()
        or not nobody_intercepts(*tensors)
    ):
        return None
    looks = [
        None if t is None else (t.shape, t.dtype, t.device, t.is_contiguous() and not t.is_neg())
        for t in tensors
    ]
    return (dispatch.from_environment(), *options, *looks)


def remember(
    look: tuple[Any, ...],
    cell: str,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    layer: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    reset: str,
    batch_first: bool,
    backend: str | None,
) -> None:
    """Keep in ``known_plans`` how a call of one layer that has gone through ran."""
    if look in known_plans:
        return
    x = input.transpose(0, 1) if batch_first else input
    w_ih, w_hh, b_ih, b_hh, w_hr = layer
    module, options = plan_layer(
        *(cell, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, None),
        *(reset, False, False, False, backend),
    )
    as_they_are = all(
        t is None or (t.is_contiguous() and not t.is_neg()) for t in (input, x, h0, c0, *layer)
    )
    if len(known_plans) >= 1024:
        known_plans.clear()
    known = module is BACKENDS["cpu"] and as_they_are and h0.numel()
    known_plans[look] = (module, options) if known else None


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
