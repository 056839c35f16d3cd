"""The instruction set "amx" of the CPU kernels on CPUs that have no AMX.

It is compiled with its own flags, and what it has beyond AVX-512, tiles and pairs of bfloat16, is
done in software (native/emulated_amx.h): as Intel documents it, to the bit, ending the process at
the first use that is a fault on the CPU. The kernels run in a process of their own, where tensors
end with what may be touched (cpu_driver.py).
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import test_cpu_directions
import test_cpu_kernels
import test_cpu_linear
import torch
from cpu_driver import AVX512, DRIVER, EMULATED_AMX, Process, Program, compiler, missing, run
from recurrence_cases import ISAS
from test_cpu_directions import KINDS, SIZES
from torch import Tensor

if lacking := missing("amx"):
    pytest.skip(f"this machine has no {lacking}", allow_module_level=True)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = Process(Program("amx", ["amx"], tmp_path_factory.mktemp("amx")), "amx")
    yield process
    process.close()


@pytest.fixture
def kernels(process: Process) -> Iterator[None]:
    before, threads = process.calls, torch.get_num_threads()
    with process.in_use():
        yield
    torch.set_num_threads(threads)
    assert process.calls > before


# --- the kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("property_", test_cpu_kernels.BFLOAT16_CHECKS)
def test_bfloat16(kernels, property_: str) -> None:
    getattr(test_cpu_kernels, f"check_bfloat16_{property_}")()


def test_gradients_and_heads_are_near_the_oracle(kernels) -> None:
    test_cpu_linear.check_gradients([torch.bfloat16])
    test_cpu_linear.check_head([torch.bfloat16])


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_directions_at_once_give_the_bits_of_in_turn(kernels, kind, sizes, count) -> None:
    torch.set_num_threads(count)
    test_cpu_directions.check_bits_of_in_turn(kind, torch.bfloat16, sizes)


def test_no_instruction_is_left_that_some_cpus_with_avx512_lack(process) -> None:
    code = run("objdump", "-d", "--no-show-raw-insn", process.program.objects["recurrence", "amx"])
    words = set(re.findall(r"^ +[0-9a-f]+:\t(\S+)", code, re.MULTILINE))
    assert "vfmadd231ps" in words
    assert not [word for word in words if re.match("tile|tdp|ldtile|sttile|.*bf16", word)]


# --- the instructions -----------------------------------------------------------------------------

Instructions = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Instructions:
    """``instructions(operands, *arguments, emulated=True)`` runs native/instructions.cpp."""
    folder = tmp_path_factory.mktemp("instructions")
    flags = ("-std=c++17", "-O1", "-Wall", "-Wextra", *AVX512)
    extra = ("-mavx512bf16", "-mamx-tile", "-mamx-bf16")
    source, software = DRIVER / "instructions.cpp", DRIVER / "emulated_amx.cpp"
    run(compiler(), *flags, *extra, source, "-o", folder / "hardware")
    run(compiler(), *flags, *extra, *EMULATED_AMX, source, software, "-o", folder / "software")

    def call(operands: bytes, *arguments: object, emulated: bool = True):
        program: Path = folder / ("software" if emulated else "hardware")
        words = [str(word) for word in (program, *arguments)]
        return subprocess.run(words, input=operands, capture_output=True, timeout=60)

    return call


def to_bytes(*tensors: Tensor) -> bytes:
    return b"".join(bytes(t.contiguous().view(torch.uint8).flatten().tolist()) for t in tensors)


def results(done: subprocess.CompletedProcess[bytes], dtype: torch.dtype = torch.float32) -> Tensor:
    assert done.returncode == 0, done.stderr
    return torch.frombuffer(bytearray(done.stdout), dtype=dtype)


def rounded(values: Tensor) -> Tensor:
    """To float32, as these instructions do: what is smaller than the smallest normal number is
    zero. They treat operands likewise."""
    values = values.float().double()
    return torch.where(values.abs() < 2.0**-126, 0.0, values)


def tiles_product(sums: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[M, N], [M, 2K], [K, 2N] -> [M, N] as documented, in float64, where a sum is exact whose
    terms have such sizes as in this test, before it is rounded."""
    sums, a, b = rounded(sums), rounded(a), rounded(b)
    first, second = torch.zeros_like(sums), torch.zeros_like(sums)
    for k in range(b.size(0)):
        first = rounded(first + a[:, 2 * k, None] * b[k, 0::2])
        second = rounded(second + a[:, 2 * k + 1, None] * b[k, 1::2])
    return rounded(sums + rounded(first + second)).float()


