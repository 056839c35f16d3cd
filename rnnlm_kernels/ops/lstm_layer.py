"""The LSTM operator: one layer in one direction."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import BACKENDS
from ..reference import state_dtype
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
from .rebuild import lstm_saved
from .registration import register

plain = with_layer_dimension(reference.lstm, states=2)


def _outputs(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    save: bool,
    return_cells: bool,
    module: ModuleType,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Uninitialised output, h_n, c_n, cells, saved; the last two are None when not wanted."""
    *steps, _ = x.shape
    hidden = c0.shape[-1]
    cells = saved = None
    if save or return_cells:
        cells = x.new_empty(*steps, hidden, dtype=state_dtype(x.dtype))
    if save and module.SAVES_GATES:
        saved = x.new_empty(*steps, 4 * hidden)
    output = x.new_empty(*steps, h0.shape[-1])
    return output, empty_contiguous_like(h0), empty_contiguous_like(c0), cells, saved


def forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    save: bool,
    return_cells: bool,
    backend: str | None,
    *,
    shapes_only: bool = False,
    later: list[Call] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The operator; with ``shapes_only`` for fake tensors: checks and outputs, no values.

    ``later``: takes the call of the backend that has yet to be made; see :mod:`.pairs`.
    """
    # (Written out: unpacking lists of arguments, and names for them, cost 0.4 us a call.)
    module, options = plan_layer(
        "lstm",
        x,
        h0,
        c0,
        w_ih,
        w_hh,
        b_ih,
        b_hh,
        w_hr,
        batch_sizes,
        "after",
        reverse,
        save,
        return_cells,
        backend,
        shapes_only,
    )
    if batch_sizes is not None and not shapes_only:
        check_batch_sizes(x, h0, batch_sizes)
    outputs = _outputs(x, h0, c0, save, return_cells, module)
    if shapes_only:
        return outputs
    if module is BACKENDS["reference"]:
        values = plain(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse)
        for out, value in zip(outputs, values, strict=False):
            if out is not None:
                out.copy_(value)
    elif h0.numel() + c0.numel():
        arguments = (
            *with_input_gates(module, x, w_ih, b_ih, w_hh, b_hh, w_hr, h0, c0, batch_sizes),
            options,
            *outputs,
        )
        if later is None:
            module.lstm_forward(*arguments)
        else:
            later.append((module, "lstm_forward", arguments))
    return outputs


def infer(
    plan: Plan,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    layer: Sequence[Any],
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Output, h_n, c_n of a dense layer with a known plan: forward without all that is known."""
    module, options = plan
    x = input.transpose(0, 1) if batch_first else input
    w_ih, w_hh, b_ih, b_hh, w_hr = layer
    steps, batch, _ = x.shape
    rows, width = w_hh.shape
    if hx is None:
        c0 = x.new_zeros(1, batch, rows // 4)
        h0 = c0 if w_hr is None else x.new_zeros(1, batch, width)
    else:
        h0, c0 = hx
    output = x.new_empty(steps, batch, width)
    h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
    module.lstm_forward(
        *(x, w_ih, b_ih, None, w_hh, b_hh, w_hr, h0, c0, None, options),
        *(output, h_n, c_n, None, None),
    )
    return (output.transpose(0, 1) if batch_first else output), h_n, c_n, None


def _fake(*args: Any) -> tuple[Any, ...]:
    return forward(*args, shapes_only=True)


def _backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    output: Tensor,
    cells: Tensor,
    saved: Tensor,
    reverse: bool,
    return_cells: bool,
    backend: str | None,
    needs: Sequence[bool],
) -> Backward:
    inputs = (x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    module, options = plan_layer(
        "lstm", *inputs, batch_sizes, "after", reverse, True, return_cells, backend
    )
    if module is BACKENDS["reference"]:
        return empty_for_none(
            x,
            reference_backward(
                functools.partial(plain, batch_sizes=batch_sizes, reverse=reverse),
                inputs,
                (grad_output, grad_h_n, grad_c_n, grad_cells),
                needs,
            ),
        )
    if x.size(0) and not saved.numel():
        # Forward did not save: by the policy "low", or not knowing of a backward (traced).
        if cells.numel():
            saved = lstm_saved(
                *(x, h0.flatten(0, -2), w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse, output)
            )
        else:  # Nor the cells, and those are made step by step: run it again.
            again: Any = forward(*inputs, batch_sizes, reverse, True, return_cells, backend)
            output, _, _, cells, saved = again
    hidden, steps = c0.size(-1), x.shape[:-1]
    of_h, of_c = (*steps, h0.size(-1)), (*steps, hidden)
    check_shapes(
        grad_output=(grad_output, of_h),
        grad_h_n=(grad_h_n, h0.shape),
        grad_c_n=(grad_c_n, c0.shape),
        grad_cells=(grad_cells, of_c),
        output=(output, of_h),
        cells=(cells, of_c),
        saved=(saved, (*steps, 4 * hidden)),
    )
    need_x, need_h0, need_c0, need_w_ih, need_w_hh, need_b_ih, need_b_hh, need_w_hr = needs
    dgates = x.new_empty((*steps, 4 * hidden))
    # The last product of the recurrence is for these alone.
    dh0 = dc0 = None
    if need_h0 or need_c0:
        dh0, dc0 = empty_contiguous_like(h0), empty_contiguous_like(c0)
    # With a projection: the gradient of each step's projected h, and h before the projection.
    dproj: Any = None if w_hr is None else torch.empty_like(output)
    unprojected: Any = None if w_hr is None else x.new_empty((*steps, hidden))
    need_db = need_b_ih or need_b_hh
    db: Any = None
    if need_db and h0.numel() and getattr(module, "SUMS_BIASES", False):
        db = x.new_empty((4 * hidden,))
    if h0.numel():
        yield (
            module,
            "lstm_backward",
            (
                *contiguous(grad_output, grad_h_n, grad_c_n, grad_cells, w_hh, w_hr, h0, c0),
                *contiguous(output, cells, saved, batch_sizes),
                options,
                dgates,
                dh0,
                dc0,
                dproj,
                unprojected,
                *([] if db is None else [db]),
            ),
        )
    if h0.numel() and multiplies(module, dgates, w_ih, w_hh):
        dx, dw_ih, dw_hh, db_ih, db_hh, dw_hr = layer_gradients(
            *(module, options, x, h0, (w_ih, w_hh, w_hr), batch_sizes, output),
            *(dgates, None, dproj, unprojected),
            (need_x, need_w_ih, need_w_hh, need_b_ih, need_b_hh, need_w_hr),
        )
        return empty_for_none(
            x,
            (
                *(dx, dh0 if need_h0 else None, dc0 if need_c0 else None),
                *(dw_ih, dw_hh, db_ih, db_hh, dw_hr),
            ),
        )
    dgates2d = dgates.flatten(0, -2)
    dw_hh = None
    if need_w_hh:
        dw_hh = empty_contiguous_like(w_hh)
        recurrent_weight_grad(output, h0.flatten(0, -2), batch_sizes, reverse, dgates, dw_hh)
    if need_db and db is None:
        db = dgates2d.sum(0)
    dx, dw_ih = input_grads(x, w_ih, dgates, need_x, need_w_ih)
    return empty_for_none(
        x,
        (
            dx,
            dh0 if need_h0 else None,
            dc0 if need_c0 else None,
            dw_ih,
            dw_hh,
            db if need_b_ih else None,
            (db.clone() if need_b_ih else db) if need_b_hh else None,
            dproj.flatten(0, -2).t() @ unprojected.flatten(0, -2) if need_w_hr else None,
        ),
    )


Eager = register(
    "lstm",
    inputs=("x", "h0", "c0", "w_ih?", "w_hh", "b_ih?", "b_hh?", "w_hr?"),
    flags=("bool reverse", "bool save", "bool return_cells", "str? backend"),
    grads=("output", "h_n", "c_n", "cells"),
    saved=("output", "cells", "saved"),
    backward_flags=("reverse", "return_cells", "backend"),
    forward=forward,
    fake=_fake,
    backward=_backward,
    layer=plain,
)
