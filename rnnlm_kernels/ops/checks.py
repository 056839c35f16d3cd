"""What the kernels take for granted about their tensors, checked with errors that name them."""

from __future__ import annotations

import torch
from torch import Tensor


def check_alike(x: Tensor, *others: Tensor | None) -> None:
    """One floating-point dtype and one device for x, h0, c0, w_ih, w_hh, b_ih, b_hh and w_hr."""
    dtype, device = x.dtype, x.device
    for tensor in others:
        if tensor is not None and (tensor.dtype is not dtype or tensor.device != device):
            break
    else:
        return
    check_floating(dtype)
    names = ("h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
    name = next(n for n, t in zip(names, others, strict=True) if t is tensor)
    if tensor.device != device:
        raise RuntimeError(f"{name} should be on the device of x ({device}), got {tensor.device}")
    raise ValueError(f"{name} should have the dtype of x ({dtype}), got {tensor.dtype}")


def check_floating(dtype: torch.dtype) -> None:
    """The dtype of x."""
    if not dtype.is_floating_point:
        raise ValueError(f"x should be a floating-point tensor, got {dtype}")


def check_layer(
    gates: int,
    dtype: torch.dtype,
    x: torch.Size,
    h0: torch.Size,
    c0: torch.Size | None,
    w_ih: torch.Size | None,
    w_hh: torch.Size,
    b_ih: torch.Size | None,
    b_hh: torch.Size | None,
    w_hr: torch.Size | None,
    batch_sizes: tuple[torch.Size, torch.dtype, torch.device] | None,
) -> None:
    """Everything the kernels take for granted about tensors that are alike: dtype and shapes."""
    check_floating(dtype)
    dims = 3 if batch_sizes is None else 2
    if len(x) != dims:
        kind = "dense x [T, B, I]" if batch_sizes is None else "packed x [N, I]"
        raise RuntimeError(f"{kind} should have {dims} dimensions, got {len(x)}")
    if len(w_hh) != 2 or w_hh[0] % gates:
        raise RuntimeError(f"w_hh should be [{gates}H, R], got {list(w_hh)}")
    rows, width = w_hh
    hidden = rows // gates
    if len(h0) != 2 and (len(h0) != 3 or h0[0] != 1):
        raise RuntimeError(f"h0 should be [B, {width}] or [1, B, {width}], got {list(h0)}")
    if w_ih is None and x[-1] != rows:
        raise RuntimeError(f"without w_ih, x should be {gates}H = {rows} wide, got {list(x)}")
    if w_ih is None and b_ih is not None:
        raise RuntimeError("without w_ih there should be no b_ih: x contains it, got one")
    *layer, batch, _ = h0
    if batch_sizes is None:
        batch = x[1]
    expected: dict[str, tuple[torch.Size | None, tuple[int, ...]]] = {
        "w_hr": (w_hr, (width, hidden)),
        "w_hh": (w_hh, (rows, hidden if w_hr is None else width)),
        "w_ih": (w_ih, (rows, x[-1])),
        "b_ih": (b_ih, (rows,)),
        "b_hh": (b_hh, (rows,)),
        "h0": (h0, (*layer, batch, width)),
        "c0": (c0, (*layer, batch, hidden)),
    }
    for name, (given, shape) in expected.items():
        if given is not None and given != shape:
            raise RuntimeError(f"{name} should have shape {list(shape)}, got {list(given)}")
    if batch_sizes is None:
        if x[0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        return
    steps, steps_dtype, steps_device = batch_sizes
    if steps_device.type != "cpu" or steps_dtype != torch.int64:
        raise RuntimeError(
            f"batch_sizes should be an int64 tensor on the CPU, got {steps_dtype} on {steps_device}"
        )
    if len(steps) != 1 or steps[0] == 0:
        raise RuntimeError(f"batch_sizes should be [T] with T > 0, got {list(steps)}")


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
