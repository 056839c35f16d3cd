"""The layers of a stack some steps behind one another: when, and the same bits as in turn.

In turn means here: as one call of the operator for each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from recurrence_cases import DTYPES, run_in_a_forked_child, run_python
from torch import Tensor
from watchers import on_a_subclass, under_a_dispatch_mode, under_a_trace

import rnnlm_kernels.nn
from rnnlm_kernels import functional, ops
from rnnlm_kernels.backends import cpu
from rnnlm_kernels.ops import gru_layer, lstm_layer

_C = pytest.importorskip("rnnlm_kernels._C")

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "LSTM-projected": ("LSTM", {"proj_size": 24}),
    "GRU": ("GRU", {}),
    "GRU-before": ("GRU", {"reset": "before"}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
every_count = pytest.mark.parametrize("count", [1, 2, 3, 4])

FEATURES, HIDDEN = 40, 65


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@contextmanager
def in_turn() -> Iterator[None]:
    with mock.patch.object(ops, "_may_run_as_a_stack", return_value=False):
        yield


@contextmanager
def watched() -> Iterator[list[int]]:
    """The numbers of layers that are called as one stack."""
    counts: list[int] = []
    stacked = cpu.stacked

    def watch(name: str, layers: Sequence[Any]) -> None:
        counts.append(len(layers))
        stacked(name, layers)

    with mock.patch.object(cpu, "stacked", watch):
        yield counts


def model(kind: str = "GRU", hidden: int = HIDDEN, layers: int = 2, **options: Any) -> Any:
    name, own = KINDS[kind]
    torch.manual_seed(0)
    given = {"num_layers": layers, "backend": "cpu", **own, **options}
    return getattr(rnnlm_kernels.nn, name)(FEATURES, hidden, **given)


def inputs(T: int, B: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(T, B, FEATURES, generator=torch.Generator().manual_seed(1)).to(dtype)


def flat(results: tuple[Any, Any]) -> list[Tensor]:
    output, states = results
    if isinstance(output, torch.nn.utils.rnn.PackedSequence):
        output = output.data
    return [output, *(states if isinstance(states, tuple) else (states,))]


def states_of(net: Any, B: int) -> Any:
    """Random initial states."""
    wide = torch.randn(net.num_layers, B, net.hidden_size, dtype=net.weight_hh_l0.dtype)
    if net._get_name() == "GRU":
        return wide
    return wide[..., : net.proj_size or None].contiguous() / 2, wide


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert not other.isnan().any()
        assert torch.equal(one, other), i


def assert_as_in_turn(net: Any, *arguments: Any, layers: int = 2) -> None:
    with in_turn():
        expected = flat(net(*arguments))
    with watched() as counts:
        found = flat(net(*arguments))
    assert counts == [layers]
    assert_equal(found, expected)


# --- how many at a time --------------------------------------------------------------------------

# Threads of the team, layers, steps; threads that a layer alone has a use for, caches that all its
# weights fill, its work.
DECISIONS = {
    "one thread": (1, 2, 1000, (1, 1, 10**6), 1),
    "each has a use for one": (2, 2, 1000, (1, 1, 10**6), 2),
    "as many as there are threads": (2, 4, 1000, (1, 1, 10**6), 2),
    "as many as there are layers": (8, 3, 1000, (2, 1, 10**6), 3),
    "half of what is too little for all at once": (4, 4, 1000, (2, 9, 10**6), 2),
    "an odd layer with no use for more": (2, 3, 1000, (1, 1, 10**6), 2),
    "an odd layer that has a use for all": (2, 3, 1000, (2, 1, 10**6), 1),
    "odd layers all at once": (4, 3, 1000, (2, 1, 10**6), 3),
    "room in one cache": (2, 2, 1000, (2, 1, 10**6), 2),
    "weights fill both caches": (2, 2, 1000, (2, 2, 10**6), 1),
    "not worth a thread": (2, 2, 1000, (1, 1, 999_999), 1),
    "just long enough": (2, 2, 64, (1, 1, 10**6), 2),
    "too short": (2, 2, 63, (1, 1, 10**6), 1),
    "the last of four would start late": (4, 4, 191, (1, 1, 10**6), 3),
    "just long enough for slower layers": (2, 2, 256, (2, 1, 10**6), 2),
    "too short for slower layers": (2, 2, 255, (2, 1, 10**6), 1),
}


@pytest.mark.parametrize(
    ("team", "layers", "steps", "most", "expected"), DECISIONS.values(), ids=DECISIONS
)
def test_as_many_layers_at_a_time_as_pay(team, layers, steps, most, expected) -> None:
    assert _C.cpu_layers_at_once(team, layers, steps, most) == expected


@pytest.mark.parametrize("asked", [[1], [1, 1, 1], [3, 1, 2], [1, 5, 1, 1], [2] * 8], ids=str)
def test_crews_are_neighbours_and_each_has_a_thread(asked: list[int]) -> None:
    for came in range(1, sum(asked) + 3):
        crews = _C.cpu_crews(came, asked)
        if came < len(asked):
            assert crews == [(i % came, 1) for i in range(len(asked))]
            continue
        begin = 0
        for (first, size), most in zip(crews, asked, strict=True):
            assert first == begin
            assert 1 <= size <= most
            begin += size
        assert begin == min(came, sum(asked))


# --- the same bits -------------------------------------------------------------------------------

# Sizes with work enough for a thread, unless there is no such work in so few steps.
SIZES = {
    "H=1": {"T": 2700, "B": 64, "hidden": 1},
    "H=7": {"T": 3500, "B": 1, "hidden": 7},
    "H=100": {"T": 260, "B": 1, "hidden": 100},
    "H=130": {"T": 260, "B": 1, "hidden": 130},
    "T=1": {"T": 1, "B": 1, "hidden": 300},
    "T=2": {"T": 2, "B": 3, "hidden": 130},
    "T=63": {"T": 63, "B": 1, "hidden": HIDDEN},
    "T=64": {"T": 64, "B": 1, "hidden": HIDDEN},
    "T=65": {"T": 65, "B": 1, "hidden": HIDDEN},
    "B=5": {"T": 260, "B": 5, "hidden": HIDDEN},
    "B=40": {"T": 260, "B": 40, "hidden": 33},
}


@every_count
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "GRU-before"])
def test_any_size_gives_the_bits_of_in_turn(kind: str, sizes: dict[str, int], count: int) -> None:
    torch.set_num_threads(count)
    net = model(kind, sizes["hidden"])
    assert_as_in_turn(net, inputs(sizes["T"], sizes["B"]))


@pytest.mark.sanitize
@every_count
@pytest.mark.parametrize("layers", [2, 3, 4, 5, 12])
@every_kind
def test_any_number_of_layers_and_threads_gives_the_bits_of_in_turn(kind, layers, count) -> None:
    torch.set_num_threads(count)
    net = model(kind, layers=layers)
    assert_as_in_turn(net, inputs(200, 1), states_of(net, 1), layers=layers)


@pytest.mark.sanitize
@pytest.mark.parametrize("count", [2, 4])
@every_dtype
@every_kind
def test_every_dtype_gives_the_bits_of_in_turn(kind, dtype, count) -> None:
    torch.set_num_threads(count)
    net = model(kind, dtype=dtype, layers=3)
    for T, B in ((130, 1), (400, 5)):
        assert_as_in_turn(net, inputs(T, B, dtype), states_of(net, B), layers=3)


def test_batch_first_and_no_biases_and_other_strides() -> None:
    for options in ({"batch_first": True}, {"bias": False}, {"memory": "low"}):
        net = model("LSTM", **options)
        x = inputs(200, 3)
        assert_as_in_turn(net, x.transpose(0, 1).contiguous() if "batch_first" in options else x)
        h, c = states_of(net, 200 if "batch_first" in options else 3)
        assert_as_in_turn(net, x, (h, torch.stack([c, c], -1)[..., 0]))


@pytest.mark.parametrize("lengths", [(290, 290, 40, 2), (130,), (300, 1, 1)], ids=str)
@every_kind
def test_rows_of_different_lengths(kind: str, lengths: tuple[int, ...]) -> None:
    net = model(kind)
    for count in (2, 4):
        torch.set_num_threads(count)
        rows = [inputs(T, 1)[:, 0] for T in lengths]
        assert_as_in_turn(net, torch.nn.utils.rnn.pack_sequence(rows))


@pytest.mark.parametrize("memory", ["fast", "low"])
@every_dtype
def test_cells_of_the_last_layer(dtype: torch.dtype, memory: str) -> None:
    weights = model("LSTM", dtype=dtype)._weights()

    def found() -> list[Tensor]:
        options = {"num_layers": 2, "return_cells": True, "memory": memory, "backend": "cpu"}
        return list(functional.lstm(inputs(200, 2, dtype), None, weights, **options))

    with in_turn():
        expected = found()
    with watched() as counts:
        assert_equal(found(), expected)
    assert counts == [2]


# --- layers that share nothing but the number of rows --------------------------------------------


class Stack:
    """The calls of a stack of layers of these sizes, ready to be made again and again."""

    def __init__(
        self,
        cell: str,
        sizes: Sequence[int],
        T: int,
        B: int,
        proj: int = 0,
        reset: str = "after",
    ) -> None:
        generator = torch.Generator().manual_seed(2)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator) / sizes[0] ** 0.5

        self.name = f"{cell}_forward"
        gates, calls = (4 if cell == "lstm" else 3), []
        self.results: list[Tensor] = []
        x = random(T, B, sizes[0])
        for hidden in sizes[1:]:
            width = proj or hidden
            weights = random(gates * hidden, x.shape[2]), random(gates * hidden, width)
            given = (*weights, random(gates * hidden), random(gates * hidden))
            if cell == "lstm":
                w_hr = random(proj, hidden) if proj else None
                found: Any = lstm_layer.forward(
                    *(x, random(B, width), random(B, hidden), *given, w_hr, None),
                    *(False, False, False, "cpu"),
                    later=calls,
                )
            else:
                found = gru_layer.forward(
                    *(x, random(B, hidden), *given, None, reset, False, False, "cpu"), later=calls
                )
            self.results += [t for t in found if t is not None]
            x = found[0]
        self.calls = [arguments for _, _, arguments in calls]

    def run(self, together: bool) -> list[Tensor]:
        """Results; what was not written before it was read makes NaN of all that follows."""
        for result in self.results:
            result.fill_(torch.nan)
        if together:
            cpu.stacked(self.name, self.calls)
        else:
            for arguments in self.calls:
                getattr(cpu, self.name)(*arguments)
        return [result.clone() for result in self.results]


UNLIKE = {
    "growing": (7, 33, 65, 100, 140),
    "shrinking": (140, 130, 65, 50, 40),
    "narrow between": (65, 140, 7, 140, 65),
}


@pytest.mark.sanitize
@every_count
@pytest.mark.parametrize("sizes", UNLIKE.values(), ids=UNLIKE)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_layers_of_different_sizes(cell: str, sizes: tuple[int, ...], count: int) -> None:
    torch.set_num_threads(count)
    for T, B in ((520, 1), (400, 6)):
        stack = Stack(cell, sizes, T, B)
        assert_equal(stack.run(together=True), stack.run(together=False))


# Each layer is faster than the one before, so that it waits all the time.
RACES: dict[str, dict[str, Any]] = {
    "one thread a layer": {"sizes": (40, 70, 55, 40, 30), "T": 200, "B": 1},
    "threads that split rows": {"sizes": (40, 60, 40), "T": 260, "B": 12},
    "threads that split units": {"sizes": (130, 170, 130), "T": 260, "B": 1},
}


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize(
    ("cell", "options"),
    [("lstm", {}), ("lstm", {"proj": 24}), ("gru", {}), ("gru", {"reset": "before"})],
    ids=["lstm", "lstm-projected", "gru", "gru-before"],
)
@pytest.mark.parametrize("sizes", RACES.values(), ids=RACES)
def test_no_layer_reads_what_is_not_written(cell, options, sizes, count) -> None:
    """Again and again, since who is late differs from run to run."""
    torch.set_num_threads(count)
    stack = Stack(cell, **sizes, **options)
    expected = stack.run(together=False)
    for _ in range(60):
        assert_equal(stack.run(together=True), expected)


def test_the_output_of_another_call_is_refused() -> None:
    first, second = Stack("gru", (7, 7, 7), 20, 1), Stack("gru", (7, 7), 20, 1)
    with pytest.raises(ValueError, match="does not read"):
        cpu.stacked("gru_forward", [*first.calls, *second.calls])


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_team_that_is_smaller_than_asked_for(limit: int) -> None:
    """It has the threads that the runtime gives, which then do all there is to do."""
    run_python(
        """
