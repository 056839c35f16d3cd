"""The CPU kernels on arm64, under emulation: right, and compiled to what was meant.

They are cross-compiled as CMakeLists.txt says and run by qemu, one process for all tests, while
PyTorch and everything else stay on this CPU (cpu_driver.py). The same tests run the same driver
compiled for this CPU, so that it is tested where there is no cross compiler. The driver puts the
end of every tensor at the end of what may be touched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from unittest import mock

import pytest
import test_cpu_kernels
import test_cpu_linear
import test_cpu_math
import test_dropout
import torch
from cpu_driver import ROOT, Process, Program, missing, run
from recurrence_cases import (
    CELLS,
    DTYPES,
    ISAS,
    assert_near_oracle,
    assert_same_bits,
    kernel_results,
    layer,
)
from test_linear_cross_entropy import OPTIONS, Case, assert_as_good_as_torch

from rnnlm_kernels import check, reference
from rnnlm_kernels.backends import cpu
from rnnlm_kernels.bench.workload import Workload

every_cell = pytest.mark.parametrize("cell", CELLS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)

NATIVE_ISAS = [isa for isa in ("generic", "avx2") if isa in ISAS]


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Program]:
    """The driver for "arm64" or "native", compiled at the first call for each."""

    @cache
    def build(target: str) -> Program:
        if lacking := missing(target):
            pytest.skip(f"this machine has no {lacking}")
        isas = NATIVE_ISAS if target == "native" else ["generic"]
        return Program(target, isas, tmp_path_factory.mktemp(target))

    return build


@pytest.fixture(scope="module", params=["arm64", *NATIVE_ISAS])
def process(request: pytest.FixtureRequest, program) -> Iterator[Process]:
    arm64 = request.param == "arm64"
    process = Process(
        program("arm64" if arm64 else "native"), "generic" if arm64 else request.param
    )
    yield process
    process.close()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where a test is run by a process, it must have reached it."""
    if "process" not in request.fixturenames:
        yield
        return
    process = request.getfixturevalue("process")
    before = process.calls
    with process.in_use(test_cpu_math):
        yield
    assert process.calls > before


# --- right ----------------------------------------------------------------------------------------

