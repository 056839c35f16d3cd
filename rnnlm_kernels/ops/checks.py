"""What the kernels take for granted about their tensors, checked with errors that name them."""

from __future__ import annotations

import torch
from torch import Tensor


def check_layer(
    gates: int,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
) -> None:
    """Everything the kernels take for granted about their tensors."""
    dtype, device = x.dtype, x.device
    if not dtype.is_floating_point:
        raise ValueError(f"x should be a floating-point tensor, got {dtype}")
    on_cpu = x.is_cpu  # quicker to compare than devices are
    for tensor in (h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr):
        if tensor is not None and (
            tensor.dtype is not dtype or not ((on_cpu and tensor.is_cpu) or tensor.device == device)
        ):
            names = ("h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
            given = zip(names, (h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr), strict=True)
            name = next(n for n, t in given if t is tensor)
            if tensor.device != device:
                raise RuntimeError(
                    f"{name} should be on the device of x ({device}), got {tensor.device}"
                )
            raise ValueError(f"{name} should have the dtype of x ({dtype}), got {tensor.dtype}")
    # .shape once per tensor: .size(i) is five times slower, and a call may take 10 us in all.
    x_shape, w_shape, h_shape = x.shape, w_hh.shape, h0.shape
    dims = 3 if batch_sizes is None else 2
    if len(x_shape) != dims:
        kind = "dense x [T, B, I]" if batch_sizes is None else "packed x [N, I]"
        raise RuntimeError(f"{kind} should have {dims} dimensions, got {len(x_shape)}")
    if len(w_shape) != 2 or w_shape[0] % gates:
        raise RuntimeError(f"w_hh should be [{gates}H, R], got {list(w_shape)}")
    rows, width = w_shape
    hidden = rows // gates
    if len(h_shape) != 2 and (len(h_shape) != 3 or h_shape[0] != 1):
        raise RuntimeError(f"h0 should be [B, {width}] or [1, B, {width}], got {list(h_shape)}")
    *layer, batch, _ = h_shape
    if batch_sizes is None:
        batch = x_shape[1]
    if (
        h_shape != (*layer, batch, width)
        or w_ih.shape != (rows, x_shape[-1])
        or (b_ih is not None and b_ih.shape != (rows,))
        or (b_hh is not None and b_hh.shape != (rows,))
        or (c0 is not None and c0.shape != (*layer, batch, hidden))
        or (width != hidden if w_hr is None else w_hr.shape != (width, hidden))
    ):
        check_shapes(
            w_hr=(w_hr, (width, hidden)),
            w_hh=(w_hh, (rows, hidden if w_hr is None else width)),
            w_ih=(w_ih, (rows, x_shape[-1])),
            b_ih=(b_ih, (rows,)),
            b_hh=(b_hh, (rows,)),
            h0=(h0, (*layer, batch, width)),
            c0=(c0, (*layer, batch, hidden)),
        )
    if batch_sizes is None:
        if x_shape[0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        return
    if batch_sizes.device.type != "cpu" or batch_sizes.dtype != torch.int64:
        raise RuntimeError(
            "batch_sizes should be an int64 tensor on the CPU, got "
            f"{batch_sizes.dtype} on {batch_sizes.device}"
        )
    if batch_sizes.dim() != 1 or batch_sizes.size(0) == 0:
        raise RuntimeError(f"batch_sizes should be [T] with T > 0, got {list(batch_sizes.shape)}")


def check_batch_sizes(x: Tensor, h0: Tensor, batch_sizes: Tensor) -> None:
    """The values of ``batch_sizes``; apart, since fake tensors have none."""
    largest, smallest, total = int(batch_sizes[0]), int(batch_sizes[-1]), int(batch_sizes.sum())
    if smallest < 1 or bool((batch_sizes[1:] > batch_sizes[:-1]).any()):
        raise RuntimeError("batch_sizes should be positive and never increase from step to step")
    if largest != h0.size(-2):
        raise RuntimeError(f"h0 should have batch_sizes[0] = {largest} rows, got {h0.size(-2)}")
    if total != x.size(0):
        raise RuntimeError(f"x should have sum(batch_sizes) = {total} rows, got {x.size(0)}")


def check_shapes(**expected: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Refuse, by name, a tensor whose shape is not the one given with it. None passes."""
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise RuntimeError(f"{name} should have shape {list(shape)}, got {list(tensor.shape)}")
