"""Swap the recurrent modules inside a model for ours, in place, and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..options import checked_memory
from .cells import GRUCell, LSTMCell
from .rnn import GRU, LSTM, NO_PROJECTION, checked_backend

_OURS: dict[type, type] = {
    torch.nn.LSTM: LSTM,
    torch.nn.GRU: GRU,
    torch.nn.LSTMCell: LSTMCell,
    torch.nn.GRUCell: GRUCell,
}
_TORCHS: dict[type, type] = {ours: torchs for torchs, ours in _OURS.items()}

# Set on a module by replace(), so that restore() touches no other.
_MARK = "_replaced_by_rnnlm_kernels"
# Options torch's modules do not have, and the value they can be restored from.
_OWN_OPTIONS = {"reset": "after", "return_cells": False}


@dataclass(frozen=True)
class Swap:
    """One module that changed. A module with several names has them joined by commas."""

    name: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.name or '(model)'}: {self.before} -> {self.after}"


@dataclass(frozen=True)
class Skipped:
    """One recurrent module that was left as it is, and why."""

    name: str
    module: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name or '(model)'}: {self.module} left alone: {self.reason}"


@dataclass(frozen=True)
class Report:
    """What :func:`replace` or :func:`restore` did. True when a module changed.

    Attributes:
        model: the model that was given; it was changed in place.
        swapped: the modules that changed.
        skipped: the recurrent modules that did not.
    """

    model: torch.nn.Module = field(repr=False)
    swapped: tuple[Swap, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.swapped)

    def __str__(self) -> str:
        return "\n".join(map(str, (*self.swapped, *self.skipped))) or "no recurrent module found"


def replace(
    model: torch.nn.Module,
    *,
    backend: str | None = None,
    memory: Literal["fast", "low"] = "fast",
) -> Report:
    """Turn every torch LSTM, GRU, LSTMCell, and GRUCell inside a model into ours.

    The module objects stay, and with them their parameters, hooks, names, training flag, and
    device: only their class changes. So an optimizer that holds the parameters goes on, and every
    other reference to a module sees the change.

    Left alone and reported are ``torch.nn.RNN``, subclasses (their ``forward`` may be anything),
    parametrized modules (replace first, then parametrize), and modules whose ``forward`` was set
    on the object.

    Args:
        model: any module, also a recurrent one itself.
        backend: given to every replaced module; see :class:`rnnlm_kernels.LSTM`.
        memory: given to every replaced layer (a cell keeps one step); see there.

    Returns:
        A :class:`Report`: what changed, what did not and why; false when nothing changed.

    Raises:
        BackendError: no backend is called ``backend``.
        ValueError: no policy is called ``memory``.

    Example:
        >>> import torch
        >>> model = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(4, 8), "out": torch.nn.Linear(8, 2)})
        >>> print(replace(model))
        rnn: torch.nn.LSTM(4, 8) -> rnnlm_kernels.LSTM(4, 8)
    """
    checked_backend(backend)
    checked_memory(memory)
    swapped, skipped = [], []
    for module, name in _named(model):
        if type(module) in _TORCHS or not isinstance(
            module, (torch.nn.RNNBase, torch.nn.RNNCellBase)
        ):
            continue
        before = _described(module)
        reason = _reason_to_keep(module)
        if reason:
            skipped.append(Skipped(name, before, reason))
            continue
        module.__class__ = _OURS[type(module)]
        # A list of the weights, which ours looks up instead: it would keep old ones alive.
        module.__dict__.pop("_flat_weights", None)
        setattr(module, _MARK, True)
        if backend is not None:
            module.backend = backend
        if memory != "fast" and isinstance(module, (LSTM, GRU)):
            module.memory = memory
        swapped.append(Swap(name, before, _described(module)))
    return Report(model, tuple(swapped), tuple(skipped))


def restore(model: torch.nn.Module) -> Report:
    """Undo :func:`replace`: turn what it replaced inside a model back into torch's modules.

    Modules that were constructed as ours are left alone and reported, and so are those that have
    since been given an option which torch lacks.

    Args:
        model: any module, also a recurrent one itself.

    Returns:
        A :class:`Report`, as for :func:`replace`.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.GRU(4, 8))
        >>> _ = replace(model)
        >>> print(restore(model))
        0: rnnlm_kernels.GRU(4, 8) -> torch.nn.GRU(4, 8)
    """
    swapped, skipped = [], []
    for module, name in _named(model):
        if not isinstance(module, tuple(_TORCHS)):
            continue
        before = _described(module)
        reason = _reason_not_to_restore(module)
        if reason:
            skipped.append(Skipped(name, before, reason))
            continue
        module.__class__ = _TORCHS[type(module)]
        for attribute in (_MARK, "backend", "memory", *_OWN_OPTIONS):
            module.__dict__.pop(attribute, None)
        if isinstance(module, torch.nn.RNNBase):
            module._init_flat_weights()
        swapped.append(Swap(name, before, _described(module)))
    return Report(model, tuple(swapped), tuple(skipped))


def _named(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str]]:
    """Every module once, with all its names."""
    names: dict[int, list[str]] = {}
    modules: dict[int, torch.nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    return [(module, ", ".join(names[key])) for key, module in modules.items()]


def _reason_to_keep(module: Any) -> str:
    kind = type(module)
    if kind in (torch.nn.RNN, torch.nn.RNNCell):
        return "there is no fused kernel for Elman networks"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized; replace the module first, then parametrize it"
    if kind not in _OURS:
        return "it is a subclass, whose forward may differ"
    if "forward" in module.__dict__:
        return "its forward was set on the object"
    if isinstance(module, torch.nn.GRU) and module.proj_size:
        return NO_PROJECTION
    return ""


def _reason_not_to_restore(module: Any) -> str:
    if not module.__dict__.get(_MARK):
        return "it was constructed as it is, not replaced"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized; remove the parametrizations first"
    if type(module) not in _TORCHS:
        return "it is a subclass, whose forward may differ"
    for option, default in _OWN_OPTIONS.items():
        value = module.__dict__.get(option, default)
        if value != default:
            return f"torch has no {option}={value!r}"
    return ""


def _described(module: torch.nn.Module) -> str:
    """Package, class, and arguments of a module, on one line."""
    kind = type(module)
    package = {"torch": "torch.nn.", "rnnlm_kernels": "rnnlm_kernels."}
    prefix = ""
    if kind in _OURS or kind in _TORCHS or kind in (torch.nn.RNN, torch.nn.RNNCell):
        prefix = package[kind.__module__.partition(".")[0]]
    return f"{prefix}{kind.__name__}({module.extra_repr()})"
