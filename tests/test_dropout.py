"""rnnlm_kernels.dropout: masks that follow from a seed by a published generator, drawn twice.

The oracle is Philox4x32-10 in whole numbers of NumPy.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recurrence_cases import ISAS, NATIVE, run_under_isa
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from watchers import Dispatch, Wrapped

import rnnlm_kernels
from rnnlm_kernels.backends import cpu

needs_native = pytest.mark.skipif(not NATIVE, reason="no native module")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
# Below one vector, one round of draws and a rest, several threads' worth.
SIZES = (0, 1, 3, 4, 7, 16, 31, 64, 65, 130, 1000, 40_001)
SEEDS = (0, 5, 2**31, 2**40 + 12345)
P = 0.3
MANY = 5000  # elements that the kernel takes


def philox_kept(seed: int, count: int, p: float) -> np.ndarray:
    """Which of the first elements are kept: word i % 4 of evaluation i // 4, its first 24 bits."""
    low = np.uint64(2**32 - 1)
    block = np.arange((count + 3) // 4, dtype=np.uint64)
    c = [block & low, block >> np.uint64(32), np.zeros_like(block), np.zeros_like(block)]
    key = [np.uint64(seed % 2**32), np.uint64(seed >> 32)]
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (product1 >> np.uint64(32)) ^ c[1] ^ key[0],
            product1 & low,
            (product0 >> np.uint64(32)) ^ c[3] ^ key[1],
            product0 & low,
        ]
        key = [
            np.uint64((int(key[0]) + 0x9E3779B9) % 2**32),
            np.uint64((int(key[1]) + 0xBB67AE85) % 2**32),
        ]
    draws = (np.stack(c, 1).reshape(-1)[:count] >> np.uint64(8)).astype(np.float64) * 2.0**-24
    return draws >= float(np.float32(p))


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    y = torch.full_like(x, math.nan)
    cpu.dropout(x, p, seed, y)
    return y


def check_masks() -> None:
    """Every dtype, against the oracle; one thread and several."""
    for dtype in DTYPES:
        for seed in SEEDS:
            for count in SIZES:
                x = torch.linspace(-2.0, 3.0, count).to(dtype)
                for p in (P, 0.9, 1.0):
                    mask = torch.from_numpy(philox_kept(seed, count, p))
                    scale = 1.0 / (1.0 - p) if p < 1.0 else 0.0
                    wide = x.double() if dtype == torch.float64 else x.float()
                    expected = torch.where(mask, wide * scale, wide * 0.0)
                    assert torch.equal(dropped(x, p, seed), expected.to(dtype)), (dtype, seed, p)
                    in_place = x.clone()
                    cpu.dropout(in_place, p, seed, in_place)
                    assert torch.equal(in_place, expected.to(dtype))


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_draws_the_published_numbers(isa: str) -> None:
    run_under_isa(isa, "import test_dropout; test_dropout.check_masks()")


@needs_native
@every_dtype
def test_any_number_of_threads_draws_the_same_mask(dtype: torch.dtype) -> None:
    x, before = torch.randn(100_003).to(dtype), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(dropped(x, P, 99))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other, results[0])


@pytest.mark.sanitize
@needs_native
@every_dtype
def test_nothing_is_written_behind_the_end(dtype: torch.dtype) -> None:
    for count in SIZES[:-1]:
        room = torch.full((count + 2,), 7.0, dtype=dtype)
        cpu.dropout(torch.ones(count, dtype=dtype), P, 3, room[1:-1])
        assert room[0] == room[-1] == 7.0


