"""The CUDA kernels on a real GPU: what the emulator shows of every tier, and what only a device can
show: streams, graphs, memory, and that nothing waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.utils.checkpoint
from cuda_emulated import Emulated, both_passes
from recurrence_cases import (
    CELLS,
    DTYPES,
    VARIANTS,
    Layer,
    assert_near_oracle,
    assert_same_bits,
    cotangents,
    layer,
    results_and_gradients,
)
from torch import Tensor, nn

import rnnlm_kernels
from rnnlm_kernels.backends import cuda, streams
from rnnlm_kernels.bench.workload import Workload
from rnnlm_kernels.check import check_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

BF16 = torch.bfloat16
TIERS = cuda.TIERS[1:]
every_cell = pytest.mark.parametrize("cell", CELLS)
every_tier = pytest.mark.parametrize("tier", TIERS)
# Hidden sizes that a tier spreads over several warps and, where it has them, several CTAs.
WIDE = {"stepwise": 200, "block": 120, "cluster": 240, "grid": 504, "grid-pairs": 1016}


@contextmanager
def on_gpu(tier: str = "auto") -> Iterator[Emulated]:
    """Runs in one tier, and lists in ``ran`` the tiers of all calls."""
    assert cuda.available()[0], cuda.available()[1]
    device = Emulated(cuda.native)
    with (
        mock.patch.dict("os.environ", {cuda.ENVIRONMENT: tier}),
        mock.patch.object(cuda, "native", device),
    ):
        yield device
        torch.cuda.synchronize()
        assert device.cuda_take_failure(torch.cuda.current_device()) == ""


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    if cuda._precision is None:
        with torch.backends.cudnn.flags(allow_tf32=False):
            yield
        return
    rnn = torch.backends.cudnn.rnn
    before = rnn.fp32_precision
    rnn.fp32_precision = "ieee"
    yield
    rnn.fp32_precision = before


def gpu(given: Layer) -> Layer:
    return given.map(lambda t: t.cuda())


def needs(tier: str, hidden: int) -> None:
    """Skips where the device has no such tier."""
    limits = cuda.native.cuda_device_limits(torch.cuda.current_device())
    for backward in (False, True):
        arguments = (backward, 2, 9, 9, hidden, 0, 81, False, False, limits, cuda.TIERS.index(tier))
        found = cuda.native.cuda_plan(0, *arguments)
        if found["tier"] is None:
            pytest.skip(found["forecasts"][tier]["obstacle"])


def wide(cell: str, tier: str, T: int = 20, B: int = 21, **options: Any) -> Layer:
    needs(tier, WIDE[tier])
    return gpu(layer(cell, T, B, 16, WIDE[tier], scale=0.1, **options).to(BF16))


# --- right --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@every_cell
def test_stepwise_is_near_the_oracle_in_every_dtype(cell: str, variant: dict, dtype) -> None:
    with on_gpu("stepwise"):
        assert_near_oracle(gpu(layer(cell, **variant)), dtype, backend="cuda")


@every_tier
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@every_cell
def test_every_tier_is_near_the_oracle(cell: str, variant: dict[str, Any], tier: str) -> None:
    needs(tier, 24)
    with on_gpu(tier) as device:
        assert_near_oracle(gpu(layer(cell, H=24, **variant)), BF16, backend="cuda")
        assert device.ran == both_passes(tier)


@every_tier
@pytest.mark.parametrize(
    "lengths", [None, (20,) * 9 + (13,) * 8 + (1,) * 4], ids=["dense", "packed"]
)
@every_cell
def test_wide_layers_are_near_the_oracle(cell: str, lengths, tier: str) -> None:
    given = wide(cell, tier, lengths=lengths)
    for dtype in (torch.bfloat16, torch.float16):
        with on_gpu(tier) as device:
            assert_near_oracle(given, dtype, backend="cuda")
            assert device.ran == both_passes(tier)


SIZES = {
    "B1-H512": (64, 1, 512),
    "B16-H1024": (64, 16, 1024),
    "B64-H768": (32, 64, 768),
    "B8-H2048": (12, 8, 2048),
    "B256-H128": (64, 256, 128),
    "B128-H1024": (32, 128, 1024),  # on an H100 in pairs, as the next
    "B64-H2048": (12, 64, 2048),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_cell
def test_modules_are_right_by_the_rule_of_the_check(cell: str, dtype: str, size) -> None:
    """As accurate as cuDNN, outputs and gradients, in whatever tier is chosen."""
    T, B, H = size
    workload = Workload(cell, T, B, H, H, dtype=dtype, device="cuda", mode="training")
    with on_gpu():
        result = check_problem(workload, "cuda")
    assert result.ok, result.summary()


def test_autocast_trains_as_on_a_cpu() -> None:
    torch.manual_seed(0)
    ours = rnnlm_kernels.LSTM(32, 64, backend="cuda").cuda()
    x = torch.randn(12, 4, 32, device="cuda")
    with on_gpu(), torch.autocast("cuda", BF16):
        output, _ = ours(x)
        output.float().sum().backward()
    assert output.dtype == BF16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ours.parameters())


# --- the same -----------------------------------------------------------------------------------


@every_tier
@every_cell
def test_runs_give_the_same_bits(cell: str, tier: str) -> None:
    given = wide(cell, tier, T=50)
    with on_gpu(tier):
        run = lambda: results_and_gradients(given, lambda *t: given.call(*t, backend="cuda"))  # noqa: E731
        first = run()
        for _ in range(5):
            assert_same_bits(run(), first)


@every_tier
def test_a_graph_replays_on_new_inputs(tier: str) -> None:
    """Forward and backward, captured together."""
    given = wide("lstm", tier).leaves()
    slopes: list[Tensor] = []

    def step() -> list[Tensor]:
        outputs = given.call(backend="cuda")
        slopes.extend(cotangents(outputs) if not slopes else [])
        return [*outputs, *torch.autograd.grad(outputs, given.present, slopes)]

    with on_gpu(tier) as device:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            static = step()
        x = given.get("x")
        for seed in (1, 2):
            with torch.no_grad():
                x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            found = [t.clone() for t in static]
            for one, other in zip(found, step(), strict=True):
                assert torch.equal(one, other)
        assert set(device.ran) == {tier}


def test_packed_sequences_are_captured_stepwise() -> None:
    given = gpu(layer("gru", lengths=(300, 9, 2), H=64).to(BF16))
    with on_gpu() as device, torch.no_grad():
        given.call(backend="cuda")
        assert device.ran != ["stepwise"]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            static = given.call(backend="cuda")
        assert device.ran[-1] == "stepwise"
        graph.replay()
        expected = given.call(backend="cuda")
    for one, other in zip(static, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02)


@every_tier
def test_layers_on_several_streams_do_not_disturb_each_other(tier: str) -> None:
    layers = [wide("lstm", tier, T=60, seed=seed) for seed in range(3)]
    with on_gpu(tier), torch.no_grad():
        expected = [one.call(backend="cuda") for one in layers]
        streams = [torch.cuda.Stream() for _ in layers]
        torch.cuda.synchronize()
        for _ in range(3):
            found = []
            for stream, one in zip(streams, layers, strict=True):
                with torch.cuda.stream(stream):
                    found.append(one.call(backend="cuda"))
            torch.cuda.synchronize()
            for mine, theirs in zip(found, expected, strict=True):
                assert all(map(torch.equal, mine, theirs))


# --- two directions side by side ----------------------------------------------------------------


@contextmanager
def directions(*, side_by_side: bool) -> Iterator[None]:
    """The plan's answer of how the directions of a layer run."""
    with mock.patch.object(cuda, "_directions", return_value={"side_by_side": side_by_side}):
        yield


