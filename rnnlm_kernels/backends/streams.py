"""Streams of our own, on which the two directions of a layer run at the same time.

Every stream that somebody calls a bidirectional layer on gets a :class:`Pair` of streams, one for
each direction. A direction's stream first waits for the caller's (fork), and the caller's then
waits for it (join), both by events: the host waits for nothing, and a CUDA graph that is being
captured takes the pair in.

Backward needs no code of ours. Autograd runs every node on the stream that its forward ran on, and
has a node's stream wait for the streams that its gradients come from, and the stream of the caller
of ``backward()`` for those of all leaves. So the directions are side by side there as well, and
``concurrent`` tells a backward call, as it tells a forward call, from the stream it is on.

Memory belongs to the stream it was allocated on, which takes it again as soon as Python lets go of
it; whatever is used on another stream has to be recorded there. What crosses is

* the caller's tensors that backward reads again, on the direction's stream and after the join.
  (Forward alone needs no record: the caller's stream, which would take the memory, has waited.)
* the outputs of a direction, which the caller's stream reads.

Gradients that cross are recorded by autograd. Those of weights stay on a pair's stream, and as no
stream is in two pairs or in anyone else's hands, memory of a pair is only taken again by work that
has waited for the caller's stream. That is why torch's pool of streams, which hands the same 32
out again and again, will not do.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_pairs: dict[tuple[int, int], Pair] = {}
_addresses: set[int] = set()


class Pair:
    """Two streams of a device, for the directions of the layers that are called on one stream.

    Events are used again at every call. Should another thread use the same stream, it may record
    one a second time before the first is waited for: a wait then is for more than it has to be.
    """

    def __init__(self, device: int, addresses: tuple[int, int]) -> None:
        self.device = device
        self.streams = [torch.cuda.ExternalStream(one, device=device) for one in addresses]
        self._begun = torch.cuda.Event()
        self._ended = [torch.cuda.Event() for _ in addresses]

    def run(
        self,
        layer: Callable[..., tuple[Tensor | None, ...]],
        *tensors: Tensor | None,
        reverse: bool,
        saves: bool,
        **options: Any,
    ) -> tuple[Tensor | None, ...]:
        """``layer(*tensors, reverse=reverse, **options)`` on the stream of that direction.

        The forward direction comes first; the reverse one waits for the same point of the caller's
        stream. ``saves``: a backward pass may follow.
        """
        caller, stream = torch.cuda.current_stream(self.device), self.streams[reverse]
        if not reverse:
            self._begun.record(caller)
        stream.wait_event(self._begun)
        if saves:
            for tensor in tensors:
                if tensor is not None and tensor.is_cuda:
                    tensor.record_stream(stream)
        try:
            with torch.cuda.stream(stream):
                outputs = layer(*tensors, reverse=reverse, **options)
        finally:
            self._ended[reverse].record(stream)
            caller.wait_event(self._ended[reverse])
        for output in outputs:
            if output is not None:
                output.record_stream(caller)
        return outputs


def pair(native: ModuleType, device: int, caller: int) -> Pair:
    """The pair of the stream with the address ``caller``."""
    found = _pairs.get((device, caller))
    if found is None:
        first, second = (native.cuda_new_stream(device, caller) for _ in range(2))
        found = _pairs[device, caller] = Pair(device, (first, second))
        _addresses.update((first, second))
    return found


def concurrent(stream: int) -> int:
    """How many launches share the device, one on the stream with this address included."""
    return 2 if stream in _addresses else 1