@every_dtype
def test_as_many_are_dropped_as_asked_for(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    count = 1 << 20
    for p in (0.05, 0.5, 0.9):
        y = rnnlm_kernels.dropout(torch.ones(count, dtype=dtype), p)
        assert set(y.unique().tolist()) == {0.0, torch.tensor(1.0 / (1.0 - p), dtype=dtype).item()}
        off = abs(int((y == 0).sum()) - count * p)
        assert off < 5 * math.sqrt(count * p * (1 - p))


def test_neighbours_rows_and_calls_are_independent() -> None:
    torch.manual_seed(1)
    x = torch.ones(1024, 1024)
    masks = [(rnnlm_kernels.dropout(x, 0.5) != 0).double() - 0.5 for _ in range(2)]
    first, second = masks
    for one, other in (
        (first, second),
        (first[:, :-1], first[:, 1:]),
        (first[:-1], first[1:]),
        (first[:, :-4], first[:, 4:]),
        (first[:-64], first[64:]),
    ):
        assert abs(float((one * other).mean()) / 0.25) < 5 / math.sqrt(one.numel())


# --- the seed -------------------------------------------------------------------------------------


def test_a_seed_of_torchs_generator_gives_a_mask() -> None:
    x = torch.ones(MANY)
    torch.manual_seed(3)
    first, state, second = (
        rnnlm_kernels.dropout(x),
        torch.get_rng_state(),
        rnnlm_kernels.dropout(x),
    )
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(rnnlm_kernels.dropout(x), second)
    torch.manual_seed(3)
    assert torch.equal(rnnlm_kernels.dropout(x), first)


@needs_native
def test_layout_makes_no_difference() -> None:
    x = torch.randn(70, 90)
    results = []
    for tensor in (x, x.t().contiguous().t(), torch._neg_view(-x), x.repeat(1, 2)[:, :90]):
        torch.manual_seed(5)
        results.append(rnnlm_kernels.dropout(tensor))
    for other in results[1:]:
        assert torch.equal(other, results[0])


def test_few_elements_have_torchs_mask() -> None:
    x, results = torch.randn(100), []
    for function in (rnnlm_kernels.dropout, F.dropout):
        torch.manual_seed(5)
        results.append(function(x, P))
    assert torch.equal(*results)


# --- gradients ------------------------------------------------------------------------------------


def scale_of(y: Tensor) -> Tensor:
    """What the elements of a result were multiplied by, in the dtype of the arithmetic."""
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    return (y.detach() != 0).to(wide) / (1.0 - P)


@every_dtype
def test_the_gradient_has_the_mask_of_forward(dtype: torch.dtype) -> None:
    x = torch.ones(50, 101, dtype=dtype, requires_grad=True)
    y = rnnlm_kernels.dropout(x, P)
    for upstream in (torch.randn_like(y), torch.ones((), dtype=dtype).expand_as(y)):
        (grad,) = torch.autograd.grad(y, x, upstream, retain_graph=True)
        assert grad.dtype == dtype
        scale = scale_of(y)
        assert torch.equal(grad, (upstream.to(scale.dtype) * scale).to(dtype))


@needs_native
def test_nothing_is_kept_for_backward() -> None:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        rnnlm_kernels.dropout(torch.ones(MANY, requires_grad=True))
    assert not kept


def test_gradients_of_gradients_and_several_at_once() -> None:
    x = torch.randn(MANY, dtype=torch.float64, requires_grad=True)
    y = rnnlm_kernels.dropout(x, P)
    scale = (y / x).detach()
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x, retain_graph=True)
    torch.testing.assert_close(second, 2 * scale.square())
    upstream = torch.randn(3, MANY, dtype=torch.float64)
    (several,) = torch.autograd.grad(y, x, upstream, is_grads_batched=True)
    torch.testing.assert_close(several, upstream * scale)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_mask_again(reentrant: bool) -> None:
    x = torch.randn(MANY, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return rnnlm_kernels.dropout(x, P).square()

    y = checkpoint(f, x, use_reentrant=reentrant)
    y.sum().backward()
    scale = scale_of(y)
    torch.testing.assert_close(x.grad, 2 * x.detach() * scale.square())


# --- where it is PyTorch's ------------------------------------------------------------------------


def assert_a_mask(y: Tensor) -> None:
    share = float((y == 0).double().mean())
    assert abs(share - P) < 0.05
    assert torch.all((y == 0) | ((y - 1 / (1 - P)).abs() < 1e-6))


def test_it_compiles_whole() -> None:
    compiled = torch.compile(
        lambda x: rnnlm_kernels.dropout(x, P), fullgraph=True, backend="aot_eager"
    )
    x = torch.ones(MANY, requires_grad=True)
    y = compiled(x)
    assert_a_mask(y.detach())
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, y)


def test_transforms_modes_and_subclasses() -> None:
    x = torch.ones(2, MANY)
    assert_a_mask(torch.func.vmap(lambda r: rnnlm_kernels.dropout(r, P), randomness="different")(x))
    y, tangent = torch.func.jvp(lambda r: rnnlm_kernels.dropout(r, P), (x,), (x,))
    assert torch.equal(y, tangent)
    assert_a_mask(y)
    with Dispatch():
        assert_a_mask(rnnlm_kernels.dropout(x, P))
    y = rnnlm_kernels.dropout(x.as_subclass(Wrapped), P)
    assert isinstance(y, Wrapped)
    assert_a_mask(y.as_subclass(Tensor))
    assert rnnlm_kernels.dropout(x.to("meta"), P).shape == x.shape


# --- the edges ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [10, MANY])
def test_none_all_and_evaluation(count: int) -> None:
    x = torch.randn(count)
    assert rnnlm_kernels.dropout(x, 0.0) is x
    assert rnnlm_kernels.dropout(x, training=False) is x
    assert torch.equal(rnnlm_kernels.dropout(x, 1.0), torch.zeros(count))


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
def test_what_is_no_probability_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=r"^p should be a probability, between 0 and 1, got "):
        rnnlm_kernels.dropout(torch.ones(3), p)
