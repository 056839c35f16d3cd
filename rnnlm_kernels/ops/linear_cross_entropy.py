"""The linear + cross-entropy head as an operator: the loss of ``input W^T + b`` without all logits.

Logits [N, V] of a large vocabulary are bigger than everything else in a small language model, and
the unfused head passes over them half a dozen times. Here a chunk of rows is taken through to the
end while its logits are in the cache: a GEMM writes them to a buffer that all chunks share, one
pass (a kernel where there is one) turns them into losses and, in place, into their gradient, and
two more GEMMs take the gradient to ``input`` and add it to that of the weight.

So a sum or mean has its gradients when forward ends, for an upstream gradient of 1, and backward
multiplies them by the real one; in place, unless the graph is kept for another backward. With
``reduction="none"`` every row has an upstream gradient of its own, unknown in forward: then forward
computes losses alone, and backward computes the logits again. Sums over chunks are taken in the
order of the rows, in float32 for 16-bit dtypes.

Second derivatives, ``torch.func``, forward-mode AD and problems that are too small to gain anything
go through :func:`plain`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, dispatch
from .planning import are_batched, must_be_plain, nobody_watches

# Rows of a chunk: GEMMs on fewer are slower; of more the logits leave the cache, and the memory is
# more than a quarter of the unfused head's. 16-bit dtypes take more.
ROWS = 256
ROWS_16_BIT = 640
# Small vocabularies: as many rows as have logits of this size. Cutting them gains nothing.
SMALL_BYTES = 4 << 20
# Chunks whose weight gradients bfloat16 adds up before the sum goes to float32: four roundings of
# growing sums are 1.4 times the error of one, and a float32 sum costs as much as a product.
ADDED_IN_BFLOAT16 = 4
# Buffers up to this size are reused by malloc, larger ones are fresh pages at every call.
CHUNK_BYTES = 32 << 20
FEWEST_ROWS = 128
# Up to so many logits PyTorch's own operations are as fast or faster: there is nothing to gain from
# a cache that holds them all, and an operator of ours costs 0.1 ms.
PLAIN_LOGITS = 1 << 18
# A GPU needs larger GEMMs to be busy.
GPU_ROWS = 4096
GPU_CHUNK_BYTES = 128 << 20


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kept(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gradients that wait for the upstream gradient.

    float16 could not hold what loss scaling is going to make large enough for it.
    """
    return dtype if dtype == torch.bfloat16 else arithmetic(dtype)


