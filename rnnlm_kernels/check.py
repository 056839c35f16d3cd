"""Every backend against the float64 oracle: the one place that states when a kernel is right.

The rule. The oracle is torch's own layer in float64 (for the GRU that torch lacks, plain PyTorch in
float64) on the same inputs: low-precision inputs are cast up, not redrawn. For each tensor (the
output, the final states, the gradients of x, of the initial states and of every weight and bias)
two errors are taken against the oracle, the largest and the root mean square of the element-wise
differences. A backend passes when both are within their limit::

    limit = 2 * (error of torch's own layer in the same dtype) + floor
    floor = ulps * eps(dtype) * scale          scale = max or RMS of the oracle's tensor

where ``ulps`` is 4 for float32 and 1 for the 16-bit dtypes. The floor only matters where torch
happens to be exact (one step, few elements). In float64 torch is its own oracle and its error is
zero by construction, so there the floor is all there is: 32 ulps, room for another order of
summation but not for another formula.

The comparator is torch's layer in the workload's dtype. Where torch has none, or it fails or
overflows in that dtype, it is the equations in plain PyTorch in that dtype: the functions of
``rnnlm_kernels.reference`` under autograd, which go through none of our operators.

A wrong shape or dtype, a missing gradient, NaN or Inf where the oracle is finite: all of these are
infinite errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .bench.contenders import (
    PLAIN,
    TORCH,
    ContenderError,
    our_layer,
    plain_layer,
    runnable,
    torch_layer,
)
from .bench.workload import Setup, Workload, precision, setup
from .dispatch import BackendError, backends

GRADIENT = "grad "  # how a row's name begins when it is one
ALLOWED_FACTOR = 2.0
FLOOR_ULPS = {
    torch.float64: 32.0,
    torch.float32: 4.0,
    torch.bfloat16: 1.0,
    torch.float16: 1.0,
}


@dataclass(frozen=True)
class CheckRow:
    """One tensor's verdict; ``*_error`` are largest errors, ``*_rms`` root mean squares."""

    name: str
    our_error: float
    torch_error: float
    limit: float
    our_rms: float
    torch_rms: float
    rms_limit: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.our_error <= self.limit and self.our_rms <= self.rms_limit

    @property
    def excess(self) -> float:
        """How much of the limit is used: at most 1 when ok; what `worst` sorts by."""
        return max(_share(self.our_error, self.limit), _share(self.our_rms, self.rms_limit))


@dataclass(frozen=True)
class CheckResult:
    """A backend's verdict on one workload.

    ``comparator`` names whose error the limits come from: ``"torch"`` or ``"plain PyTorch"``.
    """

    workload: Workload
    backend: str
    comparator: str
    rows: tuple[CheckRow, ...]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def without_gradients(self) -> CheckResult:
        """What matters to who never runs backward."""
        kept = (row for row in self.rows if not row.name.startswith(GRADIENT))
        return replace(self, rows=tuple(kept))

    @property
    def worst(self) -> CheckRow:
        return max(self.rows, key=lambda row: row.excess)

    @property
    def failures(self) -> list[CheckRow]:
        return [row for row in self.rows if not row.ok]

    def summary(self) -> str:
        """One line, as a refusal in the benchmark shows it."""
        row = self.worst
        if self.ok:
            return f"ok; worst {row.name}: error {row.our_error:.2g}, torch {row.torch_error:.2g}"
        note = f" ({row.note})" if row.note else ""
        return (
            f"{row.name} is wrong: error {row.our_error:.2g} (rms {row.our_rms:.2g}), allowed "
            f"{row.limit:.2g} (rms {row.rms_limit:.2g}){note}"
        )


@dataclass(frozen=True)
class SkippedCheck:
    """A workload that a backend does not run, and why."""

    workload: Workload
    backend: str
    reason: str


def _share(error: float, limit: float) -> float:
    if error <= limit and limit == 0:
        return 0.0
    return error / limit if limit else math.inf


