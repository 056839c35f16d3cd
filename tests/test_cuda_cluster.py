"""The block and cluster tiers (csrc/kernels/cluster_forward.cuh, cluster_backward.cuh), run by the
emulator: right for every build and for what does not quite fill it; the same bits whatever the
schedule; and an end, whatever is computed or lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cuda_emulated import emulated, needs_emulator
from hypothesis import given, settings
from hypothesis import strategies as st
from persistent_cases import problems
from recurrence_cases import (
    CELLS,
    VARIANTS,
    Layer,
    assert_near_oracle,
    assert_same_bits,
    cotangents,
    layer,
    results_and_gradients,
)
from torch import Tensor

pytestmark = needs_emulator

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
every_cell = pytest.mark.parametrize("cell", CELLS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)

# The tier and an emulated device on which it takes so many CTAs.
ON: dict[str, tuple[str, dict[str, Any]]] = {
    "block": ("block", {}),
    "2-ctas": ("cluster", {"sms": 2}),
    "4-ctas": ("cluster", {"sms": 4}),
    "8-ctas": ("cluster", {"sms": 8}),
    "16-ctas": ("cluster", {"sms": 16, "shared_per_block": 133 * 1024}),
}
BLOCK_AND_CLUSTER = ("block", "2-ctas")
on_both = pytest.mark.parametrize("on", BLOCK_AND_CLUSTER)


def ctas_of(on: str) -> int:
    return 1 if on == "block" else int(on.split("-")[0])


def running(on: str, **settings: Any) -> Any:
    tier, device = ON[on]
    return emulated(tier, **{**device, **settings})


def width(on: str) -> int:
    """A hidden size for which a device of 4 SMs takes all of them."""
    return 136 if on == "4-ctas" else 40


def scaled(cell: str, T: int, B: int, H: int, **options: Any) -> Layer:
    """A layer whose states neither vanish nor saturate, however wide it is."""
    return layer(cell, T, B, 3, H, scale=0.5 if H < 40 else 0.15 if H < 300 else 0.08, **options)


def check(problem: Layer, dtype: torch.dtype, on: str, **settings: Any) -> None:
    with running(on, **settings) as device:
        assert_near_oracle(problem, dtype, backend="cuda")
        assert set(device.ran) == {ON[on][0]}
        others = ("check", "sums of gradients")
        log = device.native.emulator_log()
        kernels = [k for k in log if not any(words in k["name"] for words in others)]
        assert {k["cluster"] for k in kernels} == {ctas_of(on)}


def all_of(problem: Layer, on: str, **settings: Any) -> dict[str, Tensor]:
    """Results and gradients."""
    with running(on, **settings):
        return results_and_gradients(problem, lambda *t: problem.call(*t, backend="cuda"))


def inference(problem: Layer, on: str, **settings: Any) -> dict[str, Tensor]:
    with running(on, **settings), torch.no_grad():
        results = problem.call(backend="cuda")
    return dict(zip(("output", "h_n", "c_n", "cells"), results, strict=False))


# --- right --------------------------------------------------------------------------------------


@on_both
@every_dtype
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@every_cell
def test_variants_are_near_the_oracle(
    cell: str, variant: dict[str, Any], dtype: torch.dtype, on: str
) -> None:
    check(layer(cell, H=24, **variant), dtype, on)


# Where it runs and [T, B, H]: the units of a build, fewer, and one CTA of several without any; one
# tile of rows, fewer, and more.
SIZES = {
    "one-vector": ("block", 3, 1, 8),
    "half-of-64-units": ("block", 3, 8, 32),
    "64-units": ("block", 2, 9, 64),
    "72-units": ("block", 2, 3, 72),
    "128-units": ("block", 3, 17, 128),
    "2-ctas-one-idle": ("2-ctas", 3, 9, 64),
    "2-ctas": ("2-ctas", 3, 9, 128),
    "4-ctas-one-idle": ("4-ctas", 3, 8, 136),
    "4-ctas": ("4-ctas", 2, 9, 256),
    "8-ctas": ("8-ctas", 2, 2, 328),
    "16-ctas": ("16-ctas", 2, 2, 264),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@every_cell
def test_builds_are_near_the_oracle(cell: str, size: tuple[str, int, int, int]) -> None:
    on, *shape = size
    check(scaled(cell, *shape), torch.bfloat16, on)


@pytest.mark.parametrize("on", ["8-ctas", "16-ctas"])
@pytest.mark.slow
@every_cell
def test_the_widest_layers_are_near_the_oracle(cell: str, on: str) -> None:
    check(scaled(cell, 2, 1, 512), torch.float16, on)


# float32 has builds of its own, with weights in shared memory from 4-ctas on.
FLOAT32_SIZES = {
    "one-vector": ("block", 3, 1, 8),
    "half-of-64-units": ("block", 5, 8, 32),
    "40-units": ("block", 1, 9, 40),
    "64-units": ("block", 2, 5, 64),
    "2-ctas": ("2-ctas", 3, 9, 104),
    "2-ctas-full": ("2-ctas", 2, 3, 128),
    "4-ctas-narrow": ("4-ctas", 3, 7, 104),
    "4-ctas-one-idle": ("4-ctas", 3, 9, 136),
    "4-ctas": ("4-ctas", 2, 6, 256),
    "8-ctas-one-idle": ("8-ctas", 2, 9, 200),
    "8-ctas": ("8-ctas", 2, 2, 256),
}
# As much as the widest LSTM needs.
ALL_SHARED = 227 * 1024


@pytest.mark.parametrize("size", FLOAT32_SIZES.values(), ids=FLOAT32_SIZES)
@every_cell
def test_float32_is_exact_where_tf32_is_not_allowed(
    cell: str, size: tuple[str, int, int, int]
) -> None:
    on, *shape = size
    check(scaled(cell, *shape), torch.float32, on)


@pytest.mark.parametrize("hidden", [264, pytest.param(512, marks=pytest.mark.slow)])
@every_cell
def test_the_widest_layers_of_float32_are_exact(cell: str, hidden: int) -> None:
    on = "16-ctas"
    check(scaled(cell, 2, 3, hidden), torch.float32, on, shared_per_block=ALL_SHARED)


@pytest.mark.parametrize("batch", range(1, 10))
@on_both
@every_cell
def test_any_number_of_rows_of_float32_is_exact(cell: str, on: str, batch: int) -> None:
    """Rows are computed four, two and one at a time, and those that a step lacks not at all."""
    check(scaled(cell, 3, batch, 40), torch.float32, on)


def both_roundings(problem: Layer, on: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    exact, found = (all_of(problem, on, allow_tf32=allowed) for allowed in (False, True))
    return exact, found


# Where tensor cores are worth it.
TF32_SIZES = {
    "64-units": ("block", 3, 9, 64),
    "40-units": ("block", 2, 7, 40),
    "2-ctas": ("2-ctas", 3, 9, 104),
    "4-ctas-one-idle": ("4-ctas", 3, 9, 136),
    "4-ctas": ("4-ctas", 2, 6, 256),
    "8-ctas": ("8-ctas", 2, 8, 200),
}


@pytest.mark.parametrize("size", TF32_SIZES.values(), ids=TF32_SIZES)
@every_cell
def test_float32_is_rounded_to_tf32_where_that_is_allowed(
    cell: str, size: tuple[str, int, int, int]
) -> None:
    on, *shape = size
    lengths = {"lengths": (3, 3, 2, 2, 2, 1, 1, 1, 1), "reverse": True} if shape[1] == 9 else {}
    exact, found = both_roundings(scaled(cell, *shape, **lengths).to(torch.float32), on)
    for name, value in exact.items():
        error = (found[name] - value).abs().max()
        assert error < 4e-3 * value.abs().max().clamp(min=1), name
    for name in ("output", "grad h0"):
        assert (found[name] - exact[name]).abs().max() > 1e-6 * exact[name].abs().max(), name


@every_cell
def test_float32_is_exact_where_tensor_cores_have_no_room(cell: str) -> None:
    """Though they are allowed: they take whole tiles, of which a GRU's last gate fills half."""
    problem = scaled(cell, 2, 2, 264).to(torch.float32)
    runs = (
        inference(problem, "16-ctas", allow_tf32=allowed, shared_per_block=ALL_SHARED)
        for allowed in (False, True)
    )
    assert_same_bits(*runs)


