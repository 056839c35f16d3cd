"""Which way of running a pass is the fastest here: the measurements behind tuned tables.

A backend says in which ways it can run a problem's pass (its *candidates*) and can be forced into
one. All of them are checked first, then those that are right are timed in turn. The other pass of
the layer is left as it is. *Forward* is timed without gradients, *backward* alone: of the same
recorded forward again and again.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from types import ModuleType

import torch
from torch import nn

from ..backends import tunable
from ..check import Judge
from ..tuning import Case, Entry
from .contenders import our_layer
from .measure import Step, TimingOptions, interleave, quantiles, stopwatch_for
from .workload import Setup, Workload, precision, setup, trial

log = logging.getLogger("rnnlm_kernels")

# What the backend would do anyway is left unless another way is faster by more than the noise.
LEAST_GAIN = 0.03


@dataclass
class Outcome:
    """What came out for one pass of one problem.

    Args:
        case: what was measured.
        candidates: the ways there are, in words; the one that is taken without a table first.
        us: median microseconds of a call, of those that were timed.
        refused: why others were not: their results are wrong, or they failed.
        note: why nothing was measured, or "".
    """

    case: Case
    candidates: Mapping[str, str] = field(default_factory=dict)
    us: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def choice(self) -> str | None:
        """The fastest, or what is taken anyway if that is about as fast."""
        if not self.us:
            return None
        fastest = min(self.us, key=lambda name: self.us[name])
        usual = next(iter(self.candidates))
        if usual in self.us and self.us[fastest] > (1 - LEAST_GAIN) * self.us[usual]:
            return usual
        return fastest

    def entry(self) -> Entry | None:
        """What a table is to hold of it."""
        if self.choice is None:
            return None
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        return Entry(self.case, self.choice, {n: round(us, 3) for n, us in self.us.items()}, today)


def problems(
    device: str,
    *,
    cells: Sequence[str],
    dtypes: Sequence[str],
    hidden: Sequence[int],
    batch: Sequence[int],
    steps: Sequence[int],
    lengths: Sequence[str] = ("dense",),
) -> list[Workload]:
    """Every combination, with as many inputs as hidden units.

    Raises:
        ValueError: a name is unknown or a size is not positive.
    """
    return [
        Workload(
            cell=cell,
            seq_len=t,
            batch=b,
            input_size=h,
            hidden_size=h,
            dtype=dtype,
            device=device,
            lengths=length,
            mode="training",
        )
        for cell, dtype, h, b, t, length in product(cells, dtypes, hidden, batch, steps, lengths)
    ]


def tune(
    workload: Workload, backend: str, *, options: TimingOptions, check_steps: int = 128
) -> Iterator[Outcome]:
    """Measure a problem's forward pass, then its backward pass.

    Args:
        workload: of one layer and direction, with mode ``"training"``.
        backend: one of :func:`rnnlm_kernels.backends.tunable`.
        options: how long to measure a pass.
        check_steps: of longer sequences only so many steps are checked.
    """
    module = tunable()[backend]
    problem = workload.problem()
    able, reason = module.supports(problem)
    judge: Judge | None = None
    for backward in (False, True):
        outcome = Outcome(Case.of(problem, backward, workload.dtype == "tf32"))
        if not able:
            outcome.note = reason
            yield outcome
            continue
        with precision(workload):
            outcome.candidates = module.candidates(problem, backward)
            if len(outcome.candidates) < 2:
                outcome.note = f"there is only {', '.join(outcome.candidates)}"
            else:
                try:
                    shorter = min(workload.seq_len, check_steps)
                    judge = judge or Judge(replace(workload, seq_len=shorter))
                    _measure(outcome, workload, backend, judge, options)
                except RuntimeError as error:  # out of memory, say: the next problem is another
                    log.debug("tuning failed on %s", outcome.case.label, exc_info=True)
                    outcome.us.clear()
                    outcome.note = f"failed: {_first_line(error)}"
        yield outcome


def _measure(
    outcome: Outcome, workload: Workload, backend: str, judge: Judge, options: TimingOptions
) -> None:
    module, backward = tunable()[backend], outcome.case.backward
    for name in outcome.candidates:
        if wrong := _what_is_wrong(judge, backend, module, backward, name):
            outcome.refused[name] = wrong
    right = [name for name in outcome.candidates if name not in outcome.refused]
    if not right:
        outcome.note = "no candidate is right"
        return
    inputs = setup(workload if backward else workload.with_mode("inference"))
    layer = our_layer(inputs, backend)
    step = _backward_step(layer, inputs) if backward else trial(layer, inputs).step

    def under(name: str) -> Step:
        def run() -> None:
            with module.forced(backward, name):
                step()

        return run

    samples = interleave(
        {name: under(name) for name in right}, options, stopwatch=stopwatch_for(workload.device)
    )
    outcome.us = {name: quantiles(taken).median_us for name, taken in samples.items()}


def _what_is_wrong(
    judge: Judge, backend: str, module: ModuleType, backward: bool, name: str
) -> str:
    """Why a candidate may not be timed, "" if it may."""
    cause = ""
    # Twice: after a launch that failed, the next call does nothing but say so, whoever makes it.
    for _ in range(2):
        try:
            with module.forced(backward, name):
                result = judge.check(lambda inputs: our_layer(inputs, backend), name)
            return "" if result.ok else result.summary()
        except RuntimeError as error:
            cause = _first_line(error)
    return cause


def _backward_step(layer: nn.Module, inputs: Setup) -> Step:
    """Backward of a forward pass that ran once: gradients of x and of all weights."""
    x = inputs.x.detach().clone().requires_grad_()
    output, _ = inputs.call(layer, x, inputs.state)
    leaves = [x, *layer.parameters()]

    def step() -> None:
        torch.autograd.grad(output, leaves, inputs.cotangents[0], retain_graph=True)

    return step


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
