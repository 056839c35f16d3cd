"""The stepwise tier (csrc/launch/stepwise.h), run by the emulator: right in every dtype, size and
tile; the same bits whatever the schedule; and no launch, read or write that is not needed.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from cuda_emulated import emulated, needs_emulator
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrence_cases import (
    CELLS,
    DTYPES,
    Layer,
    assert_near_oracle,
    assert_same_bits,
    cotangents,
    layer,
    layer_cases,
    results_and_gradients,
)
from torch import Tensor

from rnnlm_kernels.backends import cuda

pytestmark = needs_emulator

every_cell = pytest.mark.parametrize("cell", CELLS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)

# [T, B, H]: nothing to fill a vector or a tile with, exactly one, several, and several and a rest.
SIZES = {
    "one-number": (1, 1, 1),
    "one-unit": (3, 13, 1),
    "odd": (2, 9, 7),
    "one-tile": (3, 8, 16),
    "vector-and-rest": (3, 5, 33),
    "vectors": (2, 5, 100),
    "tiles-and-rest": (2, 9, 130),
}
FORWARD_LAUNCHES = {"lstm": 1, "gru": 1, "gru-before": 2}
# A projection, rows of different lengths, either direction: what can go wrong in the host's loop.
CROOKED = {
    "lstm": {"proj": 5, "lengths": (4, 3, 1), "reverse": True},
    "gru": {"lengths": (4, 3, 1), "reverse": True},
    "gru-before": {"lengths": (4, 2, 2, 1)},
}


def scaled(cell: str, T: int, B: int, H: int, **options: Any) -> Layer:
    """A layer whose states neither vanish nor saturate, however wide it is."""
    return layer(cell, T, B, 3, H, scale=0.5 if H < 40 else 0.15, **options)


def run(problem: Layer, **device: Any) -> dict[str, Tensor]:
    with emulated("stepwise", **device) as ran:
        results = results_and_gradients(problem, lambda *t: problem.call(*t, backend="cuda"))
        assert set(ran.ran) == {"stepwise"}
    return results


def states_and_gradients(problem: Layer) -> list[Tensor]:
    """All results and the gradients of the initial state, for cotangents that are a function of
    each result by itself."""
    with emulated("stepwise"):
        leaves = problem.leaves()
        outputs = leaves.call(backend="cuda")
        states = [leaves.get(n) for n in ("h0", "c0") if n in leaves.names]
        slopes = [3 * o.detach() + 0.5 for o in outputs]
        return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, states, slopes)]


def launches(problem: Layer, grads_of: tuple[str, ...] = (), **device: Any) -> list[dict[str, Any]]:
    """What was launched for a forward call and, if gradients are asked for, its backward."""
    with emulated("stepwise", **device) as ran:
        leaves = problem.map(lambda t: t.detach().clone())
        wanted = [leaves.get(name).requires_grad_() for name in grads_of]
        with torch.set_grad_enabled(bool(wanted)):
            outputs = leaves.call(backend="cuda")
        if wanted:
            torch.autograd.grad(outputs, wanted, cotangents(outputs))
        log: list[dict[str, Any]] = ran.native.emulator_log()
    return log


# --- right --------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize(("cell", "variant"), layer_cases())
def test_variants_are_near_the_oracle(cell: str, variant: dict[str, Any], dtype: str) -> None:
    with emulated("stepwise") as device:
        assert_near_oracle(layer(cell, H=17, **variant), DTYPES[dtype], backend="cuda")
        assert set(device.ran) == {"stepwise"}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@every_dtype
@every_cell
def test_sizes_are_near_the_oracle(cell: str, dtype: str, size: tuple[int, int, int]) -> None:
    with emulated("stepwise"):
        assert_near_oracle(scaled(cell, *size), DTYPES[dtype], backend="cuda")


# [SMs, rows of a tile] for 70 rows: the narrowest tile whose CTAs all find an SM, else the widest.
TILES = [
    *(("bfloat16", sms, rows) for sms, rows in ((132, 8), (12, 32), (1, 64))),
    *(("float16", sms, rows) for sms, rows in ((132, 8), (12, 32), (1, 64))),
    *(("float32", sms, rows) for sms, rows in ((132, 8), (1, 32))),
    *(("float64", sms, rows) for sms, rows in ((132, 16), (1, 16))),
]


@pytest.mark.parametrize(
    ("dtype", "sms", "rows"), TILES, ids=[f"{d}-{rows}-rows-{sms}-sms" for d, sms, rows in TILES]
)
@every_cell
def test_every_tile_is_near_the_oracle(cell: str, dtype: str, sms: int, rows: int) -> None:
    with emulated("stepwise", sms=sms) as device:
        assert_near_oracle(scaled(cell, 2, 70, 40), DTYPES[dtype], backend="cuda")
        steps = [one for one in device.native.emulator_log() if "step" in one["name"]]
    assert {one["grid"][0] for one in steps} == {-(-70 // rows)}


@pytest.mark.parametrize("proj", [13, 40])
@pytest.mark.parametrize("sms", [132, 12, 1])
def test_every_tile_of_a_projection_is_near_the_oracle(sms: int, proj: int) -> None:
    with emulated("stepwise", sms=sms):
        problem = scaled("lstm", 2, 70, 48, proj=proj)
        assert_near_oracle(problem, torch.bfloat16, backend="cuda")


@every_dtype
@every_cell
def test_long_rows_are_near_the_oracle(cell: str, dtype: str) -> None:
    """So long that a warp fills its registers more than once: in a wide tile few warps share a row,
    in a narrow one it takes a projection that widens."""
    with emulated("stepwise", sms=1):
        assert_near_oracle(scaled(cell, 1, 33, 140), DTYPES[dtype], backend="cuda")
    if cell == "lstm":
        with emulated("stepwise", sms=132):
            problem = layer(cell, 2, 3, 3, 8, proj=1100, scale=0.1)
            assert_near_oracle(problem, DTYPES[dtype], backend="cuda")


@every_cell
@pytest.mark.parametrize("sms", [132, 1])
def test_tf32_is_used_where_it_is_allowed_and_is_as_near_as_it_can_be(cell: str, sms: int) -> None:
    problem = scaled(cell, 2, 33, 40).to(torch.float32)
    exact = results_and_gradients(problem.to(torch.float64), problem.to(torch.float64).refer)
    plain, tf32 = run(problem, sms=sms), run(problem, sms=sms, allow_tf32=True)
    for name, value in exact.items():
        scale = value.abs().max().clamp(min=1)
        assert (plain[name] - value).abs().max() < 1e-5 * scale, name
        assert (tf32[name] - value).abs().max() < 4e-3 * scale, name
    assert (tf32["output"] - exact["output"]).abs().max() > 1e-5


@st.composite
def problems(draw: st.DrawFn) -> Layer:
    cell = draw(st.sampled_from(CELLS))
    hidden = draw(st.integers(1, 40))
    options: dict[str, Any] = {"reverse": draw(st.booleans()), "bias": draw(st.booleans())}
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=20))
        options["lengths"] = tuple(sorted(lengths, reverse=True))
    if cell == "lstm" and hidden > 1 and draw(st.booleans()):
        options["proj"] = draw(st.integers(1, hidden - 1))
    steps, batch = draw(st.integers(1, 4)), draw(st.integers(1, 20))
    return layer(cell, steps, batch, 3, hidden, seed=draw(st.integers(0, 99)), **options)


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(list(DTYPES.values())), st.sampled_from([1, 4, 132]))
def test_any_sizes_and_options_agree_with_the_float64_reference(
    problem: Layer, dtype: torch.dtype, sms: int
) -> None:
    with emulated("stepwise", sms=sms, seed=1 + problem.tensors[0].numel()):
        assert_near_oracle(problem, dtype, backend="cuda")


# --- the same bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_cell
def test_results_do_not_depend_on_the_schedule(cell: str, dtype: str) -> None:
    problem = layer(cell, H=24, **CROOKED[cell]).to(DTYPES[dtype])
    first, *others = (run(problem, seed=seed, sms=3) for seed in (1, 2, 3))
    for other in others:
        assert_same_bits(other, first)


@every_cell
def test_results_do_not_depend_on_what_the_workspace_held(cell: str) -> None:
    problem = layer(cell, H=11, **CROOKED[cell]).to(torch.bfloat16)
    expected = run(problem)
    with emulated("stepwise"):

        def of_nans(nbytes: int, like: Tensor) -> Tensor:
            room = torch.full((nbytes + 256,), 0xFF, dtype=torch.uint8)
            return room[-room.data_ptr() % 256 :][:nbytes]

        with mock.patch.object(cuda, "_empty", of_nans):
            found = results_and_gradients(problem, lambda *t: problem.call(*t, backend="cuda"))
    assert_same_bits(found, expected)


@every_cell
def test_a_row_does_not_depend_on_the_others(cell: str) -> None:
    # One input feature and no bias: the projection of x is the same bits for any number of rows.
    problem = layer(cell, 3, 5, 1, 24, bias=False).to(torch.float32)
    together = states_and_gradients(problem)
    of_rows = [n for n in ("x", "h0", "c0") if n in problem.names]
    for row in (0, 4):
        alone = problem.having(**{n: problem.get(n)[..., row : row + 1, :] for n in of_rows})
        for found, expected in zip(states_and_gradients(alone), together, strict=True):
            assert torch.equal(found, expected[..., row : row + 1, :])


@every_dtype
@every_cell
def test_inference_is_the_same_bits_as_training(cell: str, dtype: str) -> None:
    problem = layer(cell, H=24, **CROOKED[cell]).to(DTYPES[dtype])
    trained = run(problem)
    with emulated("stepwise"), torch.no_grad():
        outputs = problem.call(backend="cuda")
    for name, value in zip(("output", "h_n", "c_n", "cells"), outputs, strict=False):
        assert torch.equal(value, trained[name]), name


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@every_cell
def test_tensors_may_begin_anywhere(cell: str, dtype: str) -> None:
    """As views of a flat tensor of parameters do."""

    def shifted(tensor: Tensor) -> Tensor:
        room = tensor.new_empty(tensor.numel() + 1)[1:]
        return room.copy_(tensor.flatten()).view_as(tensor)

    problem = layer(cell, 3, 5, 2, 32).to(DTYPES[dtype])
    moved = problem.map(shifted)
    assert moved.get("w_hh").data_ptr() % 16 != 0
    with emulated("stepwise") as device, torch.no_grad():
        expected = problem.call(backend="cuda")
        in_place = [one["name"] for one in device.native.emulator_log()]
        for found, value in zip(moved.call(backend="cuda"), expected, strict=True):
            assert torch.equal(found, value)
        copied = [one["name"] for one in device.native.emulator_log()][len(in_place) :]
    # The products load whole vectors: h0 and the weights had to be copied.
    assert copied == 2 * ["launching the copy of weights or states"] + in_place


@every_cell
def test_gradients_of_results_that_were_not_used_are_zeros(cell: str) -> None:
    problem = layer(cell, H=9, **CROOKED[cell]).to(torch.float32)
    with emulated("stepwise"):
        leaves = problem.leaves()
        outputs = leaves.call(backend="cuda")
        slope = cotangents(outputs)[0]
        zeros = [torch.zeros_like(o) for o in outputs[1:]]
        absent = torch.autograd.grad(outputs[0], leaves.present, slope, retain_graph=True)
        given = torch.autograd.grad(outputs, leaves.present, [slope, *zeros])
    for found, expected in zip(absent, given, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_cell
def test_nan_stays_in_its_row_and_travels_on(cell: str, dtype: str) -> None:
    # An even number of input features: with an odd one, torch's own product of bfloat16 on a CPU
    # spoils the next row as well.
    problem = layer(cell, 4, 9, 4, 20).to(DTYPES[dtype])
    x = problem.get("x").clone()
    x[1, 3] = torch.nan
    with emulated("stepwise"), torch.no_grad():
        clean = problem.call(backend="cuda")[0]
        found = problem.having(x=x).call(backend="cuda")[0]
    assert found[1:, 3].isnan().all()
    found[1:, 3] = clean[1:, 3]
    assert torch.equal(found, clean)


# --- no more than needed ------------------------------------------------------------------------


@every_cell
def test_a_single_step_in_place_is_one_launch_or_two(cell: str) -> None:
    problem = layer(cell, 1, 2, 3, 32).to(torch.bfloat16)
    assert len(launches(problem)) == FORWARD_LAUNCHES[cell]


@pytest.mark.parametrize("capability", [80, 90])
@every_cell
def test_launches_overlap_where_the_device_can(cell: str, capability: int) -> None:
    """Each may start before the one in front has ended, except the first, whose weights the
    launches before the loop may still be writing; and every CTA of it waits before it reads."""
    problem = layer(cell, 3, 9, 2, 33).to(torch.bfloat16)
    log = launches(problem, ("x", "h0"), compute_capability=capability)
    for backward in (False, True):
        loop = [
            one for one in log if "step" in one["name"] and ("backward" in one["name"]) == backward
        ]
        wanted = [False] + [capability >= 90] * (len(loop) - 1)
        assert [one["programmatic"] for one in loop] == wanted
        for one in loop:
            assert one["waiting_ctas"] == one["grid"][0] * one["grid"][1] * one["grid"][2]
    others = [one for one in log if "step" not in one["name"]]
    assert others
    assert not any(one["programmatic"] for one in others)


@every_cell
def test_the_last_product_is_left_out_where_nobody_wants_it(cell: str) -> None:
    problem = layer(cell, 3, 2, 3, 16).to(torch.float32)
    with_state, without = (len(launches(problem, wanted)) for wanted in (("x", "h0"), ("x",)))
    assert with_state == without + 1


@every_cell
def test_a_packed_step_touches_its_rows_only(cell: str) -> None:
    problem = layer(cell, H=16, lengths=(3,) + (1,) * 30).to(torch.bfloat16)
    steps = [one for one in launches(problem, sms=132) if "step" in one["name"]]
    per_step = FORWARD_LAUNCHES[cell]
    assert [one["grid"][0] for one in steps[::per_step]] == [4, 1, 1]


@every_dtype
@every_cell
def test_nothing_outside_the_workspace_is_written(cell: str, dtype: str) -> None:
    problem = layer(cell, H=11, **CROOKED[cell]).to(DTYPES[dtype])
    rooms = []

    def fenced(nbytes: int, like: Tensor) -> Tensor:
        room = torch.full((256 + nbytes + 512,), 0x77, dtype=torch.uint8)
        start = 256 - room.data_ptr() % 256
        rooms.append((room, start, nbytes))
        return room[start : start + nbytes]

    with emulated("stepwise"), mock.patch.object(cuda, "_empty", fenced):
        results_and_gradients(problem, lambda *t: problem.call(*t, backend="cuda"))
    assert len(rooms) == 2
    for room, start, nbytes in rooms:
        assert (room[:start] == 0x77).all()
        assert (room[start + nbytes :] == 0x77).all()
        # The beginning belongs to the tiers that can give up.
        assert (room[start : start + 256] == 0x77).all()
        assert not (room[start + 256 : start + nbytes] == 0x77).all()
