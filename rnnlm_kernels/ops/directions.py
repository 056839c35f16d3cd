"""The two directions of a layer side by side: on streams of a GPU, on threads of a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..backends.streams import Pair
from .pairs import forwards
from .planning import PLAIN, must_be_plain, nobody_watches, plan_layer

Layer = Callable[..., tuple[Any, ...]]


def in_one_call(*layers: Sequence[Any]) -> bool:
    """Whether the backend calls of some layers may be made together, by one node of autograd.

    That is for CPUs, whose backend then divides its threads. Streams want a node for each
    direction, and whoever watches sees operators of one layer in one direction.

    Args:
        layers: all tensors that the operator takes, for each of its calls; x first.
    """
    x = layers[0][0]
    tensors = (tensor for layer in layers for tensor in layer)
    return x.is_cpu and not x.is_cuda and nobody_watches(*tensors) and not must_be_plain()


def run_in_one_call(
    forward: Layer,
    eager: type[torch.autograd.Function],
    trains: bool,
    directions: Sequence[tuple[Any, ...]],
) -> Sequence[tuple[Any, ...]]:
    """Results of an operator for its arguments in each direction; see :func:`in_one_call`."""
    if not trains:
        return forwards(forward, directions)
    first, second = directions
    results: Any = eager.apply(*first, *second)
    half = len(results) // 2
    return results[:half], results[half:]


def in_turn_or_on_streams(
    cell: str,
    layer: Layer,
    forward: Sequence[Any],
    reverse: Sequence[Any],
    **options: Any,
) -> Sequence[tuple[Any, ...]]:
    """Results of ``layer`` in each direction, at the same time where a GPU has room for both.

    Args:
        cell: ``"lstm"`` or ``"gru"``.
        layer: :func:`rnnlm_kernels.ops.lstm` or :func:`rnnlm_kernels.ops.gru`.
        forward, reverse: the positional arguments of ``layer`` for each direction.
        options: its other arguments but ``reverse``.
    """
    x = forward[0]
    # A compiler takes the operators one after the other; streams of ours would stop its trace.
    if x.is_cuda and not torch.compiler.is_compiling():
        saves = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in forward
        )
        pair = _streams(cell, saves, *forward, **options)
        if pair is not None:
            return (
                pair.run(layer, *forward, reverse=False, saves=saves, **options),
                pair.run(layer, *reverse, reverse=True, saves=saves, **options),
            )
    return layer(*forward, reverse=False, **options), layer(*reverse, reverse=True, **options)


def _streams(
    cell: str,
    saves: bool,
    *tensors: Any,
    memory: str,
    backend: str | None,
    reset: str = "after",
    return_cells: bool = False,
) -> Pair | None:
    """The streams for a layer, given the tensors of one direction; None: in turn."""
    del memory
    if not _streams_are_seen_by_nobody(tensors):
        return None
    if saves and _saved_tensors_are_hooked():
        return None
    if cell == "lstm":
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes = tensors
    else:
        x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes = tensors
        c0 = w_hr = None
    if not x.numel() or not h0.numel():
        return None
    module, recurrence = plan_layer(
        *(cell, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reset, False, saves),
        *(return_cells, backend),
    )
    if module is not BACKENDS["cuda"]:
        return None
    pair: Pair | None = module.directions(x, w_hh, w_hr, h0, batch_sizes, cell, recurrence, saves)
    return pair


def _streams_are_seen_by_nobody(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a call is of plain PyTorch, on tensors that hold memory.

    Tracers, fake tensors and subclasses are not; the reference under ``torch.func`` gains nothing.
    """
    return (
        not must_be_plain()
        and PLAIN.issuperset(map(type, tensors))
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


# (Before torch 2.8 nobody can tell.)
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def _saved_tensors_are_hooked() -> bool:
    """Whether hooks, or a checkpoint, are to bring back what backward reads.

    A checkpoint computes it again in whichever node asks first, on that node's stream; a node on
    another stream would read it without having waited.
    """
    return _top_hooks is None or _top_hooks(True) is not None
