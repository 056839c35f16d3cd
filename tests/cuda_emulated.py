"""Runs the backend "cuda" on CPU tensors, through the emulator (csrc/emulator).

    with emulated("grid", seed=3) as device:
        assert_near_oracle(layer("lstm", H=32), torch.bfloat16, backend="cuda")
        assert set(device.ran) == {"grid"}

Inside the block ``backend="cuda"`` takes tensors on the CPU: operators, modules and autograd work
as they do on a GPU, and every launch has ended when a call returns. ``make`` builds the module that
this needs (RNNLM_BUILD_EMULATOR in CMakeLists.txt).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from rnnlm_kernels import dispatch, tuning
from rnnlm_kernels.backends import cuda
from rnnlm_kernels.ops import planning

try:
    module: ModuleType | None = importlib.import_module("rnnlm_kernels._emulated")
except ImportError:
    module = None

needs_emulator = pytest.mark.skipif(module is None, reason="the emulator was not built")

# Neither zero nor what a message that has not arrived looks like: shows in the results of a kernel
# that reads memory without having written it.
_STALE = 0x5A
_ALIGNMENT = 256
_LAYERS = ("cuda_lstm_forward", "cuda_lstm_backward", "cuda_gru_forward", "cuda_gru_backward")


class Emulated:
    """The native module with a memory: ``ran`` lists the tiers of the calls so far."""

    def __init__(self, native: ModuleType) -> None:
        self.native = native
        self.ran: list[str] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.native, name)
        if name not in _LAYERS:
            return function

        def call(*arguments: Any) -> None:
            self.ran.append(cuda.TIERS[function(*arguments)])

        return call


def both_passes(tier: str) -> list[str]:
    """The tiers that run the forward and the backward pass of a layer in a tier."""
    return [tier, "grid" if tier == "grid-pairs" else tier]


def _empty(nbytes: int, like: Tensor) -> Tensor:
    room = torch.full((nbytes + _ALIGNMENT,), _STALE, dtype=torch.uint8)
    return room[-room.data_ptr() % _ALIGNMENT :][:nbytes]


def _offsets(batch_sizes: Tensor, like: Tensor) -> Tensor:
    return torch.cat([batch_sizes.new_zeros(1), batch_sizes.cumsum(0)])


def _forget() -> None:
    cuda._needs.cache_clear()
    cuda._directions.cache_clear()
    dispatch._choose.cache_clear()
    planning._choose.cache_clear()
    planning.known_plans.clear()
    tuning.forget()


def _identity(index: int) -> dict[str, str]:
    limits = cuda.native.cuda_device_limits(index)
    return {"gpu": "emulated", "sms": str(limits["sms"]), "driver": "1.0", "kernels": "0123"}


@contextmanager
def emulated(
    tier: str = "auto",
    *,
    allow_tf32: bool = False,
    wait_polls: int | None = None,
    tables: Path | None = None,
    **settings: Any,
) -> Iterator[Emulated]:
    """The backend "cuda" on an emulated device, which is fresh at the start of the block.

    Args:
        tier: value of RNNLM_CUDA_TIER.
        allow_tf32: whether torch allows its RNNs to round float32 products to TF32.
        wait_polls: polls after which a persistent launch gives up waiting.
        tables: folder with tuned tables; None for none.
        settings: of the emulator: seed, sms, compute_capability, shared_per_block, cooperative,
            drop (lose about one message in so many), ...; see ``_emulated.emulator_configure``.

    Tensors that the operators allocate are filled with NaN, workspace with other rubbish.
    """
    assert module is not None
    device = Emulated(module)
    module.emulator_reset()
    module.emulator_configure(**settings)
    module.cuda_forget_devices()
    if wait_polls is not None:
        module.cuda_set_wait_limit(wait_polls, 0)
    environment = {cuda.ENVIRONMENT: tier, tuning.ENVIRONMENT: str(tables or tuning.OFF)}
    deterministic = torch.are_deterministic_algorithms_enabled()
    _forget()
    try:
        torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
        with (
            mock.patch.dict(os.environ, environment),
            mock.patch.multiple(
                cuda,
                native=device,
                DEVICE_TYPE="cpu",
                _obstacle=lambda: "",
                current_device=lambda: 0,
                _device_count=lambda: 1,
                identity=_identity,
                _place=lambda tensor: (0, 0),
                _empty=_empty,
                _offsets=_offsets,
                _allow_tf32=lambda dtype: allow_tf32 and dtype is torch.float32,
            ),
        ):
            yield device
    finally:
        torch.use_deterministic_algorithms(deterministic)
        module.cuda_forget_devices()
        module.emulator_reset()
        _forget()
