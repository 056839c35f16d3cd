"""The GRU operator: one layer in one direction, in both variants of the reset gate."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import BACKENDS
from .checks import check_batch_sizes, check_shapes
from .derivatives import reference_backward, with_layer_dimension
from .pairs import Backward, Call
from .planning import Plan, plan_layer
from .products import (
    contiguous,
    empty_contiguous_like,
    empty_for_none,
    input_grads,
    layer_gradients,
    multiplies,
    recurrent_weight_grad,
    with_input_gates,
)
from .rebuild import gru_saved
from .registration import register

plain = with_layer_dimension(reference.gru, states=1)


def _outputs(
    x: Tensor, h0: Tensor, save: bool, reset: str, module: ModuleType
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Uninitialised output, h_n, saved (r, z, n and, for reset-after, W_hn h + b_hn)."""
    *steps, _ = x.shape
    hidden = h0.shape[-1]
    saved = None
    if save and module.SAVES_GATES:
        saved = x.new_empty(*steps, (4 if reset == "after" else 3) * hidden)
    return x.new_empty(*steps, hidden), empty_contiguous_like(h0), saved


def forward(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    batch_sizes: Tensor | None,
    reset: str,
    reverse: bool,
    save: bool,
    backend: str | None,
    *,
    shapes_only: bool = False,
    later: list[Call] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operator; with ``shapes_only`` for fake tensors: checks and outputs, no values.

    ``later``: takes the call of the backend that has yet to be made; see :mod:`.pairs`.
    """
    # (Written out: unpacking lists of arguments, and names for them, cost 0.4 us a call.)
    module, options = plan_layer(
        "gru",
        x,
        h0,
        None,
        w_ih,
        w_hh,
        b_ih,
        b_hh,
        None,
        batch_sizes,
        reset,
        reverse,
        save,
        False,
        backend,
        shapes_only,
    )
    if batch_sizes is not None and not shapes_only:
        check_batch_sizes(x, h0, batch_sizes)
    outputs = _outputs(x, h0, save, reset, module)
    if shapes_only:
        return outputs
    if module is BACKENDS["reference"]:
        values = plain(x, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse)
        outputs[0].copy_(values[0])
        outputs[1].copy_(values[1])
    elif outputs[1].numel():
        arguments = (
            *with_input_gates(module, x, w_ih, b_ih, w_hh, b_hh, h0, batch_sizes),
            options,
            *outputs,
        )
        if later is None:
            module.gru_forward(*arguments)
        else:
            later.append((module, "gru_forward", arguments))
    return outputs


def infer(
    plan: Plan, input: Tensor, hx: Tensor | None, layer: Sequence[Any], batch_first: bool
) -> tuple[Tensor, Tensor]:
    """Output and h_n of a dense layer with a known plan: forward without all that is known."""
    module, options = plan
    x = input.transpose(0, 1) if batch_first else input
    w_ih, w_hh, b_ih, b_hh, _ = layer
    steps, batch, _ = x.shape
    hidden = w_hh.shape[1]
    h0 = x.new_zeros(1, batch, hidden) if hx is None else hx
    output, h_n = x.new_empty(steps, batch, hidden), torch.empty_like(h0)
    module.gru_forward(x, w_ih, b_ih, None, w_hh, b_hh, h0, None, options, output, h_n, None)
    return (output.transpose(0, 1) if batch_first else output), h_n


def _fake(*args: Any) -> tuple[Any, ...]:
    return forward(*args, shapes_only=True)


def _backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    batch_sizes: Tensor | None,
    output: Tensor,
    saved: Tensor,
    reset: str,
    reverse: bool,
    backend: str | None,
    needs: Sequence[bool],
) -> Backward:
    inputs = (x, h0, w_ih, w_hh, b_ih, b_hh)
    module, options = plan_layer(
        *("gru", x, h0, None, w_ih, w_hh, b_ih, b_hh, None, batch_sizes),
        *(reset, reverse, True, False, backend),
    )
    if module is BACKENDS["reference"]:
        layer = functools.partial(plain, batch_sizes=batch_sizes, reset=reset, reverse=reverse)
        return empty_for_none(x, reference_backward(layer, inputs, (grad_output, grad_h_n), needs))
    if x.size(0) and not saved.numel():
        # Forward did not save: by the policy "low", or not knowing of a backward (traced).
        saved = gru_saved(
            *(x, h0.flatten(0, -2), w_ih, w_hh, b_ih, b_hh, batch_sizes, reset, reverse, output)
        )
    hidden, steps = h0.size(-1), x.shape[:-1]
    of_h = (*steps, hidden)
    check_shapes(
        grad_output=(grad_output, of_h),
        grad_h_n=(grad_h_n, h0.shape),
        output=(output, of_h),
        saved=(saved, (*steps, (4 if reset == "after" else 3) * hidden)),
    )
    need_x, need_h0, need_w_ih, need_w_hh, need_b_ih, need_b_hh = needs
    dgates = x.new_empty((*steps, 3 * hidden))
    # reset-after: gradient of W_hn h + b_hn; reset-before: r * h, what W_hn was applied to.
    candidate = torch.empty_like(output)
    # The last product of the recurrence is for this alone.
    dh0 = empty_contiguous_like(h0) if need_h0 else None
    need_db = need_b_ih or need_b_hh
    db: Any = None  # of r, z, n and, for reset-after, of W_hn h + b_hn
    if need_db and h0.numel() and getattr(module, "SUMS_BIASES", False):
        db = x.new_empty(((4 if reset == "after" else 3) * hidden,))
    if h0.numel():
        yield (
            module,
            "gru_backward",
            (
                *contiguous(grad_output, grad_h_n, w_hh, h0, output, saved, batch_sizes),
                options,
                dgates,
                candidate,
                dh0,
                *([] if db is None else [db]),
            ),
        )
    if h0.numel() and multiplies(module, dgates, w_ih, w_hh):
        dx, dw_ih, dw_hh, db_ih, db_hh, _ = layer_gradients(
            *(module, options, x, h0, (w_ih, w_hh, None), batch_sizes, output),
            *(dgates, candidate, None, None),
            (need_x, need_w_ih, need_w_hh, need_b_ih, need_b_hh, False),
        )
        return empty_for_none(x, (dx, dh0 if need_h0 else None, dw_ih, dw_hh, db_ih, db_hh))
    dgates2d, candidate2d = dgates.flatten(0, -2), candidate.flatten(0, -2)
    db_hn: Any = None  # of b_hn, where it is not that of b_in
    if db is not None:
        db, db_hn = db[: 3 * hidden], db[3 * hidden :]
    elif need_db:
        db = dgates2d.sum(0)
        if need_b_hh and reset == "after":
            db_hn = candidate2d.sum(0)
    db_hh = dw_hh = None
    if need_b_hh:
        # Not a view of what the other bias gets.
        db_hh = db.clone() if reset == "before" else torch.cat([db[: 2 * hidden], db_hn])
    if need_w_hh:
        dw_hh = empty_contiguous_like(w_hh)
        before = functools.partial(
            recurrent_weight_grad, output, h0.flatten(0, -2), batch_sizes, reverse
        )
        before(dgates[..., : 2 * hidden], dw_hh[: 2 * hidden])
        if reset == "after":
            before(candidate, dw_hh[2 * hidden :])
        else:
            torch.mm(dgates2d[:, 2 * hidden :].t(), candidate2d, out=dw_hh[2 * hidden :])
    dx, dw_ih = input_grads(x, w_ih, dgates, need_x, need_w_ih)
    return empty_for_none(
        x,
        (
            dx,
            dh0 if need_h0 else None,
            dw_ih,
            dw_hh,
            db if need_b_ih else None,
            db_hh,
        ),
    )


Eager = register(
    "gru",
    inputs=("x", "h0", "w_ih?", "w_hh", "b_ih?", "b_hh?"),
    flags=("str reset", "bool reverse", "bool save", "str? backend"),
    grads=("output", "h_n"),
    saved=("output", "saved"),
    backward_flags=("reset", "reverse", "backend"),
    forward=forward,
    fake=_fake,
    backward=_backward,
    layer=plain,
)
