"""linear_cross_entropy: torch's loss and gradients, for every option, without all logits.

The exact loss is ``F.cross_entropy(F.linear(...))`` in float64. A 16-bit or float32 result may be
twice as far from it as the same expression of torch in that dtype.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recurrence_cases import ISAS, NATIVE, run_under_isa
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton_compiled import needs_compiler, run_uninterpreted
from triton_interpreted import interpreted, needs_triton

import rnnlm_kernels
from rnnlm_kernels import BackendError, LinearCrossEntropyLoss, linear_cross_entropy
from rnnlm_kernels.ops import linear_cross_entropy as operator

BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(not NATIVE, reason="no native module")),
    "reference",
    pytest.param("triton", marks=needs_triton),
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
EPS = {torch.float32: 2e-7, torch.float64: 4e-15, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@contextmanager
def running(backend: str) -> Iterator[None]:
    """What a backend needs to run on tensors of the CPU."""
    with interpreted() if backend == "triton" else nullcontext():
        yield


class Case:
    """Tensors of one problem."""

    def __init__(self, N: int, H: int, V: int, dtype: torch.dtype = torch.float32) -> None:
        draw = torch.Generator().manual_seed(N + 10 * H + 100 * V)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        self.x = normal(N, H).to(dtype).requires_grad_()
        self.weight = (2 * normal(V, H) / max(H, 1) ** 0.5).to(dtype).requires_grad_()
        self.bias = normal(V).to(dtype).requires_grad_()
        self.target = torch.randint(V, (N,), generator=draw)
        self.target[::3] = -100
        self.class_weight = torch.rand(V, generator=draw) + 0.1
        self.upstream = normal(N)

    def loss(self, **options: Any) -> Tensor:
        return linear_cross_entropy(
            self.x, self.weight, self.target, linear_bias=self.bias, **options
        )

    def torch_loss(self, dtype: torch.dtype, weight: Tensor | None = None, **options: Any) -> Any:
        """Leaves in a dtype and torch's loss of them."""
        leaves = [t.detach().to(dtype).requires_grad_() for t in (self.x, self.weight, self.bias)]
        weight = None if weight is None else weight.to(dtype)
        return leaves, F.cross_entropy(F.linear(*leaves), self.target, weight=weight, **options)

    def values(self, loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        """The loss and its gradients, for an upstream gradient that is not 1."""
        upstream = self.upstream if loss.dim() else torch.tensor(0.7)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))]


def assert_as_good_as_torch(case: Case, backend: str, *, chunk_size: int = 5, **options: Any):
    dtype = case.x.dtype
    with running(backend):
        loss = case.loss(backend=backend, chunk_size=chunk_size, **options)
        found = case.values(loss, [case.x, case.weight, case.bias])
    assert loss.dtype == dtype
    leaves, loss = case.torch_loss(torch.float64, **options)
    exact = case.values(loss, leaves)
    leaves, loss = case.torch_loss(dtype, **options)
    theirs = case.values(loss, leaves)
    for name, ours, torchs, truth in zip(
        ("loss", "input", "weight", "bias"), found, theirs, exact, strict=True
    ):
        if torch.isnan(truth).any():
            assert torch.equal(torch.isnan(ours), torch.isnan(truth)), name
            continue
        scale = truth.abs().max() if truth.numel() else torch.tensor(0.0)
        allowed = 2 * (torchs.double() - truth).abs().max() if truth.numel() else scale
        assert ours.shape == truth.shape, name
        assert ours.dtype == dtype, name
        error = (ours.double() - truth).abs().max() if truth.numel() else scale
        assert error <= allowed + 4 * EPS[dtype] * scale, (name, error, allowed)


# --- the same numbers as torch --------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "all-smooth": {"label_smoothing": 1.0},
    "class-weights": {"weight": True},
    "class-weights-smoothing": {"weight": True, "label_smoothing": 0.3},
    "ignores-a-class": {"ignore_index": 3},
}


