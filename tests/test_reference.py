"""The reference: against torch.nn, against numbers worked by hand, and against the 2014 paper."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from math import exp, tanh
from typing import Any

import numpy as np
import pytest
import torch
from recurrence_cases import CELLS, Layer, layer, layer_cases, results_and_gradients
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnlm_kernels import reference

TORCH_CELLS = ("lstm", "gru")
every_cell = pytest.mark.parametrize("cell", CELLS)


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def torchs(given: Layer) -> Any:
    """A function of the same tensors that runs torch's own layer on them."""
    x, w_hh, w_hr = given.get("x"), given.get("w_hh"), None
    kwargs: dict[str, Any] = {"bias": given.get("b_ih") is not None}
    kind = torch.nn.GRU
    if given.cell == "lstm":
        kind, w_hr = torch.nn.LSTM, given.get("w_hr")
        kwargs["proj_size"] = 0 if w_hr is None else w_hr.size(0)
    hidden = w_hh.size(0) // (4 if given.cell == "lstm" else 3)
    module = kind(x.size(-1), hidden, dtype=x.dtype, **kwargs)

    def run(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        named = dict(zip(given.names, tensors, strict=True))
        weights = {
            f"{torch_name}_l0": named[name]
            for torch_name, name in (
                ("weight_ih", "w_ih"),
                ("weight_hh", "w_hh"),
                ("bias_ih", "b_ih"),
                ("bias_hh", "b_hh"),
                ("weight_hr", "w_hr"),
            )
            if named.get(name) is not None
        }
        data, states = named["x"], [named[n][None] for n in ("h0", "c0") if n in named]
        if given.batch_sizes is not None:
            data = PackedSequence(data, given.batch_sizes)
        hx = tuple(states) if len(states) == 2 else states[0]
        output, final = torch.func.functional_call(module, weights, (data, hx))
        output = output.data if given.batch_sizes is not None else output
        final = final if isinstance(final, tuple) else (final,)
        return (output, *(state[0] for state in final))

    return run


@pytest.mark.parametrize(
    ("cell", "options"),
    [
        *itertools.product(
            TORCH_CELLS, [{}, {"bias": False}, {"lengths": (5, 3, 3, 1)}, {"T": 1, "B": 1}]
        ),
        ("lstm", {"proj": 2}),
        ("lstm", {"proj": 2, "bias": False, "lengths": (3, 1)}),
    ],
    ids=str,
)
def test_results_and_every_gradient_equal_torchs(cell: str, options: dict) -> None:
    given = layer(cell, **options)
    results = 3 if cell == "lstm" else 2  # torch hands out no cells
    found = results_and_gradients(given, lambda *tensors: given.refer(*tensors)[:results])
    expected = results_and_gradients(given, torchs(given))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-11, msg=name)


def test_cells_are_the_c_of_torchs_cell_at_every_step() -> None:
    given = layer("lstm", T=6)
    x, h, c, *weights = given.tensors
    cells = []
    for step in x:
        h, c = torch._VF.lstm_cell(step, (h, c), *weights[:4])
        cells.append(c)
    torch.testing.assert_close(given.refer()[3], torch.stack(cells), rtol=1e-13, atol=1e-13)


# --- worked by hand -----------------------------------------------------------------------------


def test_one_unit_lstm_in_two_steps_of_arithmetic() -> None:
    x, h, c = [0.5, -1.0], 0.3, -0.2
    w_ih, w_hh = [0.1, 0.2, -0.3, 0.4], [0.7, -0.6, 0.5, 0.25]
    b_ih, b_hh = [0.01, 1.0, -0.02, 0.03], [0.05, -0.5, 0.06, -0.07]
    outputs, cells = [], []
    for step in x:
        i = sigmoid(0.1 * step + 0.01 + 0.7 * h + 0.05)
        f = sigmoid(0.2 * step + 1.0 - 0.6 * h - 0.5)
        g = tanh(-0.3 * step - 0.02 + 0.5 * h + 0.06)
        o = sigmoid(0.4 * step + 0.03 + 0.25 * h - 0.07)
        c = f * c + i * g
        h = o * tanh(c)
        outputs.append(h)
        cells.append(c)
    column = torch.tensor
    output, h_n, c_n, all_cells = reference.lstm(
        column(x, dtype=torch.float64).view(2, 1, 1),
        column([[0.3]], dtype=torch.float64),
        column([[-0.2]], dtype=torch.float64),
        column(w_ih, dtype=torch.float64).view(4, 1),
        column(w_hh, dtype=torch.float64).view(4, 1),
        column(b_ih, dtype=torch.float64),
        column(b_hh, dtype=torch.float64),
    )
    assert output.flatten().tolist() == pytest.approx(outputs, rel=1e-14)
    assert all_cells.flatten().tolist() == pytest.approx(cells, rel=1e-14)
    assert (h_n.item(), c_n.item()) == pytest.approx((h, c), rel=1e-14)


