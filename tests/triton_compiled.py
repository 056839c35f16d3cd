"""Compiles Triton kernels without a GPU, as the backend "triton" would have them compiled.

    python tests/triton_compiled.py '[{"target": "sm_90", "cell": "lstm", "dtype": "bfloat16"...}]'

prints what the compiler made of every kernel that these layers launch, forward and backward, as
JSON. The host code runs as ever, on tensors of the CPU; only its launches are caught. Triton must
not interpret here, so this is a process of its own; tests call :func:`compiled`, or, for kernels
that are no layer's, :func:`run_uninterpreted` with code that uses :func:`caught` and
:func:`compile_launches`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from rnnlm_kernels import ops
from rnnlm_kernels.backends import triton as backend
from rnnlm_kernels.triton.launch import Limits


def _obstacle() -> str:
    """Why nothing can be compiled here, or ""."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "triton brings its compilers for Linux on x86-64"
    version = importlib.metadata.version("triton")
    if tuple(map(int, version.split(".")[:2])) < (3, 3):
        return f"triton {version} wants to be told of alignment in another way; 3.3 is needed"
    return ""


needs_compiler = pytest.mark.skipif(bool(_obstacle()), reason=_obstacle() or "it is here")

# What a layer is launched with, on the smallest GPU of an architecture that there is.
TARGETS = {
    "sm_80": (("cuda", 80, 32), Limits(108, 163 * 1024, 32)),
    "sm_90": (("cuda", 90, 32), Limits(132, 227 * 1024, 32)),
    "sm_100": (("cuda", 100, 32), Limits(148, 227 * 1024, 32)),
    "gfx942": (("hip", "gfx942", 64), Limits(304, 64 * 1024, 64)),
}
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


def compiled(*problems: dict[str, Any], timeout: float = 600) -> list[dict[str, Any]]:
    """What became of every kernel of the problems, compiled in another process.

    Args:
        problems: ``target`` (a key of TARGETS), ``cell``, ``dtype``, ``batch``, ``hidden`` and, if
            wanted, ``kernel`` (value of RNNLM_TRITON_KERNEL), ``tf32``, ``proj``, ``backward``
            (False: forward alone).
    """
    found: list[dict[str, Any]] = _elsewhere(__file__, json.dumps(problems), timeout=timeout)
    return found


def run_uninterpreted(code: str) -> Any:
    """What ``code`` puts into its variable ``found``, run in a process that does not interpret."""
    return _elsewhere("-c", f"{code}\nimport json\nprint(json.dumps(found))")


def _elsewhere(*arguments: str, timeout: float = 600) -> Any:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class _Caught:
    """A kernel that is not run: ``kernel[grid](...)`` adds its arguments to a list."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


@contextmanager
def caught(*families: ModuleType) -> Iterator[list[Any]]:
    """Yields a list that gets every launch from these modules: (kernel, arguments, options)."""
    from triton.runtime import JITFunction

    launches: list[Any] = []
    with ExitStack() as stack:
        for family in families:
            kernels = {n: k for n, k in vars(family).items() if isinstance(k, JITFunction)}
            instead = {name: _Caught(kernel, launches) for name, kernel in kernels.items()}
            stack.enter_context(mock.patch.multiple(family, **instead))
        yield launches


def _launches(problem: dict[str, Any], limits: Limits) -> list[Any]:
    """Every launch of a layer's forward and backward."""
    name, dtype = problem["cell"], getattr(torch, problem["dtype"])
    families = {backend._family(n) for n in ("stepwise", problem.get("kernel", "stepwise"))}
    cell, reset = name.split("-")[0], "before" if name.endswith("before") else "after"
    gates, hidden, proj = 4 if cell == "lstm" else 3, problem["hidden"], problem.get("proj", 0)
    width, steps, batch = proj or hidden, 2, problem["batch"]

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, requires_grad=True)

    states = [tensor(batch, width), *([tensor(batch, hidden)] if cell == "lstm" else [])]
    weights = [tensor(gates * hidden, 8), tensor(gates * hidden, width)]
    biases = [tensor(gates * hidden), tensor(gates * hidden)]
    projection = [tensor(width, hidden)] if proj else []
    with ExitStack() as stack:
        launches = stack.enter_context(caught(*families))
        named = {backend.ENVIRONMENT: problem.get("kernel", "stepwise")}
        stack.enter_context(mock.patch.dict(os.environ, named))
        stack.enter_context(
            mock.patch.multiple(
                backend,
                DEVICE_TYPE="cpu",
                _obstacle=lambda: "",
                _capability=lambda index: 80,
                current_device=lambda: 0,
                _limits=lambda index: limits,
                _on_device_of=lambda tensor: nullcontext(),
                _allow_tf32=lambda dtype: problem.get("tf32", False),
            )
        )
        tensors = (tensor(steps, batch, 8), *states, *weights, *biases, *projection)
        options = {} if cell == "lstm" else {"reset": reset}
        outputs = getattr(ops, cell)(*tensors, backend="triton", **options)
        results = [o for o in outputs if o is not None]
        if problem.get("backward", True):
            torch.autograd.grad(results, tensors, [torch.empty_like(o) for o in results])
    return launches