@every_backend
@every_reduction
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_is_as_of_torch(backend: str, reduction: str, options: dict[str, Any]) -> None:
    case = Case(13, 6, 37)
    if options.get("weight"):
        options = {**options, "weight": case.class_weight}
    if "ignore_index" in options:
        case.target[case.target < 0] = 3
    assert_as_good_as_torch(case, backend, reduction=reduction, **options)


@every_backend
@pytest.mark.parametrize("dtype", EPS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("chunk_size", [16, 3], ids="chunks-of-{}".format)
@every_reduction
def test_every_dtype_is_as_accurate_as_torch(
    backend: str, dtype: torch.dtype, reduction: str, chunk_size: int
) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("no kernel for float64")
    case = Case(40, 24, 333, dtype)
    assert_as_good_as_torch(case, backend, reduction=reduction, chunk_size=chunk_size)


SHAPES = [(0, 3, 5), (1, 1, 2), (7, 7, 2), (7, 200, 1000), (7, 1, 10_007), (3, 5, 1), (64, 4, 129)]


@every_backend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes(backend: str, shape: tuple[int, int, int]) -> None:
    assert_as_good_as_torch(Case(*shape), backend, reduction="sum")
    assert_as_good_as_torch(Case(*shape), backend, reduction="mean", label_smoothing=0.1)


@every_backend
@every_reduction
def test_when_all_are_ignored_gradients_are_zero(backend: str, reduction: str) -> None:
    case = Case(6, 3, 5)
    case.target[:] = -100
    with running(backend):
        loss = case.loss(reduction=reduction, backend=backend, chunk_size=4)
        grads = torch.autograd.grad(loss.sum(), [case.x, case.weight, case.bias])
    assert torch.isnan(loss) if reduction == "mean" else not loss.any()
    assert not any(g.any() for g in grads)


@every_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_logits_that_are_not_finite_spread_as_in_torch(backend: str, value: float) -> None:
    case = Case(9, 4, 21)
    rows = [1, 2, 4, 5, 7, 8]
    with torch.no_grad():
        case.bias[7] = value
        case.target[1], case.target[4] = 7, 8
    options = {"reduction": "none"}
    with running(backend):
        loss = case.loss(backend=backend, chunk_size=4, **options)
        found = case.values(loss, [case.x, case.weight, case.bias])
    leaves, loss = case.torch_loss(torch.float32, **options)
    expected = case.values(loss, leaves)
    torch.testing.assert_close(found[0], expected[0], equal_nan=True)
    if value == float("-inf"):  # a class that is masked out
        assert found[0][1] == float("inf")
        torch.testing.assert_close(found[1:], expected[1:], equal_nan=True)
    else:
        assert torch.isnan(found[1][rows]).all()
        # Unlike torch's: what is ignored does not count, whatever it is.
        assert not found[1][::3].any()


@pytest.mark.skipif(not NATIVE, reason="no native module")
def test_hopeless_classes_get_no_denormal_gradients() -> None:
    # Products with denormal numbers take many times longer.
    case = Case(1, 1, 64)
    logits = torch.linspace(0, -103, 64)[None]
    rnnlm_kernels.backends.cpu.cross_entropy(
        *(logits, None, torch.tensor([0]), None, 0.0, -100, 0.0, None, True),
        *(torch.empty(1), torch.zeros(64)),
    )
    del case
    magnitude = logits.abs()
    assert bool(((magnitude == 0) | (magnitude >= torch.finfo(torch.float32).tiny)).all())
    assert bool((magnitude[0, :49] > 0).all())


# --- how it is called -----------------------------------------------------------------------------


@every_reduction
def test_any_leading_dimensions(reduction: str) -> None:
    torch.manual_seed(0)
    x, weight, target = torch.randn(2, 3, 4), torch.randn(9, 4), torch.randint(9, (2, 3))
    options: dict[str, Any] = {"reduction": reduction, "chunk_size": 4}
    loss = linear_cross_entropy(x, weight, target, **options)
    flat = linear_cross_entropy(x.flatten(0, 1), weight, target.flatten(), **options)
    assert loss.shape == (target.shape if reduction == "none" else ())
    assert torch.equal(loss.flatten(), flat.flatten())
    one = linear_cross_entropy(x[0, 0], weight, target[0, 0], **options)
    assert one.shape == ()
    torch.testing.assert_close(one, F.cross_entropy(weight @ x[0, 0], target[0, 0]))


def test_strided_inputs_are_those_of_their_values() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(6, 20).t(), torch.randn(6, 30).t()
    bias, target = torch.randn(60)[::2], torch.randint(30, (40,))[::2]
    loss = linear_cross_entropy(x, weight, target, linear_bias=bias, chunk_size=7)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(x, weight, bias), target))


