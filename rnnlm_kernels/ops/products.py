"""What both layers do outside the kernels, in PyTorch: the projection, weight gradients, memory."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..options import RecurrenceOptions


def empty_contiguous_like(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous():  # then the quicker call does it
        return torch.empty_like(tensor)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Kernels read memory from the first element on: no strides, no lazy negation."""
    for t in tensors:
        if t is not None and (t.is_neg() or not t.is_contiguous()):
            return tuple(t if t is None else t.resolve_neg().contiguous() for t in tensors)
    return tensors


def with_input_gates(
    module: ModuleType, x: Tensor, w_ih: Tensor | None, b_ih: Tensor | None, *others: Tensor | None
) -> tuple[Any, ...]:
    """What forward of a backend takes first: x, w_ih, b_ih, gates_x, and ``others`` contiguous.

    gates_x is the projection ``x W_ih^T + b_ih`` of all steps at once, ``[*, G*H]``: x itself where
    it is not to be projected, None where the backend does that (``PROJECTS_INPUT``).
    """
    if w_ih is None:
        x, *rest = contiguous(x, *others)
        return (x, None, None, x, *rest)
    if module.PROJECTS_INPUT:
        return contiguous(x, w_ih, b_ih, None, *others)
    gates_x = torch.nn.functional.linear(x, w_ih, b_ih).contiguous()
    return (x, w_ih, b_ih, gates_x, *contiguous(*others))


def multiplies(module: ModuleType, dgates: Tensor, w_ih: Tensor | None, w_hh: Tensor) -> bool:
    """Whether a backend's own kernels do what is left of backward after the recurrence."""
    work = dgates.numel() * (w_hh.shape[1] if w_ih is None else 2 * w_ih.shape[1])
    return hasattr(module, "multiplies") and module.multiplies(dgates.dtype, work)


def layer_gradients(
    module: ModuleType,
    options: RecurrenceOptions,
    x: Tensor,
    h0: Tensor,
    weights: tuple[Tensor | None, Tensor, Tensor | None],
    batch_sizes: Tensor | None,
    output: Tensor,
    dgates: Tensor,
    candidate: Tensor | None,
    dproj: Tensor | None,
    unprojected: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """By the backend's kernel: gradients of x, w_ih, w_hh, b_ih, b_hh, w_hr; which, ``needs`` says.

    ``weights``: w_ih, w_hh and w_hr.
    """
    w_ih, w_hh, w_hr = weights
    need_x, need_w_ih, need_w_hh, need_b_ih, need_b_hh, need_w_hr = needs
    rows = len(w_hh)
    dx = empty_contiguous_like(x) if need_x and w_ih is not None else None
    dw_ih = empty_contiguous_like(w_ih) if need_w_ih and w_ih is not None else None
    dw_hh = empty_contiguous_like(w_hh) if need_w_hh else None
    dw_hr = empty_contiguous_like(w_hr) if need_w_hr and w_hr is not None else None
    db_ih = x.new_empty(rows) if need_b_ih else None
    db_hh = x.new_empty(rows) if need_b_hh else None
    module.layer_gradients(
        *(dgates, candidate, dproj, unprojected),
        *contiguous(x, h0, output, w_ih, batch_sizes),
        options,
        *(dx, dw_ih, dw_hh, dw_hr, db_ih, db_hh),
    )
    if need_x and w_ih is None:
        dx = dgates
    return dx, dw_ih, dw_hh, db_ih, db_hh, dw_hr


def input_grads(
    x: Tensor, w_ih: Tensor | None, dgates: Tensor, need_x: bool, need_w_ih: bool
) -> tuple[Tensor | None, Tensor | None]:
    """By PyTorch: gradients of x and of w_ih, None where they are not needed."""
    if w_ih is None:
        return (dgates if need_x else None), None
    dgates = dgates.flatten(0, -2)
    dx = (dgates @ w_ih).view(x.shape) if need_x else None
    return dx, (dgates.t() @ x.flatten(0, -2) if need_w_ih else None)


def recurrent_weight_grad(
    output: Tensor,
    h0: Tensor,
    batch_sizes: Tensor | None,
    reverse: bool,
    dgates: Tensor,
    out: Tensor,
) -> Tensor:
    """``out = sum_t dgates_t^T h_{t-1}``, where the h before a row's first step is ``h0``."""
    dgates = dgates.flatten(0, -2)
    (rows, h), *rest = previous_hidden(output, h0, batch_sizes, reverse)
    torch.mm(dgates[rows].t(), h, out=out)
    for rows, h in rest:
        out.addmm_(dgates[rows].t(), h)
    return out


def previous_hidden(
    output: Tensor, h0: Tensor, batch_sizes: Tensor | None, reverse: bool
) -> list[tuple[slice, Tensor]]:
    """h before every step, in parts: which of all N rows, and their h ``[rows, R]``.

    The h before a row's first step is ``h0 [B, R]``. The parts cover every row once; of dense
    input they are views.
    """
    if batch_sizes is not None:
        return [(slice(None), _packed_previous(output, h0, batch_sizes, reverse))]
    batch, steps = h0.size(0), output.flatten(0, 1)
    rest = steps.size(0) - batch
    if not rest:
        return [(slice(None), h0)]
    if reverse:
        return [(slice(rest, None), h0), (slice(rest), steps[batch:])]
    return [(slice(batch), h0), (slice(batch, None), steps[:rest])]


def _packed_previous(output: Tensor, h0: Tensor, batch_sizes: Tensor, reverse: bool) -> Tensor:
    """h before each packed step, ``[N, R]``, put together from slices of ``output`` and ``h0``.

    (Not gathered: an index would have to be copied to a GPU, which a CUDA graph would repeat from
    memory that is long gone.)
    """
    sizes = batch_sizes.tolist()
    steps = output.split(sizes)
    if reverse:  # The step before t is t+1, which holds the first sizes[t+1] rows.
        pieces = []
        for step, rows, held in zip(steps[1:], sizes, sizes[1:], strict=False):
            pieces.append(step)
            if held < rows:
                pieces.append(h0[held:rows])
        pieces.append(h0[: sizes[-1]])
    else:
        pieces = [h0[: sizes[0]]]
        pieces += [
            step if len(step) == rows else step[:rows]
            for step, rows in zip(steps, sizes[1:], strict=False)
        ]
    return torch.cat(pieces)


def empty_for_none(x: Tensor, grads: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Operators return tensors: an empty one stands for a gradient nobody asked for."""
    return tuple(x.new_empty((0,)) if grad is None else grad for grad in grads)
