"""Runs the backend "triton" on CPU tensors, through Triton's interpreter.

    with interpreted("stepwise") as ran:
        assert_near_oracle(layer("lstm", H=17), torch.bfloat16, backend="triton")
        assert set(ran) == {"stepwise"}

Inside the block ``backend="triton"`` takes tensors on the CPU: operators, modules and autograd work
as they do on a GPU. tests/conftest.py sets TRITON_INTERPRET, which triton reads when it is
imported; programs of a launch run one after the other.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from rnnlm_kernels import dispatch
from rnnlm_kernels.backends import triton
from rnnlm_kernels.ops import planning
from rnnlm_kernels.triton.launch import Limits, Run

try:
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
except ImportError:
    interpreter = None

needs_triton = pytest.mark.skipif(
    interpreter is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="triton is not installed, or is not to interpret (TRITON_INTERPRET)",
)

# A device small enough that layers of tests have more than one program in each direction.
LIMITS = Limits(multiprocessors=4, shared_per_block=99 * 1024, warp_size=32)


def _offsets(batch_sizes: Tensor, like: Tensor) -> Tensor:
    return torch.cat([batch_sizes.new_zeros(1), batch_sizes.cumsum(0)])


# The interpreter holds bfloat16 as 16-bit integers. It multiplies them as such, and truncates where
# a GPU rounds to the nearest.


def _of_bfloat16(bits: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).view(torch.bfloat16)


def _product(builder: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    factors = [
        interpreter.TensorHandle(_of_bfloat16(x.data).float().numpy(), interpreter.tl.float32)
        if x.dtype.scalar.name == "bf16"
        else x
        for x in (a, b)
    ]
    return _WITHOUT_BFLOAT16["create_dot"](builder, *factors, d, *rest)


def _cast(builder: Any, source: Any, to: Any) -> Any:
    names = (source.dtype.scalar.name, to.scalar.name)
    if names == ("bf16", "fp32"):
        return interpreter.TensorHandle(_of_bfloat16(source.data).float().numpy(), to.scalar)
    if names == ("fp32", "bf16"):
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return interpreter.TensorHandle(
            rounded.view(torch.int16).numpy().view(np.uint16), to.scalar
        )
    return _WITHOUT_BFLOAT16["cast_impl"](builder, source, to)


_WITHOUT_BFLOAT16 = {}
if interpreter is not None:
    _WITHOUT_BFLOAT16 = {
        name: getattr(interpreter.InterpreterBuilder, name) for name in ("create_dot", "cast_impl")
    }


def identity(index: int) -> dict[str, str]:
    """What a tuned table for the interpreter would have been measured on."""
    return {"gpu": "interpreter"}


def _forget() -> None:
    dispatch._choose.cache_clear()
    planning._choose.cache_clear()
    planning.known_plans.clear()


@contextmanager
def interpreted(
    kernel: str = "auto",
    *,
    limits: Limits = LIMITS,
    allow_tf32: bool = False,
) -> Iterator[list[str]]:
    """The backend "triton" on the CPU; yields a list of the families of the calls so far.

    Args:
        kernel: value of RNNLM_TRITON_KERNEL.
        limits: of the device.
        allow_tf32: whether torch allows its RNNs to round float32 products to TF32.

    Tensors that operators and kernels allocate are filled with NaN.
    """
    ran: list[str] = []
    prepare = triton._prepare

    def recorded(*call: Any) -> tuple[str, Run]:
        family, run = prepare(*call)
        ran.append(family)
        return family, run

    builder = interpreter.InterpreterBuilder
    deterministic = torch.are_deterministic_algorithms_enabled()
    _forget()
    try:
        torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
        with (
            np.errstate(all="ignore"),  # numpy warns of what floating point is there to do
            mock.patch.multiple(builder, create_dot=_product, cast_impl=_cast),
            mock.patch.dict(os.environ, {triton.ENVIRONMENT: kernel}),
            mock.patch.multiple(
                triton,
                DEVICE_TYPE="cpu",
                _obstacle=lambda: "",
                _capability=lambda index: 80,
                current_device=lambda: 0,
                _limits=lambda index: limits,
                identity=identity,
                devices=lambda: range(1),
                _on_device_of=lambda tensor: nullcontext(),
                _prepare=recorded,
                _offsets=_offsets,
                _allow_tf32=lambda dtype: allow_tf32 and dtype is torch.float32,
            ),
        ):
            yield ran
    finally:
        torch.use_deterministic_algorithms(deterministic)
        _forget()
