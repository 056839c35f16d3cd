"""The random numbers that kernels draw (csrc/device/philox.h): the published generator, and draws
that are uniform and depend on seed, stream and position only."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest
import torch
from cuda_toolkit import cuda_resources, needs_toolkit

emulated = pytest.importorskip(
    "rnnlm_kernels._emulated", reason="built without RNNLM_BUILD_EMULATOR"
)

CTAS, THREADS = 4, 128  # of csrc/emulator/selftest.cpp
DRAWS = CTAS * THREADS * 4
ONES = 2**32 - 1

# Counter, key and result, from the known answers that come with Random123 1.14.
KNOWN = {
    "zeros": ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "digits-of-pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}


def tensor(words: list[int]) -> torch.Tensor:
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def numbers(words: torch.Tensor) -> list[int]:
    return [word % 2**32 for word in words.tolist()]


def run(name: str, words: list[int], count: int, n: int = 0) -> torch.Tensor:
    given, found = tensor(words), torch.zeros(count, dtype=torch.int32)
    emulated.selftest(name, given.data_ptr(), found.data_ptr(), n=n)
    return found


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in whole numbers, as its authors write it down."""
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN.values(), ids=KNOWN)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert numbers(run("philox", counter + key, 4, n=1)) == expected
    assert philox(counter, key) == expected


def test_any_counter_and_key() -> None:
    generator = random.Random(0)
    given = [[generator.getrandbits(32) for _ in range(6)] for _ in range(THREADS)]
    found = run("philox", [*itertools.chain(*given)], 4 * THREADS, n=THREADS)
    expected = itertools.chain(*(philox(words[:4], words[4:]) for words in given))
    assert numbers(found) == [*expected]


def draws(seed: int, stream: int, p: float) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Words, uniform numbers and what is kept, of positions from 0 on."""
    words = [seed % 2**32, seed >> 32, stream % 2**32, stream >> 32]
    bits = torch.tensor(p, dtype=torch.float32).view(torch.int32).item()
    found = run("random_draws", [*words, int(bits)], 3 * DRAWS).view(DRAWS, 3)
    return numbers(found[:, 0]), found[:, 1].contiguous().view(torch.float32), found[:, 2].bool()


def test_a_draw_is_a_function_of_seed_stream_and_position() -> None:
    seed, stream = 0x0123456789ABCDEF, 0xFEDCBA9876543210
    words, _, _ = draws(seed, stream, 0.5)
    for position in (0, 1, 6, 2047):
        block = [position // 4, 0, stream % 2**32, stream >> 32]
        assert words[position] == philox(block, [seed % 2**32, seed >> 32])[position % 4]


def test_uniform_numbers_are_the_upper_bits_and_below_one() -> None:
    words, uniform, _ = draws(1, 2, 0.5)
    assert uniform.tolist() == [(word >> 8) / 2**24 for word in words]
    assert 0 <= uniform.min() < 0.01
    assert 0.99 < uniform.max() < 1
    # The mean of n such numbers has a standard deviation of 1 / sqrt(12 n).
    assert abs(uniform.mean().item() - 0.5) < 4 / math.sqrt(12 * DRAWS)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_a_mask_drops_with_the_probability_that_it_is_given(p: float) -> None:
    _, uniform, kept = draws(3, 4, p)
    assert torch.equal(kept, uniform >= torch.tensor(p, dtype=torch.float32))
    deviation = math.sqrt(p * (1 - p) / DRAWS)
    assert abs(kept.double().mean().item() - (1 - p)) <= 4 * deviation


@needs_toolkit
def test_on_a_gpu_it_needs_registers_only(tmp_path: Path) -> None:
    source = tmp_path / "draws.cu"
    source.write_text("""
#include "device/philox.h"
__global__ void __launch_bounds__(256) draws_kernel(uint64_t seed, uint64_t stream, float p,
                                                    float* out) {
  const unsigned i = blockIdx.x * 256 + threadIdx.x;
  const rnnlm::PhiloxWords words = rnnlm::random_words(seed, stream, i);
  for (int w = 0; w < 4; ++w)
    out[4 * i + w] = rnnlm::is_kept(words.word[w], p) ? rnnlm::uniform(words.word[w]) : 0;
}
""")
    report = cuda_resources.Compiler(cache=None).report(source, "90a")
    assert not report.error
    (kernel,) = report.kernels
    assert kernel.violations() == []
