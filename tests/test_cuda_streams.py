"""The directions of a layer side by side: on which streams, in which order, and with whose memory.

There is no GPU here. Kernels run in the emulator, on tensors of the CPU that say they are a GPU's,
and torch's streams and events are stand-ins that keep vector clocks: what has been waited for is
known exactly, whatever order the calls happen to have here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from cuda_emulated import Emulated, emulated, module, needs_emulator
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from watchers import on_a_subclass, under_a_dispatch_mode, under_a_trace

import rnnlm_kernels
from rnnlm_kernels import functional, ops
from rnnlm_kernels.backends import cuda, streams

BF16 = torch.bfloat16
KINDS = ("LSTM", "GRU")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_tier = pytest.mark.parametrize("tier", cuda.TIERS[1:])
both_modes = pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
tells_hooks = pytest.mark.skipif(ops.directions._top_hooks is None, reason="torch does not tell")

Clock = dict[int, int]  # stream: how much of its work has been done for sure


class Stream:
    """Work is a tick of the stream's own clock; waiting merges another's clock into it."""

    def __init__(self, address: int, device: int = 0) -> None:
        self.cuda_stream = address
        self.clock: Clock = {address: 0}

    def work(self) -> Clock:
        self.clock[self.cuda_stream] += 1
        return dict(self.clock)

    def wait_event(self, event: Event) -> None:
        for stream, ticks in event.clock.items():
            self.clock[stream] = max(ticks, self.clock.get(stream, 0))


class Event:
    def __init__(self) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream) -> None:
        self.clock = dict(stream.clock)


def comes_after(later: Clock, stream: int, ticks: int) -> bool:
    return later.get(stream, 0) >= ticks


@dataclass
class Call:
    """A call of a kernel."""

    name: str
    stream: int
    concurrent: int
    clock: Clock


@dataclass
class Gpu:
    """What the stand-ins have seen."""

    caller: Stream
    current: Stream
    calls: list[Call] = field(default_factory=list)
    records: list[tuple[int, int]] = field(default_factory=list)  # (memory, stream)
    streams: dict[int, Stream] = field(default_factory=dict)
    capturing: bool = False

    def recorded_on(self, stream: int) -> set[int]:
        return {memory for memory, where in self.records if where == stream}


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Watched(Emulated):
    """Keeps every call of a layer, with the stream it was enqueued on."""

    def __init__(self, native: ModuleType, gpu: Gpu) -> None:
        super().__init__(native)
        self.gpu = gpu

    def __getattr__(self, name: str) -> Any:
        function = super().__getattr__(name)
        if not name.endswith(("_forward", "_backward")):
            return function

        def call(*arguments: Any) -> None:
            stream, concurrent = arguments[-7], arguments[-1]
            clock = self.gpu.streams[stream].work()
            self.gpu.calls.append(Call(name, stream, concurrent, clock))
            function(*arguments)

        return call


@contextmanager
def on_streams(
    tier: str = "auto", *, side_by_side: bool | None = True, **settings: Any
) -> Iterator[Gpu]:
    """Emulates a GPU with streams. ``side_by_side``: the answer of the plan; None: its own."""
    caller = Stream(1000)
    gpu = Gpu(caller, caller)
    gpu.streams[caller.cuda_stream] = caller

    @contextmanager
    def stream(wanted: Stream) -> Iterator[None]:
        before, gpu.current = gpu.current, wanted
        try:
            yield
        finally:
            gpu.current = before

    def external(address: int, device: int) -> Stream:
        return gpu.streams.setdefault(address, Stream(address, device))

    def record_stream(tensor: Tensor, where: Stream) -> None:
        gpu.records.append((memory(tensor), where.cuda_stream))

    is_cuda = property(lambda tensor: tensor.is_floating_point())  # batch_sizes is not on a GPU
    patches: dict[str, Any] = {
        "_place": lambda tensor: (0, gpu.current.cuda_stream),
        "_capturing": lambda: gpu.capturing,
    }
    if side_by_side is not None:
        patches["_directions"] = lambda *problem: {"side_by_side": side_by_side}
    with (
        emulated(tier, **settings) as device,
        mock.patch.multiple(cuda, native=Watched(device.native, gpu), **patches),
        mock.patch.multiple(streams, _pairs={}, _addresses=set()),
        mock.patch.multiple(
            torch.cuda,
            ExternalStream=external,
            Event=Event,
            current_stream=lambda device: gpu.current,
            stream=stream,
        ),
        mock.patch.object(Tensor, "is_cuda", is_cuda, create=True),
        mock.patch.object(Tensor, "record_stream", record_stream, create=True),
    ):
        yield gpu


def model(kind: str, H: int = 24, **options: Any) -> tuple[torch.nn.Module, Tensor]:
    """A bidirectional module and an input of 5 steps and 9 rows."""
    torch.manual_seed(0)
    options = {"bidirectional": True, "backend": "cuda", "dtype": BF16, **options}
    return getattr(rnnlm_kernels, kind)(H, H, **options), torch.randn(5, 9, H, dtype=BF16)


def flat(result: tuple[Tensor, Any]) -> list[Tensor]:
    output, states = result
    return [output, *(states if isinstance(states, tuple) else [states])]


# --- in which order ------------------------------------------------------------------------------


@needs_emulator
@every_kind
def test_directions_wait_for_the_caller_and_not_for_each_other(kind: str) -> None:
    net, x = model(kind)
    with on_streams() as gpu, torch.no_grad():
        begun = gpu.caller.work()[1000]
        net(x)
    one, other = gpu.calls
    assert len({one.stream, other.stream, 1000}) == 3
    for call, beside in ((one, other), (other, one)):
        assert comes_after(call.clock, 1000, begun)
        assert not comes_after(call.clock, beside.stream, 1)
        assert comes_after(gpu.caller.clock, call.stream, 1)  # joined
    assert gpu.current is gpu.caller


@needs_emulator
def test_a_layer_waits_for_both_directions_of_the_layer_below() -> None:
    net, x = model("LSTM", num_layers=3)
    cats: list[Clock] = []
    cat = torch.cat

    def ticking_cat(*arguments: Any) -> Tensor:
        cats.append(gpu.current.work())
        return cat(*arguments)

    with on_streams() as gpu, torch.no_grad(), mock.patch("torch.cat", ticking_cat):
        net(x)
    assert len(gpu.calls) == 6
    for i, call in enumerate(gpu.calls):
        below = gpu.calls[: i - i % 2]
        assert all(comes_after(call.clock, b.stream, b.clock[b.stream]) for b in below)
        assert comes_after(call.clock, 1000, i // 2)  # outputs were joined on the caller's stream
    for i, clock in enumerate(cats[:3]):
        done = gpu.calls[: 2 * i + 2]
        assert all(comes_after(clock, d.stream, d.clock[d.stream]) for d in done)


@needs_emulator
def test_the_caller_waits_even_if_a_direction_fails() -> None:
    net, x = model("GRU")
    with on_streams() as gpu, torch.no_grad():
        enqueue = cuda._enqueue
        failing = mock.Mock(side_effect=[None, RuntimeError("as the device says")])

        def fail(function: Callable[..., int], *arguments: Any) -> None:
            enqueue(function, *arguments)
            failing()

        with mock.patch.object(cuda, "_enqueue", fail), pytest.raises(RuntimeError, match="as the"):
            net(x)
        assert gpu.current is gpu.caller
    assert [c.name for c in gpu.calls] == ["cuda_gru_forward"] * 2
    assert all(comes_after(gpu.caller.clock, call.stream, 1) for call in gpu.calls)


@needs_emulator
def test_every_stream_of_the_caller_has_a_pair_of_its_own_and_keeps_it() -> None:
    net, x = model("LSTM")
    with on_streams() as gpu, torch.no_grad():
        net(x)
        net(x)
        gpu.current = gpu.streams[2000] = Stream(2000)
        net(x)
    used = [call.stream for call in gpu.calls]
    assert used[:2] == used[2:4]
    assert not set(used[:4]) & set(used[4:])
    assert comes_after(gpu.streams[2000].clock, used[4], 1)
    assert not comes_after(gpu.caller.clock, used[4], 1)


# --- whose memory --------------------------------------------------------------------------------


@needs_emulator
@both_modes
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@every_kind
def test_tensors_that_cross_are_recorded_and_no_others(kind: str, packed: bool, trains) -> None:
    """Inputs on the direction's stream where backward reads them again, outputs on the caller's."""
    net, x = model(kind)
    given: Any = x
    if packed:
        given = torch.nn.utils.rnn.pack_padded_sequence(x, [5, 5, 4, 3, 3, 2, 1, 1, 1])
    seen: list[tuple[set[int], set[int], bool]] = []
    alive: list[Any] = []

    def layer(*tensors: Any, reverse: bool, **options: Any) -> Any:
        outputs = run(*tensors, reverse=reverse, **options)
        alive.extend((tensors, outputs))
        present = [t for t in tensors[:-1] if t is not None]
        results = [t for t in outputs if t is not None]
        seen.append((set(map(memory, present)), set(map(memory, results)), reverse))
        return outputs

    run = getattr(ops, kind.lower())
    grad = torch.set_grad_enabled(trains)
    with on_streams() as gpu, grad, mock.patch.object(ops, kind.lower(), layer):
        net(given)
    assert len(seen) == 2
    assert gpu.recorded_on(1000) == seen[0][1] | seen[1][1]
    for inputs, _, reverse in seen:
        recorded = gpu.recorded_on(gpu.calls[reverse].stream)
        assert recorded == (inputs if trains else set())
    assert {where for _, where in gpu.records} <= {1000, *(call.stream for call in gpu.calls)}


# --- the same results ----------------------------------------------------------------------------


def backward_as_on_a_gpu(gpu: Gpu, results: list[Tensor], slopes: list[Tensor]) -> None:
    """Backward with each node of a layer on the stream of its forward, as autograd has it there."""
    seen: set[Any] = set()
    todo: list[Any] = [t.grad_fn for t in results]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        if hasattr(node, "flags"):
            (flags,) = node.flags  # of one direction; True is only set in reverse
            where = gpu.streams[gpu.calls[True in flags].stream]
            node.register_prehook(lambda _, where=where: setattr(gpu, "current", where))
            node.register_hook(lambda *_: setattr(gpu, "current", gpu.caller))
    torch.autograd.backward(results, slopes)


@needs_emulator
@every_tier
@every_kind
def test_half_of_the_device_gives_the_same_bits(kind: str, tier: str) -> None:
    net, x = model(kind)
    with emulated(tier, sms=4):
        expected = flat(net(x))
        slopes = [torch.randn(t.shape).to(t.dtype) for t in expected]
        torch.autograd.backward(expected, slopes)
        gradients = [p.grad for p in net.parameters()]
    net.zero_grad()
    with on_streams(tier, sms=4) as gpu:
        found = flat(net(x))
        backward_as_on_a_gpu(gpu, found, slopes)
    forward, backward = gpu.calls[:2], gpu.calls[2:]
    assert {call.stream for call in forward} == {call.stream for call in backward}
    assert [call.concurrent for call in gpu.calls] == [2] * 4
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    for p, gradient in zip(net.parameters(), gradients, strict=True):
        assert torch.equal(p.grad, gradient)


@needs_emulator
@every_kind
def test_the_low_memory_policy_reaches_both_directions(kind: str) -> None:
    net, x = model(kind, memory="low")
    found = []
    for run in (emulated, on_streams):
        net.zero_grad()
        with run(sms=4) as device:
            results = flat(net(x))
            kept = [node.saved_tensors[-1].numel() for node, _ in results[0].grad_fn.next_functions]
            torch.autograd.backward(results, [torch.ones_like(t) for t in results])
        assert kept == [0, 0]  # no gates
        found.append([*results, *(p.grad for p in net.parameters())])
    assert len({call.stream for call in device.calls[:2]}) == 2
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# --- when ----------------------------------------------------------------------------------------


def under_a_checkpoint(net: torch.nn.Module, x: Tensor) -> None:
    """The first node that asks has all computed again, on its stream."""
    checkpoint(net, x, use_reentrant=False)[0].float().sum().backward()


def with_hooks(net: torch.nn.Module, x: Tensor) -> None:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        net(x)


def under_a_compiler(net: torch.nn.Module, x: Tensor) -> None:
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        net(x)


def in_one_direction(net: torch.nn.Module, x: Tensor) -> None:
    one, _ = model("LSTM", bidirectional=False)
    one(x)


IN_TURN = [
    under_a_checkpoint,
    with_hooks,
    under_a_dispatch_mode,
    on_a_subclass,
    under_a_trace,
    under_a_compiler,
    in_one_direction,
]


@needs_emulator
@pytest.mark.parametrize("use", IN_TURN, ids=lambda use: use.__name__)
def test_what_streams_might_break_runs_on_the_callers(use: Callable[..., None]) -> None:
    net, x = model("LSTM")
    with on_streams() as gpu:
        use(net, x)
    assert gpu.calls
    assert {(call.stream, call.concurrent) for call in gpu.calls} == {(1000, 1)}
    assert gpu.records == []


@needs_emulator
def test_other_backends_are_left_alone() -> None:
    for backend in ("reference", "cpu"):
        net, x = model("GRU", backend=backend)
        with on_streams() as gpu, torch.no_grad():
            try:
                net(x)
            except rnnlm_kernels.BackendError:
                continue
        assert gpu.streams == {1000: gpu.caller}


@needs_emulator
def test_torch_func_and_nothing_to_do_need_no_streams() -> None:
    net, x = model("GRU", dtype=torch.float32)
    x = x.float()
    nothing = [(torch.zeros(0, 24), torch.zeros(0, 0), None, None, None)] * 2
    with on_streams(side_by_side=None) as gpu:
        torch.func.jvp(lambda t: net(t)[0], (x,), (x,))
        net(x[:, :0])
        functional.gru(x, None, nothing, bidirectional=True, backend="cuda")
        with pytest.raises(RuntimeError, match="sequence length"):
            net(x[:0])
    assert gpu.calls == []
    assert gpu.streams == {1000: gpu.caller}


@needs_emulator
@pytest.mark.parametrize("name", ["w_ih", "w_hh", "h0"])
def test_what_the_operator_refuses_it_refuses_in_its_words(name: str) -> None:
    x, h0 = torch.randn(5, 9, 24), torch.zeros(2, 9, 24)
    w_ih, w_hh = torch.zeros(72, 24), torch.zeros(72, 24)
    if name == "h0":
        h0 = torch.zeros(2)
    elif name == "w_ih":
        w_ih = torch.zeros(72)
    else:
        w_hh = torch.zeros(72)
    weights = [(w_ih, w_hh, None, None, None)] * 2
    said = []
    for side_by_side in (True, False):
        with on_streams() if side_by_side else emulated(), pytest.raises(RuntimeError) as caught:
            functional.gru(x, h0, weights, bidirectional=True, backend="cuda")
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert name in said[0]


@needs_emulator
def test_a_direction_asks_for_its_half_and_not_for_what_was_tuned_on_the_whole() -> None:
    net, x = model("GRU")
    tuned = (cuda.TIERS.index("grid"), None)
    for side_by_side, tier, concurrent in ((True, "block", 2), (False, "grid", 1)):
        with (
            on_streams(side_by_side=side_by_side) as gpu,
            mock.patch.object(cuda, "_tuned", return_value=tuned),
            mock.patch.object(cuda.tuning, "sources", return_value=True),
            mock.patch.object(cuda, "_needs", side_effect=cuda._needs) as needs,
        ):
            net(x)
            assert cuda.native.ran == [tier] * 2
        assert [call.args[-1] for call in needs.call_args_list] == [concurrent] * 2
        assert [call.concurrent for call in gpu.calls] == [concurrent] * 2


@needs_emulator
@tells_hooks
def test_a_checkpoint_of_something_else_changes_nothing() -> None:
    net, x = model("GRU")
    with on_streams() as gpu:
        y = checkpoint(torch.tanh, x.requires_grad_(), use_reentrant=False)
        net(y)
    assert [call.concurrent for call in gpu.calls] == [2, 2]


@needs_emulator
def test_where_torch_cannot_tell_of_hooks_training_runs_in_turn() -> None:
    net, x = model("GRU")
    with on_streams() as gpu, mock.patch.object(ops.directions, "_top_hooks", None):
        net(x)
        with torch.no_grad():
            net(x)
    assert [call.concurrent for call in gpu.calls] == [1, 1, 2, 2]


def asked(gpu_call: Callable[[Gpu], None]) -> list[tuple[Any, ...]]:
    """What the plan was asked: (T, B, hidden, proj, rows, packed), tier, trains, replayed."""
    questions: list[tuple[Any, ...]] = []

    def directions(*problem: Any) -> dict[str, bool]:
        questions.append((problem[3:7] + problem[7:9], *problem[-3:]))
        return {"side_by_side": False}

    with on_streams(side_by_side=None) as gpu, mock.patch.object(cuda, "_directions", directions):
        gpu_call(gpu)
    return questions


@needs_emulator
def test_the_plan_is_asked_for_every_layer_with_what_it_depends_on() -> None:
    lstm, x = model("LSTM", num_layers=2, proj_size=8)
    gru, _ = model("GRU")
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [5, 5, 4, 3, 3, 2, 1, 1, 1])

    def run(gpu: Gpu) -> None:
        lstm(x)
        with torch.no_grad():
            gru(x)
            gpu.capturing = True
            gru(x)
            gru(packed)  # without offsets: captured stepwise

    stepwise = cuda.TIERS.index("stepwise")
    dense = (5, 9, 24, 0, 45, False)
    assert asked(run) == [
        ((5, 9, 24, 8, 45, False), 0, True, False),
        ((5, 9, 24, 8, 45, False), 0, True, False),
        (dense, 0, False, False),
        (dense, 0, False, True),
        ((5, 9, 24, 0, 25, True), stepwise, False, True),
    ]


@needs_emulator
@pytest.mark.parametrize(
    ("sms", "concurrent"), [(132, 2), (100, 1)], ids=["room-for-two", "room-for-one"]
)
def test_the_plan_decides(sms: int, concurrent: int) -> None:
    """A grid of 64 CTAs, once or twice."""
    with on_streams("grid", side_by_side=None, sms=sms), torch.no_grad():
        x, w_hh = torch.empty(512, 16, 8, dtype=BF16), torch.empty(4096, 1024, dtype=BF16)
        h0, options = torch.empty(16, 1024), rnnlm_kernels.RecurrenceOptions()
        pair = cuda.directions(x, w_hh, None, h0, None, "lstm", options, False)
        addresses = {one.cuda_stream for one in pair.streams} if pair else {0}
        assert {streams.concurrent(address) for address in addresses} == {concurrent}


# --- streams -------------------------------------------------------------------------------------


@needs_emulator
def test_no_stream_is_handed_out_twice() -> None:
    assert module is not None
    assert len({module.cuda_new_stream(0, 0) for _ in range(100)}) == 100
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        module.cuda_new_stream(1, 0)


def test_a_stream_of_somebody_else_has_the_device_to_itself() -> None:
    assert streams.concurrent(0) == 1


@needs_emulator
def test_explain_says_how_directions_run() -> None:
    with emulated(sms=132):
        given = {"cell": "lstm", "input_size": 8, "dtype": BF16, "seq_len": 512, "batch": 16}
        options = rnnlm_kernels.RecurrenceOptions(reverse=True)

        def text(hidden: int, **more: Any) -> str:
            problem = rnnlm_kernels.Problem(**given, hidden_size=hidden, **more)
            return rnnlm_kernels.explain(problem, "cuda")

        assert "both directions side by side (side by side: " in text(1024, options=options)
        assert "both directions in turn (side by side: " in text(2048, options=options)
        assert "both directions" not in text(1024)
        with mock.patch.dict("os.environ", {cuda.ENVIRONMENT: "grid"}):
            assert "half of the device is too little, in turn: " in text(2048, options=options)
