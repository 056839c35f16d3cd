"""Rows of an embedding times a number per word and a mask per batch row: one program a vector.

A program owns ``BLOCK`` features of the vector of one token, forward and backward: it reads the
token, one number of ``row_scale``, a piece of a row of ``weight`` (or of the upstream gradient) and
of ``mask``, and writes their product. No program reads what another writes, and nothing is added
up here: :mod:`rnnlm_kernels.ops.embedding_dropout` sums the gradient per word.

Products are float32, from left to right as PyTorch takes them, and rounded once. A token that is no
word reads no row: its vector is NaN, and its gradient is 0 for the nearest word.
"""

# mypy: disable-error-code="no-untyped-def"
# The arguments of a device function are pointers, blocks or compile-time constants: no types.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Features of a program, one warp: eight a lane. Embeddings are some hundreds wide and rarely a
# power of two, of which larger blocks would leave more lanes idle.
BLOCK = 256


@triton.jit
def gather_vectors(
    weight, tokens, row_scale, mask, output, words, width, batch, BLOCK: tl.constexpr
):
    """output[n] = weight[tokens[n]] * row_scale[tokens[n]] * mask[n % batch]."""
    position = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    token = tl.load(tokens + position).to(tl.int64)
    exists = (token >= 0) & (token < words)
    row = weight + token * width + column
    x = tl.load(row, mask=inside & exists, other=float("nan")).to(tl.float32)
    if row_scale is not None:
        x *= tl.load(row_scale + token, mask=exists, other=0.0).to(tl.float32)
    if mask is not None:
        row = mask + position % batch * width + column
        x *= tl.load(row, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + position * width + column, x.to(output.dtype.element_ty), mask=inside)


@triton.jit
def scale_gradient(
    grad, tokens, row_scale, mask, scaled, known, words, width, batch, BLOCK: tl.constexpr
):
    """scaled[n] = grad[n] * mask[n % batch] * row_scale[tokens[n]]; known[n] is a word."""
    position = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    token = tl.load(tokens + position).to(tl.int64)
    exists = (token >= 0) & (token < words)
    # A gradient of a token that is no word is not read: it may be NaN, and NaN * 0 is not 0.
    x = tl.load(grad + position * width + column, mask=inside & exists, other=0.0).to(tl.float32)
    if mask is not None:
        row = mask + position % batch * width + column
        x *= tl.load(row, mask=inside & exists, other=0.0).to(tl.float32)
    if row_scale is not None:
        x *= tl.load(row_scale + token, mask=exists, other=0.0).to(tl.float32)
    tl.store(scaled + position * width + column, x.to(scaled.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        nearest = tl.minimum(tl.maximum(token, 0), words - 1)
        tl.store(known + position, nearest.to(known.dtype.element_ty))


def forward(
    weight: Tensor, tokens: Tensor, row_scale: Tensor | None, mask: Tensor | None, output: Tensor
) -> None:
    """Fill output [..., B, E], which is not empty; everything is contiguous."""
    words, width = weight.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    gather_vectors[(tokens.numel(), triton.cdiv(width, block))](
        *(weight, tokens, row_scale, mask, output, words, width, _batch(mask)),
        BLOCK=block,
        num_warps=1,
    )


def backward(
    grad: Tensor,
    tokens: Tensor,
    words: int,
    row_scale: Tensor | None,
    mask: Tensor | None,
    scaled: Tensor,
    known: Tensor,
) -> None:
    """Fill scaled [..., B, E], which is not empty, and known [..., B]; everything is contiguous."""
    width = grad.shape[-1]
    block = min(BLOCK, triton.next_power_of_2(width))
    scale_gradient[(tokens.numel(), triton.cdiv(width, block))](
        *(grad, tokens, row_scale, mask, scaled, known, words, width, _batch(mask)),
        BLOCK=block,
        num_warps=1,
    )


def _batch(mask: Tensor | None) -> int:
    return 1 if mask is None else len(mask)
