"""The grid tier's backward kernels (csrc/kernels/grid_backward.cuh), run by the emulator: right for
every layout of CTAs, groups, passes and fragments; the same bits whatever the schedule; and an end,
whatever is computed or lost.

Forward runs stepwise here, on the same device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any
from unittest import mock

import pytest
import torch
from cuda_emulated import Emulated, emulated, needs_emulator
from hypothesis import given, settings
from hypothesis import strategies as st
from persistent_cases import grid_ctas, problems
from recurrence_cases import (
    CELLS,
    VARIANTS,
    Layer,
    assert_near_oracle,
    assert_same_bits,
    cotangents,
    layer,
)
from torch import Tensor

from rnnlm_kernels.backends import cuda
from rnnlm_kernels.options import RecurrenceOptions

pytestmark = needs_emulator

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# One that tensor cores multiply, and the one that plain multiply-adds do.
TWO_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
every_cell = pytest.mark.parametrize("cell", CELLS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
two_dtypes = pytest.mark.parametrize("dtype", TWO_DTYPES.values(), ids=TWO_DTYPES)


@dataclass(frozen=True)
class StepwiseForward(Layer):
    """A layer whose forward calls run in the stepwise tier."""

    def call(self, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
        with mock.patch.dict(os.environ, {cuda.ENVIRONMENT: "stepwise"}):
            return super().call(*tensors, **options)


def stepwise_forward(problem: Layer) -> StepwiseForward:
    return StepwiseForward(*(getattr(problem, f.name) for f in fields(Layer)))


@contextmanager
def backward_in(tier: str, **device: Any) -> Iterator[Emulated]:
    with emulated(tier, **device) as ran:
        yield ran
        assert ran.ran == ["stepwise", tier]


def scaled(cell: str, T: int, B: int, H: int, **options: Any) -> Layer:
    """A layer whose gradients neither vanish nor explode, however wide it is."""
    return layer(cell, T, B, 3, H, scale=0.5 if H < 40 else 0.15 if H < 300 else 0.05, **options)


def check(problem: Layer, dtype: torch.dtype, **device: Any) -> None:
    with backward_in("grid", **device):
        assert_near_oracle(stepwise_forward(problem), dtype, backend="cuda")


def slopes(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Cotangents that are a function of each result by itself: a row has the same ones in any
    batch."""
    return [3 * output.detach() + 0.5 for output in outputs]


def gradients(
    problem: Layer,
    wanted: Sequence[str] | None = None,
    results: Sequence[int] | None = None,
    grads: Sequence[Tensor] | None = None,
    tier: str = "grid",
    **device: Any,
) -> dict[str, Tensor]:
    """Gradients of the tensors ``wanted`` (all) with respect to ``results`` (all, by index), for
    the cotangents ``grads`` of these."""
    present = [n for n, t in zip(problem.names, problem.tensors, strict=True) if t is not None]
    names = present if wanted is None else wanted
    with backward_in(tier, **device):
        leaves = stepwise_forward(problem.map(lambda t: t.detach().clone()))
        tensors = [leaves.get(name).requires_grad_() for name in names]
        outputs = leaves.call(backend="cuda")
        used = [outputs[i] for i in (range(len(outputs)) if results is None else results)]
        found = torch.autograd.grad(used, tensors, slopes(used) if grads is None else grads)
    return dict(zip(names, found, strict=True))


def states(problem: Layer) -> list[str]:
    """The tensors whose gradients the kernel itself computes, in sums over no other row."""
    return [name for name in ("h0", "c0") if name in problem.names]


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
    "some-warps-idle": (2, 3, 40, 3),
    "all-warps-and-rest": (2, 9, 136, 9),
    "two-fragments-a-gate": (2, 2, 264, 17),
    "two-passes": (3, 9, 24, 2),
    "three-passes": (3, 17, 40, 3),
    "tiles-of-16-rows": (2, 40, 24, 2),
    "two-groups": (3, 9, 24, 4),
    "groups-of-passes": (3, 37, 24, 4),
    "groups-of-wide-tiles": (2, 70, 8, 2),
    "four-fragments-a-gate": (2, 2, 520, 33),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@every_cell
def test_layouts_are_near_the_oracle(cell: str, size: tuple[int, int, int, int]) -> None:
    *shape, sms = size
    check(scaled(cell, *shape), torch.bfloat16, sms=sms)


