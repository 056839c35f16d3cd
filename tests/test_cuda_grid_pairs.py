"""The grid tier's forward kernels whose CTAs gather in pairs (csrc/kernels/grid_gather.cuh), run by
the emulator: right for every layout, although copies bring what was there before; the same bits as
those of the other grid kernels; and an end, whatever is lost.

Backward runs stepwise here, so that nothing but the forward pass is tried.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
from cuda_emulated import emulated, module, needs_emulator
from hypothesis import given, settings
from hypothesis import strategies as st
from persistent_cases import grid_ctas, problems
from recurrence_cases import CELLS, VARIANTS, Layer, assert_near_oracle, assert_same_bits, layer
from torch import Tensor

pytestmark = needs_emulator

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
every_cell = pytest.mark.parametrize("cell", CELLS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@dataclass(frozen=True)
class OnPairs(Layer):
    """A layer whose forward calls run in pairs, on a device as ``device`` describes it."""

    device: dict[str, Any] = field(default_factory=dict)

    def call(self, *tensors: Tensor | None, **how: Any) -> tuple[Tensor, ...]:
        with emulated("grid-pairs", **self.device) as ran:
            results = super().call(*tensors, **how)
            assert ran.ran == ["grid-pairs"]
            assert ran.native.emulator_stats()["copies"] > 0
        return results


def check(problem: Layer, dtype: torch.dtype, **device: Any) -> None:
    on = OnPairs(*(getattr(problem, f.name) for f in fields(Layer)), device)
    with emulated("stepwise") as backward:
        assert_near_oracle(on, dtype, backend="cuda")
        assert backward.ran == ["stepwise"]


def inference(problem: Layer, tier: str = "grid-pairs", **device: Any) -> dict[str, Tensor]:
    with emulated(tier, **device) as ran, torch.no_grad():
        results = problem.call(backend="cuda")
        assert ran.ran == [tier]
    return dict(zip(("output", "h_n", "c_n", "cells"), results, strict=False))


# --- right --------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@every_cell
def test_variants_are_near_the_oracle(
    cell: str, variant: dict[str, Any], dtype: torch.dtype
) -> None:
    check(layer(cell, H=24, **variant), dtype)


# [T, B, H], SMs: of 16 units and of 16 rows (with more fragments 8) a pass, what fills them not,
# just so, and not quite.
SIZES = {
    "one-pass": (5, 9, 32, 2),
    "a-cta-without-units": (4, 9, 40, 4),
    "three-passes": (5, 33, 64, 4),
    "the-last-of-three-half-full": (4, 40, 32, 2),
    "two-groups": (4, 40, 32, 4),
    "many-groups": (3, 33, 24, 10),
    "all-warps-and-rest": (2, 17, 264, 18),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@every_cell
def test_layouts_are_near_the_oracle(cell: str, size: tuple[int, int, int, int]) -> None:
    T, B, H, sms = size
    problem = layer(cell, T, B, 3, H, scale=0.5 if H < 100 else 0.15)
    check(problem, torch.bfloat16, sms=sms)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "hidden"),
    [
        pytest.param("gru", 1032, id="gru-six-fragments"),
        pytest.param("lstm", 1544, id="lstm-partly-in-shared-memory"),
    ],
)
def test_the_widest_layers_are_near_the_oracle(cell: str, hidden: int) -> None:
    check(layer(cell, 2, 9, 3, hidden, scale=0.05), torch.bfloat16, sms=132)


@every_dtype
@pytest.mark.parametrize("sms", [2, 6], ids=["passes", "groups"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@every_cell
def test_rows_that_begin_late_or_end_early_are_near_the_oracle(
    cell: str, reverse: bool, sms: int, dtype: torch.dtype
) -> None:
    """Passes and whole groups without a row in some steps."""
    lengths = (5, 5, 5) + (4,) * 17 + (2,) * 8 + (1,) * 9
    check(layer(cell, H=24, lengths=lengths, reverse=reverse), dtype, sms=sms)


@settings(max_examples=25, deadline=None)
@given(problems(), st.sampled_from(list(DTYPES.values())), st.integers(1, 3), st.integers(1, 99))
def test_any_sizes_and_options_agree_with_the_float64_reference(
    problem: Layer, dtype: torch.dtype, groups: int, seed: int
) -> None:
    ctas = grid_ctas(problem)
    check(problem, dtype, sms=(ctas + ctas % 2) * groups, seed=seed)


# --- the same bits ------------------------------------------------------------------------------


@every_dtype
@every_cell
def test_results_are_those_of_the_other_grid_kernels(cell: str, dtype: torch.dtype) -> None:
    """Whatever the schedule, whatever a copy brings late, and in one group or in more."""
    problem = layer(cell, H=40, lengths=(5, 5, 4) + (3,) * 16 + (1,) * 19).to(dtype)
    expected = inference(problem, "grid", sms=3)
    for seed, sms in ((1, 4), (2, 4), (3, 4), (4, 8), (5, 12)):
        assert_same_bits(inference(problem, seed=seed, sms=sms), expected)


@pytest.mark.parametrize("stale", [0, 1, 3], ids=["fresh", "all-old", "many-old"])
@every_cell
def test_a_copy_that_brings_what_was_there_before_changes_nothing(cell: str, stale: int) -> None:
    """Words that have not arrived are looked for again, by who multiplies them: without that the
    results would not be finite."""
    problem = layer(cell, 5, 40, 3, 40).to(torch.bfloat16)
    expected = inference(problem, "grid", sms=3)
    assert module is not None
    for seed in (1, 2, 3):
        with emulated("grid-pairs", seed=seed, sms=4, stale=stale) as device, torch.no_grad():
            results = problem.call(backend="cuda")
            assert (device.native.emulator_stats()["stale"] > 100) == (stale != 0)
        for found, wanted in zip(results, expected.values(), strict=True):
            assert torch.equal(found, wanted)
            assert found.isfinite().all()


# --- an end, whatever happens -------------------------------------------------------------------


@every_dtype
@every_cell
def test_nan_stays_in_its_row_and_travels_on(cell: str, dtype: torch.dtype) -> None:
    problem = layer(cell, 4, 19, 4, 40).to(dtype)
    x = problem.get("x").clone()
    x[1, 17] = torch.nan
    clean, found = inference(problem), inference(problem.having(x=x))
    for name in ("output", "cells"):
        if name in found:
            assert found[name][1:, 17].isnan().all()
            found[name][1:, 17] = clean[name][1:, 17]
            assert torch.equal(found[name], clean[name])


@every_dtype
@every_cell
def test_words_that_look_as_if_they_had_not_arrived_are_not_waited_for(
    cell: str, dtype: torch.dtype
) -> None:
    problem = layer(cell, 3, 9, 3, 40).to(dtype)
    for name in ("h0", "x", "w_hh"):
        ones = torch.full_like(problem.get(name).view(torch.int16), -1).view(dtype)
        results = inference(problem.having(**{name: ones}))
        assert results["output"].isnan().all()
        assert results["h_n"].isnan().all()


@every_cell
@pytest.mark.parametrize("lengths", [None, (5,) * 5 + (3,) * 28], ids=["dense", "packed"])
def test_a_lost_message_ends_the_launch_and_spoils_all_results(
    cell: str, lengths: tuple[int, ...] | None
) -> None:
    """Words that never arrive, copies that never land. No CTA leaves before its partner, who may
    still copy into it: the emulator would say so."""
    problem = layer(cell, 5, 33, 3, 40, lengths=lengths).to(torch.bfloat16)
    for seed in (1, 2, 3):
        with (
            emulated("grid-pairs", drop=50, seed=seed, sms=8, wait_polls=2000) as device,
            torch.no_grad(),
        ):
            results = problem.call(backend="cuda")
            assert device.native.emulator_stats()["dropped"] > 0
            assert all(result.isnan().all() for result in results)
            with pytest.raises(RuntimeError, match="grid-pairs"):
                problem.call(backend="cuda")
            # Off is only what failed.
            device.native.emulator_configure(drop=0)
            device.ran.clear()
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("RNNLM_CUDA_TIER", "grid")
                problem.call(backend="cuda")
            assert device.ran == ["grid"]


# --- no more than needed ------------------------------------------------------------------------


@every_cell
def test_a_call_is_one_cooperative_launch_of_clusters_of_two(cell: str) -> None:
    problem = layer(cell, 6, 20, 3, 40).to(torch.bfloat16)
    with emulated("grid-pairs", sms=9) as device, torch.no_grad():
        problem.call(backend="cuda")
        kernel, finish = device.native.emulator_log()
    assert (kernel["cooperative"], kernel["cluster"]) == (True, 2)
    assert (finish["cooperative"], finish["cluster"]) == (False, 1)
    ctas, groups, _ = kernel["grid"]
    assert ctas == 4  # of 16 units each, the last without
    assert 1 <= groups <= 2


@pytest.mark.parametrize("steps", [1, 5])
@every_cell
def test_every_row_is_copied_once_to_both_ctas_of_a_pair(cell: str, steps: int) -> None:
    problem = layer(cell, steps, 40, 3, 40).to(torch.bfloat16)
    with emulated("grid-pairs", sms=4) as device, torch.no_grad():
        problem.call(backend="cuda")
        copies = device.native.emulator_stats()["copies"]
    exchanges = 2 if cell == "gru-before" else 1
    assert copies == steps * 40 * exchanges * 4  # CTAs


@every_cell
def test_the_backward_pass_is_that_of_the_grid_tier(cell: str) -> None:
    with emulated("grid-pairs", sms=4) as device:
        assert_near_oracle(layer(cell, 3, 9, 3, 40), torch.bfloat16, backend="cuda")
        assert device.ran == ["grid-pairs", "grid"]
