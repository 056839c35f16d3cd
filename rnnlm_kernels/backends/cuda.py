"""The CUDA backend: hands device addresses to ``rnnlm_kernels._C``, which enqueues the kernels.

A layer's steps run in one of several tiers (docs/cuda.md). The native side chooses one for every
call from the sizes and the device; ``RNNLM_CUDA_TIER`` (``auto``, ``stepwise``, ``block``,
``cluster``, ``grid``) takes the choice over. Nothing here waits for the device. A persistent launch
that gave up waiting for a part of itself leaves NaN in all its outputs, and the next call on the
device raises RuntimeError with the cause; the tier stays off on that device from then on.

TF32: the recurrent product of float32 layers may be rounded to TF32 exactly where torch's own LSTM
and GRU may: where ``torch.backends.cudnn.rnn.fp32_precision`` is ``"tf32"`` or, before torch 2.9,
``torch.backends.cudnn.allow_tf32`` is True. Both are so by default. The products around the
recurrence are PyTorch's, and follow ``torch.backends.cuda.matmul``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import environment
from ..build import import_error, native
from ..options import BUILT_OPTIONS, Plan, Problem, RecurrenceOptions

# Forward keeps the activated gates (16-bit dtypes: their pre-activations) for backward.
SAVES_GATES = True
# Rows up to which forward gets x instead of the projected gates: never, a GEMM is one more launch.
PROJECTS_ROWS = 0

ENVIRONMENT = "RNNLM_CUDA_TIER"
TIERS = ("auto", "stepwise", "block", "cluster", "grid")  # in the order of CudaTier
MIN_CAPABILITY = 80

DEVICE_TYPE = "cuda"

# Codes of csrc/core/params.h and csrc/launch/plan.h.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_LSTM, _GRU_AFTER, _GRU_BEFORE = 0, 1, 2

_from_environment = environment.reader(ENVIRONMENT)
# What torch.backends.cudnn.rnn.fp32_precision reads, in a twentieth of the time. None before 2.9.
_precision = getattr(torch._C, "_get_fp32_precision_getter", None)


# --- what there is to run on --------------------------------------------------------------------


def _obstacle() -> str:
    """Why this process has no GPU for us, or "" where it has one."""
    if torch.version.hip is not None:
        return "torch was built for ROCm"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return ""


def _current_device() -> int:
    return torch.cuda.current_device()


def _device_count() -> int:
    return torch.cuda.device_count()


def _place(tensor: Tensor) -> tuple[int, int]:
    """The device of a tensor and the stream that is current there."""
    index = tensor.get_device()
    return index, torch._C._cuda_getCurrentRawStream(index)


def _empty(nbytes: int, like: Tensor) -> Tensor:
    """Workspace, from torch's allocator: on the current stream, so it may be freed at once."""
    return torch.empty(nbytes, dtype=torch.uint8, device=like.device)


def _offsets(batch_sizes: Tensor, like: Tensor) -> Tensor | None:
    """First row of each packed step and the end of the last, ``[T + 1]``, on the device.

    None while a CUDA graph is captured: it would copy, at every replay, from host memory that has
    long been something else. The stepwise tier does without.
    """
    if torch.cuda.is_current_stream_capturing():
        return None
    steps = batch_sizes.size(0)
    host = torch.zeros(steps + 1, dtype=torch.int64, pin_memory=True)
    torch.cumsum(batch_sizes, 0, out=host[1:])
    return host.to(like.device, non_blocking=True)


def available() -> tuple[bool, str]:
    if native is None:
        return False, f"the extension rnnlm_kernels._C is missing ({import_error})"
    if not hasattr(native, "cuda_needs"):
        return False, "rnnlm_kernels._C was built without CUDA"
    if obstacle := _obstacle():
        return False, obstacle
    return True, "CUDA kernels"


def supports(problem: Problem) -> tuple[bool, str]:
    missing = problem.options.unsupported(BUILT_OPTIONS)
    if missing:
        return False, f"options not built: {', '.join(missing)}"
    if problem.device_type != DEVICE_TYPE:
        return False, f"tensors are on {problem.device_type}"
    if problem.dtype not in _DTYPES:
        return False, f"no kernel for {problem.dtype}"
    ok, reason = available()
    if not ok:
        return False, reason
    capability = native.cuda_device_limits(_index(problem))["compute_capability"]
    if capability < MIN_CAPABILITY:
        found, least = (f"{c // 10}.{c % 10}" for c in (capability, MIN_CAPABILITY))
        return False, f"the device has compute capability {found}, and {least} is needed"
    return True, "CUDA kernels cover every size of this cell and dtype"


def _index(problem: Problem) -> int:
    index = torch.device(problem.device).index
    return _current_device() if index is None else index


def _tier() -> int:
    """What RNNLM_CUDA_TIER says, as a place in TIERS."""
    name = _from_environment() or "auto"
    if name not in TIERS:
        raise ValueError(f"{ENVIRONMENT}={name!r} is not a tier; expected one of {list(TIERS)}")
    return TIERS.index(name)


