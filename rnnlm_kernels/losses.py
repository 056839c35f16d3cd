"""Cross-entropy of a linear map, for vocabularies whose logits are too many to keep.

:func:`linear_cross_entropy` is torch 2.13's function of that name, for every torch that this
package runs on: same arguments, shapes and results, computed some rows at a time.
:class:`LinearCrossEntropyLoss` is the module. How it works: :mod:`rnnlm_kernels.ops`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import _autocast_dtype, _cast
from .ops import linear_cross_entropy as operator

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy loss of ``linear(input, linear_weight, linear_bias)``, without all its logits.

    Exact up to rounding, and differentiable in ``input``, ``linear_weight`` (also one that is an
    embedding's) and ``linear_bias``, as often as wanted; under ``torch.compile``, autocast and
    ``torch.func`` too. Logits are never kept: a chunk of rows is taken from the product to the
    gradients of a summed or mean loss at once. Only second derivatives, ``torch.func`` and class
    probabilities as target go through all logits.

    Args:
        input: [..., H], float32, float64, bfloat16 or float16.
        linear_weight: [V, H], in the dtype and on the device of ``input``, as ``linear_bias``.
        target: int64 [...]: class indices; or, in the dtype of ``input``, [..., V]: a probability
            for every class.
        linear_bias: [V].
        weight: [V], a weight for the loss of each class; not differentiated.
        reduction: ``"mean"`` (over the targets that count, by their class weights), ``"sum"``, or
            ``"none"``: the loss of every target. For the last, backward computes the logits again:
            a third more work than the other two.
        ignore_index: targets of this value have loss 0 and do not count. None: -100.
        label_smoothing: in [0, 1]: share of the target's probability that is spread evenly over all
            classes (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567).
        dtype: of the result. None: that of ``input``, and float32 under autocast, as of torch's
            function; 16-bit input has its losses in float32 until then.
        chunk_size: rows that are taken at a time. None: some hundreds, by the size of their logits.
        backend: ``"cpu"``, ``"triton"``, ``"reference"`` (PyTorch's operations), ``"auto"``; None
            asks ``RNNLM_BACKEND`` and then chooses.

    Returns:
        A scalar, or [...] with ``reduction="none"``. The mean of no targets is NaN.

    Raises:
        RuntimeError, ValueError, IndexError: a shape, dtype, device or value does not fit; the
            message names it.
        BackendError: the requested backend cannot run this.

    Example:
        >>> features, embedding = torch.randn(6, 4), torch.randn(10, 4)
        >>> target = torch.tensor([1, 2, 3, 4, 5, -100])
        >>> loss = linear_cross_entropy(features, embedding, target)
        >>> expected = F.cross_entropy(features @ embedding.T, target)
        >>> bool(torch.isclose(loss, expected, rtol=1e-5))
        True
    """
    autocast = _autocast_dtype(input.device.type)
    if autocast is not None:
        input = _cast(input, autocast)
        with torch.autocast(input.device.type, enabled=False):
            return linear_cross_entropy(
                input,
                _cast(linear_weight, autocast),
                target,
                linear_bias=None if linear_bias is None else _cast(linear_bias, autocast),
                weight=weight,
                reduction=reduction,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                dtype=dtype or operator.arithmetic(input.dtype),
                chunk_size=chunk_size,
                backend=backend,
            )
    _check(input, linear_weight, linear_bias, weight, reduction, label_smoothing, chunk_size)
    ignored = -100 if ignore_index is None else ignore_index
    result = dtype or input.dtype
    if target.is_floating_point():
        if target.shape != (*input.shape[:-1], len(linear_weight)):
            raise RuntimeError(
                f"target should be int64 {list(input.shape[:-1])} or probabilities "
                f"{[*input.shape[:-1], len(linear_weight)]}, got {list(target.shape)}"
            )
        if ignore_index is not None:
            raise RuntimeError("ignore_index is for a target of class indices, not probabilities")
        sums = operator.arithmetic(input.dtype)
        loss = F.cross_entropy(
            F.linear(input, linear_weight, linear_bias).flatten(0, -2).to(sums),
            target.flatten(0, -2).to(sums),
            weight=None if weight is None else weight.to(sums),
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    else:
        if target.dtype != torch.int64:
            raise ValueError(f"target should be int64 or probabilities, got {target.dtype}")
        if target.shape != input.shape[:-1]:
            raise RuntimeError(
                f"target should have shape {list(input.shape[:-1])}, that of input without its "
                f"last dimension, got {list(target.shape)}"
            )
        if target.device != input.device:
            raise RuntimeError(
                f"target should be on the device of input ({input.device}), got {target.device}"
            )
        loss = operator.linear_cross_entropy(
            input.reshape(-1, input.shape[-1]) if input.dim() != 2 else input,
            linear_weight,
            target.reshape(-1) if target.dim() != 1 else target,
            linear_bias,
            None if weight is None else weight.detach(),
            reduction=reduction,
            ignore_index=ignored,
            label_smoothing=float(label_smoothing),
            chunk_size=chunk_size,
            backend=backend,
        )
    if reduction == "none":
        loss = loss.reshape(input.shape[:-1])
    return loss.to(result)


def _check(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
    chunk_size: int | None,
) -> None:
    if input.dtype not in _DTYPES:
        raise ValueError(
            f"input should be float32, float64, bfloat16 or float16, got {input.dtype}"
        )
    if input.dim() < 1:
        raise RuntimeError("input should have at least one dimension, [..., H]")
    if linear_weight.dim() != 2:
        raise RuntimeError(f"linear_weight should be [V, H], got {list(linear_weight.shape)}")
    classes, width = linear_weight.shape
    if width != input.shape[-1]:
        raise RuntimeError(
            f"input and linear_weight should have the same last dimension, got {input.shape[-1]} "
            f"and {width}"
        )
    if classes == 0:
        raise RuntimeError("linear_weight should have at least one class")
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise ValueError(
                f"{name} should have the dtype of input ({input.dtype}), got {tensor.dtype}"
            )
    for name, tensor in (("linear_bias", linear_bias), ("weight", weight)):
        if tensor is not None and tensor.shape != (classes,):
            raise RuntimeError(f"{name} should have shape [{classes}], got {list(tensor.shape)}")
    if weight is not None and weight.dtype not in _DTYPES:
        raise ValueError(f"weight should be a floating-point tensor, got {weight.dtype}")
    others = (("linear_weight", linear_weight), ("linear_bias", linear_bias), ("weight", weight))
    for name, tensor in others:
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(
                f"{name} should be on the device of input ({input.device}), got {tensor.device}"
            )
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction should be one of {list(_REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing should be in [0, 1], got {label_smoothing}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size should be at least 1, got {chunk_size}")


class LinearCrossEntropyLoss(nn.Module):
    """A linear map and its cross-entropy loss: torch 2.13's module, on every torch.

    Parameters are ``linear.weight`` [V, H] and ``linear.bias`` [V], as of torch's.

    Args:
        in_features: H.
        num_classes: V.
        bias: whether the logits have one.
        device, dtype: of the parameters.
        reduction, weight, ignore_index, label_smoothing, chunk_size, backend: see
            :func:`linear_cross_entropy`.

    Raises:
        RuntimeError, ValueError: an option does not fit; the message names it.

    Example:
        >>> loss = LinearCrossEntropyLoss(4, 10, bias=True)
        >>> loss(torch.randn(3, 4), torch.tensor([1, 2, 3])).shape
        torch.Size([])
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        chunk_size: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.num_classes = num_classes
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.chunk_size = chunk_size
        self.backend = backend
        linear = self.linear
        _check(
            linear.weight,
            linear.weight,
            linear.bias,
            weight,
            reduction,
            label_smoothing,
            chunk_size,
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``input`` [..., H] and ``target`` [...]."""
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"reduction={self.reduction!r}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}"
        )
