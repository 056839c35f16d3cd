"""How a number is obtained: interleaved timing, bytes saved for backward, peak memory.

Timing. By the clock, on a GPU by its own events. Samples of all contenders alternate in the order A
B, B A, A B, ... so that a machine that slows down, speeds up or is shared hits them alike. A sample
repeats the step until it lasts long enough for the clock. Where one of the contenders has threads
of its own, which look for work for a while after their last, everybody waits until all threads
sleep. What is reported is the median with the 20 % and 80 % quantiles.

Memory. *Saved* bytes are what autograd keeps between forward and backward: the storages behind
every tensor it saves, each once, parameters excepted (they exist anyway), x included. Some of it
may be an opaque workspace (oneDNN and cuDNN use a byte tensor), reported on its own as well. *Peak*
is how much the resident set (CPU) or the allocator (CUDA) grows at its highest during one step.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Step = Callable[[], None]
Stopwatch = Callable[[Step], float]  # how many seconds something takes

_PATIENCE = 4.0  # in budgets


@dataclass(frozen=True)
class TimingOptions:
    """How long to measure: samples are taken in pairs of rounds until ``budget_s`` is spent.

    Args:
        budget_s: for all contenders of one workload together.
        min_samples, max_samples: of each contender, whatever the budget says; only a workload that
            has taken four budgets (a large one, or a busy machine) ends with fewer.
        min_sample_s: a sample repeats the step until it lasts this long.
        warmup: untimed calls of each contender before the first sample.
    """

    budget_s: float = 3.0
    min_samples: int = 6
    max_samples: int = 40
    min_sample_s: float = 0.02
    warmup: int = 2


@dataclass(frozen=True)
class Quantiles:
    """Median and 20/80 % quantiles of one contender's samples, in microseconds per step call."""

    median_us: float
    q20_us: float
    q80_us: float
    samples: int


def quantiles(samples_s: Iterable[float]) -> Quantiles:
    """Summarise samples given in seconds.

    Raises:
        ValueError: there are none.

    Example:
        >>> quantiles([1e-6, 2e-6, 3e-6]).median_us
        2.0
    """
    ordered = sorted(1e6 * sample for sample in samples_s)
    if not ordered:
        raise ValueError("no samples")
    median = statistics.median(ordered)
    if len(ordered) == 1:
        return Quantiles(median, median, median, 1)
    cuts = statistics.quantiles(ordered, n=5, method="inclusive")
    return Quantiles(median, cuts[0], cuts[3], len(ordered))


def cuda_stopwatch(run: Step) -> float:
    """Seconds between two events on the current stream with ``run`` between them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def stopwatch_for(device: str) -> Stopwatch | None:
    """What times a run on a device better than the clock, None for the clock."""
    return cuda_stopwatch if torch.device(device).type == "cuda" else None


def interleave(
    steps: Mapping[str, Step],
    options: TimingOptions,
    *,
    stopwatch: Stopwatch | None = None,
    clock: Callable[[], float] = time.perf_counter,
    settle: Step | None = None,
) -> dict[str, list[float]]:
    """Time several steps in turn; returns each one's samples in seconds per call.

    Args:
        steps: by contender; every one is called in every round.
        options: how many samples to take.
        stopwatch: times one run; None for the clock.
        clock: seconds; a test may count instead.
        settle: called, untimed, before each sample and the untimed call that precedes it.
    """

    def by_clock(run: Step) -> float:
        begin = clock()
        run()
        return clock() - begin

    measure = stopwatch or by_clock
    repeats = {}
    for name, step in steps.items():
        if settle:
            settle()
        repeats[name] = _repeats(step, options, measure)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    # A collection in the middle of a sample would be charged to whoever happens to run.
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = clock()
        rounds = 0
        while rounds < options.max_samples:
            spent = clock() - start
            enough = rounds >= options.min_samples and spent >= options.budget_s
            too_slow = rounds > 0 and 0 < _PATIENCE * options.budget_s <= spent
            if rounds % 2 == 0 and (enough or too_slow):
                break
            for name in order:
                step, repeat = steps[name], repeats[name]
                if settle:
                    settle()
                if settle or repeat > 1:
                    step()  # caches and cores belong to this contender before its clock starts
                samples[name].append(measure(_repeated(step, repeat)) / repeat)
            order.reverse()
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return samples


# Of a thread on another core, Linux counts the time at ticks only, of up to 10 ms.
_QUIET_S = 0.025


def wait_for_quiet(limit_s: float = 0.5) -> None:
    """Wait until the threads of this process have stopped looking for work, as a pool's do for a
    while after its last task (ONNX Runtime's for some 70 ms)."""
    until = time.perf_counter() + limit_s
    while time.perf_counter() < until:
        begin, used = time.perf_counter(), time.process_time()
        time.sleep(_QUIET_S)
        if time.process_time() - used < 0.1 * (time.perf_counter() - begin):
            return


def _repeated(step: Step, count: int) -> Step:
    def run() -> None:
        for _ in range(count):
            step()

    return run


def _repeats(step: Step, options: TimingOptions, measure: Stopwatch) -> int:
    """Warm a step up and find how many calls make a sample of the wanted length."""
    duration = 0.0
    for _ in range(max(1, options.warmup)):
        duration = measure(step)
    if duration <= 0:
        return 1
    return max(1, min(10_000, round(options.min_sample_s / duration)))


@dataclass(frozen=True)
class Saved:
    """Bytes kept for backward: in all, and of these in opaque byte tensors."""

    total: int
    workspace: int


def saved_for_backward(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> Saved:
    """Count the storages that autograd keeps after ``forward``, each once, without parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    sizes: dict[int, tuple[int, bool]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # The graph keeps the tensor, so an address stands for one storage until we are done.
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = (storage.nbytes(), tensor.dtype == torch.uint8)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return Saved(
        total=sum(size for size, _ in sizes.values()),
        workspace=sum(size for size, opaque in sizes.values() if opaque),
    )


_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # man 5 proc: resets VmHWM to the current resident set


def peak_bytes(step: Step, device: str) -> int | None:
    """How far memory in use rises during one step; None where that cannot be seen.

    On CUDA this is the caching allocator's account, on Linux the kernel's account of the resident
    set, which includes whatever a library allocates behind torch's back.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    if not _return_free_pages():
        return None
    try:
        before = _resident("VmRSS")
        _CLEAR_REFS.write_text(_RESET_PEAK)
        step()
        return max(0, _resident("VmHWM") - before)
    except (OSError, KeyError):
        return None


def _return_free_pages() -> bool:
    """Give pages that malloc holds back to the system, so that a step has to ask for its own."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # another libc, another system
        return False
    trim(0)
    return True


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * 1024
    raise KeyError(field)
