"""The loop: check, then time, every contender on every workload."""

from __future__ import annotations

import datetime
import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch

from ..check import CheckResult, Judge
from . import machine
from .contenders import (
    PLAIN,
    TORCH,
    TORCH_COMPILE,
    Contender,
    ContenderError,
    compiling,
    plain_contender,
    rival_of,
)
from .contenders import contenders as default_contenders
from .measure import (
    TimingOptions,
    interleave,
    peak_bytes,
    quantiles,
    saved_for_backward,
    stopwatch_for,
    wait_for_quiet,
)
from .results import FAILED, WRONG, Measurement, Results, fill_ratios
from .roofline import Roof
from .workload import Setup, Trial, Workload, captured, flops, precision, setup, trial

log = logging.getLogger("rnnlm_kernels")

Progress = Callable[[Workload, int], None]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Verdicts:
    """Checks each contender once per layer and input, not once per mode or runner.

    Workloads that differ in mode only share weights and inputs, so the most demanding check
    (outputs and all gradients) stands for all of them; inference is not blamed for gradients, and
    who has none is asked for none.
    With ``steps`` a longer sequence is checked over its first steps only.
    """

    def __init__(self, grid: Sequence[Workload], steps: int | None = None) -> None:
        self._steps = steps
        self._needs_grad = {self._family(w) for w in grid if w.mode != "inference"}
        self._judge: Judge | None = None
        self._found: dict[tuple[Workload, int, str], CheckResult] = {}

    def _family(self, workload: Workload) -> Workload:
        steps = min(workload.seq_len, self._steps or workload.seq_len)
        return replace(workload, mode="inference", runner="eager", seq_len=steps)

    def __call__(self, workload: Workload, contender: Contender) -> tuple[bool, str]:
        family = self._family(workload)
        key = (family, torch.get_num_threads(), contender.name)
        if key not in self._found:
            grad = contender.differentiable and family in self._needs_grad
            judged = family.with_mode("training") if grad else family
            # One at a time: an oracle of a large workload holds a lot of memory.
            if self._judge is None or self._judge.workload != judged:
                self._judge = Judge(judged)
            self._found[key] = self._judge.check(contender.build, contender.name)
        result = self._found[key]
        if workload.mode == "inference":
            result = result.without_gradients
        return result.ok, result.summary()


def new_results(
    *, command: str = "", grid: str = "custom", options: TimingOptions | None = None
) -> Results:
    """An empty result that knows where and with what it is going to be measured."""
    return Results(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=command,
        grid=grid,
        machine=machine.describe(),
        versions=machine.versions(),
        commit=machine.commit(),
        settings=asdict(options or TimingOptions()),
        load_before=machine.load(),
    )


def run(
    grid: Sequence[Workload],
    contenders: Sequence[Contender] | None = None,
    *,
    threads: Sequence[int] = (),
    options: TimingOptions | None = None,
    results: Results | None = None,
    progress: Progress = lambda workload, threads: None,
    total_s: float | None = None,
    check_steps: int | None = None,
) -> Results:
    """Measure every contender on every workload.

    A contender whose output or gradients are wrong (see :mod:`rnnlm_kernels.check`) is not timed:
    its measurement has status ``"wrong"`` and says what is wrong.

    Args:
        grid: the workloads.
        contenders: None for torch and every fused backend of ours that is available.
        threads: thread counts to measure with; empty for torch's current one.
        options: how long to measure.
        results: filled as the run goes on, so that a caller still has what was measured when the
            run is interrupted; None makes a new one.
        progress: called before each workload with it and the thread count.
        total_s: no workload is begun after so many seconds; ``results.left_out`` counts the others.
        check_steps: of longer sequences, only so many steps are checked.

    Returns:
        ``results``, complete, with ratios filled in.
    """
    chosen = list(contenders if contenders is not None else default_contenders())
    options = options or TimingOptions()
    results = results or new_results(options=options)
    results.settings |= {"total_s": total_s, "check_steps": check_steps}
    verdicts = _Verdicts(grid, check_steps)
    order = _order(grid, threads)
    start = time.monotonic()
    try:
        for index, (workload, count) in enumerate(order):
            if total_s is not None and time.monotonic() - start >= total_s:
                results.left_out = len(order) - index
                break
            progress(workload, count)
            with _threads(count):
                results.measurements += _measure(workload, chosen, verdicts, options)
        results.complete = True
    finally:
        fill_ratios(results.measurements)
    return results


