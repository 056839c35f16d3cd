"""Inputs of the recurrence operators, and ways to run and compare what they compute."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rnnlm_kernels import ops, reference
from rnnlm_kernels.backends import cpu
from rnnlm_kernels.build import build_info, native
from rnnlm_kernels.options import RecurrenceOptions

CELLS = ("lstm", "gru", "gru-before")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
NATIVE = native is not None


def available_isas() -> tuple[str, ...]:
    """The instruction sets of the native module that this CPU has, the portable one first."""
    if native is None:
        return ()
    capability = torch.backends.cpu.get_cpu_capability()
    best = {"AVX512": ("avx2", "avx512"), "AVX2": ("avx2",)}.get(capability, ())
    flags = Path("/proc/cpuinfo")
    if "avx512" in best and flags.exists():
        words = set(flags.read_text().split())
        if "avx512_bf16" in words:
            best += ("avx512bf16",)
            # The tiles also need a kernel that lends them (5.16), which then lists them here.
            best += ("amx",) if {"amx_bf16", "amx_tile"} <= words else ()
    return tuple(i for i in build_info()["isas"] if i == "generic" or i in best)


ISAS = available_isas()


@dataclass(frozen=True)
class Layer:
    """Everything one call of an operator takes. ``tensors`` are in the order of the operators."""

    cell: str
    tensors: tuple[Tensor | None, ...]
    batch_sizes: Tensor | None
    reverse: bool

    @property
    def names(self) -> tuple[str, ...]:
        weights = ("w_ih", "w_hh", "b_ih", "b_hh")
        return ("x", "h0", "c0", *weights, "w_hr") if self.cell == "lstm" else ("x", "h0", *weights)

    @property
    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"reverse": self.reverse}
        if self.cell != "lstm":
            options["reset"] = "before" if self.cell == "gru-before" else "after"
        return options

    def get(self, name: str) -> Tensor | None:
        return self.tensors[self.names.index(name)]

    def having(self, **changes: Tensor | None) -> Layer:
        """The same with some tensors exchanged."""
        named = {**dict(zip(self.names, self.tensors, strict=True)), **changes}
        return replace(self, tensors=tuple(named[name] for name in self.names))

    def map(self, function: Callable[[Tensor], Tensor]) -> Layer:
        return replace(
            self, tensors=tuple(None if t is None else function(t) for t in self.tensors)
        )

    def to(self, dtype: torch.dtype) -> Layer:
        return self.map(lambda t: t.to(dtype))

    def leaves(self) -> Layer:
        return self.map(lambda t: t.detach().clone().requires_grad_())

    @property
    def present(self) -> list[Tensor]:
        """The tensors that are not None."""
        return [t for t in self.tensors if t is not None]

    def of_present(
        self, run: Callable[..., tuple[Tensor, ...]]
    ) -> Callable[..., tuple[Tensor, ...]]:
        """``run`` as a function of only the tensors that are not None, as gradcheck wants it."""

        def function(*present: Tensor) -> tuple[Tensor, ...]:
            found = iter(present)
            return run(*(None if t is None else next(found) for t in self.tensors))

        return function

    def call(
        self, *tensors: Tensor | None, backend: str | None = None, memory: str = "fast"
    ) -> tuple[Tensor, ...]:
        """Results of the operator, cells included, on these tensors or on its own."""
        given = tensors or self.tensors
        options = {**self.options, "backend": backend, "memory": memory}
        if self.cell == "lstm":
            return ops.lstm(*given, self.batch_sizes, return_cells=True, **options)
        return ops.gru(*given, self.batch_sizes, **options)

    def refer(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The same of the reference."""
        function = reference.lstm if self.cell == "lstm" else reference.gru
        return function(*(tensors or self.tensors), self.batch_sizes, **self.options)


