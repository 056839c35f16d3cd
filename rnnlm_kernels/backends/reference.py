"""Plain PyTorch: any dtype and device, no kernels. See :mod:`rnnlm_kernels.reference`."""

from __future__ import annotations

from ..options import BUILT_OPTIONS, Plan, Problem

# Backward recomputes from the inputs, so forward saves no gates.
SAVES_GATES = False


def available() -> tuple[bool, str]:
    return True, "plain PyTorch"


def supports(problem: Problem) -> tuple[bool, str]:
    missing = problem.options.unsupported(BUILT_OPTIONS)
    if missing:
        return False, f"options not built: {', '.join(missing)}"
    if not problem.dtype.is_floating_point:
        return False, f"dtype {problem.dtype} is not a floating-point dtype"
    return True, "plain PyTorch runs any floating-point dtype on any device"


def plan(problem: Problem) -> Plan:
    return Plan("reference", "one PyTorch call per operation and step", "", supports(problem)[1])
