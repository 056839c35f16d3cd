"""An embedding with dropped words and a locked mask: one pass forward, one before the sum backward.

PyTorch's operations write the vectors three times, and gather the words' numbers apart. The kernel
reads each vector once and multiplies on the way. Backward is one pass as well: it multiplies the
upstream gradient by both masks, and torch's own backward of an embedding, which sorts by word and
adds without atomics, sums that per word: a fixed order, so the same bits every time.

On a CPU the operations are PyTorch's: there, fusing them does not pay (docs/performance-log.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..backends import triton
from .planning import are_batched, must_be_plain, nobody_intercepts


def _has_kernel(dtype: torch.dtype, device: torch.device, backend: str | None) -> bool:
    """Whether the kernel runs; what an argument asks for by name runs or raises."""
    if backend is None:
        # What the environment names may have recurrent layers only.
        backend = "reference" if dispatch.from_environment() == "reference" else "auto"
    if backend == "reference":
        return False
    if backend not in ("auto", "triton"):
        raise dispatch.BackendError(
            f"backend={backend!r} has no embedding_dropout; expected one of "
            "['auto', 'triton', 'reference']"
        )
    able, reason = triton.supports_embedding_dropout(dtype, device)
    if backend == "triton" and not able:
        raise dispatch.BackendError(f"backend='triton' cannot run embedding_dropout: {reason}")
    return able


def plain(tokens: Tensor, weight: Tensor, row_scale: Tensor | None, mask: Tensor | None) -> Tensor:
    """The same by PyTorch's own operations, differentiable in every way."""
    vectors = F.embedding(tokens, weight)
    if row_scale is not None:
        vectors = vectors * row_scale[tokens].unsqueeze(-1)
    return vectors if mask is None else vectors * mask


def _plain_backward(
    grad: Tensor, tokens: Tensor, words: int, row_scale: Tensor | None, mask: Tensor | None
) -> Tensor:
    """The gradient of the weight, as a function of ``grad`` that can be differentiated again."""
    if mask is not None:
        grad = grad * mask
    if row_scale is not None:
        grad = grad * row_scale[tokens].unsqueeze(-1)
    return _summed(grad, tokens, words)


def _summed(grad: Tensor, tokens: Tensor, words: int) -> Tensor:
    summed: Tensor = torch.ops.aten.embedding_dense_backward(grad, tokens, words, -1, False)
    return summed


class _Fused(torch.autograd.Function):
    """The kernel and its gradient."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, tokens: Tensor, row_scale: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        weight, tokens = weight.contiguous(), tokens.contiguous()
        row_scale = None if row_scale is None else row_scale.contiguous()
        mask = None if mask is None else mask.contiguous()
        ctx.save_for_backward(tokens, row_scale, mask)
        ctx.words = len(weight)
        output = weight.new_empty((*tokens.shape, weight.shape[1]))
        if output.numel():
            triton.embedding_dropout(weight, tokens, row_scale, mask, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        tokens, row_scale, mask = ctx.saved_tensors
        seen = not must_be_plain() and nobody_intercepts(grad, tokens, row_scale, mask)
        if torch.is_grad_enabled() or are_batched(grad) or not seen:
            return _plain_backward(grad, tokens, ctx.words, row_scale, mask), None, None, None
        if not grad.numel() or not ctx.words:
            return grad.new_zeros((ctx.words, grad.shape[-1])), None, None, None
        # Where a token is no word: the gradient 0, for a word that there is.
        grad = grad.contiguous()
        scaled, known = torch.empty_like(grad), torch.empty_like(tokens)
        triton.embedding_dropout_backward(grad, tokens, ctx.words, row_scale, mask, scaled, known)
        return _summed(scaled, known, ctx.words), None, None, None


def embedding_dropout(
    tokens: Tensor,
    weight: Tensor,
    row_scale: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """``weight[tokens] * row_scale[tokens] * mask``.

    Takes tensors that are checked; :func:`rnnlm_kernels.embedding_dropout` is for callers.

    Args:
        tokens: int64 or int32 [..., B]. weight: [V, E].
        row_scale: [V]. mask: [B, E]. Neither is differentiated.
        backend: see :func:`rnnlm_kernels.embedding_dropout`.

    Returns:
        [..., B, E].
    """
    fused = _has_kernel(weight.dtype, weight.device, backend)
    if not fused or must_be_plain() or not nobody_intercepts(weight, tokens, row_scale, mask):
        return plain(tokens, weight, row_scale, mask)
    vectors: Tensor = _Fused.apply(weight, tokens, row_scale, mask)
    return vectors
