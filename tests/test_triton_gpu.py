"""The Triton kernels on a real GPU: right, captured by CUDA graphs, on the stream of the caller.

What the interpreter shows of every size and option is not repeated: each kernel here is compiled
first, which takes about a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from recurrence_cases import (
    CELLS,
    Layer,
    assert_near_oracle,
    assert_same_bits,
    layer,
    results_and_gradients,
)
from torch import Tensor

from rnnlm_kernels.backends import triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not triton.available()[0], reason=triton.available()[1]),
]

BF16 = torch.bfloat16
every_cell = pytest.mark.parametrize("cell", CELLS)


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    with mock.patch.object(triton, "_allow_tf32", return_value=False):
        yield


def gpu(given: Layer) -> Layer:
    return given.map(lambda t: t.cuda())


def run(given: Layer) -> dict[str, Tensor]:
    return results_and_gradients(given, lambda *t: given.call(*t, backend="triton"))


@pytest.mark.parametrize("kernel", ["stepwise", "sequence"])
@every_cell
def test_kernels_are_near_the_oracle(
    cell: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(triton.ENVIRONMENT, kernel)
    for lengths in (None, (9,) * 20 + (4,) * 13 + (1,)):
        given = gpu(layer(cell, 9, 34, 8, 48, lengths=lengths, reverse=lengths is not None))
        assert_near_oracle(given, BF16, backend="triton")


def test_float32_is_near_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(triton.ENVIRONMENT, "stepwise")
    given = gpu(layer("lstm", 5, 70, 8, 130, scale=0.15))
    assert_near_oracle(given, torch.float32, backend="triton")


def test_two_runs_are_the_same_bits() -> None:
    given = gpu(layer("gru", 9, 34, 8, 48).to(BF16))
    assert_same_bits(run(given), run(given))


@pytest.mark.parametrize("kernel", ["stepwise", "sequence"])
def test_a_cuda_graph_replays_a_layer_on_new_input(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(triton.ENVIRONMENT, kernel)
    given = gpu(layer("lstm", 9, 34, 8, 48).to(BF16))
    x = given.get("x")
    with torch.no_grad():
        given.call(backend="triton")  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = given.call(backend="triton")
        x.copy_(torch.randn_like(x))
        graph.replay()
        for found, expected in zip(outputs, given.call(backend="triton"), strict=True):
            assert torch.equal(found, expected)


def test_kernels_run_on_the_callers_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for what is before them on it, however long that takes."""
    monkeypatch.setenv(triton.ENVIRONMENT, "stepwise")
    given = gpu(layer("lstm", 9, 34, 8, 48).to(BF16))
    x, stream = given.get("x"), torch.cuda.Stream()
    with torch.no_grad():
        expected = given.call(backend="triton")[0]
        late = given.having(x=torch.full_like(x, torch.nan))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late.get("x").copy_(x)
            found = late.call(backend="triton")[0]
        stream.synchronize()
    assert torch.equal(found, expected)