@pytest.mark.parametrize("reset", ["after", "before"])
def test_one_unit_gru_in_two_steps_of_arithmetic(reset: str) -> None:
    x, h = [0.5, -1.0], 0.3
    w_ih, w_hh = [0.1, 0.2, -0.3], [0.7, -0.6, 0.5]
    b_ih, b_hh = [0.01, 1.0, -0.02], [0.05, -0.5, 0.6]
    outputs = []
    for step in x:
        r = sigmoid(0.1 * step + 0.01 + 0.7 * h + 0.05)
        z = sigmoid(0.2 * step + 1.0 - 0.6 * h - 0.5)
        if reset == "after":
            n = tanh(-0.3 * step - 0.02 + r * (0.5 * h + 0.6))
        else:
            n = tanh(-0.3 * step - 0.02 + 0.5 * (r * h) + 0.6)
        h = (1 - z) * n + z * h
        outputs.append(h)
    column = torch.tensor
    output, h_n = reference.gru(
        column(x, dtype=torch.float64).view(2, 1, 1),
        column([[0.3]], dtype=torch.float64),
        column(w_ih, dtype=torch.float64).view(3, 1),
        column(w_hh, dtype=torch.float64).view(3, 1),
        column(b_ih, dtype=torch.float64),
        column(b_hh, dtype=torch.float64),
        reset=reset,
    )
    assert output.flatten().tolist() == pytest.approx(outputs, rel=1e-14)
    assert h_n.item() == pytest.approx(h, rel=1e-14)


def test_the_step_functions_are_one_step_of_the_layers() -> None:
    given = layer("lstm", T=1, proj=2)
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr = given.tensors
    gates = torch.nn.functional.linear(x[0], w_ih, b_ih)
    h, c = reference.lstm_cell(gates, h0, c0, w_hh, b_hh, w_hr)
    output, _, c_n, _ = given.refer()
    assert torch.equal(h, output[0])
    assert torch.equal(c, c_n)
    for cell, reset in (("gru", "after"), ("gru-before", "before")):
        given = layer(cell, T=1)
        x, h0, w_ih, w_hh, b_ih, b_hh = given.tensors
        gates = torch.nn.functional.linear(x[0], w_ih, b_ih)
        assert torch.equal(reference.gru_cell(gates, h0, w_hh, b_hh, reset), given.refer()[1])


def test_an_unknown_reset_is_named() -> None:
    with pytest.raises(ValueError, match=r"reset.*'after' or 'before'.*'middle'"):
        reference.gru_cell(torch.zeros(1, 3), torch.zeros(1, 1), torch.zeros(3, 1), reset="middle")


# --- Cho et al., 2014 ---------------------------------------------------------------------------


def cho(x: np.ndarray, h: np.ndarray, weights: Sequence[np.ndarray]) -> np.ndarray:
    """Equations 5 to 8 of "Learning Phrase Representations using RNN Encoder-Decoder", unit by
    unit: r_j = sig([W_r x]_j + [U_r h]_j), z likewise, h~_j = tanh([W x]_j + [U (r * h)]_j),
    h_j = z_j h_j + (1 - z_j) h~_j. Biases, which the paper leaves out, are added to each sum.
    """
    W, U, b, d = weights
    H = len(h)
    outputs = []
    for step in x:
        r, z, candidate = np.zeros(H), np.zeros(H), np.zeros(H)
        for j in range(H):
            a_r, a_z = b[j] + d[j], b[H + j] + d[H + j]
            for k, value in enumerate(step):
                a_r += W[j, k] * value
                a_z += W[H + j, k] * value
            for k in range(H):
                a_r += U[j, k] * h[k]
                a_z += U[H + j, k] * h[k]
            r[j], z[j] = 1 / (1 + np.exp(-a_r)), 1 / (1 + np.exp(-a_z))
        for j in range(H):
            a = b[2 * H + j] + d[2 * H + j]
            for k, value in enumerate(step):
                a += W[2 * H + j, k] * value
            for k in range(H):
                a += U[2 * H + j, k] * (r[k] * h[k])
            candidate[j] = np.tanh(a)
        h = np.array([z[j] * h[j] + (1 - z[j]) * candidate[j] for j in range(H)])
        outputs.append(h)
    return np.array(outputs)


