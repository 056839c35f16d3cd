"""The two directions of a layer side by side, where a GPU has room for both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..backends.streams import Pair
from .planning import PLAIN, must_be_plain, plan_layer

Layer = Callable[..., tuple[Any, ...]]


def side_by_side(cell: str, layer: Layer) -> Layer:
    """A stand-in for ``layer`` that runs the directions of a layer at the same time where it pays.

    Args:
        cell: ``"lstm"`` or ``"gru"``.
        layer: :func:`rnnlm_kernels.ops.lstm` or :func:`rnnlm_kernels.ops.gru`.

    Returns:
        A function with the arguments and results of ``layer``, for calls in pairs: of each layer of
        a stack the forward direction, then the reverse one. Not for more than one stack.
    """
    # A compiler takes the operators one after the other; streams of ours would stop its trace.
    return layer if torch.compiler.is_compiling() else _Directions(cell, layer)


class _Directions:
    def __init__(self, cell: str, layer: Layer) -> None:
        self._cell = cell
        self._layer = layer
        self._pair: Pair | None = None
        self._saves = False

    def __call__(
        self,
        *tensors: Tensor | None,
        reverse: bool,
        memory: str,
        backend: str | None,
        **options: Any,
    ) -> tuple[Any, ...]:
        if not reverse:
            self._saves = torch.is_grad_enabled() and any(
                tensor is not None and tensor.requires_grad for tensor in tensors
            )
            self._pair = self._choose(*tensors, backend=backend, **options)
        options.update(reverse=reverse, memory=memory, backend=backend)
        if self._pair is None:
            return self._layer(*tensors, **options)
        return self._pair.run(self._layer, *tensors, saves=self._saves, **options)

    def _choose(self, *tensors: Any, backend: str | None, **options: Any) -> Pair | None:
        """The streams for a layer, given the tensors of one direction; None: in turn."""
        if not _streams_are_seen_by_nobody(tensors):
            return None
        if self._saves and _saved_tensors_are_hooked():
            return None
        if self._cell == "lstm":
            x, h0, _, w_ih, w_hh, _, _, w_hr, batch_sizes = tensors
        else:
            x, h0, w_ih, w_hh, _, _, batch_sizes = tensors
            w_hr = None
        if w_hh.dim() != 2 or w_ih.dim() != 2 or h0.dim() < 2 or not x.numel() or not h0.numel():
            return None  # nothing to do, or nothing that can be done: the operator knows
        module, recurrence = plan_layer(
            self._cell,
            x,
            w_ih,
            w_hh,
            batch_sizes,
            False,
            self._saves,
            backend,
            proj=w_hr is not None,
            **options,
        )
        if module is not BACKENDS["cuda"]:
            return None
        pair: Pair | None = module.directions(
            x, w_hh, w_hr, h0, batch_sizes, self._cell, recurrence, self._saves
        )
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
