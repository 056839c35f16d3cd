"""What both layers do outside the kernels, in PyTorch: the projection, weight gradients, memory."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def empty_contiguous_like(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous():  # then the quicker call does it
        return torch.empty_like(tensor)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """Kernels read memory from the first element on: no strides, no lazy negation."""
    return [
        t if t is None or (t.is_contiguous() and not t.is_neg()) else t.resolve_neg().contiguous()
        for t in tensors
    ]


def input_gates(
    module: ModuleType, x: Tensor, w_ih: Tensor, b_ih: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x, w_ih, b_ih and the projection ``x W_ih^T + b_ih`` of all steps at once, ``[*, G*H]``.

    The projection is None where the backend takes so few rows upon itself.
    """
    features = x.shape[-1]
    if features and x.numel() <= module.PROJECTS_ROWS * features:
        x, w_ih, b_ih = contiguous(x, w_ih, b_ih)
        return x, w_ih, b_ih, None
    return x, w_ih, b_ih, torch.nn.functional.linear(x, w_ih, b_ih).contiguous()


def recurrent_weight_grad(
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


def empty_for_none(x: Tensor, grads: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Operators return tensors: an empty one stands for a gradient nobody asked for."""
    return tuple(x.new_empty((0,)) if grad is None else grad for grad in grads)