@on_both
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@every_cell
def test_rows_that_begin_late_or_end_early_are_near_the_oracle(
    cell: str, reverse: bool, on: str
) -> None:
    """Rows of a cluster, and clusters of which no row is left in most steps."""
    lengths = (6, 6, 5) + (4,) * 4 + (3,) * 4 + (1,) * 8
    check(layer(cell, H=24, lengths=lengths, reverse=reverse), torch.bfloat16, on)


@settings(max_examples=50, deadline=None)
@given(
    problems(most_rows=20),
    st.sampled_from(list(DTYPES.values())),
    st.sampled_from(BLOCK_AND_CLUSTER),
    st.integers(1, 99),
)
def test_any_sizes_and_options_agree_with_the_float64_reference(
    problem: Layer, dtype: torch.dtype, on: str, seed: int
) -> None:
    check(problem, dtype, on, seed=seed)


@on_both
@every_dtype
@every_cell
def test_results_and_gradients_are_those_of_the_stepwise_tier(
    cell: str, dtype: torch.dtype, on: str
) -> None:
    """But for the order of the sums. The steps are few: a rounding that went the other way goes on
    growing."""
    problem = layer(cell, 2, 11, 3, 40).to(dtype)
    with emulated("stepwise"):
        expected = results_and_gradients(problem, lambda *t: problem.call(*t, backend="cuda"))
    for name, value in all_of(problem, on).items():
        error = (value.float() - expected[name].float()).abs().max()
        scale = expected[name].float().abs().max().clamp(min=1)
        # Of float32 every sum is rounded another way, of 16 bits few results.
        ulps = 16 if dtype == torch.float32 else 2
        assert error <= ulps * torch.finfo(dtype).eps * scale, name


