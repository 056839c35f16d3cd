"""Derivatives through the plain PyTorch reference: its own backward, and second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def with_layer_dimension(
    layer: Callable[..., tuple[Tensor, ...]], states: int
) -> Callable[..., tuple[Tensor, ...]]:
    """A layer of the reference that takes states as the operators do: also ``[1, B, *]``."""

    def run(x: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, ...]:
        if rest[0].dim() == 2:
            return layer(x, *rest, **options)
        rows = [state.squeeze(0) for state in rest[:states]]
        output, *others = layer(x, *rows, *rest[states:], **options)
        finals = [state.unsqueeze(0) for state in others[:states]]
        return (output, *finals, *others[states:])

    return run


def reference_backward(
    layer: Callable[..., tuple[Any, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of ``layer(*inputs)`` with respect to the inputs that ``needs`` names.

    Runs inside an operator, below autograd, where only ``torch.func`` can differentiate.
    """
    positions = [i for i, need in enumerate(needs) if need]

    def wanted_to_graded(*wanted: Tensor) -> tuple[Tensor, ...]:
        arguments = list(inputs)
        for position, tensor in zip(positions, wanted, strict=True):
            arguments[position] = tensor
        outputs = layer(*arguments)
        return tuple(o for o, g in zip(outputs, grads, strict=True) if g is not None)

    outputs, vjp, *_ = torch.func.vjp(wanted_to_graded, *(inputs[i] for i in positions))
    given = [g for g in grads if g is not None]
    found = vjp(tuple(g.to(o.dtype) for g, o in zip(given, outputs, strict=True)))
    result: list[Tensor | None] = [None] * len(inputs)
    for position, grad in zip(positions, found, strict=True):
        result[position] = grad.contiguous()
    return result


def second_derivative(
    layer: Callable[..., tuple[Any, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad_grads: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Backward of a backward operator, by differentiating the reference twice.

    Returns the gradients with respect to ``grads`` (the incoming gradients of the first backward)
    and to ``inputs``.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases cut the graph: one input may depend on another further up.
        def alias(tensor: Tensor | None) -> Any:
            if tensor is None:
                return None
            if create_graph and tensor.requires_grad:
                return tensor.view_as(tensor)
            return tensor.detach().requires_grad_()

        inputs = [alias(t) for t in inputs]
        grads = [alias(t) for t in grads]
        outputs = layer(*inputs)
        graded = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None]
        asked = [
            (t, gg)
            for t, gg, need in zip(inputs, grad_grads, needs, strict=True)
            if need and gg is not None
        ]
        if not graded or not asked:
            return [None] * len(grads), [None] * len(inputs)
        first = torch.autograd.grad(
            [o for o, _ in graded],
            [t for t, _ in asked if t is not None],
            [g for _, g in graded],
            create_graph=True,
            allow_unused=True,
        )
        pairs = [
            (value, gg)
            for value, (_, gg) in zip(first, asked, strict=True)
            if value is not None and value.requires_grad
        ]
        wanted = [t for t in (*grads, *inputs) if t is not None]
        found: Iterator[Tensor | None] = iter(())
        if pairs:
            found = iter(
                torch.autograd.grad(
                    [value for value, _ in pairs],
                    wanted,
                    [gg for _, gg in pairs],
                    create_graph=create_graph,
                    allow_unused=True,
                )
            )
        result = [None if t is None else next(found, None) for t in (*grads, *inputs)]
    return result[: len(grads)], result[len(grads) :]
