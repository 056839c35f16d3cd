"""Defines a layer operator and its backward with torch.library, and wires their autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .derivatives import second_derivative
from .pairs import Backward, backwards, forwards
from .planning import are_batched, nobody_watches

_NAMESPACE = "rnnlm_kernels"
_library = torch.library.Library(_NAMESPACE, "DEF")


def _backward_fake(num_grads: int, num_inputs: int) -> Callable[..., tuple[Any, ...]]:
    """Shapes of a backward operator's results: those of the layer's inputs."""

    def fake(*args: Any) -> tuple[Tensor, ...]:
        inputs, needs = args[num_grads : num_grads + num_inputs], args[-1]
        x = inputs[0]
        return tuple(
            x.new_empty(t.shape) if need else x.new_empty((0,))
            for t, need in zip(inputs, needs, strict=True)
        )

    return fake


def register(
    name: str,
    *,
    inputs: tuple[str, ...],
    flags: tuple[str, ...],
    grads: tuple[str, ...],
    saved: tuple[str, ...],
    backward_flags: tuple[str, ...],
    forward: Callable[..., tuple[Any, ...]],
    fake: Callable[..., tuple[Any, ...]],
    backward: Callable[..., Backward],
    layer: Callable[..., tuple[Any, ...]],
) -> type[torch.autograd.Function]:
    """Define operator ``name`` and ``name_backward`` and wire their autograd.

    The operator takes ``inputs``, ``batch_sizes`` and ``flags``, in this order, and returns the
    tensors of ``grads`` and a last one, ``saved``. The backward operator takes the gradients of
    ``grads``, inputs and batch_sizes, what ``saved`` names, ``backward_flags`` and which gradients
    are needed.

    Args:
        inputs: names of the differentiable inputs; a ``?`` marks those that may be None.
        flags: the other arguments, as in a schema: ``"bool reverse"``.
        grads: names of the differentiable outputs.
        saved: which outputs backward reads.
        backward_flags: names of the flags that backward takes as well.
        forward, fake, backward: implementations; None stands for what was not wanted. See
            :mod:`.pairs` for how forward and backward make their call of a backend.
        layer: the same layer in plain PyTorch, for second derivatives.

    Returns:
        The operator as an ``autograd.Function`` that reaches the implementation directly. It also
        takes the arguments of two layers that do not depend on each other, one after the other, and
        returns the results of both: one node, whose calls of backends are made together.
    """
    tags = (torch.Tag.pt2_compliant_tag,)
    flag_names = [flag.split()[-1] for flag in flags]
    arguments = ", ".join(
        f"Tensor{'?' if n.endswith('?') else ''} {n.removesuffix('?')}"
        for n in (*inputs, "batch_sizes?")
    )
    num_inputs, num_grads, num_saved = len(inputs), len(grads), len(saved)
    results = ", ".join(["Tensor"] * (num_grads + 1))
    _library.define(f"{name}({arguments}, {', '.join(flags)}) -> ({results})", tags=tags)
    incoming = ", ".join(f"Tensor? grad_{n}" for n in grads)
    kept = ", ".join(f"Tensor {n}" for n in saved)
    kept_flags = ", ".join(f for f in flags if f.split()[-1] in backward_flags)
    results = ", ".join(["Tensor"] * num_inputs)
    _library.define(
        f"{name}_backward({incoming}, {arguments}, {kept}, {kept_flags}, bool[] needs)"
        f" -> ({results})",
        tags=tags,
    )

    def with_empties(function: Callable[..., Sequence[Tensor | None]]) -> Callable[..., Any]:
        # An operator returns tensors only: an empty one stands for what was not wanted.
        def operator(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            results: Any = function(*args, **kwargs)
            return tuple(results[0].new_empty((0,)) if r is None else r for r in results)

        return operator

    direct_forward = with_empties(forward)
    _library.impl(name, direct_forward, "CompositeExplicitAutograd")

    def direct_backward(*args: Any) -> tuple[Tensor, ...]:
        return backwards(backward, (args,))[0]

    _library.impl(f"{name}_backward", direct_backward, "CompositeExplicitAutograd")
    qualified = f"{_NAMESPACE}::{name}"
    torch.library.register_fake(qualified, with_empties(fake), lib=_library)
    torch.library.register_fake(
        f"{qualified}_backward", _backward_fake(num_grads, num_inputs), lib=_library
    )
    backward_op = getattr(getattr(torch.ops, _NAMESPACE), f"{name}_backward").default
    kept_positions = [flag_names.index(n) for n in backward_flags]
    saved_positions = [(*grads, "saved").index(n) for n in saved]
    num_tensors = num_inputs + 1
    num_arguments, num_results = num_tensors + len(flags), num_grads + 1
    num_kept = num_tensors + num_saved

    # For the operator it is one layer; for the autograd.Function it may be two, the one behind the
    # other wherever there are arguments, results, or what is saved of them.
    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[num_grads::num_results])
        kept: list[Tensor] = []
        ctx.flags = []
        for layer in range(len(inputs) // num_arguments):
            first, out = layer * num_arguments, layer * num_results
            kept += inputs[first : first + num_tensors]
            kept += [output[out + p] for p in saved_positions]
            ctx.flags.append([inputs[first + num_tensors + p] for p in kept_positions])
        ctx.save_for_backward(*kept)

    def autograd_backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * (num_arguments * len(ctx.flags))
        if all(g is None for g in incoming):
            return tuple(grads)
        tensors = ctx.saved_tensors
        calls, wanted = [], []
        for layer, its_flags in enumerate(ctx.flags):
            first, out = layer * num_arguments, layer * num_results
            its_incoming = incoming[out : out + num_grads]
            needs = list(ctx.needs_input_grad[first : first + num_inputs])
            if any(needs) and not all(g is None for g in its_incoming):
                kept = tensors[layer * num_kept : (layer + 1) * num_kept]
                calls.append((*its_incoming, *kept, *its_flags, needs))
                wanted.append(first)
        direct = (
            not torch.is_grad_enabled()
            and nobody_watches(*tensors, *incoming)
            and not are_batched(*incoming)
        )
        found = backwards(backward, calls) if direct else [backward_op(*call) for call in calls]
        for first, call, its_grads in zip(wanted, calls, found, strict=True):
            for i, (grad, need) in enumerate(zip(its_grads, call[-1], strict=True)):
                if need:
                    grads[first + i] = grad
        return tuple(grads)

    torch.library.register_autograd(qualified, autograd_backward, setup_context=setup, lib=_library)

    def setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[: num_grads + num_tensors])
        ctx.flags = dict(
            zip(backward_flags, inputs[num_grads + num_tensors + num_saved : -1], strict=True)
        )
        ctx.needs = inputs[-1]

    def autograd_double_backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        kwargs = {k: v for k, v in ctx.flags.items() if k in ("reset", "reverse")}
        for_grads, for_inputs = second_derivative(
            functools.partial(layer, batch_sizes=tensors[-1], **kwargs),
            tensors[num_grads:-1],
            tensors[:num_grads],
            ctx.needs,
            grad_grads,
        )
        # None for batch_sizes, what forward saved, the flags and needs.
        rest = (None,) * (1 + num_saved + len(backward_flags) + 1)
        return (*for_grads, *for_inputs, *rest)

    torch.library.register_autograd(
        f"{qualified}_backward",
        autograd_double_backward,
        setup_context=setup_backward,
        lib=_library,
    )

    # In one step: with a setup_context of its own, apply() inspects signatures on every call.
    def forward_and_setup(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        if len(args) == num_arguments:
            output = direct_forward(*args)
        else:
            first, second = forwards(direct_forward, (args[:num_arguments], args[num_arguments:]))
            output = (*first, *second)
        setup(ctx, args, output)
        return output

    return type(
        f"Eager{name.upper()}",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward_and_setup),
            "backward": staticmethod(autograd_backward),
        },
    )