def both_ways(
    kind: str, tier: str, lengths: tuple[int, ...] | None = None, num_layers: int = 2
) -> tuple[nn.Module, Any]:
    """A bidirectional module, and an input of 40 steps and 21 rows."""
    needs(tier, WIDE[tier])
    torch.manual_seed(0)
    options = {"num_layers": num_layers, "bidirectional": True, "backend": "cuda"}
    net = getattr(rnnlm_kernels, kind)(16, WIDE[tier], **options).cuda().to(BF16)
    x: Any = torch.randn(40, 21, 16, device="cuda", dtype=BF16)
    if lengths is not None:
        x = nn.utils.rnn.pack_padded_sequence(x, list(lengths))
    return net, x


def results_of(net: Callable[..., Any], x: Any) -> list[Tensor]:
    output, states = net(x)
    data = output.data if isinstance(output, nn.utils.rnn.PackedSequence) else output
    return [data, *(states if isinstance(states, tuple) else (states,))]


def train(net: nn.Module, x: Any, slopes: list[Tensor]) -> dict[str, Tensor]:
    """Outputs, final states and the gradients of all parameters."""
    net.zero_grad(set_to_none=True)
    results = results_of(net, x)
    torch.autograd.backward(results, slopes)
    found = {str(i): t.detach().clone() for i, t in enumerate(results)}
    return {**found, **{name: p.grad.clone() for name, p in net.named_parameters()}}