def gradients_of(
    problem: Layer, output: str, wanted: Sequence[str], backend: str | None
) -> list[Tensor]:
    """Gradients of one result with respect to some tensors only; without a backend, the exact."""
    tensors = [
        None if t is None else t.detach().clone().requires_grad_(name in wanted)
        for name, t in zip(problem.names, problem.tensors, strict=True)
    ]
    run = problem.refer if backend is None else problem.call
    results = run(*tensors) if backend is None else run(*tensors, backend=backend)
    named = dict(zip(("output", "h_n", "c_n", "cells"), results, strict=False))
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    return list(torch.autograd.grad(named[output], leaves, cotangents([named[output]])))


@pytest.mark.parametrize(
    "wanted", [("x", "w_hh"), ("x", "h0")], ids=["not-of-the-state", "of-the-state"]
)
@on_both
@pytest.mark.parametrize(
    ("cell", "output"),
    [(cell, name) for cell in CELLS for name in ("output", "h_n")]
    + [("lstm", name) for name in ("c_n", "cells")],
)
def test_gradients_that_are_absent_or_not_wanted(
    cell: str, output: str, on: str, wanted: tuple[str, ...]
) -> None:
    lengths = (4, 3, 3) + (1,) * 7
    problem = layer(cell, H=24, lengths=lengths, reverse=True).to(torch.float16)
    exact = gradients_of(problem.to(torch.float64), output, wanted, None)
    with running(on):
        found = gradients_of(problem, output, wanted, "cuda")
    for name, value, expected in zip(wanted, found, exact, strict=True):
        error = (value.double() - expected).abs().max()
        assert error <= 0.01 * expected.abs().max(), name


# --- the same bits ------------------------------------------------------------------------------


TENSOR_CORES_AND_NOT = {"bfloat16": torch.bfloat16, "float32": torch.float32}
with_and_without_tensor_cores = pytest.mark.parametrize(
    "dtype", TENSOR_CORES_AND_NOT.values(), ids=TENSOR_CORES_AND_NOT
)


@pytest.mark.parametrize("on", ["block", "2-ctas", "4-ctas"])
@with_and_without_tensor_cores
@every_cell
def test_results_and_gradients_do_not_depend_on_the_schedule(
    cell: str, dtype: torch.dtype, on: str
) -> None:
    lengths = (4, 4, 3, 3, 3, 3, 2, 2, 1, 1)
    problem = layer(cell, H=width(on), scale=0.2, lengths=lengths).to(dtype)
    first, *others = (all_of(problem, on, seed=seed) for seed in (1, 2, 3))
    for other in others:
        assert_same_bits(other, first)


@on_both
@with_and_without_tensor_cores
@every_cell
def test_a_row_does_not_depend_on_the_others(cell: str, dtype: torch.dtype, on: str) -> None:
    # One input feature and no bias: the projection of x is the same bits for any number of rows.
    problem = layer(cell, 3, 15, 1, 24, bias=False).to(dtype)
    together = inference(problem, on)
    of_rows = [n for n in ("x", "h0", "c0") if n in problem.names]
    for row in (0, 7, 13, 14):
        alone = problem.having(**{n: problem.get(n)[..., row : row + 1, :] for n in of_rows})
        for name, value in inference(alone, on).items():
            assert torch.equal(value, together[name][..., row : row + 1, :]), name