def evaluate(layer: nn.Module, inputs: Setup, *, grad: bool) -> dict[str, Tensor | None]:
    """Outputs, and with ``grad`` the gradient of every input and parameter, of a layer.

    The loss is the inner product of output and final states with the setup's cotangents. A
    gradient that the layer does not produce is None.
    """
    names = ("output", "h_n", "c_n")
    x, *state = (t.detach().clone().requires_grad_(grad) for t in (inputs.x, *inputs.state))
    with torch.set_grad_enabled(grad):
        output, final = inputs.call(layer, x, tuple(state))
    outputs = dict(zip(names, (output, *final), strict=False))
    if not grad:
        return dict(outputs)
    leaves = {
        "x": x,
        **dict(zip(("h0", "c0"), state, strict=False)),
        # torch.compile wraps a layer and prefixes its parameters' names
        **{n.removeprefix("_orig_mod."): weight for n, weight in layer.named_parameters()},
    }
    # A layer may lose the graph altogether: every gradient is missing then, and that is wrong.
    pairs = [
        (output, cotangent.to(output.dtype))
        for output, cotangent in zip(outputs.values(), inputs.cotangents, strict=True)
        if output.requires_grad
    ]
    gradients: Sequence[Tensor | None] = [None] * len(leaves)
    if pairs:
        gradients = torch.autograd.grad(
            [output for output, _ in pairs],
            list(leaves.values()),
            [cotangent for _, cotangent in pairs],
            allow_unused=True,
        )
    result: dict[str, Tensor | None] = {name: value.detach() for name, value in outputs.items()}
    result.update({GRADIENT + name: g for name, g in zip(leaves, gradients, strict=True)})
    return result


def errors(value: Tensor | None, oracle: Tensor) -> tuple[float, float]:
    """Largest and RMS difference from the oracle; both infinite when there is no comparing."""
    if value is None or value.shape != oracle.shape:
        return math.inf, math.inf
    difference = value.to(oracle.dtype) - oracle
    if not bool(difference.isfinite().all()):
        return math.inf, math.inf
    return _max(difference), _rms(difference)