def layer(
    cell: str,
    T: int = 4,
    B: int = 3,
    I: int = 2,  # noqa: E741
    H: int = 5,
    *,
    lengths: Sequence[int] | None = None,
    reverse: bool = False,
    bias: bool = True,
    proj: int = 0,
    projected: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    scale: float = 0.5,
) -> Layer:
    """Random tensors; ``lengths`` (longest first) makes a packed input and replaces T and B.

    ``projected``: x is the input's part of the gates, and there are no w_ih and b_ih.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    batch_sizes = None
    steps: tuple[int, ...] = (T, B)
    if lengths is not None:
        counts = [sum(n > t for n in lengths) for t in range(max(lengths))]
        batch_sizes, B, steps = torch.tensor(counts), len(lengths), (sum(counts),)
    G, R = (4 if cell == "lstm" else 3), proj or H
    tensors: list[Tensor | None] = [random(*steps, G * H if projected else I), random(B, R)]
    if cell == "lstm":
        tensors.append(random(B, H))
    tensors += [None if projected else random(G * H, I), random(G * H, R)]
    tensors += [random(G * H) if wanted else None for wanted in (bias and not projected, bias)]
    if cell == "lstm":
        tensors.append(random(R, H) if proj else None)
    return Layer(cell, tuple(tensors), batch_sizes, reverse)


# The variants that take another path through operators or kernels, by a readable id.
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "reverse": {"reverse": True},
    "packed": {"lengths": (4, 2, 2, 1)},
    "packed-reverse": {"lengths": (4, 2, 2, 1), "reverse": True},
    "no-bias": {"bias": False},
    "one-step": {"T": 1, "B": 1},
    "projected": {"projected": True},
    "projected-packed-reverse": {"projected": True, "lengths": (4, 2, 2, 1), "reverse": True},
    "projected-no-bias": {"projected": True, "bias": False},
}
PROJECTIONS: dict[str, dict[str, Any]] = {
    "projection": {"proj": 3},
    "projection-packed-reverse-no-bias": {
        "proj": 3,
        "lengths": (4, 2, 1),
        "reverse": True,
        "bias": False,
    },
}


def layer_cases() -> list[Any]:
    """Every cell with every variant it has, as pytest parameters ``cell, variant``."""
    import pytest

    cases = [(cell, name, VARIANTS[name]) for cell in CELLS for name in VARIANTS]
    cases += [("lstm", name, variant) for name, variant in PROJECTIONS.items()]
    return [pytest.param(cell, variant, id=f"{cell}-{name}") for cell, name, variant in cases]


def cotangents(outputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]


def results_and_gradients(
    given: Layer, run: Callable[..., tuple[Tensor, ...]]
) -> dict[str, Tensor]:
    """Results of ``run(*tensors)`` and gradients of every tensor of the layer, by name."""
    leaves = given.leaves()
    outputs = run(*leaves.tensors)
    found = torch.autograd.grad(outputs, leaves.present, cotangents(outputs))
    names = ("output", "h_n", "c_n", "cells")[: len(outputs)]
    result = {n: o.detach() for n, o in zip(names, outputs, strict=True)}
    given_names = [n for n, t in zip(leaves.names, leaves.tensors, strict=True) if t is not None]
    return {**result, **{f"grad {n}": g for n, g in zip(given_names, found, strict=True)}}


def assert_near_oracle(
    given: Layer, dtype: torch.dtype, backend: str = "cpu", memory: str = "fast"
) -> None:
    """The operator's results and gradients are as near to the float64 reference as those of the
    reference in the same dtype, give or take a small factor. (In float64 that is the oracle.)

    The terms of all sums are of order 1 here, so a sum that cancels is judged as if it were 1. The
    gradients of a layer all come from those of its gates, and share what these have lost to an
    ill-conditioned recurrence: each is judged as if the reference had lost as much in it, too."""
    given = given.to(dtype)
    oracle = results_and_gradients(given.to(torch.float64), given.to(torch.float64).refer)
    plain = results_and_gradients(given, given.refer)
    found = results_and_gradients(given, lambda *t: given.call(*t, backend=backend, memory=memory))
    assert found.keys() == oracle.keys()
    eps = torch.finfo(dtype).eps
    scale = {name: exact.abs().max().clamp(min=1) for name, exact in oracle.items()}

    def error(of: dict[str, Tensor], name: str) -> float:
        """Relative to the largest number of the tensor."""
        return float((of[name].double() - oracle[name]).abs().max() / scale[name])

    lost = max(error(plain, name) for name in oracle if name.startswith("grad "))
    for name in oracle:
        assert found[name].dtype == dtype
        plain_error = lost if name.startswith("grad ") else error(plain, name)
        # In float64 the reference is the oracle, and backward amplifies rounding errors.
        limit = 4 * plain_error + (256 if dtype == torch.float64 else 16) * eps
        found_error = error(found, name)
        assert found_error <= limit, f"{name}: error {found_error:.3g}, reference {plain_error:.3g}"


def poisoned(*shape: int, like: Tensor) -> Tensor:
    """NaN everywhere: what a kernel forgets to write shows."""
    return like.new_full(shape, torch.nan)


def kernel_results(given: Layer) -> dict[str, Tensor]:
    """What the C++ kernels write, without the GEMMs around them: forward, then backward.

    The cotangents are a function of each result by itself, so that a row has the same ones in any
    batch.
    """

    def slopes() -> list[Tensor]:
        return [value * 3 + 0.5 for value in results.values()]

    x, w_ih, w_hh = given.get("x"), given.get("w_ih"), given.get("w_hh")
    assert x is not None
    assert w_hh is not None
    b_ih, b_hh, h0 = given.get("b_ih"), given.get("b_hh"), given.get("h0")
    lstm = given.cell == "lstm"
    options = RecurrenceOptions(
        reset="before" if given.cell == "gru-before" else "after",
        reverse=given.reverse,
        packed=given.batch_sizes is not None,
        return_cells=lstm,
    )
    steps, width, hidden = x.shape[:-1], h0.size(1), w_hh.size(0) // (4 if lstm else 3)
    wide = torch.empty(0, dtype=reference.state_dtype(x.dtype))
    results = {
        "output": poisoned(*steps, width, like=x),
        "h_n": poisoned(*h0.shape, like=x),
    }
    head = (x, w_ih, b_ih, x if w_ih is None else None, w_hh, b_hh)
    if lstm:
        c0, w_hr = given.get("c0"), given.get("w_hr")
        results["c_n"] = poisoned(*c0.shape, like=x)
        results["cells"] = poisoned(*steps, hidden, like=wide)
        saved = poisoned(*steps, 4 * hidden, like=x)
        cpu.lstm_forward(*head, w_hr, h0, c0, given.batch_sizes, options, *results.values(), saved)
        backward = {
            "dgates": poisoned(*steps, 4 * hidden, like=x),
            "dh0": poisoned(*h0.shape, like=x),
            "dc0": poisoned(*c0.shape, like=x),
        }
        if w_hr is not None:
            backward["dproj"] = poisoned(*steps, width, like=x)
            backward["unprojected"] = poisoned(*steps, hidden, like=x)
        extra = [backward.get("dproj"), backward.get("unprojected")]
        cpu.lstm_backward(
            *slopes(),
            *(w_hh, w_hr, h0, c0, results["output"], results["cells"], saved),
            *(given.batch_sizes, options, *list(backward.values())[:3], *extra),
        )
    else:
        saved = poisoned(*steps, (3 if options.reset == "before" else 4) * hidden, like=x)
        cpu.gru_forward(*head, h0, given.batch_sizes, options, *results.values(), saved)
        backward = {
            "dgates": poisoned(*steps, 3 * hidden, like=x),
            "candidate": poisoned(*steps, hidden, like=x),
            "dh0": poisoned(*h0.shape, like=x),
        }
        cpu.gru_backward(
            *slopes(),
            *(w_hh, h0, results["output"], saved, given.batch_sizes, options),
            *backward.values(),
        )
    return {**results, "saved": saved, **backward}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert not value.isnan().any(), f"{name} was not written everywhere"
        assert torch.equal(found[name], value), name


def run_python(code: str, timeout: float = 120, **environment: str) -> str:
    """Standard output of a Python process that can import the test modules."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_in_a_forked_child(before: str, check: str, threads: int) -> None:
    """Run ``before`` in a new process on two threads, then ``check``, one line, in a fork of it."""
    printed = run_python(
        f"""
import multiprocessing, torch
torch.set_num_threads(2)
{before}
def child():
    torch.set_num_threads({threads})
    {check}
process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
process.start()
process.join(10)
if process.is_alive():
    process.kill()
    print("hangs")
print("exit code", process.exitcode)
"""
    )
    assert "hangs" not in printed
    assert "exit code 0" in printed


def run_under_isa(isa: str, code: str) -> None:
    """Run code in a process whose kernels use instruction set ``isa``."""
    check = f"from rnnlm_kernels import _C; assert _C.cpu_info()['isa'] == {isa!r}\n"
    run_python(check + code, RNNLM_CPU_ISA=isa)
