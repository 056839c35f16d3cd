"""A table of rows as input: ``layer(table, index=index)`` is ``layer(table[index])``."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from nn_pairs import INPUT_SIZE, LAYERS, layer_cases, pair, states
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnlm_kernels
from rnnlm_kernels.backends import cpu
from rnnlm_kernels.ops import lookup

WAYS = ("dense", "packed", "unbatched")
ROWS = 4

every_layer = pytest.mark.parametrize("kind", LAYERS)


@pytest.fixture(params=["own-products", "torch-products"])
def _products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either way to project a table, whatever this CPU prefers."""
    if request.param == "own-products" and not cpu.available()[0]:
        pytest.skip("needs the native module")
    monkeypatch.setattr(cpu, "multiplies", lambda *_: request.param == "own-products")


def table(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(ROWS, INPUT_SIZE, dtype=dtype).requires_grad_()


def index_of(way: str, batch_first: bool) -> Any:
    """Positions of 6 steps in 3 rows, or in one without a batch."""
    if way == "unbatched":
        return torch.randint(ROWS, (6,))
    index = torch.randint(ROWS, (3, 6) if batch_first else (6, 3))
    if way == "dense":
        return index
    lengths = torch.tensor([3, 6, 2])
    return pack_padded_sequence(index, lengths, batch_first=batch_first, enforce_sorted=False)


def looked_up(rows: Tensor, index: Any) -> Any:
    return (
        index._replace(data=rows[index.data]) if isinstance(index, PackedSequence) else rows[index]
    )


def flat(results: Any) -> list[Tensor]:
    if isinstance(results, PackedSequence):
        return [results.data]
    if isinstance(results, Tensor):
        return [results]
    return [tensor for result in results for tensor in flat(result)]


def gradients(results: list[Tensor], of: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(9)
    return list(torch.autograd.grad(results, of, [torch.randn_like(r) for r in results]))


@pytest.mark.usefixtures("_products")
@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "options"), layer_cases())
def test_results_and_gradients_are_those_of_the_rows(
    kind: str, options: dict, way: str, memory: str
) -> None:
    _, layer = pair(kind, **options)
    layer.memory = memory
    rows, index = table(), index_of(way, layer.batch_first)
    hx = states(layer, None if way == "unbatched" else 3)
    given = [rows, *layer.parameters()]
    expected = flat(layer(looked_up(rows, index), hx))
    found = flat(layer(rows, hx, index=index))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, given), gradients(expected, given))


@every_layer
@pytest.mark.parametrize("bidirectional", [False, True])
def test_stacks_in_inference(kind: str, bidirectional: bool) -> None:
    _, layer = pair(kind, num_layers=3, bidirectional=bidirectional)
    rows, index = table(), torch.randint(ROWS, (200, 1))
    with torch.no_grad():
        torch.testing.assert_close(flat(layer(rows, index=index)), flat(layer(rows[index])))


@every_layer
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_backend_takes_an_index(kind: str, backend: str) -> None:
    _, layer = pair(kind)
    layer.backend = backend
    rows, index = table(), index_of("dense", False)
    torch.testing.assert_close(flat(layer(rows, index=index)), flat(layer(rows[index])))


@every_layer
def test_reset_before_and_cells(kind: str) -> None:
    options = {"reset": "before"} if kind == "GRU" else {"return_cells": True}
    layer = getattr(rnnlm_kernels, kind)(INPUT_SIZE, 5, **options).double()
    rows, index = table(), index_of("dense", False)
    torch.testing.assert_close(flat(layer(rows, index=index)), flat(layer(rows[index])))


@pytest.mark.usefixtures("_products")
def test_derivatives_of_every_order() -> None:
    index = torch.tensor([[0, 1], [3, 1], [0, 0]])
    given = [torch.randn(*s, dtype=torch.float64).requires_grad_() for s in ((4, 3), (8, 3), (8,))]
    run = functools.partial(_projected, index)
    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)
    assert torch.autograd.gradcheck(run, given, check_batched_grad=True)


def _projected(index: Tensor, rows: Tensor, w_ih: Tensor, b_ih: Tensor) -> Tensor:
    return lookup.projected_rows(rows, index, w_ih, b_ih)


@pytest.mark.usefixtures("_products")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_row_that_thousands_of_positions_read_has_an_exact_gradient(dtype: torch.dtype) -> None:
    """16-bit sums would stop to grow at 256 and at 2048."""
    rows = torch.ones(2, 1, dtype=dtype).requires_grad_()
    w_ih = torch.ones(1, 1, dtype=dtype).requires_grad_()
    b_ih = torch.zeros(1, dtype=dtype).requires_grad_()
    lookup.projected_rows(rows, torch.zeros(4096, dtype=torch.int64), w_ih, b_ih).sum().backward()
    assert [rows.grad.flatten().tolist(), w_ih.grad.item(), b_ih.grad.item()] == [
        [4096, 0],
        4096,
        4096,
    ]