# [T, B, H]
SIZES = {"odd": (9, 5, 100), "blocks": (3, 13, 130), "one-row": (12, 1, 33)}
TINY = {
    "one-number": {"T": 1, "B": 1, "H": 1},
    "one-unit": {"T": 4, "B": 13, "H": 1},
    "one-step-one-row": {"T": 1, "B": 1, "H": 7},
    "less-than-a-block": {"T": 11, "B": 6, "H": 7},
    "reverse": {"T": 5, "B": 4, "H": 10, "reverse": True},
    "no-bias": {"T": 4, "B": 3, "H": 6, "bias": False},
    "packed": {"lengths": (12, 9, 9, 1), "H": 19},
    "packed-reverse": {"lengths": (12, 9, 9, 1), "H": 18, "reverse": True},
    "few-rows": {"T": 1, "B": 2, "H": 21, "I": 19},
    "projected-input": {"T": 5, "B": 3, "H": 18, "projected": True},
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@every_dtype
@every_cell
def test_error_is_within_the_rule(process, cell: str, dtype: str, size) -> None:
    T, B, H = size
    workload = Workload(cell, T, B, 11, H, dtype=dtype, mode="training")
    result = check.check_problem(workload, "cpu")
    assert result.ok, result.summary()


@pytest.mark.parametrize("size", TINY.values(), ids=TINY)
@every_dtype
@every_cell
def test_small_sizes_and_options_are_near_the_oracle(process, cell: str, dtype: str, size) -> None:
    assert_near_oracle(layer(cell, **{"I": 3, **size}), DTYPES[dtype])


@pytest.mark.parametrize("size", [{"T": 10, "B": 3}, {"lengths": (9, 7, 7, 2), "reverse": True}])
@every_dtype
def test_a_projected_state_is_near_the_oracle(process, dtype: str, size) -> None:
    assert_near_oracle(layer("lstm", H=35, proj=18, **size), DTYPES[dtype])


@every_dtype
def test_gradients_and_heads_are_near_the_oracle(process, dtype: str) -> None:
    test_cpu_linear.check_gradients([DTYPES[dtype]])
    test_cpu_linear.check_head([DTYPES[dtype]])


@pytest.mark.parametrize("lengths", ["dense", "packed"])
@every_cell
def test_both_directions_are_within_the_rule(process, threads, cell: str, lengths: str) -> None:
    torch.set_num_threads(2)
    sizes = {"seq_len": 20, "batch": 2, "input_size": 7, "hidden_size": 65, "lengths": lengths}
    workload = Workload(cell, bidirectional=True, mode="training", **sizes)
    result = check.check_problem(workload, "cpu")
    assert result.ok, result.summary()


@every_dtype
@every_cell
def test_no_rows_at_all(process, cell: str, dtype: str) -> None:
    results = kernel_results(layer(cell, 4, 0, H=7, dtype=DTYPES[dtype]))
    assert all(value.numel() == 0 for value in results.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_sixteen_bit_number_is_read_exactly_and_rounded_to_nearest_even(
    process, dtype: str
) -> None:
    test_cpu_kernels.check_sixteen_bit_storage(DTYPES[dtype])


@pytest.mark.parametrize("dtype", test_cpu_math.DTYPES)
@pytest.mark.parametrize("function", test_cpu_math.FUNCTIONS)
def test_functions_are_right_to_the_ulp(process, function: str, dtype: str) -> None:
    every = test_cpu_math.arguments

    def some(*arguments: str) -> object:
        return every(*arguments)[::13]

    with mock.patch.object(test_cpu_math, "arguments", some):
        test_cpu_math.check_error(function, dtype)
    test_cpu_math.check_special_values(function, dtype)


@every_dtype
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_losses_and_their_gradients_are_as_of_torch(process, options: dict, dtype: str) -> None:
    case = Case(13, 9, 35, DTYPES[dtype])
    if "weight" in options:
        options = {**options, "weight": case.class_weight}
    if "ignore_index" in options:
        case.target[case.target < 0] = options["ignore_index"]
    assert_as_good_as_torch(case, "cpu", **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_nan_of_any_payload_stays_one(process, dtype: str) -> None:
    """Rounded as a number, some would become zeros."""
    payloads = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -0x7FFFFF, -1], dtype=torch.int32)
    logits, target = torch.zeros(5, 7, dtype=DTYPES[dtype]), torch.zeros(5, dtype=torch.int64)
    options = (target, None, 0.0, -100, 0.0, payloads.view(torch.float32), True)
    cpu.cross_entropy(logits, None, *options, torch.empty(5), None)
    assert logits.isnan().all()


def test_dropout_draws_the_published_numbers(process) -> None:
    test_dropout.check_masks()


# --- the same bits --------------------------------------------------------------------------------

# Too small to split, rows, units, and both.
SPLITS = {
    "one-thread": {"T": 3, "B": 2, "H": 9},
    "rows": {"T": 12, "B": 7, "H": 64},
    "units": {"T": 3, "B": 1, "H": 300},
    "rows-and-units": {"T": 4, "B": 4, "H": 300},
    "packed-rows": {"lengths": tuple(range(14, 4, -1)), "H": 70, "reverse": True},
}


@pytest.mark.parametrize("openmp", [None, "libgomp.so.1"], ids=["std-thread", "libgomp"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_cell
def test_any_number_of_threads_gives_the_same_bits(process, threads, cell, dtype, openmp) -> None:
    if openmp and not process.program.has(openmp):
        pytest.skip(f"there is no {openmp}")
    other = Process(process.program, process.isa, openmp)
    assert other.cpu_info()["threads_from"] == (openmp or "std::thread")
    for size in SPLITS.values():
        problem = layer(cell, dtype=DTYPES[dtype], scale=0.1, **size)
        torch.set_num_threads(1)
        expected = kernel_results(problem)
        with other.in_use():
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert_same_bits(kernel_results(problem), expected)
    other.close()


@every_dtype
def test_any_number_of_threads_gives_the_same_losses(process, threads, dtype: str) -> None:
    case = Case(30, 1, 3000, DTYPES[dtype])
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        logits = (case.x @ case.weight.t()).detach()
        losses = torch.full((30,), torch.nan, dtype=reference.state_dtype(logits.dtype))
        options = (case.target, None, 0.0, -100, 0.1, None, True)
        cpu.cross_entropy(logits, case.bias.detach(), *options, losses, None)
        results.append({"losses": losses, "gradient": logits})
    for other in results[1:]:
        assert_same_bits(other, results[0])


# --- the machine code -----------------------------------------------------------------------------

Instruction = tuple[int, str, str]  # address, name, operands


@pytest.fixture(scope="module")
def functions(program) -> dict[str, list[Instruction]]:
    """The recurrence of arm64, by functions."""
    source = program("arm64").objects["recurrence", "generic"]
    text = run("aarch64-linux-gnu-objdump", "-dC", "--no-show-raw-insn", source)
    parts = re.split(r"^[0-9a-f]+ <(.+)>:$", text, flags=re.MULTILINE)[1:]
    line = re.compile(r"^ +([0-9a-f]+):\t(\S+)(?:\t(.*))?$", re.MULTILINE)
    return {
        name: [(int(address, 16), word, rest) for address, word, rest in line.findall(code)]
        for name, code in zip(parts[::2], parts[1::2], strict=True)
    }


def product_loop(code: list[Instruction]) -> list[Instruction]:
    """The shortest stretch with a multiply-add, from where a branch leads back to the branch."""
    loops = []
    for end, (address, word, rest) in enumerate(code):
        target = re.search(r"\b([0-9a-f]+) <", rest)
        if target and word.startswith(("b.", "cb", "tb")) and int(target[1], 16) <= address:
            loops.append([one for one in code[: end + 1] if one[0] >= int(target[1], 16)])
    return min((one for one in loops if "fmla" in [word for _, word, _ in one]), key=len)


def test_a_step_of_the_product_keeps_its_sums_in_registers(functions) -> None:
    """And is a load for each vector of weights and each row, a multiply-add for each sum, and
    little else: addresses, a request for what comes later, the end of the loop."""
    seen = set()
    for name, code in functions.items():
        found = re.search(r"\bchain<(float|double), \d, (\d), (\d)>", name)
        if not found:
            continue
        rows, vectors = int(found[2]), int(found[3])
        loop = product_loop(code)
        words = [word for _, word, _ in loop]
        assert words.count("fmla") == vectors * rows, name
        assert len(loop) <= vectors * rows + vectors + rows + 6, name
        assert not [rest for _, _, rest in loop if "sp" in rest], f"{name} spills"
        seen.add((found[1], vectors, rows))
    assert {(number, 4, 6) for number in ("float", "double")} <= seen
    assert {(number, 3, 8) for number in ("float", "double")} <= seen


def test_sixteen_bit_numbers_are_converted_by_vector_instructions(functions) -> None:
    words = {word for code in functions.values() for _, word, _ in code}
    assert {"fcvtl", "fcvtn", "shll", "shrn"} <= words


def test_arm64_needs_no_more_than_its_base_instructions(program) -> None:
    commands = json.loads(program("arm64").commands)
    kernels = {c["file"]: c["command"].split() for c in commands if "/csrc/cpu/" in c["file"]}
    assert set(kernels) == {str(path) for path in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    for source, words in kernels.items():
        assert [word for word in words if word.startswith("-m")] == [], source