def _source(
    kernel: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """What Triton would compile for a launch, and with which options."""
    from triton.compiler import ASTSource

    named = dict(zip(kernel.arg_names, args, strict=False))
    compiler_options = {}
    for name, value in options.items():
        (named if name in kernel.arg_names else compiler_options)[name] = value
    signature, constants, attributes = {}, {}, {}
    free = {p.name for p in kernel.params if p.do_not_specialize}
    for position, parameter in enumerate(kernel.params):
        value, name = named[parameter.name], parameter.name
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name not in free and value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), compiler_options


def _resources(binary: bytes) -> dict[str, int]:
    """Registers, stack and local memory of a thread, in bytes where they are bytes."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def _amd_resources(assembly: str) -> dict[str, int]:
    keys = {"reg": "vgpr_count", "stack": "private_segment_fixed_size", "local": "vgpr_spill_count"}
    return {k: int(re.findall(rf"\.{v}:\s*(\d+)", assembly)[0]) for k, v in keys.items()}


def _products(assembly: str) -> list[str]:
    """The instructions of tensor cores that it has."""
    names = {"wgmma.mma_async": "wgmma", "mma.sync": "mma.sync", "tcgen05.mma": "tcgen05.mma"}
    names["v_mfma"] = "v_mfma"
    return sorted(name for text, name in names.items() if re.search(rf"\b{text}", assembly))


def compile_launches(launches: list[Any], target: str) -> list[dict[str, Any]]:
    """Compiles each kernel once, however often it was launched.

    Args:
        launches: of :func:`caught`, outside its block.
        target: a key of TARGETS.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    device, limits = TARGETS[target]
    seen, results = set(), []
    for kernel, args, options in launches:
        source, compiler_options = _source(kernel, args, options)
        if source.hash() in seen:
            continue
        seen.add(source.hash())
        made = triton.compile(source, target=GPUTarget(*device), options=compiler_options)
        if device[0] == "cuda":
            resources = _resources(made.asm["cubin"])
        else:
            resources = _amd_resources(made.asm["amdgcn"])
        results.append(
            {
                "target": target,
                "name": source.name,
                "shared": made.metadata.shared,
                "may_share": limits.shared_per_block,
                "products": _products(made.asm.get("ptx") or made.asm["amdgcn"]),
                "tile": {k: options[k] for k in ("ROWS", "UNITS", "DEPTH") if k in options},
                "num_warps": options.get("num_warps"),
                **resources,
            }
        )
    return results


def _compile(problem: dict[str, Any]) -> list[dict[str, Any]]:
    launches = _launches(problem, TARGETS[problem["target"]][1])
    return [{**problem, **made} for made in compile_launches(launches, problem["target"])]


def main() -> None:
    problems = json.loads(sys.argv[1])
    with ProcessPoolExecutor(min(len(problems), os.cpu_count() or 1)) as pool:
        results = [one for many in pool.map(_compile, problems) for one in many]
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
