"""Who computes a problem: argument, then ``RNNLM_BACKEND``, then the first backend that can."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch

from . import environment
from .backends import BACKENDS
from .options import Plan, Problem, RecurrenceOptions

log = logging.getLogger("rnnlm_kernels")

ENVIRONMENT = "RNNLM_BACKEND"
from_environment = environment.reader(ENVIRONMENT)


class BackendError(RuntimeError):
    """The backend that was asked for cannot run the problem, or none can."""


def backends() -> dict[str, ModuleType]:
    """Every backend of this version by name, in the order of preference."""
    return dict(BACKENDS)


def can_run(name: str, problem: Problem) -> tuple[bool, str]:
    """Whether backend ``name`` can run ``problem`` in this process, and why (not)."""
    backend = BACKENDS[name]
    ok, reason = backend.available()
    return backend.supports(problem) if ok else (ok, reason)


def requested(backend: str | None) -> tuple[str, str]:
    """The backend asked for and by whom, after applying argument > environment > automatic."""
    source = "backend="
    if backend is None:
        backend = from_environment() or "auto"
        source = f"{ENVIRONMENT}="
    if backend != "auto" and backend not in BACKENDS:
        raise BackendError(
            f"{source}{backend!r} is not a backend; expected 'auto' or one of {list(BACKENDS)}"
        )
    return backend, source


@functools.lru_cache(maxsize=4096)
def _choose(problem: Problem, backend: str, source: str) -> str:
    verdicts = {name: can_run(name, problem) for name in BACKENDS}
    able = [name for name, (ok, _) in verdicts.items() if ok]
    if backend != "auto":
        ok, reason = verdicts[backend]
        if not ok:
            others = f"backends that can: {able}" if able else "no other backend can either"
            raise BackendError(f"{source}{backend!r} cannot run {problem}: {reason}; {others}")
        return backend
    if not able:
        refusals = "; ".join(f"{name}: {reason}" for name, (_, reason) in verdicts.items())
        raise BackendError(f"no backend can run {problem}: {refusals}")
    if able[0] == "reference" and problem.device_type != "meta":
        _warn_slow(verdicts, problem.device_type)
    return able[0]


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def _warn_slow(verdicts: dict[str, tuple[bool, str]], device_type: str) -> None:
    """Say once per reason that the fused kernels are out of reach."""
    reasons = "; ".join(f"{name}: {reason}" for name, (ok, reason) in verdicts.items() if not ok)
    _warn_once(f"running the slow reference backend on {device_type} ({reasons})")


def choose(problem: Problem, backend: str | None = None) -> str:
    """The name of the backend that runs a problem; arguments and errors as of :func:`plan`."""
    return _choose(problem, *requested(backend))


def plan(problem: Problem, backend: str | None = None) -> Plan:
    """Choose the backend and kernel for a problem.

    Args:
        problem: what is to be computed.
        backend: a name, ``"auto"``, or None to ask ``RNNLM_BACKEND`` and then choose automatically.

    Raises:
        BackendError: the requested backend cannot run the problem (the message says why and which
            backends can), or its name is unknown.
    """
    return BACKENDS[choose(problem, backend)].plan(problem)


def explain(subject: torch.nn.Module | Problem, backend: str | None = None) -> str:
    """Say which plan a module or a problem gets, and why every other backend was not taken.

    Args:
        subject: a :class:`Problem`, or a module; every layer of ours inside it is explained.
        backend: as in :func:`plan`; a module's own ``backend`` goes first.

    Example:
        >>> text = explain(Problem("gru", 8, 16), backend="reference")
        >>> text.splitlines()[0]
        'gru(reset=after) T=any B=any I=8 H=16 float32 cpu inference'
    """
    if isinstance(subject, Problem):
        return _explain_problem(subject, backend)
    lines = []
    for name, module in subject.named_modules():
        if hasattr(module, "problems"):
            lines.append(f"{name or type(module).__name__}: {module}")
            for problem in module.problems():
                text = _explain_problem(problem, getattr(module, "backend", None) or backend)
                lines.extend("  " + line for line in text.splitlines())
    if not lines:
        return "no rnnlm_kernels layer found; rnnlm_kernels.replace(model) swaps torch's own"
    return "\n".join(lines)


def _explain_problem(problem: Problem, backend: str | None) -> str:
    lines = [str(problem)]
    try:
        chosen = plan(problem, backend)
        lines.append(f"  {chosen}")
        taken = chosen.backend
    except BackendError as error:
        lines.append(f"  cannot run: {error}")
        taken = None
    for name in BACKENDS:
        if name != taken:
            ok, reason = can_run(name, problem)
            lines.append(f"  {name}: {'could run' if ok else 'cannot run'} ({reason})")
    return "\n".join(lines)


__all__ = [
    "BackendError",
    "Plan",
    "Problem",
    "RecurrenceOptions",
    "backends",
    "can_run",
    "choose",
    "explain",
    "plan",
    "requested",
]
