"""The gate math of every cell, forward and backward, on blocks of float32: written here once.

The twin of csrc/device/gates.h, with its names; equations: docs/equations.md. ``a_*`` is a
pre-activation, ``d_x`` is dLoss/dx. All arguments are float32 blocks of one shape.

``saved`` holds pre-activations where tensors have 16 bits (a sigmoid near 1 has no bits left in
them) and activated gates in float32: the flag ``PRE`` of the functions that read it.
"""

# mypy: disable-error-code="no-untyped-def"
# The arguments of a device function are blocks or compile-time constants; neither has a type.

from __future__ import annotations

import triton
import triton.language as tl

# --- the two functions ----------------------------------------------------------------------------


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), of the exponential that cannot overflow. NaN stays NaN."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(x):
    """Near 0, where 1 - exp(-2x) cancels, a polynomial with an error of 1.3 ulp. NaN stays NaN."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    u = x * x
    p = ((0.016437583 * u - 0.052671812) * u + 0.13320725) * u - 0.33332947
    return tl.where(tl.abs(x) < 0.55, x + x * (u * p), tl.where(x < 0, -far, far))


# --- LSTM: c' = f c + i g, h = o tanh(c') ---------------------------------------------------------


@triton.jit
def lstm_activate(a_i, a_f, a_g, a_o):
    """The gates i, f, g, o of their pre-activations."""
    return sigmoid(a_i), sigmoid(a_f), tanh(a_g), sigmoid(a_o)


@triton.jit
def lstm_saved(a_i, a_f, a_g, a_o, PRE: tl.constexpr):
    """The gates i, f, g, o of what forward saved."""
    if PRE:
        a_i, a_f, a_g, a_o = lstm_activate(a_i, a_f, a_g, a_o)
    return a_i, a_f, a_g, a_o


@triton.jit
def lstm_forward(i, f, g, o, c):
    """h and c after a step from the activated gates and c before it."""
    c = f * c + i * g
    return o * tanh(c), c


@triton.jit
def lstm_backward(i, f, g, o, c_prev, c, d_h, d_c):
    """Gradients of the four pre-activations and of c_prev.

    ``d_h`` is complete; ``d_c`` is what the next step handed back.
    """
    t = tanh(c)
    d_c = d_h * o * (1.0 - t * t) + d_c
    d_i = d_c * g * i * (1.0 - i)
    d_f = d_c * c_prev * f * (1.0 - f)
    d_g = d_c * i * (1.0 - g * g)
    d_o = d_h * t * o * (1.0 - o)
    return d_i, d_f, d_g, d_o, d_c * f


# --- GRU: h' = (1 - z) n + z h --------------------------------------------------------------------


@triton.jit
def gru_saved(a_r, a_z, a_n, PRE: tl.constexpr):
    """The gates r, z, n of what forward saved."""
    if PRE:
        a_r, a_z, a_n = sigmoid(a_r), sigmoid(a_z), tanh(a_n)
    return a_r, a_z, a_n


@triton.jit
def gru_update(z, n, h):
    """h after a step."""
    return z * h + (1.0 - z) * n


@triton.jit
def gru_update_backward(z, n, h_prev, d_h):
    """Gradients of z's and n's pre-activations, and of h_prev along the direct path (z)."""
    return d_h * (h_prev - n) * z * (1.0 - z), d_h * (1.0 - z) * (1.0 - n * n), d_h * z


@triton.jit
def gru_reset_after_backward(r, hn, d_n):
    """Reset after, n = tanh(x_n + r hn) with hn = W_hn h + b_hn: gradients of a_r and of hn.

    ``d_n`` is the gradient of n's pre-activation. The recurrent product of n's rows is taken with
    the gradient of hn.
    """
    return d_n * hn * r * (1.0 - r), d_n * r


@triton.jit
def gru_reset_before_backward(r, h_prev, d_rh):
    """Reset before, n = tanh(x_n + W_hn (r h) + b_hn): gradients of a_r, and of h_prev through r h.

    ``d_rh`` is the gradient of r * h.
    """
    return d_rh * h_prev * r * (1.0 - r), d_rh * r