# Of float32 a fragment is 16 k of a tensor core or 32 of plain multiply-adds: one, not full; two;
# tiles of 16 rows, where there are such; and so many that some wait in shared memory.
FLOAT32_SIZES = {
    "variants": (4, 9, 40, 6),
    "all-warps-and-rest": (2, 3, 136, 9),
    "tiles-of-16-rows": (2, 40, 264, 17),
    "partly-in-shared-memory": (2, 2, 776, 49),
}


def float32_problem(cell: str, size: tuple[int, int, int, int]) -> tuple[Layer, int]:
    *shape, sms = size
    packed = {"lengths": (5, 5, 4) + (2,) * 9, "reverse": True} if shape[1] == 9 else {}
    return scaled(cell, *shape, **packed), sms


# Plain multiply-adds have tiles of 8 rows only.
@pytest.mark.parametrize("size", [n for n in FLOAT32_SIZES if n != "tiles-of-16-rows"])
@every_cell
def test_float32_is_exact_where_tf32_is_not_allowed(cell: str, size: str) -> None:
    problem, sms = float32_problem(cell, FLOAT32_SIZES[size])
    check(problem, torch.float32, sms=sms)


@pytest.mark.parametrize("batch", range(1, 10))
@every_cell
def test_any_number_of_rows_of_a_tile_is_near_the_oracle(cell: str, batch: int) -> None:
    """Plain multiply-adds compute 1, 2, 4 or 8, and share them out among groups one by one."""
    for sms in (3, 6):
        check(scaled(cell, 3, batch, 40), torch.float32, sms=sms)


@pytest.mark.parametrize("hidden", [264, 520])
@every_cell
def test_parts_of_the_weights_meet_within_a_load_of_one_row(cell: str, hidden: int) -> None:
    """A load of one row spans four fragments, of which a GRU has two or three kinds."""
    check(scaled(cell, 2, 1, hidden), torch.float32, sms=33)


@pytest.mark.parametrize("size", FLOAT32_SIZES.values(), ids=FLOAT32_SIZES)
@every_cell
def test_float32_is_rounded_to_tf32_where_that_is_allowed(
    cell: str, size: tuple[int, int, int, int]
) -> None:
    problem, sms = float32_problem(cell, size)
    problem = problem.to(torch.float32)
    names = states(problem)
    exact, found = (gradients(problem, names, sms=sms, allow_tf32=tf32) for tf32 in (False, True))
    for name, value in exact.items():
        error = (found[name] - value).abs().max()
        assert error < 4e-3 * value.abs().max().clamp(min=1), name
    assert (found["h0"] - exact["h0"]).abs().max() > 1e-6 * exact["h0"].abs().max()


@every_cell
def test_exact_float32_errs_no_more_than_twice_as_much_as_torch(cell: str) -> None:
    problem = scaled(cell, 4, 5, 520).to(torch.float32)
    exact, of_torch = (
        torch.autograd.grad(outputs, leaves.get("h0"), slopes(outputs))[0].double()
        for leaves in (problem.to(torch.float64).leaves(), problem.leaves())
        for outputs in [leaves.refer()[:1]]
    )
    found = gradients(problem, ["h0"], results=[0], sms=33)["h0"].double()
    error, error_of_torch = ((h - exact).square().mean().sqrt() for h in (found, of_torch))
    assert error <= 2 * error_of_torch


@every_cell
def test_float64_is_refused(cell: str) -> None:
    words = "bfloat16, float16 and float32"
    with emulated("grid"):
        leaves = stepwise_forward(layer(cell, H=24)).leaves()
        outputs = leaves.call(backend="cuda")
        with pytest.raises(NotImplementedError, match=words):
            torch.autograd.grad(outputs, leaves.present, slopes(outputs))


@pytest.mark.slow
@every_cell
def test_weights_partly_in_shared_memory_count_like_the_others(cell: str) -> None:
    problem = scaled(cell, 2, 1, 1544)
    names = states(problem)
    # Wide apart: every gate has a gradient that shows.
    problem = problem.having(**{name: 20 * problem.get(name) for name in names}).to(torch.float16)
    expected = gradients(problem, names, tier="stepwise", sms=132)
    for name, value in gradients(problem, names, sms=132).items():
        error = (value.float() - expected[name].float()).abs().max()
        assert error <= 4 * torch.finfo(torch.float16).eps * expected[name].abs().max(), name


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


@every_dtype
@every_cell
def test_gradients_are_those_of_the_stepwise_tier(cell: str, dtype: torch.dtype) -> None:
    """But for the order of the sums, and roundings that it turns the other way."""
    problem = layer(cell, H=40, lengths=(3, 3) + (2,) * 6 + (1,) * 3).to(dtype)
    expected = gradients(problem, tier="stepwise")
    for name, value in gradients(problem, sms=6).items():
        error = (value.float() - expected[name].float()).abs().max()
        scale = expected[name].abs().max().clamp(min=1)
        limit = (16 if dtype is torch.float32 else 4) * torch.finfo(dtype).eps
        assert error <= limit * scale, name


