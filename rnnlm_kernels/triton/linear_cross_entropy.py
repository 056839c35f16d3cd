"""The part of a linear + cross-entropy head that is not a matrix product: one program a row.

A chunk of logits [rows, classes] becomes losses and, in place, the gradient with respect to the
logits; :mod:`rnnlm_kernels.ops.linear_cross_entropy` cuts the chunks and multiplies the matrices.
What is computed is in csrc/core/params.h (CrossEntropy).

A program reads its row twice, in blocks of classes. First for the sum of exponentials: every lane
keeps the maximum of what it has seen and its sum relative to that, and the lanes are joined at the
end, so no block waits for a reduction. Then for the gradient, which is written where the logit was.
The bias is added as logits are read. No program reads what another writes.

As of PyTorch, a row in which a logit is NaN or +inf has NaN everywhere, unless it is ignored. A
target that is no class makes the loss of its row NaN; nothing is read or written outside the row.
"""

# mypy: disable-error-code="no-untyped-def"
# The arguments of a device function are pointers, blocks or compile-time constants: no types.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Classes of a block and the warps of a program: eight values a lane, at which two programs fit on a
# multiprocessor with every option.
BLOCK = 2048
WARPS = 8


@triton.jit
def _logits(row, bias, column, classes):
    """A block of logits with their bias, float32; -inf behind the last class."""
    inside = column < classes
    x = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, x, float("-inf"))


@triton.jit
def cross_entropy_rows(
    logits,
    bias,
    targets,
    class_weight,
    upstream,
    losses,
    classes,
    ignore_index,
    label_smoothing,
    class_weight_sum,
    GRADIENT: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss and gradient of one row."""
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * classes
    target = tl.load(targets + index)
    lanes = tl.arange(0, BLOCK)
    if target == ignore_index:
        tl.store(losses + index, 0.0)
        if GRADIENT:
            for start in range(0, classes, BLOCK):
                column = start + lanes
                zeros = tl.zeros([BLOCK], logits.dtype.element_ty)
                tl.store(row + column, zeros, mask=column < classes)
    else:
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        sums = tl.zeros([BLOCK], tl.float32)
        weighted = tl.zeros([BLOCK], tl.float32)  # sum of w[c] x[c]
        for start in range(0, classes, BLOCK):
            column = start + lanes
            x = _logits(row, bias, column, classes)
            larger = tl.maximum(largest, x)  # passes over a NaN, which makes the sum NaN
            # -inf minus -inf would be NaN.
            kept = tl.where(largest == larger, 1.0, tl.exp(largest - larger))
            sums = sums * kept + tl.where(x == float("-inf"), 0.0, tl.exp(x - larger))
            largest = larger
            if SMOOTH:
                weight = tl.full([BLOCK], 1.0, tl.float32)
                if class_weight is not None:
                    weight = tl.load(class_weight + column, mask=column < classes, other=0.0)
                weighted += tl.where(column < classes, weight * x, 0.0)
        m = tl.max(largest, 0)
        total = tl.sum(sums * tl.where(largest == m, 1.0, tl.exp(largest - m)), 0)

        exists = (target >= 0) & (target < classes)
        at_target = tl.load(row + target, mask=exists, other=float("nan")).to(tl.float32)
        if bias is not None:
            at_target += tl.load(bias + target, mask=exists, other=0.0).to(tl.float32)
        hit = 1.0 - label_smoothing
        if class_weight is not None:
            hit *= tl.load(class_weight + target, mask=exists, other=0.0)
        loss = hit * (tl.log(total) - (at_target - m))
        coefficient = hit
        even = label_smoothing / classes
        if SMOOTH:
            loss += even * (class_weight_sum * (tl.log(total) + m) - tl.sum(weighted, 0))
            coefficient += even * class_weight_sum
        tl.store(losses + index, loss)

        if GRADIENT:
            factor = 1.0
            if upstream is not None:
                factor = tl.load(upstream + index)
            scale = coefficient / total
            for start in range(0, classes, BLOCK):
                column = start + lanes
                x = _logits(row, bias, column, classes)
                g = tl.exp(x - m) * scale
                if SMOOTH:
                    if class_weight is not None:
                        g -= even * tl.load(class_weight + column, mask=column < classes, other=0.0)
                    else:
                        g -= even
                g = tl.where(column == target, g - hit, g) * factor
                tl.store(row + column, g.to(logits.dtype.element_ty), mask=column < classes)


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
    rows, classes = logits.shape
    block = min(BLOCK, triton.next_power_of_2(classes))
    cross_entropy_rows[(rows,)](
        logits,
        bias,
        target,
        class_weight,
        upstream,
        losses,
        classes,
        ignore_index,
        label_smoothing,
        float(classes) if class_weight is None else class_weight_sum,
        GRADIENT=gradient,
        SMOOTH=label_smoothing != 0.0,
        BLOCK=block,
        num_warps=max(1, min(WARPS, block // 256)),
    )
    if bias_grad is not None:
        bias_grad += logits.sum(0, dtype=bias_grad.dtype)
