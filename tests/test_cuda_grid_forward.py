"""The grid tier's forward kernels (csrc/kernels/grid_forward.cuh), run by the emulator: right for
every layout of CTAs, groups, passes and fragments; the same bits whatever the schedule; and an end,
whatever is computed or lost.

Backward runs stepwise here: it finds the saved tensors as it expects them, or its gradients are
wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
from cuda_emulated import emulated, needs_emulator
from hypothesis import given, settings
from hypothesis import strategies as st
from persistent_cases import grid_ctas, problems
from recurrence_cases import (
    CELLS,
    VARIANTS,
    Layer,
    assert_near_oracle,
    assert_same_bits,
    layer,
    results_and_gradients,
)
from torch import Tensor

pytestmark = needs_emulator

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# One that tensor cores multiply, and the one that plain multiply-adds do.
TWO_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
every_cell = pytest.mark.parametrize("cell", CELLS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
two_dtypes = pytest.mark.parametrize("dtype", TWO_DTYPES.values(), ids=TWO_DTYPES)


@dataclass(frozen=True)
class OnGrid(Layer):
    """A layer whose forward calls run in the grid tier, on a device as ``device`` describes it."""

    device: dict[str, Any] = field(default_factory=dict)

    def call(self, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
        with emulated("grid", **self.device) as ran:
            results = super().call(*tensors, **options)
            assert ran.ran == ["grid"]
        return results


def on_grid(problem: Layer, **device: Any) -> OnGrid:
    return OnGrid(*(getattr(problem, f.name) for f in fields(Layer)), device)


def scaled(cell: str, T: int, B: int, H: int, **options: Any) -> Layer:
    """A layer whose states neither vanish nor saturate, however wide it is."""
    return layer(cell, T, B, 3, H, scale=0.5 if H < 40 else 0.15 if H < 300 else 0.05, **options)


def check(problem: Layer, dtype: torch.dtype, **device: Any) -> None:
    with emulated("stepwise") as backward:
        assert_near_oracle(on_grid(problem, **device), dtype, backend="cuda")
        assert backward.ran == ["stepwise"]


def inference(problem: Layer, **device: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        results = on_grid(problem, **device).call(backend="cuda")
    return dict(zip(("output", "h_n", "c_n", "cells"), results, strict=False))


# --- right --------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@every_cell
def test_variants_are_near_the_oracle(
    cell: str, variant: dict[str, Any], dtype: torch.dtype
) -> None:
    check(layer(cell, H=24, **variant), dtype)


# [T, B, H], SMs. One CTA for 16 units, 8 warps for 32 k each, 8 rows a tile: what fills these not,
# just so, and not quite; and as many groups as the SMs hold.
SIZES = {
    "half-a-cta": (3, 2, 8, 1),
    "one-cta-one-tile": (3, 8, 16, 1),
    "some-warps-idle": (2, 3, 72, 5),
    "all-warps-and-rest": (2, 9, 264, 17),
    "two-passes": (3, 9, 24, 2),
    "three-passes": (3, 17, 40, 3),
    "tiles-of-16-rows": (2, 40, 24, 2),
    "two-groups": (3, 9, 24, 4),
    "groups-of-passes": (3, 37, 24, 4),
    "groups-of-wide-tiles": (2, 70, 8, 2),
    "four-fragments": (2, 2, 520, 33),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@every_cell
def test_layouts_are_near_the_oracle(cell: str, size: tuple[int, int, int, int]) -> None:
    *shape, sms = size
    check(scaled(cell, *shape), torch.bfloat16, sms=sms)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "hidden"),
    [
        pytest.param("gru", 1032, id="gru-six-fragments"),
        pytest.param("lstm", 1544, id="lstm-partly-in-shared-memory"),
    ],
)
def test_the_widest_layers_are_near_the_oracle(cell: str, hidden: int) -> None:
    """Others of these: test_float32_is_rounded_to_tf32_where_that_is_allowed, where they are half
    as wide."""
    check(scaled(cell, 2, 1, hidden), torch.bfloat16, sms=132)


@two_dtypes
@pytest.mark.parametrize("sms", [2, 6], ids=["passes", "groups"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@every_cell
def test_rows_that_begin_late_or_end_early_are_near_the_oracle(
    cell: str, reverse: bool, sms: int, dtype: torch.dtype
) -> None:
    """Passes and whole groups without a row in some steps."""
    lengths = (6, 6, 5) + (4,) * 7 + (2,) * 8 + (1,) * 7
    check(layer(cell, H=24, lengths=lengths, reverse=reverse), dtype, sms=sms)


@settings(max_examples=50, deadline=None)
@given(problems(), st.sampled_from(list(DTYPES.values())), st.integers(1, 4), st.integers(1, 99))
def test_any_sizes_and_options_agree_with_the_float64_reference(
    problem: Layer, dtype: torch.dtype, groups: int, seed: int
) -> None:
    ctas = grid_ctas(problem)
    check(problem, dtype, sms=ctas * groups, seed=seed)


# Fragments of float32 are of 16 k: one; two, not all full; four and wide tiles; six; and so many
# that some wait in shared memory.
FLOAT32_SIZES = {
    "variants": (4, 9, 40, 6),
    "all-warps-and-rest": (2, 3, 136, 9),
    "tiles-of-16-rows": (2, 40, 264, 17),
    "six-fragments": (2, 2, 520, 33),
    "partly-in-shared-memory": (2, 2, 776, 49),
}


@pytest.mark.parametrize("size", FLOAT32_SIZES.values(), ids=FLOAT32_SIZES)
@every_cell
def test_float32_is_rounded_to_tf32_where_that_is_allowed(
    cell: str, size: tuple[int, int, int, int]
) -> None:
    *shape, sms = size
    packed = {"lengths": (5, 5, 4) + (2,) * 9, "reverse": True} if shape[1] == 9 else {}
    problem = scaled(cell, *shape, **packed).to(torch.float32)
    exact = results_and_gradients(problem.to(torch.float64), problem.to(torch.float64).refer)
    on = on_grid(problem, sms=sms, allow_tf32=True)
    with emulated("stepwise"):
        found = results_and_gradients(on, lambda *t: on.call(*t, backend="cuda"))
    for name, value in exact.items():
        scale = value.abs().max().clamp(min=1)
        assert (found[name] - value).abs().max() < 4e-3 * scale, name
    assert (found["output"] - exact["output"]).abs().max() > 1e-6


@pytest.mark.parametrize("size", FLOAT32_SIZES.values(), ids=FLOAT32_SIZES)
@every_cell
def test_float32_is_exact_where_tf32_is_not_allowed(
    cell: str, size: tuple[int, int, int, int]
) -> None:
    *shape, sms = size
    packed = {"lengths": (5, 5, 4) + (2,) * 9, "reverse": True} if shape[1] == 9 else {}
    check(scaled(cell, *shape, **packed), torch.float32, sms=sms)


@pytest.mark.parametrize("batch", range(1, 10))
@every_cell
def test_any_number_of_rows_of_a_tile_is_near_the_oracle(cell: str, batch: int) -> None:
    """Plain multiply-adds leave out the rows that do not exist, and share them out among groups
    one by one."""
    for sms in (3, 6):
        check(scaled(cell, 2, batch, 40), torch.float32, sms=sms)


@every_cell
def test_exact_float32_errs_no_more_than_twice_as_much_as_torch(cell: str) -> None:
    problem = scaled(cell, 4, 5, 520).to(torch.float32)
    exact = problem.to(torch.float64).refer()[0]
    error, of_torch = (
        (output.double() - exact).square().mean().sqrt()
        for output in (inference(problem, sms=33)["output"], problem.refer()[0])
    )
    assert error <= 2 * of_torch


@every_cell
def test_float64_is_refused(cell: str) -> None:
    words = "bfloat16, float16 and float32"
    with emulated("grid"), pytest.raises(NotImplementedError, match=words):
        layer(cell, H=24).call(backend="cuda")


@every_dtype
@every_cell
def test_results_are_those_of_the_stepwise_tier(cell: str, dtype: torch.dtype) -> None:
    """But for the order of the sums. The steps are few: a rounding that went the other way goes on
    growing."""
    problem = layer(cell, 2, 11, 3, 40).to(dtype)
    found = inference(problem, sms=6)
    with emulated("stepwise"), torch.no_grad():
        expected = problem.call(backend="cuda")
    for (name, value), other in zip(found.items(), expected, strict=True):
        error = (value.float() - other.float()).abs().max()
        limit = (8 if dtype is torch.float32 else 2) * torch.finfo(dtype).eps
        assert error <= limit * other.abs().max().clamp(min=1), name


# --- the same bits ------------------------------------------------------------------------------


@every_dtype
@every_cell
def test_results_do_not_depend_on_the_schedule(cell: str, dtype: torch.dtype) -> None:
    """Nor on the order in which stores become visible."""
    problem = layer(cell, H=40, lengths=(5, 5, 4) + (3,) * 6 + (1,) * 3).to(dtype)
    first, *others = (inference(problem, seed=seed, sms=3) for seed in (1, 2, 3, 4))
    for other in others:
        assert_same_bits(other, first)


@two_dtypes
@every_cell
def test_a_row_does_not_depend_on_the_others_or_on_the_layout(
    cell: str, dtype: torch.dtype
) -> None:
    # One input feature and no bias: the projection of x is the same bits for any number of rows.
    problem = layer(cell, 3, 40, 1, 24, bias=False).to(dtype)
    together = inference(problem, sms=2)
    assert_same_bits(inference(problem, sms=6), together)
    of_rows = [n for n in ("x", "h0", "c0") if n in problem.names]
    for row in (0, 2, 7, 39):
        alone = problem.having(**{n: problem.get(n)[..., row : row + 1, :] for n in of_rows})
        for name, value in inference(alone, sms=2).items():
            assert torch.equal(value, together[name][..., row : row + 1, :]), name


@every_dtype
@every_cell
def test_inference_is_the_same_bits_as_training(cell: str, dtype: torch.dtype) -> None:
    problem = layer(cell, H=24, lengths=(4, 2, 2, 1), reverse=True).to(dtype)
    with emulated("stepwise"):
        on = on_grid(problem)
        trained = results_and_gradients(on, lambda *t: on.call(*t, backend="cuda"))
    for name, value in inference(problem).items():
        assert torch.equal(value, trained[name]), name


# --- an end, whatever happens -------------------------------------------------------------------


@every_dtype
@every_cell
def test_nan_stays_in_its_row_and_travels_on(cell: str, dtype: torch.dtype) -> None:
    problem = layer(cell, 4, 9, 4, 40).to(dtype)
    x = problem.get("x").clone()
    x[1, 3] = torch.nan
    clean, found = inference(problem), inference(problem.having(x=x))
    for name in ("output", "cells"):
        if name in found:
            assert found[name][1:, 3].isnan().all()
            found[name][1:, 3] = clean[name][1:, 3]
            assert torch.equal(found[name], clean[name])


@every_dtype
@every_cell
def test_words_that_look_as_if_they_had_not_arrived_are_not_waited_for(
    cell: str, dtype: torch.dtype
) -> None:
    """0xFFFF is a NaN of 16 bits, 0xFFFFFFFF of 32: what an empty place of a message holds."""
    problem = layer(cell, 3, 9, 3, 40).to(dtype)

    def of_ones(tensor: Tensor) -> Tensor:
        integer = torch.int32 if dtype is torch.float32 else torch.int16
        return torch.full_like(tensor.view(integer), -1).view(dtype)

    for name in ("h0", "x", "w_hh"):
        results = inference(problem.having(**{name: of_ones(problem.get(name))}))
        assert results["output"].isnan().all()
        assert results["h_n"].isnan().all()


@two_dtypes
@every_cell
@pytest.mark.parametrize("lengths", [None, (5,) * 5 + (3,) * 12], ids=["dense", "packed"])
def test_a_lost_message_ends_the_launch_and_spoils_all_results(
    cell: str, lengths: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    problem = layer(cell, 5, 17, 3, 40, lengths=lengths).to(dtype)
    for seed in (1, 2, 3):
        with (
            emulated("grid", drop=50, seed=seed, sms=6, wait_polls=2000) as device,
            torch.no_grad(),
        ):
            results = problem.call(backend="cuda")
            assert device.native.emulator_stats()["dropped"] > 0
            assert all(result.isnan().all() for result in results)
            with pytest.raises(RuntimeError, match="grid"):
                problem.call(backend="cuda")


# --- no more than needed ------------------------------------------------------------------------


@every_cell
def test_a_call_is_one_cooperative_launch_and_its_check(cell: str) -> None:
    problem = layer(cell, 6, 20, 3, 40).to(torch.bfloat16)
    with emulated("grid", sms=9) as device, torch.no_grad():
        problem.call(backend="cuda")
        kernel, finish = device.native.emulator_log()
    assert kernel["cooperative"]
    assert not finish["cooperative"]
    ctas, groups, _ = kernel["grid"]
    assert ctas == 3  # of 16 units each
    assert 1 <= groups <= 3
