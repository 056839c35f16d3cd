"""The CUDA backend: hands device addresses to ``rnnlm_kernels._C``, which enqueues the kernels.

A layer's steps run in one of several tiers (docs/cuda.md). A tuned table (:mod:`..tuning`) names
the one that was the fastest; without one the native side chooses for every call from the sizes and
the device. ``RNNLM_CUDA_TIER`` (``auto``, ``stepwise``, ``block``, ``cluster``, ``grid``,
``grid-pairs``) takes the choice over. Nothing here waits for the device. A persistent launch
that gave up waiting for a part of itself leaves NaN in all its outputs, and the next call on the
device raises RuntimeError with the cause; the tier stays off on that device from then on.

TF32: the recurrent product of float32 layers may be rounded to TF32 exactly where torch's own LSTM
and GRU may: where ``torch.backends.cudnn.rnn.fp32_precision`` is ``"tf32"`` or, before torch 2.9,
``torch.backends.cudnn.allow_tf32`` is True. Both are so by default. The products around the
recurrence are PyTorch's, and follow ``torch.backends.cuda.matmul``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from .. import environment, tuning
from ..build import import_error, native
from ..options import BUILT_OPTIONS, Plan, Problem, RecurrenceOptions
from . import streams

# Forward keeps the activated gates (16-bit dtypes: their pre-activations) for backward.
SAVES_GATES = True
# Backward adds up the gradients of biases itself, where its caller brings room for them (db).
SUMS_BIASES = True
# Forward gets the projected gates: on a GPU that is one more launch, and no pass over memory that
# it would not make anyway.
PROJECTS_INPUT = False

ENVIRONMENT = "RNNLM_CUDA_TIER"
# In the order of CudaTier. The backward pass of "grid-pairs" is that of "grid".
TIERS = ("auto", "stepwise", "block", "cluster", "grid", "grid-pairs")
MIN_CAPABILITY = 80

DEVICE_TYPE = "cuda"

# Codes of csrc/core/params.h and csrc/launch/plan.h.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_LSTM, _GRU_AFTER, _GRU_BEFORE = 0, 1, 2
_CELLS = ("lstm", "gru", "gru-before")
_AUTOMATIC, _STEPWISE = 0, 1

# Tiers that `forced` has put in charge, forward and backward. Of the process, for autograd runs
# backward in a thread of its own.
_forced = [_AUTOMATIC, _AUTOMATIC]

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


def current_device() -> int:
    """The index of the GPU that tensors of ``DEVICE_TYPE`` are put on."""
    return torch.cuda.current_device()


def _device_count() -> int:
    return torch.cuda.device_count()


def _place(tensor: Tensor) -> tuple[int, int]:
    """The device of a tensor and the stream that is current there."""
    index = tensor.get_device()
    return index, torch._C._cuda_getCurrentRawStream(index)


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _empty(nbytes: int, like: Tensor) -> Tensor:
    """Workspace, from torch's allocator: on the current stream, so it may be freed at once."""
    return torch.empty(nbytes, dtype=torch.uint8, device=like.device)


def _offsets(batch_sizes: Tensor, like: Tensor) -> Tensor | None:
    """First row of each packed step and the end of the last, ``[T + 1]``, on the device.

    None while a CUDA graph is captured: it would copy, at every replay, from host memory that has
    long been something else. The stepwise tier does without.
    """
    if _capturing():
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
    return current_device() if index is None else index


def _tier(backward: bool) -> int:
    """The tier that was asked for, as a place in TIERS: by `forced`, or by RNNLM_CUDA_TIER."""
    if forced := _forced[backward]:
        return forced
    name = _from_environment() or "auto"
    if name not in TIERS:
        raise ValueError(f"{ENVIRONMENT}={name!r} is not a tier; expected one of {list(TIERS)}")
    return TIERS.index(name)


def _tuned(device: int, case: tuning.Case) -> tuple[int, tuning.Tuned | None]:
    """The tier that a table names for a pass of a layer, and the table; (_AUTOMATIC, None) if none.

    It may turn out to be unable: the table was measured with other sizes, or it has failed since.
    """
    found = tuning.lookup("cuda", device, case, identity)
    if found is None or found.choice not in TIERS[1:]:
        return _AUTOMATIC, None
    return TIERS.index(found.choice), found