def plan(problem: Problem) -> Plan:
    code = _tier()
    tier = TIERS[code]
    kernel = f"fused {problem.cell}"
    limits = native.cuda_device_limits(_index(problem))
    if problem.seq_len is None or problem.batch is None:
        return Plan("cuda", kernel, f"tier {tier}", "the tier depends on T and B")
    cell = _LSTM if problem.cell == "lstm" else _gru(problem.options)
    shapes, reasons = [], []
    for backward in range(1 + problem.training):
        found = native.cuda_plan(
            cell,
            backward,
            _DTYPES[problem.dtype],
            problem.seq_len,
            problem.batch,
            problem.hidden_size,
            problem.proj_size,
            problem.seq_len * problem.batch,
            problem.options.packed,
            _allow_tf32(problem.dtype),
            limits,
            code,
        )
        name = ("forward", "backward")[backward]
        shapes.append(f"{name}: {found['shape'] or tier + ' cannot'}")
        reasons.append(f"{name}: {_forecasts(found['forecasts'])}")
    source = "the cost model" if tier == "auto" else f"{ENVIRONMENT}={tier}"
    reason = f"by {source}; derived us per step, {'; '.join(reasons)}"
    return Plan("cuda", kernel, "; ".join(shapes), reason)


def _forecasts(forecasts: dict[str, dict[str, Any]]) -> str:
    """What the cost model says of each tier, in one line."""
    able = [f"{tier} {one['us_per_step']:.2g}" for tier, one in forecasts.items() if one["able"]]
    unable: dict[str, list[str]] = {}
    for tier, one in forecasts.items():
        if not one["able"]:
            unable.setdefault(one["obstacle"], []).append(tier)
    return ", ".join([*able, *(f"not {' or '.join(who)}: {why}" for why, who in unable.items())])


def state() -> dict[str, str]:
    """Each device in a line: what a plan depends on, and the tiers that are off. For people."""
    ok, reason = available()
    if not ok:
        return {"cuda": reason}
    lines = {}
    for index in range(_device_count()):
        limits = native.cuda_device_limits(index)
        capability, cooperative = limits["compute_capability"], limits["cooperative"]
        facts = [
            f"compute capability {capability // 10}.{capability % 10}",
            f"{limits['sms']} SMs",
            f"{limits['shared_per_block'] // 1024} KB of shared memory for a CTA",
            *([] if cooperative else ["no cooperative launches"]),
            *(f"tier {tier} is off: {why}" for tier, why in limits["off"].items()),
        ]
        lines[f"cuda:{index}"] = ", ".join(facts)
    return lines


# --- the calls ----------------------------------------------------------------------------------


def _gru(options: RecurrenceOptions) -> int:
    return _GRU_BEFORE if options.reset == "before" else _GRU_AFTER


def _allow_tf32(dtype: torch.dtype) -> bool:
    if dtype is not torch.float32:
        return False
    if _precision is not None:
        return bool(_precision("cuda", "rnn") == "tf32")
    return bool(torch.backends.cudnn.allow_tf32)


@functools.lru_cache(maxsize=4096)
def _needs(*problem: Any) -> tuple[int, bool]:
    needs: tuple[int, bool] = native.cuda_needs(*problem)
    return needs


def _resources(
    cell: int,
    backward: bool,
    steps: int,
    batch: int,
    hidden: int,
    proj: int,
    batch_sizes: Tensor | None,
    output: Tensor,
) -> tuple[tuple[int | bool, ...], tuple[Tensor | None, ...]]:
    """The last arguments of a native call, and the tensors that have to live until it returns."""
    device, stream = _place(output)
    tier, tf32 = _tier(), _allow_tf32(output.dtype)
    dtype, packed = _DTYPES[output.dtype], batch_sizes is not None
    rows = len(output) if packed else steps * batch
    nbytes, wants_offsets = _needs(
        cell, backward, dtype, steps, batch, hidden, proj, rows, packed, tf32, device, tier
    )
    workspace = _empty(nbytes, output)
    offsets = _offsets(batch_sizes, output) if batch_sizes is not None and wants_offsets else None
    address = 0 if offsets is None else offsets.data_ptr()
    arguments = (device, stream, address, workspace.data_ptr(), nbytes, tier, tf32)
    return arguments, (workspace, offsets)