def test_probabilities_as_target() -> None:
    case = Case(6, 3, 5)
    target = torch.rand(6, 5).softmax(-1)
    loss = linear_cross_entropy(case.x, case.weight, target, label_smoothing=0.1)
    logits = F.linear(case.x, case.weight)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, label_smoothing=0.1))


def test_a_tied_weight_gets_both_gradients() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(50, 8)
    tokens, target = torch.randint(50, (30,)), torch.randint(50, (30,))

    def gradient(loss: Any) -> Tensor:
        (grad,) = torch.autograd.grad(loss(embedding(tokens), embedding.weight), embedding.weight)
        return grad

    ours = gradient(lambda x, w: linear_cross_entropy(x, w, target, chunk_size=8))
    torch.testing.assert_close(ours, gradient(lambda x, w: F.cross_entropy(x @ w.T, target)))


def test_gradients_are_only_computed_for_what_wants_them() -> None:
    case = Case(20, 4, 9)
    frozen = case.weight.detach()
    loss = linear_cross_entropy(case.x, frozen, case.target, chunk_size=8)
    loss.backward()
    assert case.x.grad is not None
    _, *grads = operator.forward(
        *(case.x.detach(), frozen, None, case.target, None, "sum", -100, 0.0, 8, None),
        [True, False, False],
    )
    assert [g.numel() for g in grads] == [case.x.numel(), 0, 0]


@every_reduction
def test_a_kept_graph_gives_the_same_gradients_again(reduction: str) -> None:
    case = Case(20, 4, 9)
    leaves = [case.x, case.weight, case.bias]
    loss = case.loss(reduction=reduction, chunk_size=8).sum()
    first = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    copies = [g.clone() for g in first]
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))
    last = torch.autograd.grad(loss, leaves)
    for a, b, c in zip(first, second, last, strict=True):
        torch.testing.assert_close(a, 3 * b)
        assert torch.equal(b, c)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@every_reduction
@pytest.mark.parametrize("keep", [True, False], ids=["graph kept", "graph freed"])
def test_many_upstream_gradients_at_once(reduction: str, keep: bool) -> None:
    case = Case(20, 4, 9)
    leaves = [case.x, case.weight, case.bias]
    loss = case.loss(reduction=reduction, chunk_size=8)
    upstream = torch.rand(3, *loss.shape)
    expected = [torch.autograd.grad(loss, leaves, one, retain_graph=True) for one in upstream]
    found = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True, retain_graph=keep)
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*expected, strict=True))))


def test_chunks_change_nothing_but_rounding_and_runs_repeat_bit_by_bit() -> None:
    case = Case(50, 8, 40)
    leaves = [case.x, case.weight, case.bias]

    def values(chunk_size: int) -> list[Tensor]:
        return case.values(case.loss(chunk_size=chunk_size), leaves)

    whole = values(50)
    assert all(torch.equal(a, b) for a, b in zip(values(7), values(7), strict=True))
    for size in (1, 7, 49, 1000):
        torch.testing.assert_close(values(size), whole)


