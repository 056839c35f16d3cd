"""The C++ kernels: right in every dtype and size, the same bits whatever runs beside them.

Where bits are compared, the kernels are called by themselves: the GEMMs around them (projection,
weight gradients) are PyTorch's, whose sums depend on the number of rows and of threads.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cpu_driver import DRIVER, SOURCES, compiler, missing, run
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrence_cases import (
    CELLS,
    DTYPES,
    ISAS,
    assert_near_oracle,
    assert_same_bits,
    kernel_results,
    layer,
    layer_cases,
    results_and_gradients,
    run_in_a_forked_child,
    run_python,
    run_under_isa,
)

from rnnlm_kernels import check, ops
from rnnlm_kernels.backends import cpu
from rnnlm_kernels.bench.workload import Workload
from rnnlm_kernels.options import RecurrenceOptions

_C = pytest.importorskip("rnnlm_kernels._C")

pytestmark = pytest.mark.sanitize

every_cell = pytest.mark.parametrize("cell", CELLS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)

# Sizes that fill no vector, exactly one, or several and a rest. [T, B, H]
SIZES = {
    "one-step": (1, 5, 33),
    "one-vector": (5, 5, 16),
    "one-row": (6, 1, 17),
    "odd": (9, 5, 100),
    "blocks": (3, 13, 130),
    "few-rows": (2, 13, 130),  # whose weights are not packed
    "large": (1, 7, 1030),  # more weights than a cache holds
}
TINY = {
    "one-step-one-row": (1, 1, 7),
    "one-unit": (4, 13, 1),
    "one-number": (1, 1, 1),
    "long-one-unit": (60, 2, 1),
}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- right --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@every_dtype
@every_cell
def test_error_is_within_the_rule(cell: str, dtype: str, size: tuple[int, int, int]) -> None:
    T, B, H = size
    result = check.check_problem(Workload(cell, T, B, 11, H, dtype=dtype, mode="training"), "cpu")
    assert result.ok, result.summary()


@pytest.mark.parametrize("size", TINY.values(), ids=TINY)
@every_dtype
@every_cell
def test_few_numbers_are_near_the_oracle(cell: str, dtype: str, size: tuple[int, int, int]) -> None:
    """The rule compares the errors of two sums; of a single number that is a matter of luck."""
    T, B, H = size
    assert_near_oracle(layer(cell, T, B, 11, H), DTYPES[dtype])


@st.composite
def layers(draw: st.DrawFn):
    cell = draw(st.sampled_from(CELLS))
    hidden = draw(st.integers(1, 40))
    sizes = {
        "T": draw(st.integers(1, 6)),
        "B": draw(st.integers(1, 9)),
        "I": draw(st.integers(1, 9)),
    }
    options = {name: draw(st.booleans()) for name in ("reverse", "bias", "projected")}
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=9))
        options["lengths"] = tuple(sorted(lengths, reverse=True))
    if cell == "lstm" and hidden > 1 and draw(st.booleans()):
        options["proj"] = draw(st.integers(1, hidden - 1))
    # Larger weights amplify rounding errors from step to step beyond any bound worth asserting.
    options["scale"] = min(0.5, hidden**-0.5)
    return layer(cell, H=hidden, seed=draw(st.integers(0, 99)), **sizes, **options)


@settings(max_examples=150, deadline=None)
@given(layers(), st.sampled_from(list(DTYPES.values())))
def test_any_sizes_and_options_agree_with_the_float64_reference(problem, dtype) -> None:
    assert_near_oracle(problem, dtype)


@pytest.mark.parametrize(("cell", "variant"), layer_cases())
def test_kernels_write_every_element_of_every_result(cell: str, variant: dict) -> None:
    for name, value in kernel_results(layer(cell, H=17, **variant)).items():
        assert not value.isnan().any(), name


@every_cell
def test_more_than_65535_steps(cell: str) -> None:
    problem = layer(cell, 70_000, 1, 1, 4, dtype=torch.float32)
    output, h_n, *_ = problem.call(backend="cpu")
    assert torch.equal(output[-1], h_n)
    # Contracting dynamics: the last steps do not remember how the first ones began.
    tail = problem.having(x=problem.get("x")[-300:])
    torch.testing.assert_close(output[-100:], tail.refer()[0][-100:])


@every_cell
def test_few_rows_without_packing_equal_the_packed_product(cell: str) -> None:
    """8 steps of one row leave the weights as they are, a ninth makes the kernel pack them."""
    long = layer(cell, 9, 1, 3, 31)
    short = long.having(x=long.get("x")[:8])
    torch.testing.assert_close(
        kernel_results(short)["output"], kernel_results(long)["output"][:8], rtol=1e-13, atol=1e-13
    )


# A thread projects the input for several steps at once (of few rows a step, up to 64 rows and 64
# steps), or together with the product of a step's rows.
PROJECTIONS = {
    "many steps of one row": {"T": 150, "B": 1},
    "steps of some rows": {"T": 9, "B": 7},
    "steps of too many rows": {"T": 3, "B": 70},
    "ragged": {"lengths": (70, 70, 9, *[3] * 60)},
}


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("input_size", [1, 16, 37, 200])
@pytest.mark.parametrize("sizes", PROJECTIONS.values(), ids=PROJECTIONS)
@every_cell
def test_the_projection_of_the_input(cell, sizes, input_size, reverse) -> None:
    given = layer(cell, I=input_size, H=19, reverse=reverse, scale=0.3, **sizes)
    assert_near_oracle(given, torch.float64)


# --- 16-bit storage -----------------------------------------------------------------------------


def check_sixteen_bit_storage(dtype: torch.dtype) -> None:
    """Every 16-bit number is read exactly, and results round to nearest even.

    An LSTM step with zero weights and chosen biases makes ``c = f * c0 + i * g`` of known factors.
    """
    c0 = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(256, 256)
    closed, half, opened, one = -200.0, 0.0, 100.0, 30.0
    factors = {  # i, f, g -> expected c of c0 in float32
        "c0": ((closed, opened, half), lambda c: c),
        "c0 / 2": ((closed, half, half), lambda c: c * 0.5),
        "c0 / 2 + 1 / 2": ((half, half, one), lambda c: c * 0.5 + 0.5),
    }
    for name, (gates, function) in factors.items():
        bias = torch.tensor([*gates, 0.0], dtype=dtype).repeat_interleave(256)
        weights = torch.zeros(1024, 1, dtype=dtype), torch.zeros(1024, 256, dtype=dtype)
        x, h0 = torch.zeros(1, 256, 1, dtype=dtype), torch.zeros_like(c0)
        c_n = ops.lstm(x, h0, c0, *weights, bias, backend="cpu")[2]
        expected = function(c0.float()).to(dtype)
        same = (c_n == expected) | (c_n.isnan() & expected.isnan())
        assert same.all(), f"{name}: {c0[~same][:5]} gave {c_n[~same][:5]}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_sixteen_bit_number_is_read_exactly_and_rounded_to_nearest_even(dtype) -> None:
    check_sixteen_bit_storage(DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@every_cell
def test_sixteen_bit_state_is_kept_in_float32(cell: str, dtype: str) -> None:
    """400 steps of a slowly growing state, each of them smaller than an ulp of it."""
    problem = layer(cell, 400, 2, 3, 8, scale=0.02)
    bias = torch.zeros_like(problem.get("b_ih"))
    if cell == "lstm":
        bias[8:16] = 6.0  # the forget gate is nearly open
        problem = problem.having(b_ih=bias, c0=torch.ones(2, 8, dtype=torch.float64))
    else:
        bias[8:16] = 6.0  # z: the state is nearly kept
        problem = problem.having(b_ih=bias, h0=torch.ones(2, 8, dtype=torch.float64))
    problem = problem.to(DTYPES[dtype])
    ours, exact = problem.call(backend="cpu"), problem.to(torch.float64).refer()
    eps = torch.finfo(DTYPES[dtype]).eps
    for mine, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=4 * eps, atol=4 * eps)


# --- the same bits ------------------------------------------------------------------------------

SPLITS = {
    "too-small-to-split": {"T": 3, "B": 2, "H": 9},
    "rows": {"T": 20, "B": 16, "H": 64},
    "units": {"T": 3, "B": 2, "H": 600},
    "rows-and-units": {"T": 9, "B": 2, "H": 400},
    "packed-rows": {"lengths": tuple(range(20, 4, -1)), "H": 64, "reverse": True},
    "rows-of-large-weights": {"T": 4, "B": 24, "H": 300},
    "one-step": {"T": 1, "B": 70, "H": 100, "I": 40},
    "memory-mapped-beforehand": {"T": 260, "B": 130, "H": 64},
}


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
@every_cell
def test_any_number_of_threads_gives_the_same_bits(cell: str, sizes: dict, threads) -> None:
    problem = layer(cell, dtype=torch.float32, scale=0.1, **sizes)
    torch.set_num_threads(1)
    expected = kernel_results(problem)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        assert_same_bits(kernel_results(problem), expected)


@pytest.mark.parametrize("threads_", [2, 3, 8])
@pytest.mark.parametrize(
    "lengths",
    [(70,) * 40, (300, *[1] * 59), (300, *[1] * 199), (300, 300, *[1] * 198)],
    ids=["equal", "one-long", "one-of-many", "two-of-many"],
)
@every_cell
def test_groups_of_rows_of_any_sizes_give_the_same_bits(cell, lengths, threads_, threads) -> None:
    """The largest group has as many rows as there is memory for."""
    problem = layer(cell, lengths=lengths, H=70, scale=0.1)
    torch.set_num_threads(1)
    expected = kernel_results(problem)
    torch.set_num_threads(threads_)
    assert_same_bits(kernel_results(problem), expected)


@pytest.mark.parametrize("groups", [1, 2, 3, 7, 16])
def test_groups_of_rows_have_nearly_equal_work(groups: int) -> None:
    draw = random.Random(groups)
    for shortest, longest in ((1, 1), (50, 100), (1, 100), (1, 3)):
        for rows in (groups, groups + 1, 3 * groups, 100):
            lengths = sorted((draw.randint(shortest, longest) for _ in range(rows)), reverse=True)
            batch_sizes = [sum(n > t for n in lengths) for t in range(lengths[0])]
            found = _C.cpu_row_groups(batch_sizes, groups)
            assert [begin for begin, _ in found] == [0, *(end for _, end in found[:-1])]
            assert found[-1][1] == rows
            assert all(1 <= end - begin <= 2 * -(-rows // groups) for begin, end in found)
            if 2 * shortest >= longest:
                most = max(sum(lengths[begin:end]) for begin, end in found)
                assert most <= sum(lengths) / groups + longest
    assert _C.cpu_row_groups([40, *[1] * 299], 2) == [(0, 1), (1, 40)]
    assert _C.cpu_row_groups([40, *[1] * 299], 4) == [(0, 1), (1, 14), (14, 27), (27, 40)]


def test_threads_share_a_projection_of_few_rows_and_a_projected_state(threads) -> None:
    problem = layer("lstm", 2, 2, 300, 500, proj=200, dtype=torch.float32, scale=0.05)
    torch.set_num_threads(1)
    expected = kernel_results(problem)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        assert_same_bits(kernel_results(problem), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_cell
def test_a_rows_bits_do_not_depend_on_the_other_rows(cell: str, dtype: str) -> None:
    """From a fifth of H steps on: below that, how many rows there are decides how they are
    multiplied."""
    together = layer(cell, 10, 13, 3, 37, dtype=DTYPES[dtype])
    expected = kernel_results(together)
    states = ("h0", "c0") if cell == "lstm" else ("h0",)
    for row in (0, 6, 12):
        rows = {name: together.get(name)[row : row + 1] for name in states}
        alone = together.having(x=together.get("x")[:, row : row + 1].contiguous(), **rows)
        for name, value in kernel_results(alone).items():
            whole = expected[name]
            assert torch.equal(
                value, whole[row : row + 1] if whole.dim() == 2 else whole[:, row : row + 1]
            ), name


@every_cell
def test_a_row_of_the_operator_depends_on_others_by_rounding_only(cell: str) -> None:
    together = layer(cell, 12, 13, 30, 37, dtype=torch.float32)
    states = ("h0", "c0") if cell == "lstm" else ("h0",)
    alone = together.having(
        x=together.get("x")[:, 4:5], **{name: together.get(name)[4:5] for name in states}
    )
    torch.testing.assert_close(
        alone.call(backend="cpu")[0], together.call(backend="cpu")[0][:, 4:5], rtol=1e-5, atol=1e-6
    )


@every_cell
def test_a_packed_row_has_the_bits_of_a_dense_row(cell: str) -> None:
    lengths = (12, 10, 9)
    packed = layer(cell, lengths=lengths, H=21)
    data, states = packed.get("x"), ("h0", "c0") if cell == "lstm" else ("h0",)
    steps = data.split(packed.batch_sizes.tolist())
    outputs = kernel_results(packed)["output"].split(packed.batch_sizes.tolist())
    for row, length in enumerate(lengths):
        dense = layer(cell, length, 1, H=21).having(
            **{n: t for n, t in zip(packed.names, packed.tensors, strict=True) if n != "x"},
            x=torch.stack([step[row : row + 1] for step in steps[:length]]),
        )
        dense = dense.having(**{name: packed.get(name)[row : row + 1] for name in states})
        found = torch.stack([output[row : row + 1] for output in outputs[:length]])
        assert torch.equal(kernel_results(dense)["output"], found)


@every_cell
def test_repeating_a_call_repeats_the_bits(cell: str) -> None:
    problem = layer(cell, 7, 9, 20, 50, dtype=torch.float32)
    first = results_and_gradients(problem, problem.call)
    for _ in range(3):
        assert_same_bits(results_and_gradients(problem, problem.call), first)


def test_calls_of_several_python_threads_do_not_disturb_each_other(threads) -> None:
    torch.set_num_threads(2)
    problems = [
        layer(cell, 5 + i, 6, 3, 40 + 9 * i, seed=i, dtype=torch.float32, scale=0.2)
        for i in range(4)
        for cell in CELLS
    ]
    expected = [kernel_results(problem) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for found, wanted in zip(pool.map(kernel_results, problems), expected, strict=True):
                assert_same_bits(found, wanted)


# --- the process around them --------------------------------------------------------------------


def check_everything() -> None:
    for dtype in DTYPES.values():
        for seed, cell in enumerate(CELLS):
            for hidden in (1, 7, 17, 33, 70):
                assert_near_oracle(layer(cell, 4, 5, 3, hidden, seed=seed), dtype)
            assert_near_oracle(layer(cell, lengths=(12, 9, 9, 1), H=19, reverse=True), dtype)
            assert_near_oracle(layer(cell, T=1, B=2, H=21, I=19), dtype)
        assert_near_oracle(layer("lstm", 10, 3, H=35, proj=18), dtype)
    for dtype in (torch.bfloat16, torch.float16):
        check_sixteen_bit_storage(dtype)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_agrees_with_the_reference(isa: str) -> None:
    run_under_isa(isa, "import test_cpu_kernels; test_cpu_kernels.check_everything()")


# [T, B, H]: less than a tile, whole tiles, several with a rest in every direction, several groups
# of rows; weights that are read unpacked (few products) and packed, of a single step at their use.
BFLOAT16_SIZES = (
    *((20, 1, 1), (20, 3, 1), (6, 64, 1), (2, 1, 7), (9, 17, 7), (5, 8, 33), (4, 64, 33)),
    *((3, 17, 100), (12, 1, 100), (3, 3, 130), (2, 8, 130), (2, 64, 130), (3, 17, 1024)),
    *((1, 70, 33), (1, 5, 130), (1, 150, 100), (40, 1, 130), (1, 17, 1)),
    *((2, B, 35) for B in (16, 33, 47, 48, 49)),
)
BFLOAT16_CHECKS = ("errors", "bits", "specials", "functions")


def check_bfloat16_errors() -> None:
    for cell in CELLS:
        for T, B, H in BFLOAT16_SIZES:
            if H < 33:  # of a few numbers the rule is a matter of luck
                assert_near_oracle(layer(cell, T, B, 11, H), torch.bfloat16)
                continue
            workload = Workload(cell, T, B, 11, H, dtype="bfloat16", mode="training")
            result = check.check_problem(workload, "cpu")
            assert result.ok, result.summary()
        for B in (1, 17, 49, 70):  # x is read where it lies
            assert_near_oracle(layer(cell, 3, B, 32, 34, scale=0.2), torch.bfloat16)
            projected = layer(cell, 3, B, H=34, scale=0.2, projected=True)
            assert_near_oracle(projected, torch.bfloat16)
        for H in (7, 33, 130):
            lengths = (*[9] * 20, *[5] * 13, 2, 1)
            for reverse in (False, True):
                packed = layer(cell, lengths=lengths, H=H, reverse=reverse, scale=0.2)
                assert_near_oracle(packed, torch.bfloat16)
    assert_near_oracle(layer("lstm", 10, 35, H=70, proj=41, scale=0.2), torch.bfloat16)


def check_bfloat16_bits() -> None:
    sizes = ({"T": 9, "B": 37, "H": 130}, {"T": 3, "B": 2, "H": 1024}, {"T": 40, "B": 70, "H": 33})
    packed = {"lengths": tuple(range(40, 3, -1)), "H": 100, "reverse": True}
    for cell in CELLS:
        for size in (*sizes, packed):
            problem = layer(cell, dtype=torch.bfloat16, scale=0.1, **size)
            torch.set_num_threads(1)
            expected = kernel_results(problem)
            for count in (2, 3):
                torch.set_num_threads(count)
                assert_same_bits(kernel_results(problem), expected)
        # A row is the same whatever other rows share its tiles.
        torch.set_num_threads(1)
        some = layer(cell, 9, 37, H=70, dtype=torch.bfloat16, scale=0.1)
        for rows in (1, 16, 19):
            states = {
                name: value[:rows]
                for name in ("h0", "c0")
                if name in some.names and (value := some.get(name)) is not None
            }
            few = kernel_results(some.having(x=some.get("x")[:, :rows].contiguous(), **states))
            for name, value in kernel_results(some).items():
                at = value[:, :rows] if value.dim() == 3 else value[:rows]
                assert torch.equal(few[name], at), f"{cell} {name}, {rows} rows"


def check_bfloat16_specials() -> None:
    """NaN and infinity stay in their rows, from the step on in which they come."""
    for cell in CELLS:
        problem = layer(cell, 6, 20, 3, 18, dtype=torch.bfloat16)
        x = problem.get("x").clone()
        x[2, 17, 0], x[3, 2, 1] = math.nan, math.inf
        output, h_n, *_ = problem.having(x=x).call(backend="cpu")
        plain, *_ = problem.call(backend="cpu")
        for row in range(20):
            clean = {17: 2, 2: 3}.get(row, 6)
            assert torch.equal(output[:clean, row], plain[:clean, row])
        assert output[2:, 17].isnan().all()
        assert h_n[17].isnan().all()
        weights = problem.get("w_hh").clone()
        weights[3, 5] = math.nan
        assert problem.having(w_hh=weights).call(backend="cpu")[0][1:].isnan().any(-1).all()


def check_bfloat16_functions() -> None:
    """Sigmoid and tanh of every bfloat16, seen through float32 cell states of one LSTM step.

    The values come as biases, 1024 units at a time: a product would turn an infinity into NaN.
    """
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    zero = torch.zeros(4 * 1024, 1024).bfloat16()
    x, w_ih, h0, c0 = zero[:1, None, :1] + 0, zero[:, :1] + 0, zero[:1] + 0, zero[:1] + 1
    output, h_n, c_n = (torch.empty(1, 1, 1024).bfloat16() for _ in range(3))
    cells = torch.empty(1, 1, 1024)
    half, opened, closed = (torch.full((1024,), v).bfloat16() for v in (0.0, 100.0, -100.0))
    for values in every.split(1024):
        exact, nan = values.double(), values.isnan()
        for name, gates, expected in (
            ("sigmoid", (closed, values, half, half), exact.sigmoid()),  # c = 0 * 0 + f * 1
            ("tanh", (opened, closed, values, half), exact.tanh()),  # c = 1 * g + 0 * 1
        ):
            cpu.lstm_forward(
                *(x, w_ih, torch.cat(gates), None, zero, None, None, h0, c0, None),
                *(RecurrenceOptions(), output, h_n, c_n, cells, None),
            )
            found = cells.flatten().double()
            error = ((found - expected).abs() / expected.abs().clamp(min=1e-30))[~nan]
            assert (error < 1e-5).all(), f"{name}: {error.max()}"
            assert found[nan].isnan().all()


@pytest.mark.parametrize("isa", ["avx512bf16", "amx"])
@pytest.mark.parametrize("property_", BFLOAT16_CHECKS)
def test_bfloat16_in_hardware(isa: str, property_: str) -> None:
    if isa not in ISAS:
        pytest.skip(f"this CPU or build has no {isa}")
    run_under_isa(isa, f"import test_cpu_kernels; test_cpu_kernels.check_bfloat16_{property_}()")


def test_an_unknown_instruction_set_is_named_and_the_reference_steps_in() -> None:
    printed = run_python(
        """
