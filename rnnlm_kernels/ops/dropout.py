"""Dropout whose mask is drawn again in backward, not kept.

On CPUs PyTorch draws one number of a mask after the other, on one thread (not with MKL and an Intel
CPU): 12 ns each on an AMD, an eighth of an update of AWD-LSTM. The CPU kernel takes one number
from PyTorch's generator, as the seed of random numbers that follow from it and from an element's
position alone (csrc/device/philox.h).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import cpu
from .planning import are_batched, must_be_plain, nobody_intercepts
from .products import contiguous

# Fewer elements are PyTorch's: autograd in Python takes longer than drawing one after the other.
_FEW = 4096


def dropout(x: Tensor, p: float) -> Tensor:
    """``x / (1 - p)``, or zero with probability ``p``, for each element.

    What :func:`torch.nn.functional.dropout` is in training; it is what runs where the CPU kernel
    cannot. In the dtype and shape of ``x``, differentiable in every way.
    """
    own = (
        x.is_cpu
        and x.numel() >= _FEW
        and 0.0 < p <= 1.0
        and not must_be_plain()
        and nobody_intercepts(x)
        and cpu.supports_dropout(x.dtype, x.device)[0]
    )
    if not own:
        return F.dropout(x, p)
    # Of PyTorch's default generator: what its masks would be drawn from.
    seed = int(torch.empty((), dtype=torch.int64).random_())
    dropped: Tensor = _Dropout.apply(x, p, seed)
    return dropped


def _dropped(x: Tensor, p: float, seed: int) -> Tensor:
    (x,) = contiguous(x)
    y = torch.empty_like(x)
    cpu.dropout(x, p, seed, y)
    return y


class _Dropout(torch.autograd.Function):
    """The kernel, which is linear: the gradient is the same of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.p, ctx.seed = p, seed
        return _dropped(x, p, seed)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (grad,) = grads
        if must_be_plain() or are_batched(grad) or not nobody_intercepts(grad):
            # Its own shape: of several gradients at once, grad has that of one.
            ones = torch.ones(grad.shape, dtype=grad.dtype)
            return grad * _dropped(ones, ctx.p, ctx.seed), None, None
        return _Dropout.apply(grad, ctx.p, ctx.seed), None, None