LENGTHS = {"dense": None, "packed": (4,) * 21 + (3,) * 11 + (1,) * 5}


@two_dtypes
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@every_cell
def test_gradients_of_biases_are_sums_over_all_groups_and_their_passes(
    cell: str, lengths: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    """Of units that do not fill the last CTA."""
    problem = layer(cell, 4, 37, 3, 24, lengths=lengths).to(dtype)
    exact = (wide := problem.to(torch.float64).leaves()).refer()
    biases = [wide.get("b_ih"), wide.get("b_hh")]
    expected = torch.autograd.grad(exact, biases, grads := cotangents(exact))
    with backward_in("grid", sms=4) as device:
        outputs = (leaves := stepwise_forward(problem).leaves()).call(backend="cuda")
        grads = [grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=True)]
        found = torch.autograd.grad(outputs, [leaves.get("b_ih"), leaves.get("b_hh")], grads)
        (kernel,) = (k for k in device.native.emulator_log() if k["cooperative"])
    ctas, groups, _ = kernel["grid"]
    assert (ctas, groups) == (2, 2)
    assert 37 / groups > 16  # rows of a pass, at most
    for value, other in zip(found, expected, strict=True):
        error = (value.double() - other).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * other.abs().max()


RESULTS = {"output": 0, "h_n": 1, "c_n": 2, "cells": 3}


@pytest.mark.parametrize(
    ("cell", "result"),
    [(c, r) for c in CELLS for r in RESULTS if c == "lstm" or RESULTS[r] < 2],
)
def test_results_that_nobody_uses_have_no_gradient(cell: str, result: str) -> None:
    problem = layer(cell, H=24, lengths=(4, 2, 2, 1)).to(torch.bfloat16)
    used = [RESULTS[result]]
    found = gradients(problem, results=used)
    exact = (wide := problem.to(torch.float64).leaves()).refer()
    expected = torch.autograd.grad([exact[i] for i in used], wide.present, slopes(exact)[used[0]])
    for (name, value), other in zip(found.items(), expected, strict=True):
        error = (value.double() - other).abs().max()
        assert error <= 16 * torch.finfo(torch.bfloat16).eps * other.abs().max().clamp(min=1), name


@two_dtypes
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@every_cell
def test_an_initial_state_that_needs_no_gradient_changes_no_other(
    cell: str, reverse: bool, dtype: torch.dtype
) -> None:
    problem = layer(cell, H=24, lengths=(4, 2, 2, 1) + (1,) * 9, reverse=reverse)
    problem = problem.to(dtype)
    everything = gradients(problem, sms=2)
    others = [name for name in everything if name not in states(problem)]
    found = gradients(problem, others, sms=2)
    assert_same_bits(found, {name: everything[name] for name in others})


# --- the same bits ------------------------------------------------------------------------------


@every_dtype
@every_cell
def test_gradients_do_not_depend_on_the_schedule(cell: str, dtype: torch.dtype) -> None:
    """Nor on the order in which stores become visible."""
    problem = layer(cell, H=40, lengths=(5, 5, 4) + (3,) * 6 + (1,) * 3).to(dtype)
    first, *others = (gradients(problem, seed=seed, sms=3) for seed in (1, 2, 3, 4))
    for other in others:
        assert_same_bits(other, first)


@two_dtypes
@every_cell
def test_a_row_does_not_depend_on_the_others_or_on_the_layout(
    cell: str, dtype: torch.dtype
) -> None:
    # One input feature and no bias: the projection of x is the same bits for any number of rows.
    problem = layer(cell, 3, 40, 1, 24, bias=False).to(dtype)
    names = states(problem)
    together = gradients(problem, names, sms=2)
    assert_same_bits(gradients(problem, names, sms=6), together)
    of_rows = [n for n in ("x", "h0", "c0") if n in problem.names]
    for row in (0, 7, 39):
        alone = problem.having(**{n: problem.get(n)[..., row : row + 1, :] for n in of_rows})
        for name, value in gradients(alone, names, sms=2).items():
            assert torch.equal(value, together[name][row : row + 1]), name


# --- an end, whatever happens -------------------------------------------------------------------