import torch, rnnlm_kernels
from rnnlm_kernels import _C, ops
try:
    _C.cpu_info()
except ValueError as error:
    print("error:", error)
x, h0, w = torch.ones(2, 1, 1), torch.ones(1, 1), torch.ones(3, 1)
try:
    ops.gru(x, h0, w, w, backend="cpu")
except rnnlm_kernels.BackendError as error:
    print("backend:", error)
print(rnnlm_kernels.build_info()["cpu"])
rnnlm_kernels.GRU(1, 1)(torch.ones(2, 1, 1))
""",
        RNNLM_CPU_ISA="bogus",
    )
    assert "error: RNNLM_CPU_ISA='bogus' is not an instruction set" in printed
    assert "generic" in printed
    assert "backend: backend='cpu' cannot run" in printed
    assert printed.count("running the slow reference backend") == 1


@pytest.mark.parametrize("count", [1, 2])
def test_a_forked_child_can_call_the_kernels(count: int) -> None:
    """As DataLoader workers do, after the parent has used its threads. (Small enough a problem
    for PyTorch to use one thread around the kernel: its own pool does not survive a fork.)"""
    run_in_a_forked_child(
        """
from recurrence_cases import assert_same_bits, kernel_results, layer
problem = layer("gru", 20, 8, 3, 48, dtype=torch.float32, scale=0.1)
expected = kernel_results(problem)
""",
        "assert_same_bits(kernel_results(problem), expected)",
        count,
    )


def complaints(name: str, folder: Path) -> str:
    """Of a program about csrc/cpu/parallel.h."""
    program = folder / name
    run(
        *(compiler(), "-std=c++17", "-O1", "-pthread", f"-I{SOURCES}", DRIVER / f"{name}.cpp"),
        *(SOURCES / "cpu" / "parallel.cpp", "-ldl", "-o", program),
    )
    return run(program)


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs Linux and two processors",
)
@pytest.mark.skipif(bool(missing("native")), reason=f"no {missing('native')}")
def test_threads_of_a_team_take_processors_of_their_own(tmp_path: Path) -> None:
    assert not complaints("seats", tmp_path)


@pytest.mark.skipif(bool(missing("native")), reason=f"no {missing('native')}")
def test_work_that_is_handed_out_is_taken_once(tmp_path: Path) -> None:
    assert not complaints("handout", tmp_path)


@pytest.mark.skipif(bool(_C.build_info()["sanitizers"]), reason="ASan ends the process instead")
def test_exhausted_memory_is_a_memory_error_that_names_the_mend() -> None:
    absurd = 2**28  # hidden units: the workspace alone would be an exabyte
    with pytest.raises(MemoryError, match=r"workspace.*[Ss]maller batch or hidden size"):
        _C.cpu_gru_forward(0, 1, 9, 4, 0, False, absurd, False, 1, *[0] * 10)


@every_cell
def test_nan_and_infinity_stay_in_their_row(cell: str) -> None:
    problem = layer(cell, 5, 4, 3, 18)
    x = problem.get("x").clone()
    x[2, 1, 0], x[3, 2, 1] = math.nan, math.inf
    problem = problem.having(x=x)
    ours, expected = problem.call(backend="cpu"), problem.refer()
    for mine, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, wanted, equal_nan=True)
    assert ours[0][2:, 1].isnan().all()
    assert not ours[0][:, [0, 3]].isnan().any()