def test_autocast_computes_in_its_dtype_and_returns_float32() -> None:
    case = Case(30, 8, 40)
    with torch.autocast("cpu", torch.bfloat16):
        loss = case.loss(chunk_size=16)
        theirs = F.cross_entropy(F.linear(case.x, case.weight, case.bias), case.target)
    assert loss.dtype == theirs.dtype == torch.float32
    exact = case.torch_loss(torch.float64)[1]
    assert abs(loss - exact) <= EPS[torch.bfloat16] * exact
    loss.backward()
    assert case.x.grad is not None
    assert case.x.grad.dtype == torch.float32


def test_dtype_of_the_result() -> None:
    case = Case(30, 8, 40, torch.bfloat16)
    assert case.loss(chunk_size=8).dtype == torch.bfloat16
    exact = case.torch_loss(torch.float64)[1]
    loss = case.loss(chunk_size=8, dtype=torch.float32)
    assert abs(loss - exact) < 2e-3 * exact


# --- derivatives of all kinds ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS[:2])
@every_reduction
def test_first_and_second_derivatives(backend: str, reduction: str) -> None:
    case = Case(5, 3, 7, torch.float64)

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(
            *(x, weight, case.target),
            linear_bias=bias,
            weight=case.class_weight,
            label_smoothing=0.2,
            reduction=reduction,
            backend=backend,
            chunk_size=2,
        )

    leaves = (case.x, case.weight, case.bias)
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


def test_a_second_derivative_sees_a_tied_weight() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randint(6, (6,))

    def second(loss: Any) -> Tensor:
        (grad,) = torch.autograd.grad(loss(weight.tanh(), weight), weight, create_graph=True)
        (again,) = torch.autograd.grad(grad.square().sum(), weight)
        return again

    ours = second(lambda x, w: linear_cross_entropy(x, w, target, chunk_size=4))
    torch.testing.assert_close(ours, second(lambda x, w: F.cross_entropy(x @ w.T, target)))


def test_functional_transforms_and_forward_mode() -> None:
    case = Case(5, 3, 7)
    x, weight, target = case.x.detach(), case.weight.detach(), case.target

    def ours(weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, target, chunk_size=2)

    def theirs(weight: Tensor) -> Tensor:
        return F.cross_entropy(x @ weight.T, target)

    torch.testing.assert_close(torch.func.grad(ours)(weight), torch.func.grad(theirs)(weight))
    many = torch.stack([weight, 2 * weight])
    torch.testing.assert_close(torch.func.vmap(ours)(many), torch.func.vmap(theirs)(many))
    tangent = torch.ones_like(weight)
    torch.testing.assert_close(
        torch.func.jvp(ours, (weight,), (tangent,)), torch.func.jvp(theirs, (weight,), (tangent,))
    )