def _planned(problem: Problem, backward: bool, code: int, limits: dict[str, Any]) -> dict[str, Any]:
    """What the native side says of a pass in a tier; problem knows its T and B."""
    assert problem.seq_len is not None
    assert problem.batch is not None
    answer: dict[str, Any] = native.cuda_plan(
        _LSTM if problem.cell == "lstm" else _gru(problem.options),
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
    return answer


def plan(problem: Problem) -> Plan:
    code = _tier(False)
    kernel = f"fused {problem.cell}"
    index = _index(problem)
    limits = native.cuda_device_limits(index)
    if problem.seq_len is None or problem.batch is None:
        return Plan("cuda", kernel, f"tier {TIERS[code]}", "the tier depends on T and B")
    shapes, sources, reasons = [], [], []
    for backward in (False, True)[: 1 + problem.training]:
        name, code = ("forward", "backward")[backward], _tier(backward)
        source = f"{ENVIRONMENT}={TIERS[code]}" if code else "the cost model"
        found = _planned(problem, backward, code, limits)
        if not code:
            tuned, table = _tuned(index, _case(problem, backward))
            answer = _planned(problem, backward, tuned, limits)
            if table is not None and answer["tier"] is not None:
                found, source = answer, str(table)
        shapes.append(f"{name}: {found['shape'] or TIERS[code] + ' cannot'}")
        sources.append(source)
        reasons.append(f"{name}: {_forecasts(found['forecasts'])}")
    one_source = len(set(sources)) == 1
    by = sources[0] if one_source else f"{sources[0]}, backward by {sources[1]}"
    reason = f"by {by}; derived us per step, {'; '.join(reasons)}"
    if problem.options.reverse:
        reason += f"; {_beside(problem, limits)}"
    return Plan("cuda", kernel, "; ".join(shapes), reason)


def _beside(problem: Problem, limits: dict[str, Any]) -> str:
    """Whether the forward direction of the same layer runs at the same time, in words."""
    assert problem.seq_len is not None
    assert problem.batch is not None
    answer = native.cuda_directions(
        _LSTM if problem.cell == "lstm" else _gru(problem.options),
        _DTYPES[problem.dtype],
        problem.seq_len,
        problem.batch,
        problem.hidden_size,
        problem.proj_size,
        problem.seq_len * problem.batch,
        problem.options.packed,
        _allow_tf32(problem.dtype),
        limits,
        _tier(False),
        problem.training,
        False,
    )
    together, in_turn = answer["us_side_by_side"], answer["us_in_turn"]
    cost = "half of the device is too little" if together is None else f"{together:.0f} us"
    how = "side by side" if answer["side_by_side"] else "in turn"
    return f"both directions {how} (side by side: {cost}, in turn: {in_turn:.0f} us)"


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


# --- for measuring (see rnnlm_kernels.backends) -------------------------------------------------


def devices() -> range:
    """Indices of the GPUs there are."""
    return range(_device_count() if available()[0] else 0)


def identity(index: int) -> dict[str, str]:
    """What a tuned table must have been measured on to hold for a device."""
    limits, built = native.cuda_device_limits(index), native.build_info()
    return {
        **tuning.gpu_identity(index),
        "sms": str(limits["sms"]),  # of this process, which MPS may give fewer
        "nvcc": built["cuda_version"],
        "kernels": built["kernels"],
    }


def _case(problem: Problem, backward: bool) -> tuning.Case:
    return tuning.Case.of(problem, backward, _allow_tf32(problem.dtype))


def candidates(problem: Problem, backward: bool) -> dict[str, str]:
    """The tiers that can run a pass of a problem with T and B, the cost model's choice first."""
    limits = native.cuda_device_limits(_index(problem))
    automatic = _planned(problem, backward, _AUTOMATIC, limits)
    able = [tier for tier, one in automatic["forecasts"].items() if one["able"]]
    able.sort(key=lambda tier: tier != automatic["tier"])
    return {tier: _planned(problem, backward, TIERS.index(tier), limits)["shape"] for tier in able}


@contextmanager
def forced(backward: bool, candidate: str) -> Iterator[None]:
    """Inside the block a pass of every layer runs in this tier, or raises NotImplementedError."""
    before = _forced[backward]
    _forced[backward] = TIERS.index(candidate)
    try:
        yield
    finally:
        _forced[backward] = before


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
) -> tuple[list[tuple[int | bool, ...]], tuple[Tensor | None, ...]]:
    """The last arguments of a native call, and the tensors that have to live until it returns.

    Where a tuned table names the tier there are two sets of arguments, its and the automatic ones,
    for :func:`_enqueue`; the workspace is enough for either. (A table was measured with the device
    to itself: it says nothing of one of two directions.)
    """
    device, stream = _place(output)
    tier, tf32 = _tier(backward), _allow_tf32(output.dtype)
    dtype, packed = _DTYPES[output.dtype], batch_sizes is not None
    rows = len(output) if packed else steps * batch
    sharing = streams.concurrent(stream)
    nbytes, wants_offsets = _needs(
        cell, backward, dtype, steps, batch, hidden, proj, rows, packed, tf32, device, tier, sharing
    )
    tiers = [tier]
    if tier == _AUTOMATIC and sharing == 1 and tuning.sources("cuda", device, identity):
        name = tuning.dtype_name(output.dtype, tf32)
        case = tuning.Case(_CELLS[cell], backward, name, hidden, proj, packed, steps, batch)
        tuned, _ = _tuned(device, case)
        if tuned != _AUTOMATIC:
            tiers.insert(0, tuned)
            wants_offsets |= packed
    workspace = _empty(nbytes, output)
    offsets = _offsets(batch_sizes, output) if batch_sizes is not None and wants_offsets else None
    address = 0 if offsets is None else offsets.data_ptr()
    attempts: list[tuple[int | bool, ...]] = [
        (device, stream, address, workspace.data_ptr(), nbytes, tier, tf32, sharing)
        for tier in tiers
    ]
    return attempts, (workspace, offsets)