@every_layer
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_strides_and_small_integers(kind: str, dtype: torch.dtype) -> None:
    _, layer = pair(kind)
    rows = torch.randn(INPUT_SIZE, ROWS, dtype=torch.float64).t()
    index = torch.randint(ROWS, (3, 6), dtype=dtype).t()
    torch.testing.assert_close(flat(layer(rows, index=index)), flat(layer(rows[index.long()])))


@every_layer
def test_no_sequences_of_no_rows(kind: str) -> None:
    _, layer = pair(kind)
    rows = torch.zeros(0, INPUT_SIZE, dtype=torch.float64).requires_grad_()
    output, *_ = flat(layer(rows, index=torch.zeros(5, 0, dtype=torch.int64)))
    assert output.shape == (5, 0, layer.hidden_size)
    assert gradients([output], [rows])[0].shape == rows.shape


@every_layer
def test_under_autocast(kind: str) -> None:
    _, layer = pair(kind, dtype=torch.float32)
    rows, index = table(torch.float32), index_of("dense", False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = layer(rows, index=index)[0], layer(rows[index])[0]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@every_layer
def test_compiled_without_a_break(kind: str) -> None:
    _, layer = pair(kind, dtype=torch.float32)
    rows, index = table(torch.float32), index_of("dense", False)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found, expected = flat(compiled(rows, index=index)), flat(layer(rows, index=index))
    torch.testing.assert_close(found, expected)
    given = [rows, *layer.parameters()]
    torch.testing.assert_close(gradients(found, given), gradients(expected, given))


@every_layer
def test_under_functional_transforms(kind: str) -> None:
    _, layer = pair(kind)
    rows, index = table().detach(), index_of("dense", False)

    def loss(rows: Tensor) -> Tensor:
        return layer(rows, index=index)[0].square().sum()

    torch.testing.assert_close(
        torch.func.grad(loss)(rows),
        torch.func.grad(lambda r: layer(r[index])[0].square().sum())(rows),
    )
    torch.testing.assert_close(torch.vmap(loss)(rows.expand(2, -1, -1))[0], loss(rows))


# --- refused ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_products")
@pytest.mark.parametrize("wrong", [ROWS, -1])
def test_an_index_out_of_the_table_is_named(wrong: int) -> None:
    _, layer = pair("LSTM")
    index = torch.tensor([[0, 1], [2, wrong]])
    low, high = int(index.min()), int(index.max())
    with pytest.raises(IndexError, match=f"rows of the input, 0 to 3, got {low} to {high}"):
        layer(table(), index=index)


@every_layer
@pytest.mark.parametrize(
    ("index", "error", "match"),
    [
        (
            torch.zeros(5, 2),
            TypeError,
            "index should hold int64 or int32 numbers, got torch.float32",
        ),
        ([[0, 1]], TypeError, "index should hold int64 or int32 numbers, got list"),
        (
            torch.zeros(5, 2, 1, dtype=torch.int64),
            RuntimeError,
            "index should be 1-D or 2-D, got 3-D",
        ),
        (torch.zeros(0, 2, dtype=torch.int64), RuntimeError, "sequence length to be larger than 0"),
    ],
    ids=["floats", "list", "3d", "no-steps"],
)
def test_wrong_indices_are_named(kind: str, index: Any, error: type[Exception], match: str) -> None:
    _, layer = pair(kind)
    with pytest.raises(error, match=match):
        layer(table(), index=index)


@every_layer
@pytest.mark.parametrize("shape", [(ROWS,), (ROWS, INPUT_SIZE + 1), (5, 3, INPUT_SIZE)])
def test_what_is_no_table_is_named(kind: str, shape: tuple[int, ...]) -> None:
    _, layer = pair(kind)
    with pytest.raises(RuntimeError, match=r"tensor of its rows, \[U, 3\], got a tensor of shape"):
        layer(torch.zeros(shape, dtype=torch.float64), index=torch.zeros(5, 3, dtype=torch.int64))


@every_layer
def test_states_are_those_of_the_index(kind: str) -> None:
    _, layer = pair(kind)
    with pytest.raises(RuntimeError, match=r"\(1, 3, 5\), got \[1, 4, 5\]"):
        layer(table(), states(layer, 4), index=index_of("dense", False))