@on_both
@every_dtype
@every_cell
def test_inference_is_the_same_bits_as_training(cell: str, dtype: torch.dtype, on: str) -> None:
    problem = layer(cell, H=24, lengths=(4, 2, 2, 1), reverse=True).to(dtype)
    trained = all_of(problem, on)
    for name, value in inference(problem, on).items():
        assert torch.equal(value, trained[name]), name


# --- an end, whatever happens -------------------------------------------------------------------


@pytest.mark.parametrize("on", ["block", "2-ctas", "4-ctas"])
@every_dtype
@every_cell
def test_nan_stays_in_its_row(cell: str, dtype: torch.dtype, on: str) -> None:
    problem = layer(cell, 3, 9, 4, width(on), scale=0.2).to(dtype)
    x = problem.get("x").clone()
    x[1, 3] = torch.nan
    clean, found = all_of(problem, on), all_of(problem.having(x=x), on)
    assert found["output"][1:, 3].isnan().all()
    assert not found["output"][0].isnan().any()
    assert found["grad x"][:, 3].isnan().all()
    others = [row for row in range(9) if row != 3]
    names = ["output", "h_n", "grad h0"]
    # The gates' gradients times W_ih, by torch. On a CPU its product of bfloat16 may spoil the next
    # row as well, depending on sizes and threads.
    if dtype != torch.bfloat16:
        names.append("grad x")
    for name in names:
        assert torch.equal(found[name][..., others, :], clean[name][..., others, :]), name


@pytest.mark.parametrize("on", ["2-ctas", "4-ctas"])
@every_cell
def test_a_lost_message_ends_the_forward_launch_and_spoils_all_results(cell: str, on: str) -> None:
    problem = layer(cell, 4, 5, 3, width(on)).to(torch.bfloat16)
    for seed in (1, 2):
        with running(on, drop=50, seed=seed, wait_polls=1024) as device, torch.no_grad():
            results = problem.call(backend="cuda")
            assert device.native.emulator_stats()["dropped"] > 0
            assert all(result.isnan().all() for result in results)
            with pytest.raises(RuntimeError, match="cluster"):
                problem.call(backend="cuda")


@pytest.mark.parametrize("drop", [20, 300], ids=["many", "few"])
@pytest.mark.parametrize("on", ["2-ctas", "4-ctas"])
@every_cell
def test_a_lost_message_ends_the_backward_launch_and_spoils_all_gradients(
    cell: str, on: str, drop: int
) -> None:
    """Warps of a CTA that wait no longer, and those that do not know yet, meet at its barriers."""
    problem = layer(cell, 4, 5, 3, width(on)).to(torch.bfloat16).leaves()
    for seed in (1, 2):
        with running(on, wait_polls=1024) as device:
            results = problem.call(*problem.tensors, backend="cuda")
            device.native.emulator_configure(drop=drop, seed=seed)
            x, h0 = problem.get("x"), problem.get("h0")
            grads = torch.autograd.grad(results, (x, h0), cotangents(results))
            assert device.native.emulator_stats()["dropped"] > 0
            assert all(grad.isnan().all() for grad in grads)
            with pytest.raises(RuntimeError, match="cluster"):
                problem.call(backend="cuda")


# --- no more than needed ------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["block", "2-ctas", "4-ctas"])
@every_cell
def test_a_call_is_one_launch_and_its_check(cell: str, on: str) -> None:
    problem = layer(cell, 2, 20, 3, width(on)).to(torch.bfloat16)
    with running(on) as device, torch.no_grad():
        problem.call(backend="cuda")
        kernel, *check = device.native.emulator_log()
    assert kernel["cluster"] == ctas_of(on)
    assert kernel["grid"] == (3 * ctas_of(on), 1, 1)  # three clusters of 8 rows
    assert not kernel["cooperative"]
    assert len(check) == (0 if on == "block" else 1)  # CTAs on their own wait for nobody


def test_clusters_beyond_the_device_run_one_after_the_other() -> None:
    problem = layer("lstm", 3, 40, 3, 40).to(torch.bfloat16)
    assert_same_bits(all_of(problem, "2-ctas"), all_of(problem, "2-ctas", bounded=False))