def chunk_rows(rows: int, classes: int, itemsize: int, device_type: str) -> int:
    """How many rows are taken at a time: chosen by the size of their logits, in equal shares."""
    if device_type == "cpu":
        # A part, so that few rows are less memory too.
        part = -(-rows // (4 if itemsize == 2 else 3))
        most = min(ROWS_16_BIT if itemsize == 2 else ROWS, max(FEWEST_ROWS, part))
        most = max(most, SMALL_BYTES // (classes * itemsize))
        size, fewest = CHUNK_BYTES, FEWEST_ROWS
    else:
        most, size, fewest = GPU_ROWS, GPU_CHUNK_BYTES, 2 * FEWEST_ROWS
    most = max(fewest, min(most, size // (classes * itemsize)))
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


# --- the pass over a chunk of logits --------------------------------------------------------------


def _torch_pass(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    class_weight_sum: float,
    ignore_index: int,
    label_smoothing: float,
    upstream: Tensor | None,
    gradient: bool,
    losses: Tensor,
    bias_grad: Tensor | None,
) -> None:
    """What kernels do (csrc/core/params.h, CrossEntropy), with PyTorch's operations."""
    classes = logits.shape[1]
    x = logits if logits.dtype == losses.dtype else logits.to(losses.dtype)
    if bias is not None:
        x += bias
    x -= x.amax(1, keepdim=True)
    counted = target != ignore_index
    hit = torch.where(counted, target, 0)[:, None]
    at_target = x.gather(1, hit)
    share = torch.full_like(at_target, 1.0 - label_smoothing)
    if class_weight is not None:
        share *= class_weight[hit]
    even = label_smoothing / classes
    if label_smoothing:
        distance = -(x.sum(1) if class_weight is None else x @ class_weight)[:, None]
    x.exp_()
    total = x.sum(1, keepdim=True)
    found = share * (total.log() - at_target)
    coefficient = share
    if label_smoothing:
        all_weights = classes if class_weight is None else class_weight_sum
        found += even * (distance + all_weights * total.log())
        coefficient = share + even * all_weights
    losses.copy_(torch.where(counted, found[:, 0], 0.0))
    if not gradient:
        return
    x *= coefficient / total
    if label_smoothing:
        x -= even if class_weight is None else even * class_weight
    x.scatter_add_(1, hit, -share)
    if upstream is not None:
        x *= upstream[:, None]
    x.masked_fill_(~counted[:, None], 0.0)
    if x is not logits:
        logits.copy_(x)
    if bias_grad is not None:
        bias_grad += x.sum(0)


# Those that have a kernel for it, in the order of preference.
_KERNELS: dict[str, Any] = {"triton": backends.triton, "cpu": backends.cpu}


def _choose_pass(
    dtype: torch.dtype, device: torch.device, backend: str | None
) -> Callable[..., None]:
    """The pass that runs on such logits; what an argument asks for by name runs or raises."""
    if backend is None:
        # What the environment names may have recurrent layers only.
        backend = "reference" if dispatch.from_environment() == "reference" else "auto"
    verdicts = {name: k.supports_cross_entropy(dtype, device) for name, k in _KERNELS.items()}
    if backend == "auto":
        backend = next((name for name, (able, _) in verdicts.items() if able), "reference")
    if backend == "reference":
        return _torch_pass
    if backend not in _KERNELS:
        known = ["auto", *_KERNELS, "reference"]
        raise dispatch.BackendError(
            f"backend={backend!r} has no linear_cross_entropy; expected one of {known}"
        )
    able, reason = verdicts[backend]
    if not able:
        raise dispatch.BackendError(
            f"backend={backend!r} cannot run linear_cross_entropy: {reason}"
        )
    run: Callable[..., None] = _KERNELS[backend].cross_entropy
    return run


# --- the products of a chunk ----------------------------------------------------------------------


class _TorchProducts:
    """PyTorch's, for every device."""

    @staticmethod
    def linear(x: Tensor, w: Tensor, out: Tensor) -> None:
        torch.mm(x, w.t(), out=out)

    @staticmethod
    def linear_gradients(
        grad: Tensor,
        x: Tensor,
        w: Tensor,
        dx: Tensor | None,
        dw: Tensor | None,
        *,
        scale: float = 1.0,
        accumulates: bool = False,
    ) -> None:
        if dx is not None:
            dx.addmm_(grad, w, beta=0, alpha=scale)
        if dw is not None:
            dw.addmm_(grad.t(), x, beta=1 if accumulates else 0, alpha=scale)


def _choose_products(input: Tensor, classes: int) -> Any:
    """Whose products are the faster ones; see :func:`rnnlm_kernels.backends.cpu.multiplies`."""
    if not (input.is_cpu and backends.cpu.available()[0]):
        return _TorchProducts
    own = backends.cpu.multiplies(input.dtype, input.numel() * classes)
    return backends.cpu if own else _TorchProducts


# --- forward and backward over all chunks ---------------------------------------------------------


def _run(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    chunk_size: int | None,
    backend: str | None,
    needs: Sequence[bool],
    upstream: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Losses [N] in the arithmetic dtype and the gradients of their sum as they are kept.

    Args:
        needs: which gradients are wanted: of input, weight and bias.
        upstream: [N], what the losses' gradients are multiplied by.
        scale: the same for all rows, put on the products: 16-bit logits' gradients would lose more
            by it.
    """
    rows, width = input.shape
    classes = len(linear_weight)
    dtype, sums = input.dtype, arithmetic(input.dtype)
    run_pass = _choose_pass(dtype, input.device, backend)
    products = _choose_products(input, classes)
    need_input, need_weight, need_bias = needs
    gradient = any(needs)
    alpha = 1.0 if scale is None else scale
    chunk = chunk_size or chunk_rows(rows, classes, input.element_size(), input.device.type)

    input, linear_weight, target = (
        input.contiguous(),
        linear_weight.contiguous(),
        target.contiguous(),
    )
    bias = None if linear_bias is None else linear_bias.contiguous()
    weights = None if class_weight is None else class_weight.to(sums).contiguous()
    total = (
        0.0 if weights is None or not label_smoothing else float(weights.sum(dtype=torch.float64))
    )
    # One after the other, so that what lives long does not lie above what is given back.
    losses = input.new_empty(rows, dtype=sums)
    held = kept(dtype)
    d_input = input.new_empty((rows, width), dtype=held) if need_input else None
    d_bias = input.new_zeros(classes, dtype=sums) if need_bias else None
    # The weight's gradient: in 16 bits, one sum of products that is kept, or several in float32.
    narrow = dtype != sums
    added = ADDED_IN_BFLOAT16 if dtype == torch.bfloat16 else 1
    product = input.new_empty((classes, width)) if need_weight and narrow else None
    d_weight = product if held == dtype and rows <= added * chunk else None
    if need_weight and d_weight is None:
        d_weight = input.new_empty((classes, width), dtype=sums)
    if not rows:
        if d_weight is not None:
            d_weight = d_weight.zero_().to(held)
        return losses, d_input, d_weight, None if d_bias is None else d_bias.to(held)
    logits_of_chunk = input.new_empty((min(chunk, rows), classes))

    for index, start in enumerate(range(0, rows, chunk)):
        part = slice(start, min(start + chunk, rows))
        x = input[part]
        logits = logits_of_chunk[: len(x)]
        products.linear(x, linear_weight, logits)
        run_pass(
            logits,
            bias,
            target[part],
            weights,
            total,
            ignore_index,
            label_smoothing,
            None if upstream is None else upstream[part],
            gradient,
            losses[part],
            d_bias,
        )
        if not gradient:
            continue
        gradients = functools.partial(products.linear_gradients, logits, x, linear_weight)
        dx = None if d_input is None else d_input[part]
        if dx is not None and held != dtype:
            in_dtype = torch.empty_like(x)
            gradients(in_dtype, None)
            torch.mul(in_dtype, alpha, out=dx)
            dx = None
        if product is None:
            gradients(dx, d_weight, scale=alpha, accumulates=start > 0)
            continue
        gradients(dx, None, scale=alpha)
        gradients(None, product, accumulates=index % added > 0)
        if (index + 1) % added and part.stop < rows:
            continue
        assert d_weight is not None
        if index >= added:
            d_weight.add_(product, alpha=alpha)
        elif alpha != 1.0 or d_weight is not product:
            torch.mul(product, alpha, out=d_weight)
    if d_weight is not None and d_weight.dtype != held:
        assert product is not None
        d_weight = product.copy_(d_weight)
    if d_bias is not None:
        d_bias = d_bias.mul_(alpha).to(held)
    return losses, d_input, d_weight, d_bias


def _divisor(
    target: Tensor, class_weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """What a mean divides by: the summed class weights of the targets that count."""
    counted = target != ignore_index
    if class_weight is None:
        return counted.sum().to(dtype)
    weights = class_weight.to(dtype)[torch.where(counted, target, 0)]
    return torch.where(counted, weights, 0.0).sum()


def forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    chunk_size: int | None,
    backend: str | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator: the loss and, for a sum or mean, its gradients; empty where not wanted."""
    if target.device.type == "cpu":
        outside = (target != ignore_index) & ((target < 0) | (target >= len(linear_weight)))
        if bool(outside.any()):
            raise IndexError(
                f"target {int(target[outside][0])} is out of bounds for {len(linear_weight)} "
                "classes"
            )
    run = functools.partial(
        _run,
        input,
        linear_weight,
        target,
        linear_bias,
        class_weight,
        ignore_index,
        label_smoothing,
        chunk_size,
        backend,
    )
    empty = input.new_empty(0, dtype=kept(input.dtype))
    if reduction == "none":
        losses, *_ = run([False, False, False])
        return losses, empty, empty.clone(), empty.clone()
    divisor = None
    scale = None
    if reduction == "mean":
        divisor = _divisor(target, class_weight, ignore_index, arithmetic(input.dtype))
        if any(needs) and input.device.type == "cpu":
            scale = 1.0 / float(divisor) if float(divisor) else 0.0
    losses, *grads = run(needs, scale=scale)
    loss = losses.sum()
    if divisor is not None:
        loss = loss / divisor
        if scale is None:
            # A GPU would have to be waited for to know the divisor.
            factor = torch.where(divisor == 0, 0.0, 1.0 / divisor)
            for grad in grads:
                if grad is not None:
                    grad.mul_(factor)
    d_input, d_weight, d_bias = (empty.clone() if g is None else g for g in grads)
    return loss, d_input, d_weight, d_bias


def _fake(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    chunk_size: int | None,
    backend: str | None,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    none = reduction == "none"
    loss = input.new_empty(input.shape[:1] if none else (), dtype=arithmetic(input.dtype))
    shapes = (input.shape, linear_weight.shape, linear_weight.shape[:1])
    return (
        loss,
        *(
            input.new_empty(shape if need and not none else (0,), dtype=kept(input.dtype))
            for shape, need in zip(shapes, needs, strict=True)
        ),
    )


def _backward(
    grad_losses: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    chunk_size: int | None,
    backend: str | None,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients from the gradient of every row's loss, [N]; the logits are computed again."""
    _, *grads = _run(
        input,
        linear_weight,
        target,
        linear_bias,
        class_weight,
        ignore_index,
        label_smoothing,
        chunk_size,
        backend,
        needs,
        upstream=grad_losses.to(arithmetic(input.dtype)).contiguous(),
    )
    return tuple(input.new_empty(0) if g is None else g.to(input.dtype) for g in grads)


def _backward_fake(
    grad_losses: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    needs = rest[-1]
    shapes = (input.shape, linear_weight.shape, linear_weight.shape[:1])
    return tuple(
        input.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)
    )


def plain(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The same loss by PyTorch's own operations, with all logits; differentiable in every way."""
    sums = arithmetic(input.dtype)
    return F.cross_entropy(
        F.linear(input, linear_weight, linear_bias).to(sums),
        target,
        weight=None if class_weight is None else class_weight.to(sums),
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


# --- autograd -------------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight"
)
_FLAGS = "int ignore_index, float label_smoothing, SymInt? chunk_size, str? backend, bool[] needs"
_NAME = "rnnlm_kernels::linear_cross_entropy"
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library = torch.library.Library("rnnlm_kernels", "FRAGMENT")
_library.define(
    f"linear_cross_entropy({_ARGUMENTS}, str reduction, {_FLAGS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    f"linear_cross_entropy_backward(Tensor grad_losses, {_ARGUMENTS}, {_FLAGS})"
    " -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_library.impl("linear_cross_entropy", forward, "CompositeExplicitAutograd")
_library.impl("linear_cross_entropy_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(_NAME, _fake, lib=_library)
torch.library.register_fake(f"{_NAME}_backward", _backward_fake, lib=_library)
_OPERATOR = torch.ops.rnnlm_kernels.linear_cross_entropy.default
_BACKWARD_OPERATOR = torch.ops.rnnlm_kernels.linear_cross_entropy_backward.default

# torch 2.6 does not tell; it then computes gradients that an exported program does not need.
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
# Whether the running backward keeps its graph, so that what was saved will be read again.
_graph_is_kept: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.flags = inputs[5:]


def _autograd_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    inputs, saved = saved[:5], saved[5:]
    reduction, ignore_index, label_smoothing, chunk_size, backend, there = ctx.flags
    needs = list(ctx.needs_input_grad[:3])
    rest = (None,) * 8
    if grad is None or not any(needs):
        return (None, None, None, *rest)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return (*_differentiable(grad, inputs, ctx.flags[:3], needs), *rest)
    direct = nobody_watches(grad, *inputs) and not are_batched(grad)
    if reduction == "none" or any(n and not t for n, t in zip(needs, there, strict=True)):
        if reduction != "none":
            if reduction == "mean":
                grad = grad / _divisor(inputs[3], inputs[4], ignore_index, grad.dtype)
            grad = grad.expand(len(inputs[0]))
        run: Callable[..., tuple[Tensor, ...]] = _backward if direct else _BACKWARD_OPERATOR
        found = run(grad, *inputs, ignore_index, label_smoothing, chunk_size, backend, needs)
    else:
        # Nobody will read the saved gradients again: they can be multiplied where they are.
        in_place = direct and not _graph_is_kept()
        unscaled = in_place and grad.is_cpu and float(grad) == 1.0
        found = tuple(
            (d if unscaled else d.mul_(grad) if in_place else d * grad).to(inputs[0].dtype)
            for d in saved
        )
    return (*(d if need else None for d, need in zip(found, needs, strict=True)), *rest)


def _differentiable(
    grad: Tensor,
    inputs: Sequence[Tensor | None],
    flags: Sequence[Any],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients as functions of inputs and ``grad`` that can be differentiated again."""
    # Aliases cut the graph: one input may depend on another further up.
    aliases: list[Any] = [
        t.view_as(t) if t is not None and need else t
        for t, need in zip(inputs, (*needs, False, False), strict=True)
    ]
    names = ("reduction", "ignore_index", "label_smoothing")
    loss = plain(*aliases, **dict(zip(names, flags, strict=True)))
    wanted = [t for t, need in zip(aliases, needs, strict=False) if need]
    found = iter(torch.autograd.grad(loss, wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needs]


torch.library.register_autograd(_NAME, _autograd_backward, setup_context=_setup, lib=_library)


class _Eager(torch.autograd.Function):
    """The operator without PyTorch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        output = forward(*args)
        _setup(ctx, args, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return _autograd_backward(ctx, *grads)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of ``input @ linear_weight.T + linear_bias``, a chunk of rows at a time.

    Takes tensors that are checked; :func:`rnnlm_kernels.linear_cross_entropy` is for callers.

    Args:
        input: [N, H]. linear_weight: [V, H]. linear_bias: [V].
        target: int64 [N]. weight: class weights [V], not differentiated.
        chunk_size, backend: see :func:`rnnlm_kernels.linear_cross_entropy`.

    Returns:
        The loss, float32 (float64 for float64): a scalar, or [N] with ``reduction="none"``.
    """
    watched = not nobody_watches(input, linear_weight, linear_bias, target, weight)
    free = chunk_size is None and backend in (None, "auto")
    small = free and not watched and len(input) * len(linear_weight) <= PLAIN_LOGITS
    if small or must_be_plain():
        return plain(
            input,
            linear_weight,
            linear_bias,
            target,
            weight,
            reduction,
            ignore_index,
            label_smoothing,
        )
    # What is traced or exported is meant for inference.
    traced = torch._C._get_tracing_state() is not None or _is_exporting()
    differentiate = torch.is_grad_enabled() and not traced
    needs = [
        differentiate and t is not None and t.requires_grad
        for t in (input, linear_weight, linear_bias)
    ]
    run: Callable[..., tuple[Tensor, ...]] = _OPERATOR
    if not watched:
        run = _Eager.apply if any(needs) else forward
    return run(
        input,
        linear_weight,
        linear_bias,
        target,
        weight,
        reduction,
        ignore_index,
        label_smoothing,
        chunk_size,
        backend,
        needs,
    )[0]