def _max(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0


def limit(torch_error: float, scale: float, dtype: torch.dtype) -> float:
    """The rule: what error is allowed, given torch's own and the size of the oracle's numbers."""
    info = torch.finfo(dtype)
    smallest_step = info.smallest_normal * info.eps  # below it nothing can be represented
    return ALLOWED_FACTOR * torch_error + max(FLOOR_ULPS[dtype] * info.eps * scale, smallest_step)


class Judge:
    """Holds one workload's oracle and torch's errors, to judge any number of contenders.

    Raises:
        ContenderError: neither torch nor plain PyTorch can serve as the comparator.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.inputs = setup(workload)
        self.grad = workload.mode != "inference"
        self.oracle = self._oracle()
        self.comparator, self.comparator_errors = self._comparator()

    def _oracle(self) -> dict[str, Tensor]:
        inputs = self.inputs.to(torch.float64)
        build = plain_layer if self.workload.cell == "gru-before" else torch_layer
        layer = build(inputs)
        values = evaluate(layer, inputs, grad=self.grad)
        oracle = {name: value for name, value in values.items() if value is not None}
        if len(oracle) != len(values):
            raise ContenderError("failed", f"the float64 oracle of {self.workload} is incomplete")
        return oracle

    def _comparator(self) -> tuple[str, dict[str, tuple[float, float]]]:
        refusals = []
        for name, build in ((TORCH, torch_layer), (PLAIN, plain_layer)):
            try:
                with precision(self.workload):
                    values = evaluate(build(self.inputs), self.inputs, grad=self.grad)
            except RuntimeError as error:  # torch has no such kernel in this dtype
                refusals.append(f"{name}: {error}")
                continue
            found = {key: errors(values[key], oracle) for key, oracle in self.oracle.items()}
            if all(math.isfinite(largest) for largest, _ in found.values()):
                return name, found
            refusals.append(f"{name}: not finite in {self.workload.dtype}")
        raise ContenderError(
            "failed", f"nothing to compare {self.workload.label} with: {'; '.join(refusals)}"
        )

    def check(self, build: Callable[[Setup], nn.Module], name: str) -> CheckResult:
        """Judge the layer that ``build`` makes for this workload's setup.

        Where the workload asks for gradients, the forward pass without them is judged too: it may
        well be another kernel, one that does not save anything.
        """
        with precision(self.workload):
            layer = build(self.inputs)
            values = evaluate(layer, self.inputs, grad=self.grad)
            quiet = evaluate(layer, self.inputs, grad=False) if self.grad else {}
        rows = [self._row(key, key, values.get(key)) for key in self.oracle]
        rows += [self._row(f"{key} (no_grad)", key, value) for key, value in quiet.items()]
        return CheckResult(self.workload, name, self.comparator, tuple(rows))

    def _row(self, name: str, key: str, value: Tensor | None) -> CheckRow:
        oracle = self.oracle[key]
        dtype = self.workload.torch_dtype
        largest, rms = errors(value, oracle)
        note = ""
        if value is None:
            note = "no gradient"
        elif value.shape != oracle.shape:
            note = f"shape {tuple(value.shape)}, expected {tuple(oracle.shape)}"
        elif value.dtype != dtype:
            largest = rms = math.inf
            note = f"dtype {value.dtype}, expected {dtype}"
        elif math.isinf(largest):
            note = "not finite"
        torch_error, torch_rms = self.comparator_errors[key]
        return CheckRow(
            name=name,
            our_error=largest,
            torch_error=torch_error,
            limit=limit(torch_error, _max(oracle), dtype),
            our_rms=rms,
            torch_rms=torch_rms,
            rms_limit=limit(torch_rms, _rms(oracle), dtype),
            note=note,
        )


def check_problem(workload: Workload, backend: str) -> CheckResult:
    """Check one backend on one workload.

    Args:
        workload: with mode ``"inference"`` only outputs are checked, else gradients as well.
        backend: one of :func:`rnnlm_kernels.dispatch.backends`.

    Raises:
        BackendError: the backend cannot run the workload.

    Example:
        >>> result = check_problem(Workload("gru", 5, 2, 3, 4, mode="training"), "reference")
        >>> result.ok
        True
    """
    ok, reason = runnable(backend, workload) if backend in backends() else (False, "unknown")
    if not ok:
        raise BackendError(f"backend {backend!r} cannot run {workload.label}: {reason}")
    return Judge(workload).check(lambda inputs: our_layer(inputs, backend), backend)


def default_problems(device: str = "cpu") -> list[Workload]:
    """Small workloads that together reach every branch: sizes that fill no vector, one step of one
    row, packing, both directions, stacking, projection, no bias; every cell and dtype.

    For a GPU they are joined by TF32 and by the sizes for which a layer is spread over one, several
    or all of its multiprocessors.
    """
    variants: list[dict[str, object]] = [
        {"seq_len": 7, "batch": 3, "input_size": 5, "hidden_size": 9},
        {"seq_len": 35, "batch": 20, "input_size": 200, "hidden_size": 200},
        {"seq_len": 1, "batch": 1, "input_size": 64, "hidden_size": 64},
        {"seq_len": 40, "batch": 6, "input_size": 24, "hidden_size": 40, "lengths": "packed"},
        {
            "seq_len": 9,
            "batch": 4,
            "input_size": 12,
            "hidden_size": 20,
            "num_layers": 2,
            "bidirectional": True,
        },
        {
            "seq_len": 11,
            "batch": 5,
            "input_size": 16,
            "hidden_size": 33,
            "bidirectional": True,
            "lengths": "packed",
            "bias": False,
        },
        {"seq_len": 9, "batch": 4, "input_size": 12, "hidden_size": 20, "proj_size": 8},
    ]
    dtypes = ["float32", "float64", "bfloat16", "float16"]
    if torch.device(device).type == "cuda":
        dtypes.append("tf32")
        variants += [
            {"seq_len": 24, "batch": 5, "input_size": 128, "hidden_size": 128},
            {"seq_len": 24, "batch": 33, "input_size": 64, "hidden_size": 256},
            {"seq_len": 16, "batch": 16, "input_size": 64, "hidden_size": 512},
            {"seq_len": 16, "batch": 70, "input_size": 64, "hidden_size": 1024},
            {"seq_len": 12, "batch": 3, "input_size": 64, "hidden_size": 2048},
            {
                "seq_len": 24,
                "batch": 20,
                "input_size": 64,
                "hidden_size": 768,
                "bidirectional": True,
                "lengths": "packed",
            },
        ]
    return [
        Workload(cell=cell, dtype=dtype, device=device, mode="training", **variant)  # type: ignore[arg-type]
        for cell in ("lstm", "gru", "gru-before")
        for dtype in dtypes
        for variant in variants
        if cell == "lstm" or not variant.get("proj_size")
    ]


def check_all(
    workloads: Iterable[Workload], backend_names: Sequence[str]
) -> Iterator[CheckResult | SkippedCheck]:
    """Check backends on workloads, one result at a time; the oracle is computed once for all."""
    for workload in workloads:
        judge = None
        for backend in backend_names:
            ok, reason = runnable(backend, workload)
            if not ok:
                yield SkippedCheck(workload, backend, reason)
                continue
            judge = judge or Judge(workload)

            def build(inputs: Setup, backend: str = backend) -> nn.Module:
                return our_layer(inputs, backend)

            yield judge.check(build, backend)
