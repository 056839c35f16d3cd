"""embedding_dropout: PyTorch's operations on a CPU, bit for bit, and the same from one kernel.

The exact vectors and gradient are PyTorch's operations in float64. The kernel is run by Triton's
interpreter, and compiled without a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from triton_compiled import needs_compiler, run_uninterpreted
from triton_interpreted import interpreted, needs_triton

from rnnlm_kernels import BackendError, embedding_dropout
from rnnlm_kernels.backends import triton
from rnnlm_kernels.lm.dropout import ElementDropout, LockedDropout, embed_with_dropped_rows, kept
from rnnlm_kernels.ops import embedding_dropout as operator

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
every_path = pytest.mark.parametrize(
    "backend", ["reference", pytest.param("triton", marks=needs_triton)]
)
MASKS = {
    "both": (True, True),
    "words": (True, False),
    "locked": (False, True),
    "none": (False,) * 2,
}
every_mask = pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)


def running(backend: str) -> Any:
    """What a backend needs to run on tensors of the CPU."""
    return interpreted() if backend == "triton" else nullcontext()


class Case:
    """Tensors of one problem; about a third of everything is dropped."""

    def __init__(
        self,
        T: int,
        B: int,
        E: int,
        V: int = 7,
        dtype: torch.dtype = torch.float32,
        masks: tuple[bool, bool] = (True, True),
        device: str = "cpu",
    ) -> None:
        draw = torch.Generator().manual_seed(T + 10 * B + 100 * E)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw).to(device, dtype)

        def mask(*shape: int) -> Tensor:
            drawn = torch.rand(*shape, generator=draw) > 0.3
            return (drawn / 0.7).to(device, dtype)

        self.tokens = torch.randint(V, (T, B), generator=draw).to(device)
        self.weight = normal(V, E).requires_grad_()
        self.row_scale = mask(V) if masks[0] else None
        self.mask = mask(B, E) if masks[1] else None
        self.upstream = normal(T, B, E)

    def vectors(self, **options: Any) -> Tensor:
        return embedding_dropout(
            self.tokens, self.weight, row_scale=self.row_scale, mask=self.mask, **options
        )

    def results(self, **options: Any) -> list[Tensor]:
        """Vectors and the gradient of the weight."""
        vectors = self.vectors(**options)
        return [vectors.detach(), *torch.autograd.grad(vectors, self.weight, self.upstream)]

    def expected(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The same from PyTorch's operations, in a dtype."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype or tensor.dtype)

        weight = cast(self.weight).requires_grad_()
        vectors = F.embedding(self.tokens, weight)
        if self.row_scale is not None:
            vectors = vectors * cast(self.row_scale)[:, None][self.tokens]
        if self.mask is not None:
            vectors = vectors * cast(self.mask)[None]
        return [vectors.detach(), *torch.autograd.grad(vectors, weight, cast(self.upstream))]


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
        assert torch.equal(torch.signbit(ours), torch.signbit(theirs))


# --- the same numbers as PyTorch's operations -----------------------------------------------------


@every_mask
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=lambda d: str(d)[6:])
def test_on_a_cpu_they_are_pytorchs_operations(
    dtype: torch.dtype, masks: tuple[bool, bool]
) -> None:
    case = Case(5, 3, 6, dtype=dtype, masks=masks)
    assert "Fused" not in str(case.vectors().grad_fn)
    assert_same_bits(case.results(), case.expected())


@needs_triton
@every_mask
def test_the_kernel_has_their_bits_in_float32(masks: tuple[bool, bool]) -> None:
    case = Case(5, 3, 13, masks=masks)
    with running("triton"):
        vectors = case.vectors()  # chosen without being asked for
        assert "Fused" in str(vectors.grad_fn)
        found = case.results()
    assert_same_bits(found, case.expected())


@needs_triton
@every_mask
@every_dtype
def test_the_kernel_is_as_accurate_as_they_are(
    dtype: torch.dtype, masks: tuple[bool, bool]
) -> None:
    # Every word once: sums of 16-bit gradients are PyTorch's own.
    case = Case(7, 1, 33, dtype=dtype, masks=masks)
    case.tokens = torch.randperm(7)[:, None]
    with running("triton"):
        found = case.results(backend="triton")
    for ours, theirs, exact in zip(
        found, case.expected(), case.expected(torch.float64), strict=True
    ):
        assert ours.dtype == dtype
        allowed = (theirs.double() - exact).abs().max()
        assert (ours.double() - exact).abs().max() <= allowed


SHAPES = {
    "one-step": (1, 4, 5),
    "one-row": (4, 1, 5),
    "one-feature": (3, 2, 1),
    "odd": (3, 2, 257),
    "several-blocks": (2, 2, 600),
    "no-step": (0, 2, 5),
    "no-row": (2, 0, 5),
    "no-feature": (2, 2, 0),
}


@every_path
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_odd_and_empty_shapes(backend: str, shape: tuple[int, int, int]) -> None:
    case = Case(*shape)
    with running(backend):
        found = case.results(backend=backend)
    assert found[0].shape == shape
    assert_same_bits(found, case.expected())


@every_path
def test_tokens_of_any_shape_and_either_integer(backend: str) -> None:
    case = Case(2, 3, 5)
    with running(backend):
        for tokens in (torch.tensor(2), torch.tensor([1, 0]), torch.zeros(2, 1, 3).long()):
            vectors = embedding_dropout(
                tokens, case.weight, row_scale=case.row_scale, backend=backend
            )
            assert vectors.shape == (*tokens.shape, 5)
            assert torch.equal(vectors, case.weight[tokens] * case.row_scale[tokens][..., None])
        case.tokens = case.tokens.int()
        assert_same_bits(case.results(backend=backend), case.expected())


@every_path
def test_tensors_need_not_be_contiguous(backend: str) -> None:
    case = Case(4, 3, 6)
    expected = case.expected()
    case.tokens = case.tokens.t().contiguous().t()
    case.weight = case.weight.detach().t().contiguous().t().requires_grad_()
    case.row_scale = torch.stack([case.row_scale, case.row_scale], 1)[:, 0]
    case.mask = case.mask.t().contiguous().t()
    case.upstream = case.upstream.transpose(0, 2).contiguous().transpose(0, 2)
    with running(backend):
        assert_same_bits(case.results(backend=backend), expected)
        (grad,) = torch.autograd.grad(case.vectors(backend=backend).sum(), case.weight)
    case.upstream = torch.ones(4, 3, 6)
    assert torch.equal(grad, case.expected()[1])


@every_path
def test_what_is_not_finite_spreads(backend: str) -> None:
    case = Case(2, 2, 3)
    case.tokens = torch.tensor([[1, 2], [3, 0]])
    case.row_scale[:] = torch.tensor([0.0, 0.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    with torch.no_grad():
        case.weight[1, 0], case.weight[2, 1] = float("nan"), float("inf")
    case.upstream[1, 1, 2] = float("inf")
    with running(backend):
        found = case.results(backend=backend)
    for ours, theirs in zip(found, case.expected(), strict=True):
        assert not torch.isfinite(theirs).all()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@every_path
def test_the_same_bits_every_time(backend: str) -> None:
    # Many gradients of one word, whose sum depends on the order.
    case = Case(40, 3, 5, V=2)
    with running(backend):
        first = case.results(backend=backend)
        for _ in range(3):
            assert_same_bits(case.results(backend=backend), first)


# --- derivatives ----------------------------------------------------------------------------------


@every_path
def test_masks_are_constants(backend: str) -> None:
    case = Case(2, 2, 3)
    case.row_scale.requires_grad_()
    case.mask.requires_grad_()
    with running(backend):
        case.vectors(backend=backend).sum().backward()
    assert case.weight.grad is not None
    assert case.row_scale.grad is case.mask.grad is None


@every_path
def test_second_derivatives(backend: str) -> None:
    case = Case(5, 3, 4)
    found = []
    for path in (backend, "reference"):
        with running(path):
            vectors = case.vectors(backend=path)
            (grad,) = torch.autograd.grad(vectors.pow(3).sum(), case.weight, create_graph=True)
            found.append([grad, *torch.autograd.grad(grad.pow(2).sum(), case.weight)])
    assert found[0][1].any()
    torch.testing.assert_close(found[0], found[1])
    case = Case(3, 2, 2, V=4, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda w: embedding_dropout(case.tokens, w, row_scale=case.row_scale, mask=case.mask),
        case.weight,
    )


@every_path
def test_many_upstream_gradients_at_once(backend: str) -> None:
    case = Case(3, 2, 4)
    upstream = torch.stack([case.upstream, 2 * case.upstream])
    with running(backend):
        vectors = case.vectors(backend=backend)
        (both,) = torch.autograd.grad(vectors, case.weight, upstream, is_grads_batched=True)
    torch.testing.assert_close(both, torch.stack([case.expected()[1], 2 * case.expected()[1]]))


@every_path
def test_torch_func_transforms(backend: str) -> None:
    case = Case(3, 2, 4)

    def loss(weight: Tensor) -> Tensor:
        vectors = embedding_dropout(
            case.tokens, weight, row_scale=case.row_scale, mask=case.mask, backend=backend
        )
        return (vectors * case.upstream).sum()

    weight = case.weight.detach()
    with running(backend):
        torch.testing.assert_close(torch.func.grad(loss)(weight), case.expected()[1])
        _, tangent = torch.func.jvp(loss, (weight,), (weight,))
        stacked = torch.func.vmap(loss)(torch.stack([weight, 2 * weight]))
    torch.testing.assert_close(tangent, loss(weight) if backend == "reference" else stacked[0])
    torch.testing.assert_close(stacked[1], 2 * stacked[0])


@every_path
def test_compiles_without_graph_breaks(backend: str) -> None:
    torch._dynamo.reset()
    case = Case(3, 2, 4)
    with running(backend):
        compiled = torch.compile(
            lambda w: embedding_dropout(
                case.tokens, w, row_scale=case.row_scale, mask=case.mask, backend="auto"
            ),
            fullgraph=True,
            backend="aot_eager",
        )
        vectors = compiled(case.weight)
        (grad,) = torch.autograd.grad(vectors, case.weight, case.upstream)
    assert_same_bits([vectors.detach(), grad], case.expected())


@needs_triton
def test_the_kernel_also_runs_in_front_of_a_profiler() -> None:
    case = Case(3, 2, 4)
    with running("triton"), torch.profiler.profile() as profile:
        case.results()
    assert any("Fused" in event.key for event in profile.key_averages())


# --- wrong tokens and arguments -------------------------------------------------------------------


def test_on_a_cpu_a_token_that_is_no_word_is_refused() -> None:
    case = Case(2, 2, 3)
    for token in (7, -1):
        case.tokens[1, 0] = token
        with pytest.raises(IndexError, match="out of range"):
            case.vectors()


@needs_triton
@every_dtype
def test_the_kernel_reads_nothing_for_a_token_that_is_no_word(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    summed, tokens_summed = operator._summed, []

    def watched(grad: Tensor, tokens: Tensor, words: int) -> Tensor:
        tokens_summed.append(tokens)
        return summed(grad, tokens, words)

    monkeypatch.setattr(operator, "_summed", watched)
    case = Case(4, 2, 3, dtype=dtype)
    right = case.tokens.clone()
    case.tokens[0, 1], case.tokens[2, 0], case.tokens[3, 1] = 7, -1, 1 << 60
    wrong = case.tokens != torch.where((case.tokens >= 0) & (case.tokens < 7), case.tokens, -9)
    case.upstream[wrong] = float("nan")
    with running("triton"):
        vectors, grad = case.results(backend="triton")
    assert wrong.sum() == 3
    # On a GPU torch's sum would write where the others point.
    assert tokens_summed[0][wrong].tolist() == [6, 0, 6]
    assert torch.isnan(vectors[wrong]).all()
    case.tokens = right
    case.upstream[wrong] = 0.0
    with running("triton"):
        expected, expected_grad = case.results(backend="triton")
    assert torch.equal(vectors[~wrong], expected[~wrong])
    assert torch.equal(grad, expected_grad)


GOOD = {"tokens": torch.zeros(4, 2).long(), "weight": torch.zeros(7, 3)}
META = torch.device("meta")
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "tokens-dtype": ({"tokens": torch.zeros(4, 2)}, ValueError, "tokens should be int64"),
    "weight-dtype": ({"weight": GOOD["tokens"]}, ValueError, "weight should be a floating"),
    "weight-shape": ({"weight": torch.zeros(7)}, RuntimeError, r"weight should be \[V, E\]"),
    "scale-shape": ({"row_scale": torch.zeros(7, 1)}, RuntimeError, r"row_scale .* shape \[7\]"),
    "scale-dtype": ({"row_scale": torch.zeros(7).half()}, ValueError, "row_scale .* the dtype"),
    "scale-device": ({"row_scale": torch.zeros(7, device=META)}, RuntimeError, "row_scale .* on"),
    "mask-shape": ({"mask": torch.zeros(4, 3)}, RuntimeError, r"mask should have shape \[2, 3\]"),
    "mask-dtype": ({"mask": torch.zeros(2, 3).double()}, ValueError, "mask .* the dtype"),
    "mask-device": ({"mask": torch.zeros(2, 3, device=META)}, RuntimeError, "mask .* on the dev"),
    "mask-batch": (
        {"tokens": torch.tensor(0), "mask": torch.zeros(2, 3)},
        RuntimeError,
        "mask is .* no dimension B",
    ),
    "tokens-device": ({"tokens": GOOD["tokens"].to(META)}, RuntimeError, "tokens should be on"),
    "backend": ({"backend": "cpu"}, BackendError, "'cpu' has no embedding_dropout"),
    "no-gpu": ({"backend": "triton"}, BackendError, r"triton.*tensors are on cpu"),
}


@pytest.mark.parametrize(("changes", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        embedding_dropout(**{**GOOD, **changes})


@needs_triton
def test_the_environment_can_ask_for_pytorchs_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(2, 2, 3)
    with running("triton"):
        assert "Fused" in str(case.vectors().grad_fn)
        monkeypatch.setenv("RNNLM_BACKEND", "reference")
        assert "Fused" not in str(case.vectors().grad_fn)
        double = Case(2, 2, 3, dtype=torch.float64)
        monkeypatch.delenv("RNNLM_BACKEND")
        assert "Fused" not in str(double.vectors().grad_fn)


# --- the kernels as compiled ----------------------------------------------------------------------

COMPILES = """
import torch
from triton_compiled import caught, compile_launches
from rnnlm_kernels.triton import embedding_dropout as family
found = []
for target in ("sm_80", "sm_90", "sm_100"):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tokens = torch.zeros(5, 3, dtype=torch.int64)
        weight, output = torch.empty(9, 401, dtype=dtype), torch.empty(5, 3, 401, dtype=dtype)
        row_scale, mask = torch.empty(9, dtype=dtype), torch.empty(3, 401, dtype=dtype)
        with caught(family) as launches:
            family.forward(weight, tokens, row_scale, mask, output)
            family.backward(output, tokens, 9, row_scale, mask, output, tokens)
        found += compile_launches(launches, target)