def slopes_of(net: nn.Module, x: Any) -> list[Tensor]:
    with torch.no_grad():
        return cotangents(results_of(net, x))


both_kinds = pytest.mark.parametrize("kind", ["LSTM", "GRU"])


@every_tier
@pytest.mark.parametrize(
    "lengths", [None, (40,) * 9 + (13,) * 8 + (1,) * 4], ids=["dense", "packed"]
)
@both_kinds
def test_side_by_side_is_bit_for_bit_in_turn(kind: str, lengths, tier: str) -> None:
    net, x = both_ways(kind, tier, lengths)
    with on_gpu(tier):
        slopes = slopes_of(net, x)
        with directions(side_by_side=False):
            expected = train(net, x, slopes)
        with directions(side_by_side=True):
            for _ in range(5):
                assert_same_bits(train(net, x, slopes), expected)


@every_tier
def test_side_by_side_on_a_stream_of_the_user(tier: str) -> None:
    net, x = both_ways("LSTM", tier)
    stream = torch.cuda.Stream()
    with on_gpu(tier):
        slopes = slopes_of(net, x)
        with directions(side_by_side=False):
            expected = train(net, x, slopes)
        stream.wait_stream(torch.cuda.current_stream())
        with directions(side_by_side=True), torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # whoever does not wait for this reads the wrong input
            found = train(net, x * 1, slopes)
        torch.cuda.current_stream().wait_stream(stream)
        assert_same_bits(found, expected)


@every_tier
def test_side_by_side_memory_is_not_taken_too_early(tier: str) -> None:
    """Directions that are late, tensors that nobody holds any more, and others that want memory."""
    net, x = both_ways("GRU", tier)
    with on_gpu(tier):
        slopes = slopes_of(net, x)
        with directions(side_by_side=False):
            expected = train(net, x, slopes)
        with directions(side_by_side=True):
            for i in range(10):
                for pair in streams._pairs.values():
                    for late in pair.streams[i % 2 :]:
                        with torch.cuda.stream(late):
                            torch.cuda._sleep(10_000_000)
                found = train(net, x.clone(), slopes)
                for size in (x.numel(), 21 * 40 * WIDE[tier], 21 * 40 * 2 * WIDE[tier]):
                    torch.full((size,), float("nan"), device="cuda", dtype=BF16)
                assert_same_bits(found, expected)
                del found
                torch.cuda.empty_cache()


