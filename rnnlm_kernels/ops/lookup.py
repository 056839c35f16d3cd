"""The input's part of a layer's gates, where every position reads a row of a table.

The projection of a row is computed once, however many positions read it, and so are its gradients:
what the gates of those positions pass back is summed first. PyTorch's operations can do all of
that. On CPUs whose products are done by kernels of this package (docs/performance-log.md) one node
of autograd does it by those.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import cpu
from ..reference import state_dtype
from .planning import are_batched, must_be_plain, nobody_watches
from .products import contiguous


def projected_rows(table: Tensor, index: Tensor, w_ih: Tensor, b_ih: Tensor | None) -> Tensor:
    """``(table W_ih^T + b_ih)[index]``, differentiable in every way.

    Args:
        table: ``[U, I]``. w_ih: ``[G*H, I]``. b_ih: ``[G*H]`` or None.
        index: int64 or int32, rows of the table.

    Returns:
        ``[*index.shape, G*H]``.

    Raises:
        IndexError: a value of ``index`` is no row of the table.

    Example:
        >>> projected_rows(torch.eye(2), torch.tensor([1, 1]), torch.tensor([[2.0, 3.0]]), None)
        tensor([[3.],
                [3.]])
    """
    tensors = (table, w_ih, b_ih)
    own = (
        table.is_cpu
        and not must_be_plain()
        and nobody_watches(*tensors, index)
        and cpu.available()[0]
        and cpu.multiplies(table.dtype, table.numel() * len(w_ih))
        and table.numel()
    )
    try:
        return _Own.apply(table, index, w_ih, b_ih) if own else _plain(table, index, w_ih, b_ih)
    except IndexError:
        raise IndexError(
            f"index should name rows of the input, 0 to {len(table) - 1}, got "
            f"{int(index.min())} to {int(index.max())}"
        ) from None


def _plain(table: Tensor, index: Tensor, w_ih: Tensor, b_ih: Tensor | None) -> Tensor:
    gates = F.linear(table, w_ih, b_ih)
    # In the dtype of sums: the gradient of a row is one, over all positions that read it.
    return F.embedding(index, gates.to(state_dtype(gates.dtype))).to(gates.dtype)


class _Own(torch.autograd.Function):
    """The same by the CPU backend's products."""

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, index: Tensor, w_ih: Tensor, b_ih: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(table, index, w_ih)
        table, w_ih = contiguous(table, w_ih)
        gates = table.new_empty(len(table), len(w_ih))
        cpu.linear(table, w_ih, gates)
        if b_ih is not None:
            gates += b_ih
        return F.embedding(index, gates)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        table, index, w_ih = ctx.saved_tensors
        need_table, _, need_w_ih, need_b_ih = ctx.needs_input_grad
        wide = grads[0].to(state_dtype(table.dtype))
        summed = torch.ops.aten.embedding_dense_backward(wide, index, len(table), -1, False)
        grad = summed.to(table.dtype)
        d_table: Tensor | None = None
        d_w_ih: Tensor | None = None
        if torch.is_grad_enabled() or are_batched(grad):
            d_table = grad @ w_ih if need_table else None
            d_w_ih = grad.mT @ table if need_w_ih else None
        elif need_table or need_w_ih:
            grad, table, w_ih = contiguous(grad, table, w_ih)
            d_table = torch.empty_like(table) if need_table else None
            d_w_ih = torch.empty_like(w_ih) if need_w_ih else None
            cpu.linear_gradients(grad, table, w_ih, d_table, d_w_ih)
        return d_table, None, d_w_ih, summed.sum(-2).to(grad.dtype) if need_b_ih else None
