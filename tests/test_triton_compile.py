"""The Triton kernels compile without a GPU for every architecture, within what a program may have.

The launches are those of the backend, so what is compiled is what would run (triton_compiled.py).
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
from triton_compiled import compiled, needs_compiler

pytestmark = needs_compiler

CELLS = ("lstm", "gru", "gru-before")
# Forward and backward of a layer, by what decides the tile: a few rows, and many.
STEPWISE = {
    "lstm": {"lstm_step", "lstm_step_backward", "state_step_backward"},
    "gru": {"gru_after_step", "gru_step_backward", "state_step_backward"},
    "gru-before": {
        "gru_reset_step",
        "gru_candidate_step",
        "gru_step_backward",
        "gru_reset_step_backward",
        "state_step_backward",
    },
}
# [target, dtype, TF32 allowed, rows, hidden]. sm_90 has all of them; of the other targets those
# that compile to other instructions.
STEPWISE_CASES = [
    ("sm_90", "bfloat16", False, 16, 1024),
    ("sm_90", "bfloat16", False, 1024, 2048),
    ("sm_90", "float32", False, 16, 1024),
    ("sm_90", "float32", False, 1024, 2048),
    ("sm_90", "float32", True, 1024, 2048),
    ("sm_80", "bfloat16", False, 16, 1024),
    ("sm_80", "bfloat16", False, 1024, 2048),
    ("sm_80", "float32", True, 1024, 2048),
    ("sm_100", "bfloat16", False, 1024, 2048),
    ("sm_100", "float32", True, 1024, 2048),
    ("gfx942", "bfloat16", False, 16, 1024),
    ("gfx942", "float32", False, 1024, 2048),
]
# ptxas moves two or three values to the stack where that lets one more program onto a
# multiprocessor. More would be a tile that is too large.
STACK_BYTES = 32


@functools.cache
def kernels() -> list[dict[str, Any]]:
    """Everything at once: the processes that compile start once."""
    problems = [
        {"target": t, "cell": c, "dtype": d, "tf32": tf32, "batch": b, "hidden": h}
        for t, d, tf32, b, h in STEPWISE_CASES
        for c in CELLS
    ]
    # No multiple of anything, and a projection.
    problems += [
        {"target": "sm_90", "cell": c, "dtype": "float16", "batch": 5, "hidden": 100, "proj": p}
        for c, p in (("lstm", 33), ("gru", 0), ("gru-before", 0))
    ]
    return compiled(*problems)


def of(target: str, dtype: str, tf32: bool, rows: int, hidden: int) -> list[dict[str, Any]]:
    wanted = {"target": target, "dtype": dtype, "tf32": tf32, "batch": rows, "hidden": hidden}
    return [k for k in kernels() if wanted.items() <= k.items()]


every_case = pytest.mark.parametrize(
    "case", STEPWISE_CASES, ids=["-".join(map(str, case)) for case in STEPWISE_CASES]
)


@every_case
def test_every_kernel_compiles(case: tuple[str, str, bool, int, int]) -> None:
    for cell, names in STEPWISE.items():
        assert {k["name"] for k in of(*case) if k["cell"] == cell} == names


@every_case
def test_sums_stay_in_registers_and_blocks_in_shared_memory(
    case: tuple[str, str, bool, int, int],
) -> None:
    for kernel in of(*case):
        assert kernel["stack"] <= STACK_BYTES, kernel
        assert 0 < kernel["shared"] <= kernel["may_share"], kernel


@every_case
def test_products_are_done_by_tensor_cores_where_they_may_be(
    case: tuple[str, str, bool, int, int],
) -> None:
    target, dtype, tf32, rows, _ = case
    # With 64 rows, those of a whole group of warps.
    wide = {"sm_90": "wgmma", "sm_100": "tcgen05.mma"}.get(target, "mma.sync")
    wanted = [wide if rows >= 64 else "mma.sync"]
    if target == "gfx942":
        wanted = ["v_mfma"]  # which multiply float32 as well
    elif dtype == "float32" and not tf32:
        wanted = []
    for kernel in of(*case):
        assert kernel["products"] == wanted, kernel


def test_odd_sizes_compile_within_the_same_bounds() -> None:
    odd = [k for k in kernels() if k["hidden"] == 100]
    assert {k["name"] for k in odd} == {"projection_step"}.union(*STEPWISE.values())
    for kernel in odd:
        assert kernel["stack"] <= STACK_BYTES, kernel
