"""Who runs a workload: torch's own layer, torch.compile of it, ONNX Runtime's, and ours, one per
backend."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

import torch
from torch import nn

from ..dispatch import BackendError, backends, can_run, plan
from ..nn import GRU, LSTM
from . import onnx_runtime
from .measure import Step
from .plain import PlainLayer
from .workload import Setup, Workload, layer_arguments

TORCH = "torch"
TORCH_COMPILE = "torch.compile"
PLAIN = "plain PyTorch"
ONNX = "ONNX Runtime"
RIVALS = (TORCH, TORCH_COMPILE, ONNX, PLAIN)
DOES_NOT_COMPILE = "does not compile"
_RECURRENT_OPERATORS = (
    "aten::lstm",
    "aten::gru",
    "aten::mkldnn_rnn_layer",
    "aten::_cudnn_rnn",
)
REFERENCE = "reference"  # our slow backend, which nobody means when asking how fast we are


class ContenderError(RuntimeError):
    """A contender cannot run a workload; ``status`` says in which way, for the result table."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Contender:
    """Something that can be timed.

    Args:
        name: as shown in tables.
        build: makes a layer with torch's signature and parameter names for a setup, with the
            setup's weights loaded; raises :class:`ContenderError` when it cannot.
        trusted: what the correctness rule compares with, and so cannot fail it.
        plan: which kernel runs, for the record.
        compile_limit_s: it compiles when it first runs, and may take this long.
        observed: names, from a step of it, the kernel that runs; takes the place of ``plan``.
        differentiable: whether it may be asked for gradients.
        spins: it has threads of its own, which go on running for a while after a call: beside it
            everybody waits until all threads sleep before a sample.
    """

    name: str
    build: Callable[[Setup], nn.Module]
    trusted: bool = False
    plan: Callable[[Workload], str] = lambda workload: ""
    compile_limit_s: float | None = None
    observed: Callable[[Step], str] | None = None
    differentiable: bool = True
    spins: bool = False


def torch_layer(inputs: Setup) -> nn.Module:
    """torch's own layer with a setup's weights.

    Raises:
        ContenderError: torch has no such cell (``gru-before``).
    """
    workload = inputs.workload
    if workload.cell == "gru-before":
        raise ContenderError("unsupported", "torch has no GRU with reset before")
    layer = nn.LSTM if workload.cell == "lstm" else nn.GRU
    return inputs.load(layer(**layer_arguments(workload)))


def our_layer(inputs: Setup, backend: str) -> nn.Module:
    """Our layer on one backend with a setup's weights.

    Raises:
        ContenderError: the backend is not built or does not run this workload.
    """
    workload = inputs.workload
    try:
        plan(workload.problem(), backend)
    except BackendError as error:
        raise ContenderError("unsupported", str(error)) from error
    arguments = layer_arguments(workload)
    if workload.cell == "lstm":
        return inputs.load(LSTM(**arguments, backend=backend))
    reset = "before" if workload.cell == "gru-before" else "after"
    return inputs.load(GRU(**arguments, reset=reset, backend=backend))


def ours(backend: str) -> Contender:
    """Our layer on one backend as a contender named after it."""
    return Contender(
        name=backend,
        build=lambda inputs: our_layer(inputs, backend),
        plan=lambda workload: str(plan(workload.problem(), backend)),
    )


def torch_contender() -> Contender:
    return Contender(TORCH, torch_layer, trusted=True)


def plain_layer(inputs: Setup) -> nn.Module:
    """The equations in plain PyTorch with a setup's weights."""
    return inputs.load(PlainLayer(inputs.workload))


def plain_contender() -> Contender:
    return Contender(PLAIN, plain_layer, trusted=True)


class _TimeLimit(BaseException):
    """Not an Exception, so that the compiler's own fallbacks do not swallow it."""