import torch
from test_cpu_stacked import Stack, assert_equal
torch.set_num_threads(4)
for sizes in ((65,) * 6, (200, 200, 140)):
    for T, B in ((200, 1), (400, 6)):
        stack = Stack("lstm", sizes, T, B)
        assert_equal(stack.run(together=True), stack.run(together=False))
""",
        OMP_THREAD_LIMIT=str(limit),
    )


@pytest.mark.parametrize("count", [1, 2])
def test_a_forked_child_runs_a_stack(count: int) -> None:
    run_in_a_forked_child(
        """
from rnnlm_kernels import nn
net = nn.GRU(40, 65, 3, backend="cpu").requires_grad_(False)
x = torch.randn(200, 1, 40)
expected = net(x)[0]
""",
        "assert torch.equal(net(x)[0], expected)",
        count,
    )


# --- when ----------------------------------------------------------------------------------------


def under_a_profiler(net: torch.nn.Module, x: Tensor) -> None:
    """It shows the operators of both layers."""
    with torch.profiler.profile() as profile:
        net(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["rnnlm_kernels::gru"] == 2


def under_a_transform(net: torch.nn.Module, x: Tensor) -> None:
    torch.func.jvp(lambda t: net(t)[0], (x,), (x,))


def with_gradients_of_weights(net: torch.nn.Module, x: Tensor) -> None:
    with torch.enable_grad():
        net(x)[0].sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def with_a_gradient_of_the_input(net: torch.nn.Module, x: Tensor) -> None:
    net.requires_grad_(False)
    x.requires_grad_()
    with torch.enable_grad():
        net(x)[0].sum().backward()
    assert x.grad is not None


def with_dropout(net: torch.nn.Module, x: Tensor) -> None:
    model(dropout=0.5)(x)


def in_both_directions(net: torch.nn.Module, x: Tensor) -> None:
    model(bidirectional=True)(x)


def with_one_layer(net: torch.nn.Module, x: Tensor) -> None:
    model(layers=1)(x)


def without_rows(net: torch.nn.Module, x: Tensor) -> None:
    output, h_n = net(x[:, :0])
    assert output.shape == (20, 0, HIDDEN)
    assert h_n.shape == (2, 0, HIDDEN)


IN_TURN = [
    under_a_dispatch_mode,
    on_a_subclass,
    under_a_trace,
    under_a_profiler,
    under_a_transform,
    with_gradients_of_weights,
    with_a_gradient_of_the_input,
    with_dropout,
    in_both_directions,
    with_one_layer,
    without_rows,
]


@pytest.mark.parametrize("use", IN_TURN, ids=lambda use: use.__name__)
def test_layers_are_called_one_by_one(use: Callable[..., None]) -> None:
    net, x = model(), inputs(20, 2)
    with watched() as counts:
        use(net, x)
    assert counts == []


def test_the_reference_gets_layers_one_by_one() -> None:
    net, x = model(backend="reference"), inputs(20, 2)
    with watched() as counts:
        found = flat(net(x))
    assert counts == []
    with in_turn():
        assert_equal(found, flat(net(x)))


def test_a_compiler_sees_operators_of_one_layer() -> None:
    net, x = model().requires_grad_(False), inputs(20, 2)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    expected = net(x)[0]
    found = torch.compile(net, backend=backend, fullgraph=True)(x)[0]
    assert seen.count("rnnlm_kernels.gru.default") == 2
    torch.testing.assert_close(found, expected)


def test_frozen_layers_and_idle_dropout_are_no_reason_to_wait() -> None:
    x = inputs(20, 2)
    with watched() as counts, torch.enable_grad():
        model().requires_grad_(False)(x)
        model(dropout=0.5).requires_grad_(False).eval()(x)
    assert counts == [2, 2]


def test_autocast_gives_a_stack_in_its_dtype() -> None:
    net, x = model("LSTM"), inputs(200, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_in_turn(net, x)
        assert net(x)[0].dtype == torch.bfloat16


WRONG = {
    "no steps": lambda net: net(torch.zeros(0, 1, FEATURES)),
    "weight of the second layer": lambda net: functional.gru(
        inputs(20, 1), None, [net._weights()[0], net._weights()[0]], num_layers=2
    ),
    "memory": lambda net: functional.gru(
        inputs(20, 1), None, net._weights(), num_layers=2, memory="none"
    ),
    "backend": lambda net: functional.gru(
        inputs(20, 1), None, net._weights(), num_layers=2, backend="none"
    ),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_call_is_refused_with_the_same_words(wrong: Callable[[Any], Any]) -> None:
    refusals = []
    for how in (in_turn, watched):
        with how(), pytest.raises((RuntimeError, ValueError)) as caught:
            wrong(model())
        refusals.append((caught.type, str(caught.value)))
    assert refusals[0] == refusals[1]
