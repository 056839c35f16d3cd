"""Layers whose backend calls are made together: on CPUs, where layers share a team of threads.

A layer's forward and its backward hold one call of a backend each. Forward ends with it, so it is
enough to be told to leave that call to somebody else (``later``). Backward goes on afterwards, with
the gradients of the weights: it is a generator that yields the call and returns the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

Call = tuple[ModuleType, str, tuple[Any, ...]]
"""A call of a backend that somebody has yet to make: module, name of the function, arguments."""

Backward = Generator[Call, None, tuple[Tensor, ...]]


def _make(calls: Sequence[Call]) -> None:
    """Make calls of different layers, at the same time where they are two of a backend that can."""
    if len(calls) == 2:
        (module, name, first), (other, other_name, second) = calls
        together = getattr(module, "together", None)
        if together and module is other and name == other_name:
            together(name, first, second)
            return
    for module, name, arguments in calls:
        getattr(module, name)(*arguments)


def forwards(
    forward: Callable[..., tuple[Any, ...]], layers: Sequence[tuple[Any, ...]]
) -> list[tuple[Any, ...]]:
    """``[forward(*arguments) for arguments in layers]``; no layer takes from another."""
    calls: list[Call] = []
    results = [forward(*arguments, later=calls) for arguments in layers]
    _make(calls)
    return results


def stacked(
    forward: Callable[..., tuple[Any, ...]], x: Tensor, layers: Sequence[tuple[Any, ...]]
) -> list[tuple[Any, ...]]:
    """Results of ``forward(x, *arguments)``, where x is the output of the layer before.

    A backend that has ``stacked`` makes the calls of all layers: it chooses by what they have in
    common. Any other makes them in turn.
    """
    calls: list[Call] = []
    results: list[tuple[Any, ...]] = []
    for arguments in layers:
        results.append(forward(x, *arguments, later=calls))
        x = results[-1][0]
        if calls and not hasattr(calls[0][0], "stacked"):
            _make(calls)
            calls.clear()
    if calls:
        module, name, _ = calls[0]
        module.stacked(name, [given for _, _, given in calls])
    return results


def backwards(
    backward: Callable[..., Backward], layers: Sequence[tuple[Any, ...]]
) -> list[tuple[Tensor, ...]]:
    """What ``backward(*arguments)`` returns in the end, for the arguments of each layer."""
    calls: list[Call] = []
    found: list[Any] = []  # the results of a layer, or the generator that goes on to them
    for arguments in layers:
        running = backward(*arguments)
        try:
            calls.append(next(running))
            found.append(running)
        except StopIteration as end:  # There was nothing to call.
            found.append(end.value)
    _make(calls)
    calls.clear()  # Copies that were made for the call alone go.
    return [one if isinstance(one, tuple) else _end(one) for one in found]


def _end(running: Backward) -> tuple[Tensor, ...]:
    try:
        next(running)
    except StopIteration as end:
        results: tuple[Tensor, ...] = end.value
        return results
    raise AssertionError("a layer's backward makes one call of a backend")