def lstm_forward(
    x: Tensor,
    w_ih: Tensor,
    b_ih: Tensor | None,
    gates_x: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    options: RecurrenceOptions,
    output: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    cells: Tensor | None,
    saved: Tensor | None,
) -> None:
    """Fill output, h_n, c_n and, where wanted, cells and saved."""
    steps, batch = len(x if batch_sizes is None else batch_sizes), h0.shape[-2]
    hidden, proj = c0.shape[-1], 0 if w_hr is None else len(w_hr)
    arguments, alive = _resources(_LSTM, False, steps, batch, hidden, proj, batch_sizes, output)
    native.cuda_lstm_forward(
        _DTYPES[h0.dtype],
        steps,
        batch,
        0 if batch_sizes is None else batch_sizes.data_ptr(),
        options.reverse,
        hidden,
        proj,
        gates_x.data_ptr(),
        w_hh.data_ptr(),
        0 if b_hh is None else b_hh.data_ptr(),
        0 if w_hr is None else w_hr.data_ptr(),
        h0.data_ptr(),
        c0.data_ptr(),
        output.data_ptr(),
        h_n.data_ptr(),
        c_n.data_ptr(),
        0 if cells is None else cells.data_ptr(),
        0 if saved is None else saved.data_ptr(),
        *arguments,
    )
    del alive


def lstm_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    w_hh: Tensor,
    w_hr: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    output: Tensor,
    cells: Tensor,
    saved: Tensor,
    batch_sizes: Tensor | None,
    options: RecurrenceOptions,
    dgates: Tensor,
    dh0: Tensor | None,
    dc0: Tensor | None,
    dproj: Tensor | None,
    unprojected: Tensor | None,
) -> None:
    """Fill dgates, dh0 and dc0 (both or neither) and, with a projection, dproj and unprojected."""
    steps, batch = len(output if batch_sizes is None else batch_sizes), h0.shape[-2]
    hidden, proj = c0.shape[-1], 0 if w_hr is None else len(w_hr)
    arguments, alive = _resources(_LSTM, True, steps, batch, hidden, proj, batch_sizes, output)
    native.cuda_lstm_backward(
        _DTYPES[h0.dtype],
        steps,
        batch,
        0 if batch_sizes is None else batch_sizes.data_ptr(),
        options.reverse,
        hidden,
        proj,
        0 if grad_output is None else grad_output.data_ptr(),
        0 if grad_h_n is None else grad_h_n.data_ptr(),
        0 if grad_c_n is None else grad_c_n.data_ptr(),
        0 if grad_cells is None else grad_cells.data_ptr(),
        w_hh.data_ptr(),
        0 if w_hr is None else w_hr.data_ptr(),
        c0.data_ptr(),
        cells.data_ptr(),
        saved.data_ptr(),
        dgates.data_ptr(),
        0 if dh0 is None else dh0.data_ptr(),
        0 if dc0 is None else dc0.data_ptr(),
        0 if dproj is None else dproj.data_ptr(),
        0 if unprojected is None else unprojected.data_ptr(),
        *arguments,
    )
    del alive


def gru_forward(
    x: Tensor,
    w_ih: Tensor,
    b_ih: Tensor | None,
    gates_x: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    h0: Tensor,
    batch_sizes: Tensor | None,
    options: RecurrenceOptions,
    output: Tensor,
    h_n: Tensor,
    saved: Tensor | None,
) -> None:
    """Fill output, h_n and, where wanted, saved."""
    steps, batch = len(x if batch_sizes is None else batch_sizes), h0.shape[-2]
    hidden = h0.shape[-1]
    arguments, alive = _resources(
        _gru(options), False, steps, batch, hidden, 0, batch_sizes, output
    )
    native.cuda_gru_forward(
        _DTYPES[h0.dtype],
        steps,
        batch,
        0 if batch_sizes is None else batch_sizes.data_ptr(),
        options.reverse,
        hidden,
        options.reset == "before",
        gates_x.data_ptr(),
        w_hh.data_ptr(),
        0 if b_hh is None else b_hh.data_ptr(),
        h0.data_ptr(),
        output.data_ptr(),
        h_n.data_ptr(),
        0 if saved is None else saved.data_ptr(),
        *arguments,
    )
    del alive


def gru_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    w_hh: Tensor,
    h0: Tensor,
    output: Tensor,
    saved: Tensor,
    batch_sizes: Tensor | None,
    options: RecurrenceOptions,
    dgates: Tensor,
    candidate: Tensor,
    dh0: Tensor | None,
) -> None:
    """Fill dgates, dh0 and candidate (see csrc/core/params.h)."""
    steps, batch = len(output if batch_sizes is None else batch_sizes), h0.shape[-2]
    hidden = h0.shape[-1]
    arguments, alive = _resources(_gru(options), True, steps, batch, hidden, 0, batch_sizes, output)
    native.cuda_gru_backward(
        _DTYPES[h0.dtype],
        steps,
        batch,
        0 if batch_sizes is None else batch_sizes.data_ptr(),
        options.reverse,
        hidden,
        options.reset == "before",
        0 if grad_output is None else grad_output.data_ptr(),
        0 if grad_h_n is None else grad_h_n.data_ptr(),
        w_hh.data_ptr(),
        h0.data_ptr(),
        output.data_ptr(),
        saved.data_ptr(),
        dgates.data_ptr(),
        candidate.data_ptr(),
        0 if dh0 is None else dh0.data_ptr(),
        *arguments,
    )
    del alive