def test_reset_before_is_the_gru_of_cho_et_al() -> None:
    given = layer("gru-before", T=5, B=3, I=4, H=6)
    x, h0, *weights = (t.numpy() for t in given.tensors)
    output, h_n = given.refer()
    for row in range(3):
        expected = cho(x[:, row], h0[row], weights)
        np.testing.assert_allclose(output[:, row].numpy(), expected, rtol=1e-12)
        np.testing.assert_allclose(h_n[row].numpy(), expected[-1], rtol=1e-12)


def test_the_two_variants_differ() -> None:
    before, after = layer("gru-before"), layer("gru")
    assert all(torch.equal(a, b) for a, b in zip(before.tensors, after.tensors, strict=True))
    assert (before.refer()[0] - after.refer()[0]).abs().max() > 1e-3


# --- lengths and directions ---------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@every_cell
def test_a_packed_row_is_that_row_alone(cell: str, reverse: bool) -> None:
    lengths = (5, 3, 3, 1)
    packed = layer(cell, lengths=lengths, reverse=reverse)
    sizes = packed.batch_sizes.tolist()
    steps = packed.get("x").split(sizes)
    results = packed.refer()
    for row, length in enumerate(lengths):
        states = {n: packed.get(n)[row : row + 1] for n in ("h0", "c0") if n in packed.names}
        weights = {n: packed.get(n) for n in packed.names if n.startswith(("w_", "b_"))}
        x = torch.stack([step[row : row + 1] for step in steps[:length]])
        alone = layer(cell, length, 1, reverse=reverse).having(x=x, **states, **weights).refer()
        finals = 2 if cell == "lstm" else 1
        for whole, own in zip(results[1 : 1 + finals], alone[1 : 1 + finals], strict=True):
            torch.testing.assert_close(whole[row : row + 1], own, rtol=1e-13, atol=1e-13)
        for index in (0, 3) if cell == "lstm" else (0,):
            whole = torch.stack([s[row : row + 1] for s in results[index].split(sizes)[:length]])
            torch.testing.assert_close(whole, alone[index], rtol=1e-13, atol=1e-13)


@every_cell
def test_reverse_is_flip_forward_flip(cell: str) -> None:
    """To rounding: a GEMM may sum up a row of x in another order at another place."""
    close = functools.partial(torch.testing.assert_close, rtol=1e-14, atol=1e-14)
    forward = layer(cell, T=6)
    backward = layer(cell, T=6, reverse=True)
    flipped = backward.having(x=backward.get("x").flip(0)).refer()
    expected = forward.refer()
    close(flipped[0].flip(0), expected[0])
    close(flipped[1], expected[1])
    if cell == "lstm":
        close(flipped[3].flip(0), expected[3])


# --- derivatives and dtypes ---------------------------------------------------------------------


@pytest.mark.parametrize(("cell", "options"), layer_cases())
def test_first_derivatives(cell: str, options: dict) -> None:
    given = layer(cell, I=2, H=4, **options).leaves()
    assert torch.autograd.gradcheck(given.of_present(given.refer), given.present)


@every_cell
def test_second_and_third_derivatives(cell: str) -> None:
    """Third: gradgradcheck of the gradient."""
    given = layer(cell, T=2, B=1, I=1, H=1).leaves()
    function = given.of_present(given.refer)
    assert torch.autograd.gradgradcheck(function, given.present)

    def gradient(*tensors: Tensor) -> tuple[Tensor, ...]:
        output = function(*tensors)[0]
        return torch.autograd.grad(output.sin().sum(), tensors, create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, given.present)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@every_cell
def test_sixteen_bit_inputs_are_computed_in_float32_and_rounded_once(cell: str, dtype) -> None:
    given = layer(cell, T=12, dtype=dtype)
    # The projection is an operation of the tensors' dtype; what follows is not.
    gates = torch.nn.functional.linear(given.get("x"), given.get("w_ih"), given.get("b_ih"))
    wide = given.to(torch.float32)
    rows = gates.size(-1)
    wide = wide.having(x=gates.float(), w_ih=torch.eye(rows), b_ih=torch.zeros(rows))
    for narrow, exact in zip(given.refer(), wide.refer(), strict=True):
        assert narrow.dtype == dtype
        assert torch.equal(narrow, exact.to(dtype))


def test_state_dtype() -> None:
    assert reference.state_dtype(torch.float16) == torch.float32
    assert reference.state_dtype(torch.bfloat16) == torch.float32
    assert reference.state_dtype(torch.float32) == torch.float32
    assert reference.state_dtype(torch.float64) == torch.float64