@every_tier
def test_side_by_side_is_captured_and_replayed(tier: str) -> None:
    net, x = both_ways("LSTM", tier)
    with on_gpu(tier), directions(side_by_side=True):
        slopes = slopes_of(net, x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            train(net, x, slopes)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            static = train(net, x, slopes)
        for seed in (1, 2):
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            found = {name: t.clone() for name, t in static.items()}
            assert_same_bits(found, train(net, x, slopes))


def test_a_checkpoint_computes_again_in_turn() -> None:
    net, x = both_ways("LSTM", "stepwise")
    with on_gpu("stepwise"), directions(side_by_side=True):
        slopes = slopes_of(net, x)
        expected = train(net, x, slopes)
        net.zero_grad(set_to_none=True)
        results = torch.utils.checkpoint.checkpoint(results_of, net, x, use_reentrant=False)
        torch.autograd.backward(results, slopes)
        for name, p in net.named_parameters():
            assert torch.equal(p.grad, expected[name]), name


@every_tier
def test_one_direction_does_not_wait_for_the_other(tier: str) -> None:
    net, x = both_ways("GRU", tier, num_layers=1)
    with on_gpu(tier), directions(side_by_side=True), torch.no_grad():
        net(x)
        caller = torch.cuda.current_stream()
        late, other = streams._pairs[caller.device_index, caller.cuda_stream].streams
        torch.cuda.synchronize()
        with torch.cuda.stream(late):
            torch.cuda._sleep(400_000_000)
        net(x)
        other.synchronize()
        assert not late.query()
        assert not caller.query()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_tier
def test_side_by_side_on_a_device_that_is_not_the_current_one(tier: str) -> None:
    net, x = both_ways("GRU", tier)
    with on_gpu(tier), directions(side_by_side=True):
        slopes = slopes_of(net, x)
        expected = train(net, x, slopes)
        found = train(net.to("cuda:1"), x.to("cuda:1"), [t.to("cuda:1") for t in slopes])
        assert torch.cuda.current_device() == 0
        assert_same_bits({name: t.to("cuda:0") for name, t in found.items()}, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_tier
def test_a_layer_runs_on_the_device_of_its_tensors(tier: str) -> None:
    given = wide("gru", tier)
    with on_gpu(tier), torch.no_grad():
        expected = given.call(backend="cuda")
        found = given.map(lambda t: t.to("cuda:1")).call(backend="cuda")
    assert torch.cuda.current_device() == 0
    for one, other in zip(found, expected, strict=True):
        assert one.device == torch.device("cuda:1")
        assert torch.equal(one.to(other.device), other)


# --- no more than needed ------------------------------------------------------------------------


@every_tier
@pytest.mark.parametrize("lengths", [None, (9, 5, 2)], ids=["dense", "packed"])
def test_a_forward_pass_waits_for_nothing(tier: str, lengths) -> None:
    given = wide("lstm", tier, lengths=lengths)
    with on_gpu(tier), torch.no_grad():
        given.call(backend="cuda")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.cuda._sleep(400_000_000)  # a fifth of a second, in which no kernel of ours starts
            behind = torch.cuda.Event()
            behind.record()
            given.call(backend="cuda")
            assert not behind.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def peak_bytes(run: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_peak_memory_is_below_cudnns(kind: str, mode: str) -> None:
    T, B, H = 256, 32, 512
    torch.manual_seed(0)
    theirs: nn.Module = getattr(nn, kind)(H, H).cuda().to(BF16)
    ours: nn.Module = getattr(rnnlm_kernels, kind)(H, H, backend="cuda").cuda().to(BF16)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, H, device="cuda", dtype=BF16)

    def run(module: nn.Module) -> Callable[[], None]:
        def step() -> None:
            with torch.set_grad_enabled(mode == "training"):
                output, _ = module(x)
            if mode == "training":
                output.sum().backward()

        return step

    with on_gpu():
        for module in (ours, theirs):  # allocates gradients and what is kept between calls
            run(module)()
        assert peak_bytes(run(ours)) < peak_bytes(run(theirs))