@every_dtype
@every_cell
def test_nan_stays_in_its_row_and_travels_back(cell: str, dtype: torch.dtype) -> None:
    problem = layer(cell, 4, 9, 3, 40).to(dtype)
    names = ["x", *states(problem)]
    clean = cotangents([torch.empty(4, 9, 40, dtype=dtype)])[0]
    dirty = clean.clone()
    dirty[2, 3, 5] = torch.nan
    expected = gradients(problem, names, results=[0], grads=[clean])
    found = gradients(problem, names, results=[0], grads=[dirty])
    assert found["x"][:3, 3].isnan().all()
    assert not found["x"][3, 3].isnan().any()
    for name, value in found.items():
        if name != "x":
            assert value[3].isnan().all(), name
        value[..., 3, :] = expected[name][..., 3, :]
        assert torch.equal(value, expected[name]), name


@every_dtype
@every_cell
def test_words_that_look_as_if_they_had_not_arrived_are_not_waited_for(
    cell: str, dtype: torch.dtype
) -> None:
    """0xFFFF is a NaN of 16 bits, 0xFFFFFFFF of 32: what an empty place of a message holds."""
    problem = layer(cell, 3, 9, 3, 40).to(dtype)
    integer = torch.int32 if dtype is torch.float32 else torch.int16
    ones = torch.full((3, 9, 40), -1, dtype=integer).view(dtype)
    found = gradients(problem, results=[0], grads=[ones])
    assert all(value.isnan().all() for value in found.values())


@two_dtypes
@every_cell
def test_the_first_step_of_a_row_needs_no_weights(cell: str, dtype: torch.dtype) -> None:
    """Its gates' gradients are right even where the weights are NaN and other rows, which have come
    further, meet them."""
    hidden, gates = 24, 4 if cell == "lstm" else 3
    batch_sizes = torch.tensor([2, 1, 1])  # row 0 of step 0, row 1, rows 0 of steps 1 and 2
    options = RecurrenceOptions(reset="before" if cell == "gru-before" else "after", packed=True)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    generator = torch.Generator().manual_seed(0)
    weights = torch.full((gates * hidden, hidden), torch.nan, dtype=dtype)
    h0, c0, output = random(2, hidden), random(2, hidden), random(4, hidden)
    saved = random(4, (3 if options.reset == "before" else 4) * hidden)
    dgates, candidate = random(4, gates * hidden), random(4, hidden)
    common = (saved, batch_sizes, options, dgates)
    with emulated("grid"):
        if cell == "lstm":
            cells, grads = random(4, hidden, dtype=torch.float32), (output, None, None, None)
            cuda.lstm_backward(*grads, weights, None, h0, c0, output, cells, *common, *4 * [None])
        else:
            cuda.gru_backward(output, None, weights, h0, output, *common, candidate, None)
    if cell == "gru-before":
        dgates = dgates[:, hidden:]  # that of r needs them
    assert dgates[[0, 2]].isnan().all()
    assert dgates[[1, 3]].isfinite().all()


@two_dtypes
@every_cell
@pytest.mark.parametrize("lengths", [None, (5,) * 5 + (3,) * 12], ids=["dense", "packed"])
def test_a_lost_message_ends_the_launch_and_spoils_all_gradients(
    cell: str, lengths: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    problem = layer(cell, 5, 17, 3, 40, lengths=lengths).to(dtype)
    for seed in (1, 2, 3):
        with emulated("grid", drop=50, seed=seed, sms=6, wait_polls=2000) as device:
            leaves = stepwise_forward(problem).leaves()
            outputs = leaves.call(backend="cuda")
            found = torch.autograd.grad(outputs, leaves.present, cotangents(outputs))
            assert device.native.emulator_stats()["dropped"] > 0
            assert all(gradient.isnan().all() for gradient in found)
            with pytest.raises(RuntimeError, match="grid"):
                problem.call(backend="cuda")


# --- no more than needed ------------------------------------------------------------------------


@every_cell
def test_a_call_is_one_cooperative_launch_the_biases_last_sums_and_a_check(cell: str) -> None:
    problem = stepwise_forward(layer(cell, 6, 20, 3, 40)).to(torch.bfloat16)
    with emulated("grid", sms=9) as device:
        outputs = (leaves := problem.leaves()).call(backend="cuda")
        before = len(device.native.emulator_log())
        torch.autograd.grad(outputs, leaves.present, cotangents(outputs))
        kernel, sums, finish = device.native.emulator_log()[before:]
    assert kernel["cooperative"]
    assert not sums["cooperative"]
    assert not finish["cooperative"]
    ctas, groups, _ = kernel["grid"]
    assert ctas == 3  # of 16 units each
    assert 1 <= groups <= 3