def pairs_product(sums: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[M, 16], [M, 32], [M, 32] -> [M, 16]"""
    sums, products = rounded(sums), rounded(a) * rounded(b)
    return rounded(rounded(sums + products[:, 1::2]) + products[:, 0::2]).float()


@pytest.fixture(params=[1.0, 2.0**-63], ids=["normal", "near-the-smallest-number"])
def random(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """Numbers whose products, or which themselves, are near 1 or 2^-126."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, product: bool = False) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * request.param
        return (values * request.param).float() if product else values.bfloat16()

    return draw


@pytest.mark.parametrize("shape", [(16, 16, 16), (1, 1, 1), (5, 16, 16), (7, 3, 11)])
def test_a_product_of_tiles_is_as_documented(instructions, random, shape) -> None:
    M, K, N = shape
    cases = [(random(M, N, product=True), random(M, 2 * K), random(K, 2 * N)) for _ in range(40)]
    cases[0][1][:] = 2.0**-127
    cases[1][0][:] = 2.0**-127
    found = results(instructions(b"".join(to_bytes(*case) for case in cases), "tiles", *shape))
    expected = torch.stack([tiles_product(*case) for case in cases])
    assert torch.equal(found.view(expected.shape), expected)


def test_a_product_of_pairs_is_as_documented(instructions, random) -> None:
    operands = random(40, 16, product=True), random(40, 32), random(40, 32)
    operands[1][0], operands[0][1] = 2.0**-127, 2.0**-127
    cases = b"".join(to_bytes(*rows) for rows in zip(*operands, strict=True))
    found = results(instructions(cases, "dot_pairs"))
    assert torch.equal(found.view(40, 16), pairs_product(*operands))


def test_rounding_to_bfloat16_is_as_documented(instructions, random) -> None:
    values = random(40, 16, product=True)
    values.view(torch.int32)[::2] &= -0x8000  # many of them halfway between two results
    found = results(instructions(to_bytes(values), "to_bfloat16"), torch.bfloat16)
    assert torch.equal(found.view(40, 16), rounded(values).bfloat16())


# The instruction set that has them, and the bytes of their operands.
IN_HARDWARE = {
    "dot_pairs": ("avx512bf16", 3 * 64),
    "to_bfloat16": ("avx512bf16", 64),
    "tiles 16 16 16": ("amx", 3 * 1024),
    "tiles 5 3 11": ("amx", 4 * (5 * 11 + 5 * 3 + 3 * 11)),
}


@pytest.mark.parametrize("instruction", IN_HARDWARE)
def test_software_gives_the_bits_of_the_cpu(instructions, instruction: str) -> None:
    """On any operands: denormal and infinite numbers, NaN."""
    isa, size = IN_HARDWARE[instruction]
    if isa not in ISAS:
        pytest.skip(f"this CPU has no {isa}")
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (500 * size // 4,), generator=generator).int()
    # Half of them with exponents so near to each other that sums round.
    anything[::2] = anything[::2] & ~0x78007800 | 0x38003800
    dtype = torch.bfloat16 if instruction == "to_bfloat16" else torch.float32
    software, hardware = (
        results(instructions(to_bytes(anything), *instruction.split(), emulated=emulated), dtype)
        for emulated in (True, False)
    )
    assert software.isfinite().any()
    assert torch.equal(software.nan_to_num(1.25), hardware.nan_to_num(1.25))


ROWS, ROW_BYTES = 48, 16  # where they begin in a configuration, of one byte and of two for a tile
PRODUCT = "configure load0 load4 load6 dot046 store0 release"
MISUSES = {  # steps, changes of the configuration, what is said
    "nothing-configured": ("zero0", {}, "no tiles are configured"),
    "released": ("configure zero0 release store0", {}, "no tiles are configured"),
    "nothing-loaded": ("configure load0 load4 dot046", {}, "nothing was loaded"),
    "nothing-to-store": ("configure store3", {}, "nothing was loaded"),
    "loaded-before-configured": ("configure load0 configure store0", {}, "nothing was loaded"),
    "left-out": ("configure load5", {ROWS + 5: 0, ROW_BYTES + 10: 0}, "leaves this tile out"),
    "palette": ("configure", {0: 2}, "no such palette"),
    "start-row": ("configure", {1: 1}, "start_row"),
    "many-rows": ("configure", {ROWS + 7: 17}, "more than 16 rows"),
    "long-rows": ("configure", {ROW_BYTES + 14: 65}, "more than 64 bytes"),
    "no-rows": ("configure", {ROWS + 2: 0}, "rows without bytes"),
    "reserved": ("configure", {ROWS + 8: 1}, "reserved"),
    "other-rows": (PRODUCT, {ROWS + 4: 15}, "different rows"),
    "other-columns": (PRODUCT, {ROW_BYTES: 60}, "different columns"),
    "other-depth": (PRODUCT, {ROWS + 6: 15}, "columns of a are not the rows of b"),
    "half-words": (PRODUCT, {ROW_BYTES: 62}, "within a word"),
    "same-tile": ("configure load0 load4 dot044", {}, "named twice"),
}


def configuration(changes: dict[int, int]) -> bytes:
    config = bytearray(64)
    config[0] = 1
    for tile in range(8):
        config[ROWS + tile], config[ROW_BYTES + 2 * tile] = 16, 64
    for at, value in changes.items():
        config[at] = value
    return bytes(config)


@pytest.mark.parametrize("misuse", MISUSES.values(), ids=MISUSES)
def test_misuse_of_tiles_ends_the_process(instructions, misuse) -> None:
    steps, changes, message = misuse
    done = instructions(configuration(changes), "sequence", *steps.split())
    assert done.returncode < 0
    assert message in done.stderr.decode()


def test_use_of_tiles_does_not(instructions) -> None:
    done = instructions(configuration({}), "sequence", *PRODUCT.split())
    assert (done.returncode, done.stderr) == (0, b"")