@contextlib.contextmanager
def compiling(contender: Contender) -> Iterator[None]:
    """Give a contender that compiles its time, and tell failing to compile from failing.

    The limit needs SIGALRM and the main thread; without them there is none.

    Raises:
        ContenderError: it did not compile, or not in time.
    """
    limit_s = contender.compile_limit_s
    if limit_s is None:
        yield
        return

    def expire(number: int, frame: FrameType | None) -> None:
        raise _TimeLimit

    limited = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGALRM")
    previous = signal.signal(signal.SIGALRM, expire) if limited else None
    try:
        if limited:
            signal.setitimer(signal.ITIMER_REAL, limit_s)
        yield
    except _TimeLimit:
        message = f"stopped after the limit of {limit_s:g} s"
        raise ContenderError(DOES_NOT_COMPILE, message) from None
    except ContenderError:
        raise
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ContenderError(DOES_NOT_COMPILE, first_line[:200]) from error
    finally:
        if limited:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)


def compiled_torch(limit_s: float) -> Contender:
    """``torch.compile(fullgraph=True)`` of torch's layer.

    Dynamo refuses torch's recurrent layers unless told otherwise, and then unrolls a GRU over
    time, which can take longer than anyone waits. An LSTM may end in the operator that torch's own
    layer calls; the plan tells which.
    """

    def build(inputs: Setup) -> nn.Module:
        from torch._inductor import config as inductor  # takes longer to import than torch

        torch._dynamo.reset()  # one workload's guards must not count against the next one
        # Not a `patch` around the call: the layer compiles again whenever a guard fails.
        torch._dynamo.config.allow_rnn = True
        # Threads would go on compiling after the limit, while others are timed.
        inductor.compile_threads = 1
        compiled: nn.Module = torch.compile(torch_layer(inputs), fullgraph=True)  # type: ignore[assignment]
        return compiled

    return Contender(TORCH_COMPILE, build, compile_limit_s=limit_s, observed=recurrent_operators)


def recurrent_operators(step: Step) -> str:
    """Which of torch's recurrent operators a step calls, or that it is unrolled over time.

    Example:
        >>> layer, x = nn.GRU(2, 2), torch.zeros(3, 1, 2)
        >>> recurrent_operators(lambda: layer(x))
        'aten::gru'
        >>> recurrent_operators(lambda: torch.tanh(x))
        'unrolled over time'
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells stderr that it profiles
    with torch.autograd.profiler.profile(use_kineto=False) as seen:
        step()
    names = [str(event.name) for event in seen.function_events]
    found = [name for name in dict.fromkeys(names) if name in _RECURRENT_OPERATORS]
    return ", ".join(found) or "unrolled over time"


def onnx_contender() -> Contender:
    """ONNX Runtime's layer; what it cannot run, it says so about."""

    def build(inputs: Setup) -> nn.Module:
        if refusal := onnx_runtime.refusal(inputs.workload):
            raise ContenderError("unsupported", refusal)
        return onnx_runtime.OnnxLayer(inputs)

    return Contender(ONNX, build, differentiable=False, spins=True)


def default_backends() -> list[str]:
    """The fused backends that are available in this process, in order of preference."""
    return [
        name for name, backend in backends().items() if name != REFERENCE and backend.available()[0]
    ]


def contenders(
    backend_names: list[str] | None = None,
    *,
    compile_torch: bool = False,
    compile_limit_s: float = 60.0,
    onnx: bool = False,
) -> list[Contender]:
    """torch first, then ours.

    Args:
        backend_names: our backends to run; None for every fused one that is built, or the
            reference when there is none.
        compile_torch: add ``torch.compile`` of torch's layer.
        compile_limit_s: time allowed for compiling one workload.
        onnx: add ONNX Runtime's layer.

    """
    names = backend_names or default_backends() or [REFERENCE]
    chosen = [torch_contender(), *(ours(name) for name in names)]
    if compile_torch:
        chosen.insert(1, compiled_torch(compile_limit_s))
    if onnx:
        chosen.append(onnx_contender())
    return chosen


def rival_of(workload: Workload) -> str:
    """Whom a workload's ratios compare with: torch, or plain PyTorch where torch has no layer."""
    return PLAIN if workload.cell == "gru-before" else TORCH


def runnable(name: str, workload: Workload) -> tuple[bool, str]:
    """Whether a backend runs a workload, and why (not)."""
    return can_run(name, workload.problem())