"""


@needs_compiler
def test_the_kernels_compile_for_gpus_without_spills() -> None:
    kernels = run_uninterpreted(COMPILES)
    assert len(kernels) == 18
    for kernel in kernels:
        assert kernel["stack"] == kernel["local"] == 0, kernel
        assert kernel["reg"] <= 64, kernel  # 32 programs, all that fit, on a multiprocessor


@pytest.mark.gpu
@pytest.mark.skipif(not triton.available()[0], reason=triton.available()[1])
@every_dtype
def test_on_a_gpu(dtype: torch.dtype) -> None:
    case = Case(35, 20, 401, V=100, dtype=dtype, device="cuda")
    found = case.results(backend="triton")
    assert_same_bits(case.results(backend="triton"), found)
    if dtype == torch.float32:
        assert torch.equal(found[0], case.expected()[0])
    theirs, exact = case.expected(), case.expected(torch.float64)
    for ours, torchs, truth in zip(found, theirs, exact, strict=True):
        allowed = 2 * (torchs.double() - truth).abs().max()
        assert (ours.double() - truth).abs().max() <= allowed + 1e-6 * truth.abs().max()
    case.tokens[0, 0], case.tokens[3, 3] = 100, -1
    vectors, grad = case.results(backend="triton")
    assert torch.isnan(vectors[0, 0]).all()
    assert torch.isnan(vectors[3, 3]).all()
    assert torch.isfinite(grad).all()


# --- the language model ---------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("locked", [True, False], ids=["locked", "elements"])
@pytest.mark.parametrize("p", [0.0, 0.4], ids="words-{}".format)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_a_model_draws_the_masks_of_separate_steps(
    backend: str, locked: bool, p: float, packed: bool
) -> None:
    embedding, x_dropout = nn.Embedding(9, 5), (LockedDropout if locked else ElementDropout)(0.3)
    rows = torch.tensor([0, 1, 2, 0, 1, 0]) if packed else None
    tokens = torch.tensor([1, 8, 3, 1, 1, 0])
    tokens = tokens if packed else tokens.view(2, 3)
    results = []
    for fused in (True, False):
        torch.manual_seed(4)
        with running(backend):
            if fused:
                vectors = embed_with_dropped_rows(embedding, tokens, p, x_dropout, rows)
            else:
                vectors = embedding(tokens)
                if p:
                    vectors = vectors * kept((9, 1), p, embedding.weight)[tokens]
                if not locked:
                    vectors = x_dropout(vectors)
                elif packed:
                    vectors = vectors * kept((3, 5), 0.3, vectors)[rows]
                else:
                    vectors = vectors * kept((1, 3, 5), 0.3, vectors)
            upstream = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1))
            grads = torch.autograd.grad(vectors, embedding.weight, upstream)
        results.append([vectors.detach(), *grads])
    assert_same_bits(*results)
    embedding.eval()
    x_dropout.eval()
    found = embed_with_dropped_rows(embedding, tokens, p, x_dropout, rows)
    assert torch.equal(found, embedding(tokens))
