"""Ways to call a layer while somebody watches: it must not take a short cut past the dispatcher."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return function(*args, **(kwargs or {}))


class Wrapped(Tensor):
    pass


def under_a_dispatch_mode(net: torch.nn.Module, x: Tensor) -> None:
    with Dispatch():
        net(x)


def on_a_subclass(net: torch.nn.Module, x: Tensor) -> None:
    net(x.as_subclass(Wrapped))


def under_a_trace(net: torch.nn.Module, x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(net.requires_grad_(False), x, check_trace=False)
