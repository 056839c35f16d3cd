"""Dropout: of elements, and of what is looked up in an embedding.

:func:`dropout` is ``torch.nn.functional.dropout``, :func:`embedding_dropout`
``torch.nn.functional.embedding`` with two masks that recurrent language models put on it. How they
work: :mod:`rnnlm_kernels.ops.dropout`, :mod:`rnnlm_kernels.ops.embedding_dropout`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import dropout as elements
from .ops import embedding_dropout as operator


def dropout(input: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """``torch.nn.functional.dropout``, with masks that all threads of a CPU draw.

    There PyTorch draws a mask on one thread, number by number, unless it has MKL and an Intel CPU.
    This takes one number from PyTorch's default generator and draws the mask from that: on two
    cores of an AMD in a thirteenth of the time (against MKL it was not measured). So a seed gives
    the same mask for any number of threads and on any CPU, but not the one that PyTorch would draw;
    of fewer than 4096 elements it does. Backward draws the mask again instead of keeping it. On
    other devices, under ``torch.compile``, ``torch.func``, forward-mode AD and dispatch modes, it
    is PyTorch's.

    Args:
        input: floating point, any shape.
        p: probability of an element to be zeroed; the others are multiplied by ``1 / (1 - p)``.
        training: otherwise the input comes back.

    Returns:
        Of the shape and dtype of ``input``.

    Raises:
        ValueError: ``p`` is no probability.

    Example:
        >>> y = dropout(torch.ones(5000), 0.5)
        >>> sorted(set(y.tolist()))
        [0.0, 2.0]
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p should be a probability, between 0 and 1, got {p}")
    return elements.dropout(input, p) if training and p > 0.0 else input


def embedding_dropout(
    tokens: Tensor,
    weight: Tensor,
    *,
    row_scale: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rows of an embedding, times a number per word and a mask that is constant in time.

    ``weight[tokens] * row_scale[tokens] * mask``. The caller draws the masks; their values are 0
    and ``1 / (1 - p)`` for dropout (Gal and Ghahramani 2016, https://arxiv.org/abs/1512.05287), and
    may be anything. Differentiable in ``weight`` as often as wanted, by the same sums in the same
    order every time; the masks are constants.

    On a GPU with Triton one kernel reads, multiplies and writes: in float32 the bits of PyTorch's
    operations, in 16 bits rounded once instead of after every product. Everywhere else, and under
    ``torch.compile``, ``torch.func`` and dispatch modes, PyTorch's operations run.

    Args:
        tokens: int64 or int32 [..., B], any shape without ``mask``.
        weight: [V, E], floating point.
        row_scale: [V], in the dtype and on the device of ``weight``, as ``mask``.
        mask: [B, E].
        backend: ``"triton"``, ``"reference"`` (PyTorch's operations), ``"auto"``; None asks
            ``RNNLM_BACKEND`` and then chooses.

    Returns:
        [..., B, E], in the dtype of ``weight``.

    Raises:
        RuntimeError, ValueError: a shape, dtype or device does not fit; the message names it.
        IndexError: on the CPU, a token that is no word. The kernel reads nothing for one: its
            vector is NaN, and has no part in the gradient.
        BackendError: the requested backend cannot run this.

    Example:
        >>> weight, tokens = torch.ones(10, 4), torch.tensor([[1, 2], [3, 1]])
        >>> row_scale, mask = torch.ones(10), torch.full((2, 4), 2.0)
        >>> row_scale[1] = 0.0
        >>> embedding_dropout(tokens, weight, row_scale=row_scale, mask=mask)[..., 0]
        tensor([[0., 2.],
                [2., 0.]])
    """
    _check(tokens, weight, row_scale, mask)
    return operator.embedding_dropout(
        tokens,
        weight,
        None if row_scale is None else row_scale.detach(),
        None if mask is None else mask.detach(),
        backend=backend,
    )


def _check(tokens: Tensor, weight: Tensor, row_scale: Tensor | None, mask: Tensor | None) -> None:
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"tokens should be int64 or int32, got {tokens.dtype}")
    if not weight.is_floating_point():
        raise ValueError(f"weight should be a floating-point tensor, got {weight.dtype}")
    if weight.dim() != 2:
        raise RuntimeError(f"weight should be [V, E], got {list(weight.shape)}")
    words, width = weight.shape
    if row_scale is not None and row_scale.shape != (words,):
        raise RuntimeError(f"row_scale should have shape [{words}], got {list(row_scale.shape)}")
    if mask is not None:
        if tokens.dim() == 0:
            raise RuntimeError("mask is [B, E], and tokens have no dimension B")
        expected = (tokens.shape[-1], width)
        if mask.shape != expected:
            raise RuntimeError(f"mask should have shape {[*expected]}, got {list(mask.shape)}")
    for name, tensor in (("row_scale", row_scale), ("mask", mask)):
        if tensor is not None and tensor.dtype != weight.dtype:
            raise ValueError(
                f"{name} should have the dtype of weight ({weight.dtype}), got {tensor.dtype}"
            )
    for name, tensor in (("tokens", tokens), ("row_scale", row_scale), ("mask", mask)):
        if tensor is not None and tensor.device != weight.device:
            raise RuntimeError(
                f"{name} should be on the device of weight ({weight.device}), got {tensor.device}"
            )