@every_reduction
def test_compiles_without_graph_breaks_and_without_recompiling(reduction: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *t: linear_cross_entropy(
            t[0], t[1], t[3], linear_bias=t[2], reduction=reduction, chunk_size=8
        ),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for rows in (20, 33):
        case = Case(rows, 4, 9)
        leaves = [case.x, case.weight, case.bias]
        with torch._dynamo.config.patch(error_on_recompile=rows == 33):
            found = case.values(compiled(*leaves, case.target), leaves)
        expected = case.values(case.loss(reduction=reduction, chunk_size=8), leaves)
        torch.testing.assert_close(found, expected)


def test_the_operators_keep_their_promises() -> None:
    case = Case(6, 3, 5)
    arguments = (case.x, case.weight, case.bias, case.target, None)
    for reduction in ("mean", "none"):
        torch.library.opcheck(
            torch.ops.rnnlm_kernels.linear_cross_entropy.default,
            (*arguments, reduction, -100, 0.1, 4, None, [True, True, True]),
        )


# --- memory ---------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.elements = max([self.elements, *found])
        return out


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_is_larger_than_a_chunk_or_the_weight(backend: str, reduction: str) -> None:
    case = Case(100, 4, 50)
    flags = (-100, 0.1, 10, backend)
    everything = [True, True, True]
    tensors = [
        t.detach() if t is not None else None
        for t in (case.x, case.weight, case.bias, case.target, None)
    ]
    with Largest() as seen:
        operator.forward(*tensors, reduction, *flags, everything)
        operator._backward(torch.ones(100), *tensors, *flags, everything)
    assert 10 * 50 <= seen.elements <= 10 * 50 + 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_peak_memory_is_a_fraction_of_the_logits(backend: str) -> None:
    program = """
import torch, pathlib, sys
from rnnlm_kernels import linear_cross_entropy
def resident(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1]) * 1024
N, H, V = 3000, 8, 8000
x, w = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
y = torch.randint(V, (N,))
def step(rows):
    linear_cross_entropy(x[:rows], w, y[:rows], backend=sys.argv[1]).backward()
step(40)
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
step(N)
print((resident("VmHWM") - before) / (4 * N * V))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, backend], capture_output=True, text=True, check=True
    )
    # The unfused loss has three times its logits at once.
    assert float(done.stdout) < (0.25 if backend == "cpu" else 0.75)


def test_the_weights_gradient_becomes_grad_without_a_copy() -> None:
    case = Case(20, 4, 9)
    operator_backward = operator._autograd_backward
    given: list[int] = []

    def watched(ctx: Any, *grads: Any) -> Any:
        found = operator_backward(ctx, *grads)
        given.append(found[1].data_ptr())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "_autograd_backward", watched)
        (3 * case.loss(chunk_size=8)).backward()
    gc.collect()
    assert case.weight.grad is not None
    assert given == [case.weight.grad.data_ptr()]


@pytest.mark.parametrize(
    ("rows", "classes", "itemsize", "chunk"),
    [
        pytest.param(600, 10_000, 4, 200, id="a-third"),
        pytest.param(2000, 10_000, 4, 250, id="shares-are-equal"),
        pytest.param(1400, 60_000, 4, 128, id="32-MiB"),
        pytest.param(4000, 10_000, 2, 572, id="more-rows-in-16-bits"),
        pytest.param(5000, 65, 4, 5000, id="small-vocabulary-at-once"),
        pytest.param(5000, 1_000_000, 4, 125, id="never-collapses"),
        pytest.param(0, 10, 4, 1, id="no-rows"),
    ],
)
def test_chunks_on_a_cpu(rows: int, classes: int, itemsize: int, chunk: int) -> None:
    assert operator.chunk_rows(rows, classes, itemsize, "cpu") == chunk


def test_chunks_on_a_gpu_never_collapse() -> None:
    for classes in (1000, 33_278, 267_735, 1_000_000):
        rows = operator.chunk_rows(32_768, classes, 2, "cuda")
        assert rows >= 256 or rows == 32_768
        assert rows * classes * 2 <= max(operator.GPU_CHUNK_BYTES, 256 * classes * 2)


# --- backends -------------------------------------------------------------------------------------


def check_native() -> None:
    for dtype in EPS:
        for options in ({}, {"label_smoothing": 0.1}, {"reduction": "none"}):
            for shape in ((9, 6, 77), (3, 5, 1), (2, 3, 1031)):
                assert_as_good_as_torch(Case(*shape, dtype), "cpu", **options)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    run_under_isa(isa, "import test_linear_cross_entropy as t; t.check_native()")


@pytest.mark.sanitize
@pytest.mark.skipif(not NATIVE, reason="no native module")
@pytest.mark.parametrize("dtype", EPS, ids=lambda d: str(d)[6:])
def test_nothing_is_written_outside_a_chunk(dtype: torch.dtype) -> None:
    for classes in (1, 2, 15, 16, 17, 33, 67):
        case = Case(3, 2, classes, dtype)
        room = torch.full((5, classes), 7.0, dtype=dtype)
        room[1:4] = F.linear(case.x, case.weight).detach()
        sums = operator.arithmetic(dtype)
        losses = torch.full((5,), 7.0, dtype=sums)
        bias_grad = torch.zeros(classes + 2, dtype=sums)
        rnnlm_kernels.backends.cpu.cross_entropy(
            *(room[1:4], case.bias.detach(), case.target, case.class_weight.to(sums)),
            *(float(case.class_weight.sum()), -100, 0.1, torch.ones(3, dtype=sums), True),
            *(losses[1:4], bias_grad[1 : classes + 1]),
        )
        assert (room[[0, 4]] == 7).all()
        assert (losses[[0, 4]] == 7).all()
        assert not bias_grad[[0, -1]].any()
        assert (room[1:4] != 7).any()


@pytest.mark.skipif(not NATIVE, reason="no native module")
def test_losses_do_not_depend_on_the_number_of_threads() -> None:
    case = Case(100, 4, 2000)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            logits = F.linear(case.x, case.weight).detach()
            losses, sums = torch.empty(100), torch.zeros(2000)
            rnnlm_kernels.backends.cpu.cross_entropy(
                logits, None, case.target, None, 0.0, -100, 0.0, None, True, losses, sums
            )
            results.append((losses, logits, sums))
    finally:
        torch.set_num_threads(threads)
    for losses, logits, sums in results[1:]:
        assert torch.equal(losses, results[0][0])
        assert torch.equal(logits, results[0][1])
        torch.testing.assert_close(sums, results[0][2])


def test_small_problems_are_computed_plainly_and_the_same() -> None:
    case = Case(20, 4, 9)
    leaves = [case.x, case.weight, case.bias]
    assert "CrossEntropy" not in str(case.loss(chunk_size=8).grad_fn)
    plain = case.loss()
    assert len(case.x) * len(case.weight) <= operator.PLAIN_LOGITS
    assert "NllLoss" in str(plain.grad_fn)
    torch.testing.assert_close(
        case.values(plain, leaves), case.values(case.loss(chunk_size=8), leaves)
    )


def test_a_backend_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(4, 2, 3)
    with pytest.raises(BackendError, match="'cuda' has no linear_cross_entropy"):
        case.loss(backend="cuda")
    with pytest.raises(BackendError, match=r"triton.*tensors are on cpu"):
        case.loss(backend="triton")
    meta = [t.detach().to("meta") for t in (case.x, case.weight, case.target)]
    with pytest.raises(BackendError, match=r"cpu.*tensors are on meta"):
        linear_cross_entropy(*meta, backend="cpu", reduction="none")
    monkeypatch.setenv("RNNLM_BACKEND", "reference")
    passes: list[str] = []
    monkeypatch.setattr(operator, "_torch_pass", lambda *a: passes.append("torch"))
    case.loss(chunk_size=2, reduction="none")
    assert passes == ["torch", "torch"]


@needs_triton
def test_a_target_that_is_no_class_makes_a_kernels_loss_nan() -> None:
    logits, losses = torch.randn(3, 5), torch.zeros(3)
    with running("triton"):
        rnnlm_kernels.backends.triton.cross_entropy(
            *(logits, None, torch.tensor([1, 5, -7]), None, 0.0, -100, 0.0, None, False),
            *(losses, None),
        )
    assert torch.isnan(losses).tolist() == [False, True, True]


COMPILES = """
import torch
from triton_compiled import caught, compile_launches
from rnnlm_kernels.triton import linear_cross_entropy as head
found = []
for target in ("sm_80", "sm_90", "sm_100"):
    for dtype in (torch.float32, torch.bfloat16):
        for classes in (100, 33278):
            with caught(head) as launches:
                head.cross_entropy(
                    torch.empty(2, classes, dtype=dtype), torch.empty(classes, dtype=dtype),
                    torch.zeros(2, dtype=torch.int64), torch.empty(classes), 1.0, -100, 0.1,
                    torch.empty(2), True, torch.empty(2), None)
            found += compile_launches(launches, target)
"""


@needs_compiler
def test_the_kernel_compiles_for_gpus_without_spills() -> None:
    kernels = run_uninterpreted(COMPILES)
    assert len(kernels) == 12
    for kernel in kernels:
        assert kernel["stack"] == kernel["local"] == 0, kernel
        assert kernel["reg"] <= 128, kernel  # two programs of 256 lanes on a multiprocessor


# --- the module and wrong arguments ---------------------------------------------------------------


def test_the_module_is_torchs() -> None:
    torch.manual_seed(0)
    ours = LinearCrossEntropyLoss(4, 9, bias=True, label_smoothing=0.1, weight=torch.rand(9))
    x, target = torch.randn(6, 4), torch.randint(9, (6,))
    logits = F.linear(x, ours.linear.weight, ours.linear.bias)
    expected = F.cross_entropy(logits, target, weight=ours.weight, label_smoothing=0.1)
    torch.testing.assert_close(ours(x, target), expected)
    assert "label_smoothing=0.1" in repr(ours)
    if hasattr(nn, "LinearCrossEntropyLoss"):
        theirs = nn.LinearCrossEntropyLoss(
            4, 9, bias=True, label_smoothing=0.1, weight=torch.rand(9)
        )
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(x, target), theirs(x, target))


GOOD = {
    "input": torch.zeros(6, 4),
    "linear_weight": torch.zeros(9, 4),
    "target": torch.zeros(6, dtype=torch.int64),
}
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "integers": ({"input": torch.zeros(6, 4).long()}, ValueError, "input should be float32"),
    "no-dimension": ({"input": torch.tensor(1.0)}, RuntimeError, "input should have at least"),
    "weight-dims": ({"linear_weight": torch.zeros(9)}, RuntimeError, "linear_weight should be"),
    "width": ({"linear_weight": torch.zeros(9, 5)}, RuntimeError, "input and linear_weight"),
    "no-class": ({"linear_weight": torch.zeros(0, 4)}, RuntimeError, "linear_weight should have"),
    "weight-dtype": (
        {"linear_weight": torch.zeros(9, 4).double()},
        ValueError,
        "linear_weight should have the dtype of input",
    ),
    "bias": ({"linear_bias": torch.zeros(8)}, RuntimeError, "linear_bias should have shape"),
    "class-weight": ({"weight": torch.zeros(8)}, RuntimeError, "weight should have shape"),
    "class-weight-dtype": ({"weight": torch.zeros(9).int()}, ValueError, "weight should be"),
    "device": (
        {"linear_weight": torch.zeros(9, 4, device="meta")},
        RuntimeError,
        "linear_weight should be on the device",
    ),
    "target-dtype": ({"target": torch.zeros(6).int()}, ValueError, "target should be int64"),
    "target-shape": ({"target": torch.zeros(5).long()}, RuntimeError, "target should have shape"),
    "target-probabilities": ({"target": torch.zeros(6, 8)}, RuntimeError, "target should be int64"),
    "too-large": ({"target": torch.full((6,), 9)}, IndexError, "target 9 is out of bounds"),
    "negative": ({"target": torch.full((6,), -1)}, IndexError, "target -1 is out of bounds"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction should be one of"),
    "smoothing": ({"label_smoothing": 1.5}, ValueError, "label_smoothing should be in"),
    "chunk": ({"chunk_size": 0}, ValueError, "chunk_size should be at least 1"),
    "ignored-probabilities": (
        {"target": torch.zeros(6, 9), "ignore_index": 1},
        RuntimeError,
        "ignore_index is for",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {**GOOD, "chunk_size": 4, **changes}
    with pytest.raises(error, match=message):
        linear_cross_entropy(
            arguments.pop("input"),
            arguments.pop("linear_weight"),
            arguments.pop("target"),
            **arguments,
        )
