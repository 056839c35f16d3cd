"""The gate math of rnnlm_kernels/triton/cells.py: as exact as float32 is, derivatives included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton_interpreted import needs_triton

from rnnlm_kernels import reference

tl: Any = pytest.importorskip("triton.language")
triton: Any = pytest.importorskip("triton")
cells: Any = pytest.importorskip("rnnlm_kernels.triton.cells")

pytestmark = needs_triton

N = 256
EPS = torch.finfo(torch.float32).eps


@triton.jit
def functions(x, sigmoid, tanh, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(sigmoid + i, cells.sigmoid(value))
    tl.store(tanh + i, cells.tanh(value))


@triton.jit
def lstm(inputs, outputs, N: tl.constexpr):
    """In: a_i, a_f, a_g, a_o, c, d_h, d_c. Out: h, c, four gradients, d_c_prev; twice, the second
    time of gates as 16-bit tensors save them."""
    at = tl.arange(0, N)
    a_i, a_f, a_g, a_o = (
        tl.load(inputs + at),
        tl.load(inputs + N + at),
        tl.load(inputs + 2 * N + at),
        tl.load(inputs + 3 * N + at),
    )
    c_prev, d_h, d_c = (
        tl.load(inputs + 4 * N + at),
        tl.load(inputs + 5 * N + at),
        tl.load(inputs + 6 * N + at),
    )
    for pre in tl.static_range(2):
        i, f, g, o = cells.lstm_activate(a_i, a_f, a_g, a_o)
        h, c = cells.lstm_forward(i, f, g, o, c_prev)
        if pre == 1:
            i, f, g, o = cells.lstm_saved(a_i, a_f, a_g, a_o, True)
        else:
            i, f, g, o = cells.lstm_saved(i, f, g, o, False)
        d_i, d_f, d_g, d_o, d_c_prev = cells.lstm_backward(i, f, g, o, c_prev, c, d_h, d_c)
        out = outputs + pre * 7 * N + at
        tl.store(out, h)
        tl.store(out + N, c)
        tl.store(out + 2 * N, d_i)
        tl.store(out + 3 * N, d_f)
        tl.store(out + 4 * N, d_g)
        tl.store(out + 5 * N, d_o)
        tl.store(out + 6 * N, d_c_prev)


@triton.jit
def gru(inputs, outputs, N: tl.constexpr):
    """In: a_r, a_z, x_n, hn, h, d_h, q. Out, reset after: h', gradients of a_r, a_z, x_n, hn and
    of h along the direct path; reset before, with q = W_hn's product: gradients of a_r and h."""
    at = tl.arange(0, N)
    a_r, a_z = tl.load(inputs + at), tl.load(inputs + N + at)
    x_n, hn = tl.load(inputs + 2 * N + at), tl.load(inputs + 3 * N + at)
    h, d_h, q = (
        tl.load(inputs + 4 * N + at),
        tl.load(inputs + 5 * N + at),
        tl.load(inputs + 6 * N + at),
    )
    r, z, n = cells.gru_saved(a_r, a_z, x_n + cells.sigmoid(a_r) * hn, True)
    r, z, n = cells.gru_saved(r, z, n, False)
    d_z, d_n, direct = cells.gru_update_backward(z, n, h, d_h)
    d_r, d_hn = cells.gru_reset_after_backward(r, hn, d_n)
    before_d_r, before_direct = cells.gru_reset_before_backward(r, h, q)
    tl.store(outputs + at, cells.gru_update(z, n, h))
    tl.store(outputs + N + at, d_r)
    tl.store(outputs + 2 * N + at, d_z)
    tl.store(outputs + 3 * N + at, d_n)
    tl.store(outputs + 4 * N + at, d_hn)
    tl.store(outputs + 5 * N + at, direct)
    tl.store(outputs + 6 * N + at, before_d_r)
    tl.store(outputs + 7 * N + at, before_direct)


def of_functions(x: Tensor) -> tuple[Tensor, Tensor]:
    sigmoid, tanh = torch.empty_like(x), torch.empty_like(x)
    with np.errstate(all="ignore"):
        functions[(1,)](x, sigmoid, tanh, x.numel())
    return sigmoid, tanh


def random(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, N, generator=torch.Generator().manual_seed(seed)) * 2


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found.double() - expected).abs().max() <= 16 * EPS * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("reach", [1e-4, 0.5, 1.0, 10.0, 80.0])
def test_functions_are_exact_to_an_ulp_or_two(reach: float) -> None:
    x = torch.linspace(-reach, reach, 2048)
    sigmoid, tanh = of_functions(x)
    exact = x.double()
    assert (sigmoid - exact.sigmoid()).abs().max() <= 2 * EPS
    # Relative, also near 0: a gradient through a small gate has all its digits.
    assert ((tanh - exact.tanh()) / exact.tanh()).abs().max() <= 2 * EPS
    assert ((sigmoid - exact.sigmoid()) / exact.sigmoid()).abs().max() <= 100 * EPS


def test_functions_saturate_and_keep_nan() -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 0.0, -0.0, 1e-38])
    sigmoid, tanh = of_functions(x)
    torch.testing.assert_close(sigmoid, x.sigmoid(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(tanh, x.tanh(), rtol=0, atol=0, equal_nan=True)


def graded(function: Callable[..., Any], inputs: Tensor, slopes: list[Tensor]) -> list[Tensor]:
    """Results of a function of float64 rows, and its gradients."""
    leaves = [row.double().requires_grad_() for row in inputs]
    outputs = function(*leaves)
    grads = torch.autograd.grad(outputs, leaves, [s.double() for s in slopes])
    return [*(o.detach() for o in outputs), *grads]


def test_lstm_is_the_reference_and_its_derivative() -> None:
    inputs = random(7)
    outputs = torch.empty(14, N)
    lstm[(1,)](inputs, outputs, N)

    def step(i: Tensor, f: Tensor, g: Tensor, o: Tensor, c: Tensor) -> Any:
        gates = torch.cat([i, f, g, o])[None]  # one row of N units
        w, h = c.new_zeros(4 * N, N), c.new_zeros(1, N)
        return [t[0] for t in reference.lstm_cell(gates, h, c[None], w)]

    expected = graded(step, inputs[:5], [inputs[5], inputs[6]])
    for found in (outputs[:7], outputs[7:]):
        for value, exact in zip(found, expected, strict=True):
            assert_close(value, exact)


def test_gru_is_the_reference_and_its_derivative() -> None:
    inputs = random(7, seed=1)
    outputs = torch.empty(8, N)
    gru[(1,)](inputs, outputs, N)
    d_h, q = inputs[5], inputs[6]

    def after(a_r: Tensor, a_z: Tensor, x_n: Tensor, hn: Tensor, h: Tensor) -> Any:
        # One row of N units; without weights, W_hn h + b_hn is the bias.
        gates, bias = torch.cat([a_r, a_z, x_n]), torch.cat([hn.new_zeros(2 * N), hn])
        return [reference.gru_cell(gates[None], h[None], hn.new_zeros(3 * N, N), bias)[0]]

    for value, exact in zip(outputs[:6], graded(after, inputs[:5], [d_h]), strict=True):
        assert_close(value, exact)

    def reset(a_r: Tensor, h: Tensor) -> Any:
        return [a_r.sigmoid() * h]

    _, d_r, direct = graded(reset, inputs[[0, 4]], [q])
    assert_close(outputs[6], d_r)
    assert_close(outputs[7], direct)
