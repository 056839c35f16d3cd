"""The stepwise Triton kernels, interpreted on the CPU: right for every cell, dtype, size and tile,
and no launch, read or write that is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
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
from triton_interpreted import LIMITS, interpreted, needs_triton

import rnnlm_kernels
from rnnlm_kernels.triton import tiles
from rnnlm_kernels.triton.launch import Limits, Run
from rnnlm_kernels.triton.tiles import Tile

stepwise: Any = pytest.importorskip("rnnlm_kernels.triton.stepwise")

pytestmark = needs_triton

TRITON_DTYPES = [name for name in DTYPES if name != "float64"]
every_cell = pytest.mark.parametrize("cell", CELLS)
every_dtype = pytest.mark.parametrize("dtype", TRITON_DTYPES)

# [T, B, H]: one number, less than a tile, a tile and a rest in rows, in units, in terms.
SIZES = {
    "one-number": (1, 1, 1),
    "one-unit": (3, 5, 1),
    "odd": (2, 5, 7),
    "one-tile": (2, 16, 16),
    "tile-and-rest": (2, 17, 17),
    "terms-and-rest": (2, 3, 100),
    "tiles-and-rest": (1, 5, 130),
}
# Rows of different lengths, either direction, a projection: what can go wrong in the host's loop.
CROOKED = {
    "lstm": {"proj": 5, "lengths": (4, 3, 1), "reverse": True},
    "gru": {"lengths": (4, 3, 1), "reverse": True},
    "gru-before": {"lengths": (4, 2, 2, 1)},
}


def scaled(cell: str, T: int, B: int, H: int, **options: Any) -> Layer:
    """A layer whose states neither vanish nor saturate, however wide it is."""
    return layer(cell, T, B, 3, H, scale=0.5 if H < 40 else 0.15, **options)


def run(problem: Layer) -> dict[str, Tensor]:
    with interpreted("stepwise"):
        return results_and_gradients(problem, lambda *t: problem.call(*t, backend="triton"))


@contextmanager
def launches() -> Iterator[list[tuple[str, int, int]]]:
    """Name, rows and units of each launch in the block."""
    log = []
    launch = stepwise._launch

    def logged(kernel: Any, tile: Tile, run: Run, rows: int, units: int, *args: Any, **kw: Any):
        log.append((kernel.__name__, rows, units))
        launch(kernel, tile, run, rows, units, *args, **kw)

    with mock.patch.object(stepwise, "_launch", logged):
        yield log


# --- right ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("cell", "variant"), layer_cases())
def test_variants_are_near_the_oracle(cell: str, variant: dict[str, Any], dtype: str) -> None:
    with interpreted("stepwise") as ran:
        assert_near_oracle(layer(cell, H=17, **variant), DTYPES[dtype], backend="triton")
        assert set(ran) == {"stepwise"}


@every_cell
def test_float16_is_near_the_oracle(cell: str) -> None:
    with interpreted("stepwise"):
        assert_near_oracle(layer(cell, H=17, **CROOKED[cell]), torch.float16, backend="triton")


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_cell
def test_sizes_are_near_the_oracle(cell: str, dtype: str, size: tuple[int, int, int]) -> None:
    with interpreted("stepwise"):
        assert_near_oracle(scaled(cell, *size), DTYPES[dtype], backend="triton")


# [multiprocessors, rows of the batch]: the fewer, the wider is a tile.
@pytest.mark.parametrize(("processors", "batch"), [(132, 70), (2, 70), (1, 33)])
@every_cell
def test_every_tile_is_near_the_oracle(cell: str, processors: int, batch: int) -> None:
    limits = Limits(processors, 99 * 1024, 32)
    with interpreted("stepwise", limits=limits):
        assert_near_oracle(scaled(cell, 2, batch, 40), torch.bfloat16, backend="triton")


def test_a_projection_wider_than_a_tile_is_near_the_oracle() -> None:
    with interpreted("stepwise"):
        assert_near_oracle(scaled("lstm", 2, 17, 48, proj=40), torch.bfloat16, backend="triton")


@every_cell
def test_no_rows_are_no_work(cell: str) -> None:
    with interpreted("stepwise") as ran:
        results = run_empty(layer(cell, 3, 0, 2, 4).to(torch.float32))
        assert [len(r.flatten()) for r in results] == [0] * len(results)
        assert not ran


def run_empty(problem: Layer) -> list[Tensor]:
    leaves = problem.leaves()
    outputs = leaves.call(backend="triton")
    x, *_ = torch.autograd.grad(outputs, leaves.present, cotangents(outputs))
    return [*outputs, x]


@st.composite
def problems(draw: st.DrawFn) -> Layer:
    cell = draw(st.sampled_from(CELLS))
    hidden = draw(st.integers(1, 40))
    options: dict[str, Any] = {"reverse": draw(st.booleans()), "bias": draw(st.booleans())}
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=20))
        options["lengths"] = tuple(sorted(lengths, reverse=True))
    if cell == "lstm" and hidden > 1 and draw(st.booleans()):
        options["proj"] = draw(st.integers(1, hidden - 1))
    steps, batch = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    return layer(cell, steps, batch, 3, hidden, seed=draw(st.integers(0, 99)), **options)


@settings(max_examples=8, deadline=None)
@given(problems(), st.sampled_from(TRITON_DTYPES))
def test_any_sizes_and_options_agree_with_the_float64_reference(problem: Layer, dtype: str) -> None:
    with interpreted("stepwise"):
        assert_near_oracle(problem, DTYPES[dtype], backend="triton")


def test_a_stack_of_packed_bidirectional_layers_is_torchs() -> None:
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(3, 9, num_layers=2, bidirectional=True)
    ours = rnnlm_kernels.LSTM(3, 9, num_layers=2, bidirectional=True, backend="triton")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, 3)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [4, 1, 3], enforce_sorted=False)
    with interpreted("stepwise") as ran:
        found, (h_n, c_n) = ours(packed)
        assert set(ran) == {"stepwise"}
    expected, states = theirs(packed)
    torch.testing.assert_close(found.data, expected.data)
    torch.testing.assert_close((h_n, c_n), states)


def test_second_derivatives_are_the_references() -> None:
    problem = layer("gru", 2, 2, 2, 3).to(torch.float32).leaves()
    found = []
    for backend in ("triton", "reference"):
        with interpreted("stepwise"):
            outputs = problem.call(backend=backend)
            slopes = cotangents(outputs)
            first = torch.autograd.grad(outputs, problem.present, slopes, create_graph=True)
            found.append(torch.autograd.grad(first[0].square().sum(), problem.present[0])[0])
    torch.testing.assert_close(*found)


# --- what is asked of the kernels -----------------------------------------------------------------


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_products_are_tf32_where_torch_allows_it_only(dtype: str, allowed: bool) -> None:
    seen = set()
    launch = stepwise._launch

    def watched(kernel: Any, tile: Tile, run: Run, *args: Any, **kw: Any) -> None:
        seen.add(run.precision)
        launch(kernel, tile, run, *args, **kw)

    with (
        interpreted("stepwise", allow_tf32=allowed),
        mock.patch.object(stepwise, "_launch", watched),
    ):
        layer("lstm", 1, 1, 2, 3).to(DTYPES[dtype]).call(backend="triton")
    assert seen == {"tf32" if allowed and dtype == "float32" else "ieee"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_cell
def test_inference_is_the_same_bits_as_training(cell: str, dtype: str) -> None:
    problem = layer(cell, H=24, **CROOKED[cell]).to(DTYPES[dtype])
    trained = run(problem)
    with interpreted("stepwise"), torch.no_grad():
        outputs = problem.call(backend="triton")
    for name, value in zip(("output", "h_n", "c_n", "cells"), outputs, strict=False):
        assert torch.equal(value, trained[name]), name


@every_cell
def test_two_runs_are_the_same_bits(cell: str) -> None:
    problem = layer(cell, H=24, **CROOKED[cell]).to(torch.bfloat16)
    assert_same_bits(run(problem), run(problem))


@every_cell
def test_gradients_of_results_that_were_not_used_are_zeros(cell: str) -> None:
    problem = layer(cell, H=9, **CROOKED[cell]).to(torch.float32)
    with interpreted("stepwise"):
        leaves = problem.leaves()
        outputs = leaves.call(backend="triton")
        for used in range(2):
            slope = cotangents(outputs)[used]
            slopes = [torch.zeros_like(o) for o in outputs]
            slopes[used] = slope
            absent = torch.autograd.grad(outputs[used], leaves.present, slope, retain_graph=True)
            given = torch.autograd.grad(outputs, leaves.present, slopes, retain_graph=True)
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
    with interpreted("stepwise"), torch.no_grad():
        clean = problem.call(backend="triton")[0]
        found = problem.having(x=x).call(backend="triton")[0]
    assert found[1:, 3].isnan().all()
    found[1:, 3] = clean[1:, 3]
    assert torch.equal(found, clean)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_infinite_weights_spoil_no_step_without_a_next_one(cell: str) -> None:
    """There is no gradient that they multiply; zeros would do, but for 0 * inf."""
    B, H, G = 2, 5, 4 if cell == "lstm" else 3
    call = Run(False, "ieee", LIMITS, None, None)
    w, dgates = torch.full((G * H, H), torch.inf), torch.empty(1, B, G * H)
    state, steps = torch.rand(B, H), torch.rand(1, B, H)
    saved = torch.rand(1, B, 4 * H)
    with interpreted("stepwise"):
        if cell == "lstm":
            stepwise.lstm_backward(
                *(call, steps, None, None, None, w, None, state, steps, saved),
                *(dgates, None, None, None, None),
            )
        else:
            candidate = torch.empty(1, B, H)
            stepwise.gru_backward(
                call, cell, steps, None, w, state, steps, saved, dgates, candidate, None
            )
    assert dgates.isfinite().all()


# --- no more than needed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        ("lstm", ["lstm_step"]),
        ("gru", ["gru_after_step"]),
        ("gru-before", ["gru_reset_step", "gru_candidate_step"]),
    ],
)
def test_a_step_is_one_launch_or_two(cell: str, names: list[str]) -> None:
    with interpreted("stepwise"), launches() as log, torch.no_grad():
        layer(cell, 3, 2, 3, 16).to(torch.float32).call(backend="triton")
    assert [name for name, *_ in log] == 3 * names


@every_cell
def test_the_last_product_is_left_out_where_nobody_wants_it(cell: str) -> None:
    problem = layer(cell, 3, 2, 3, 16).to(torch.float32).leaves()
    counts = []
    for names in (("x", "h0"), ("x",)):
        with interpreted("stepwise"):
            outputs = problem.having(
                h0=problem.get("h0").detach().requires_grad_("h0" in names),
                **({"c0": problem.get("c0").detach()} if cell == "lstm" else {}),
            ).call(backend="triton")
            with launches() as log:
                wanted = [problem.get("x")]
                torch.autograd.grad(outputs, wanted, cotangents(outputs))
            counts.append([name for name, *_ in log].count("state_step_backward"))
    assert counts == [1, 0]


@every_cell
def test_a_packed_step_touches_its_rows_only(cell: str) -> None:
    problem = layer(cell, H=16, lengths=(3, 1, 1)).to(torch.bfloat16)
    with interpreted("stepwise"), launches() as log, torch.no_grad():
        problem.call(backend="triton")
    per_step = 2 if cell == "gru-before" else 1
    assert [rows for _, rows, _ in log[::per_step]] == [3, 1, 1]


@every_dtype
@every_cell
def test_nothing_beyond_the_results_is_written(cell: str, dtype: str) -> None:
    """Sizes that leave rests of tiles in rows and units; a fence around every tensor."""
    T, B, H, G = 2, 3, 18, 4 if cell == "lstm" else 3
    fences = []

    def fenced(*shape: int, dtype: torch.dtype = DTYPES[dtype]) -> Tensor:
        size = torch.Size(shape).numel()
        room = torch.full((size + 128,), 7.0, dtype=dtype)
        fences.append((room, size))
        room[64 : 64 + size] = torch.randn(size) / 4
        return room[64 : 64 + size].view(shape)

    wide = torch.float32
    call = Run(False, "ieee", LIMITS, None, None)
    w, b, h0, c0 = fenced(G * H, H), fenced(G * H), fenced(B, H), fenced(B, H)
    output, h_n, dh0 = fenced(T, B, H), fenced(B, H), fenced(B, H)
    gates_x, dgates = fenced(T, B, G * H), fenced(T, B, G * H)
    saved = fenced(T, B, (3 if cell == "gru-before" else 4) * H)
    with interpreted("stepwise"):
        if cell == "lstm":
            c_n, cells, dc0 = fenced(B, H), fenced(T, B, H, dtype=wide), fenced(B, H)
            stepwise.lstm_forward(call, gates_x, w, b, None, h0, c0, output, h_n, c_n, cells, saved)
            stepwise.lstm_backward(
                *(call, output, h_n, c_n, cells, w, None, c0, cells, saved),
                *(dgates, dh0, dc0, None, None),
            )
        else:
            stepwise.gru_forward(call, cell, gates_x, w, b, h0, output, h_n, saved)
            candidate = fenced(T, B, H)
            stepwise.gru_backward(
                call, cell, output, h_n, w, h0, output, saved, dgates, candidate, dh0
            )
    for room, size in fences:
        assert (room[:64] == 7).all()
        assert (room[64 + size :] == 7).all()
    assert not dgates.isnan().any()


# --- the tile -------------------------------------------------------------------------------------

GPUS = {
    "h100": Limits(132, 227 * 1024, 32),
    "a10": Limits(72, 99 * 1024, 32),
    "mi300": Limits(304, 64 * 1024, 64),
    "small": Limits(2, 48 * 1024, 32),
}


@pytest.mark.parametrize("gpu", GPUS)
@given(
    cell=st.sampled_from(CELLS),
    backward=st.booleans(),
    dtype=st.sampled_from(TRITON_DTYPES),
    batch=st.integers(1, 5000),
    hidden=st.integers(1, 9000),
)
def test_every_default_tile_can_be_launched(
    gpu: str, cell: str, backward: bool, dtype: str, batch: int, hidden: int
) -> None:
    limits, of = GPUS[gpu], DTYPES[dtype]
    tile = tiles.choose("stepwise", cell, backward, of, batch, hidden, limits)
    for size in (tile.rows, tile.units, tile.depth):
        assert size >= 16  # the least that tl.dot multiplies
        assert size & (size - 1) == 0
    gates = 1 if backward else {"lstm": 4, "gru": 3, "gru-before": 2}[cell]
    block = (tile.rows + gates * tile.units) * tile.depth * of.itemsize
    assert tile.stages >= 1
    assert block * tile.stages <= limits.shared_per_block
    assert tile.rows * tile.units * gates <= 128 * 32 * tile.warps  # sums in registers


def test_few_rows_are_spread_over_the_device() -> None:
    limits = GPUS["h100"]
    for hidden, programs in ((512, 32), (2048, 128), (4096, 128)):
        tile = tiles.choose("stepwise", "lstm", False, torch.bfloat16, 8, hidden, limits)
        assert (tile.rows, -(-hidden // tile.units)) == (16, programs)