@functools.lru_cache(maxsize=4096)
def _directions(device: int, *problem: Any) -> dict[str, Any]:
    answer: dict[str, Any] = native.cuda_directions(
        *problem[:-3], native.cuda_device_limits(device), *problem[-3:]
    )
    return answer


def directions(
    x: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    h0: Tensor,
    batch_sizes: Tensor | None,
    cell: str,
    options: RecurrenceOptions,
    trains: bool,
) -> streams.Pair | None:
    """The streams on which the directions of a bidirectional layer run side by side.

    None where the forecasts say that they had better run in turn, each on the whole device. Takes
    the tensors of the forward direction; ``trains``: a backward pass may follow.
    """
    device, caller = _place(x)
    tier, replayed, packed = _tier(False), _capturing(), batch_sizes is not None
    if packed and replayed and tier == _AUTOMATIC:
        tier = _STEPWISE  # there will be no offsets
    steps, batch = len(x if batch_sizes is None else batch_sizes), h0.shape[-2]
    hidden = len(w_hh) // (4 if cell == "lstm" else 3)
    answer = _directions(
        device,
        _LSTM if cell == "lstm" else _gru(options),
        _DTYPES[x.dtype],
        steps,
        batch,
        hidden,
        0 if w_hr is None else len(w_hr),
        len(x) if packed else steps * batch,
        packed,
        _allow_tf32(x.dtype),
        tier,
        trains,
        replayed,
    )
    return streams.pair(native, device, caller) if answer["side_by_side"] else None


def _enqueue(
    function: Callable[..., int], attempts: list[tuple[int | bool, ...]], *layer: int | bool
) -> None:
    """Call a native function with the first of the attempts that it does not refuse.

    The tier of a tuned table was measured with other sizes and other tensors, and may have failed
    since; what it cannot run, the automatic choice runs. A mistake of ours is refused by both.
    """
    *tuned, last = attempts
    for attempt in tuned:
        with suppress(NotImplementedError, ValueError):
            function(*layer, *attempt)
            return
    function(*layer, *last)


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
    attempts, alive = _resources(_LSTM, False, steps, batch, hidden, proj, batch_sizes, output)
    _enqueue(
        native.cuda_lstm_forward,
        attempts,
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
    db: Tensor | None = None,
) -> None:
    """Fill dgates and, where wanted, dh0 and dc0 (both or neither), db, dproj and unprojected.

    db [4H] is dgates summed over all steps and rows. With a projection dproj and unprojected are
    always wanted.
    """
    steps, batch = len(output if batch_sizes is None else batch_sizes), h0.shape[-2]
    hidden, proj = c0.shape[-1], 0 if w_hr is None else len(w_hr)
    attempts, alive = _resources(_LSTM, True, steps, batch, hidden, proj, batch_sizes, output)
    _enqueue(
        native.cuda_lstm_backward,
        attempts,
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
        0 if db is None else db.data_ptr(),
        0 if dh0 is None else dh0.data_ptr(),
        0 if dc0 is None else dc0.data_ptr(),
        0 if dproj is None else dproj.data_ptr(),
        0 if unprojected is None else unprojected.data_ptr(),
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
    attempts, alive = _resources(_gru(options), False, steps, batch, hidden, 0, batch_sizes, output)
    _enqueue(
        native.cuda_gru_forward,
        attempts,
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
    db: Tensor | None = None,
) -> None:
    """Fill dgates, candidate (see csrc/core/params.h) and, where wanted, dh0 and db.

    db is dgates summed over all steps and rows [3H]; for reset-after the sum of candidate follows
    [4H].
    """
    steps, batch = len(output if batch_sizes is None else batch_sizes), h0.shape[-2]
    hidden = h0.shape[-1]
    attempts, alive = _resources(_gru(options), True, steps, batch, hidden, 0, batch_sizes, output)
    _enqueue(
        native.cuda_gru_backward,
        attempts,
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
        0 if db is None else db.data_ptr(),
        0 if dh0 is None else dh0.data_ptr(),
    )
    del alive