def _order(grid: Sequence[Workload], threads: Sequence[int]) -> list[tuple[Workload, int]]:
    """Modes and thread counts of one family stay together, so that its oracle is computed once."""
    families: dict[Workload, list[Workload]] = {}
    for workload in grid:
        key = replace(workload, mode="inference", runner="eager")
        families.setdefault(key, []).append(workload)
    return [
        (workload, count)
        for family in families.values()
        for count in threads or (torch.get_num_threads(),)
        for workload in family
    ]


def _line_up(workload: Workload, contenders: Sequence[Contender]) -> list[Contender]:
    """Who runs a workload: where torch has no such layer, plain PyTorch stands in as the rival."""
    if rival_of(workload) != PLAIN:
        return list(contenders)
    lacking = (TORCH, TORCH_COMPILE, PLAIN)
    return [plain_contender(), *(c for c in contenders if c.name not in lacking)]


def _measure(
    workload: Workload,
    contenders: Sequence[Contender],
    verdicts: _Verdicts,
    options: TimingOptions,
) -> list[Measurement]:
    """All contenders on one workload with the current number of threads."""
    with precision(workload):
        return _measure_now(workload, contenders, verdicts, options)


def _measure_now(
    workload: Workload,
    contenders: Sequence[Contender],
    verdicts: _Verdicts,
    options: TimingOptions,
) -> list[Measurement]:
    threads = torch.get_num_threads()
    inputs = setup(workload)
    measurements: list[Measurement] = []
    trials: dict[str, Trial] = {}
    line_up = _line_up(workload, contenders)
    for contender in line_up:
        measurement = Measurement(workload, threads, contender.name)
        measurements.append(measurement)
        try:
            with compiling(contender):
                trials[contender.name] = _admit(contender, inputs, verdicts, measurement)
        except ContenderError as error:
            measurement.status, measurement.note = error.status, str(error)
        except Exception as error:  # a contender's crash is a result, not the end of the run
            log.debug("%s failed on %s", contender.name, workload.label, exc_info=True)
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            measurement.status, measurement.note = FAILED, first_line[:300]

    if trials:
        steps = {name: t.step for name, t in trials.items()}
        roof = Roof(workload) if workload.device == "cpu" else None
        samples = interleave(
            steps | dict(roof.steps if roof else {}),
            options,
            stopwatch=stopwatch_for(workload.device),
            settle=wait_for_quiet if any(c.spins for c in line_up) else None,
        )
        work = flops(workload)
        least_us, bound = roof.least_us(samples) if roof else (None, "")
        for measurement in measurements:
            if measurement.contender in samples:
                found = quantiles(samples[measurement.contender])
                measurement.median_us = found.median_us
                measurement.q20_us, measurement.q80_us = found.q20_us, found.q80_us
                measurement.samples = found.samples
                measurement.us_per_step = found.median_us / workload.seq_len
                measurement.gflops = work / found.median_us / 1e3
                if least_us is not None:
                    measurement.roof_us, measurement.bound = least_us, bound
                    measurement.roofline = least_us / found.median_us
                # Hooks would make a compiled layer compile again, and a graph has its own memory.
                if measurement.contender != TORCH_COMPILE and workload.runner == "eager":
                    _measure_memory(trials[measurement.contender], inputs, measurement)
    gc.collect()
    return measurements


def _admit(
    contender: Contender, inputs: Setup, verdicts: _Verdicts, measurement: Measurement
) -> Trial:
    """Build a contender's layer and run it once, after its results have been found right.

    Raises:
        ContenderError: it cannot run the workload, or runs it wrongly.
    """
    workload = inputs.workload
    if not contender.trusted:
        ok, measurement.note = verdicts(workload, contender)
        if not ok:
            raise ContenderError(WRONG, measurement.note)
    measurement.plan = contender.plan(workload)
    ready = trial(contender.build(inputs), inputs)
    ready.step()
    if contender.observed is not None:
        measurement.plan = contender.observed(ready.step)
    return captured(ready) if workload.runner == "graph" else ready


def _measure_memory(ready: Trial, inputs: Setup, measurement: Measurement) -> None:
    workload = inputs.workload
    if workload.mode != "inference":
        saved = saved_for_backward(ready.forward, ready.layer.parameters())
        measurement.saved_bytes = saved.total
        measurement.workspace_bytes = saved.workspace
    measurement.peak_bytes = peak_bytes(ready.step, workload.device)
