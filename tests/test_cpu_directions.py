"""The two directions of a layer on threads side by side: when, and the same bits as in turn.

In turn means here: as two calls of the operator for one direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from recurrence_cases import DTYPES, layer, run_in_a_forked_child
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from watchers import on_a_subclass, under_a_dispatch_mode, under_a_trace

import rnnlm_kernels.nn
from rnnlm_kernels import functional, ops
from rnnlm_kernels.backends import cpu
from rnnlm_kernels.ops import gru_layer, lstm_layer
from rnnlm_kernels.ops.pairs import forwards

_C = pytest.importorskip("rnnlm_kernels._C")

KINDS = {
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {}),
    "GRU-before": ("GRU", {"reset": "before"}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)

# Each direction has work enough for a thread of its own, and too little for two.
SIZES: dict[str, dict[str, Any]] = {
    "one row": {"T": 20, "B": 1},
    "some rows": {"T": 9, "B": 5},
    "ragged": {"lengths": (20, 13, 13, 2)},
}
HIDDEN, FEATURES = 65, 7


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@contextmanager
def in_turn() -> Iterator[None]:
    with mock.patch.object(ops, "in_one_call", return_value=False):
        yield


@contextmanager
def watched() -> Iterator[list[str]]:
    """The names of the functions that are called for both directions together."""
    names: list[str] = []
    together = cpu.together

    def watch(name: str, *arguments: Any) -> None:
        names.append(name)
        together(name, *arguments)

    with mock.patch.object(cpu, "together", watch):
        yield names


def model(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> torch.nn.Module:
    name, own = KINDS[kind]
    torch.manual_seed(0)
    given = {"bidirectional": True, "backend": "cpu", "dtype": dtype, **own, **options}
    net: torch.nn.Module = getattr(rnnlm_kernels.nn, name)(FEATURES, HIDDEN, **given)
    return net


def inputs(dtype: torch.dtype = torch.float32, **sizes: Any) -> tuple[Tensor, Tensor | None]:
    given = layer("gru", I=FEATURES, dtype=dtype, **sizes)
    x = given.get("x")
    assert x is not None
    return x, given.batch_sizes


def run(net: torch.nn.Module, x: Tensor, batch_sizes: Tensor | None) -> list[Tensor]:
    """Output and states."""
    if batch_sizes is None:
        output, states = net(x)
    else:
        packed = torch.nn.utils.rnn.PackedSequence(x, batch_sizes)
        output, states = net(packed)
        output = output.data
    return [output, *(states if isinstance(states, tuple) else (states,))]


def slopes(results: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(r.shape, generator=generator).to(r) for r in results]


def everything(net: torch.nn.Module, x: Tensor, batch_sizes: Tensor | None) -> list[Tensor]:
    """Results without a gradient, results with one, and the gradients of x and of all weights."""
    with torch.no_grad():
        plain = run(net, x, batch_sizes)
    x = x.detach().requires_grad_()
    results = run(net, x, batch_sizes)
    grads = torch.autograd.grad(results, [x, *net.parameters()], slopes(results))
    return [*plain, *results, *grads]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert not other.isnan().any()
        assert torch.equal(one, other), i


# --- which threads -------------------------------------------------------------------------------

# The team; threads that a problem alone has a use for, caches that its weights fill, its work.
DECISIONS = {
    "one thread": (1, (1, 1, 10**6), (1, 1, 10**6), False),
    "each has a use for one": (2, (1, 1, 10**6), (1, 1, 10**6), True),
    "each has a use for all and room in one cache": (2, (2, 1, 10**6), (2, 1, 10**6), True),
    "weights fill both caches": (2, (2, 2, 10**6), (2, 2, 10**6), False),
    "weights fill two of four caches": (4, (4, 2, 10**6), (4, 2, 10**6), True),
    "one of them fills all caches": (4, (2, 1, 10**6), (4, 3, 10**6), False),
    "much is of use to neither": (8, (2, 5, 10**6), (2, 5, 10**6), True),
    "half of three is one": (3, (2, 2, 10**6), (1, 1, 10**6), False),
    "not worth a thread": (2, (1, 1, 99_999), (1, 1, 10**6), False),
    "just worth a thread": (2, (1, 1, 100_000), (1, 1, 100_000), True),
}


@pytest.mark.parametrize(("team", "first", "second", "expected"), DECISIONS.values(), ids=DECISIONS)
def test_side_by_side_where_half_a_team_will_do(team, first, second, expected) -> None:
    assert _C.cpu_side_by_side(team, first, second) == expected
    assert _C.cpu_side_by_side(team, second, first) == expected


def test_crews_get_what_they_asked_for_or_share_what_came() -> None:
    for first in range(1, 6):
        for second in range(1, 6):
            assert _C.cpu_crews(1, [first, second]) == [(0, 1), (0, 1)]
            for came in range(2, 13):
                (begin, size), (other_begin, other_size) = _C.cpu_crews(came, [first, second])
                assert (begin, other_begin) == (0, size)
                assert size >= 1
                assert other_size >= 1
                if came >= first + second:
                    assert (size, other_size) == (first, second)
                else:
                    assert size + other_size == came
                    assert abs(size - came * first / (first + second)) <= 1


# --- the same bits -------------------------------------------------------------------------------


@pytest.mark.sanitize
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@every_kind
def test_any_number_of_threads_gives_the_bits_of_in_turn(kind, sizes, count) -> None:
    torch.set_num_threads(count)
    net, (x, batch_sizes) = model(kind, num_layers=2), inputs(**sizes)
    with in_turn():
        expected = everything(net, x, batch_sizes)
    with watched() as names:
        assert_equal(everything(net, x, batch_sizes), expected)
    cell = kind[:4].rstrip("-").lower()
    assert names == [f"{cell}_forward"] * 4 + [f"{cell}_backward"] * 2


def check_bits_of_in_turn(kind: str, dtype: torch.dtype, sizes: dict[str, Any]) -> None:
    net, (x, batch_sizes) = model(kind, dtype), inputs(dtype, **sizes)
    with in_turn():
        expected = everything(net, x, batch_sizes)
    assert_equal(everything(net, x, batch_sizes), expected)


@pytest.mark.sanitize
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@every_dtype
@every_kind
def test_every_dtype_gives_the_bits_of_in_turn(kind, dtype, sizes) -> None:
    check_bits_of_in_turn(kind, dtype, sizes)


VARIANTS: dict[str, dict[str, Any]] = {
    "memory low": {"memory": "low"},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "projection": {"kind": "LSTM", "proj_size": 24},
    "projection, memory low": {"kind": "LSTM", "proj_size": 24, "memory": "low"},
    "reference": {"backend": "reference"},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("sizes", [{"T": 20, "B": 2}, {"T": 1, "B": 1}], ids=["steps", "one-step"])
def test_every_variant_gives_the_bits_of_in_turn(variant, sizes) -> None:
    options = dict(variant)
    kinds = [options.pop("kind")] if "kind" in options else ["LSTM", "GRU"]
    for kind in kinds:
        net, (x, batch_sizes) = model(kind, **options), inputs(**sizes)
        with in_turn():
            expected = everything(net, x, batch_sizes)
        with watched() as names:
            assert_equal(everything(net, x, batch_sizes), expected)
        assert len(names) == (0 if "backend" in options else 3)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_an_empty_batch_has_empty_results_and_gradients_of_zero(kind: str) -> None:
    net = model(kind)
    plain = everything(net, torch.zeros(3, 0, FEATURES), None)
    assert plain[0].shape == (3, 0, 2 * HIDDEN)
    for grad in plain[-8:]:
        assert not grad.any()


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_cells_are_those_of_in_turn_with_their_gradients(memory: str) -> None:
    net, (x, _) = model("LSTM"), inputs(T=20, B=2)
    weights = [
        tuple(
            getattr(net, f"{name}_l0{end}").detach().requires_grad_()
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        for end in ("", "_reverse")
    ]

    def found() -> list[Tensor]:
        results = functional.lstm(
            x,
            None,
            [(*direction, None) for direction in weights],
            bidirectional=True,
            return_cells=True,
            memory=memory,
            backend="cpu",
        )
        leaves = [w for direction in weights for w in direction]
        return [*results, *torch.autograd.grad(results, leaves, slopes(list(results)))]

    with in_turn():
        expected = found()
    with watched() as names:
        assert_equal(found(), expected)
    assert len(names) == 2


@pytest.mark.sanitize
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_layers_of_different_sizes_run_together(cell: str, count: int) -> None:
    """What runs side by side need not be alike: one is through before the other."""
    forward = (lstm_layer if cell == "lstm" else gru_layer).forward
    flags = (False, True, False, "cpu") if cell == "lstm" else ("after", False, True, "cpu")

    def arguments(**sizes: Any) -> tuple[Any, ...]:
        given = layer(cell, I=FEATURES, dtype=torch.float32, scale=0.1, **sizes)
        return (*given.tensors, given.batch_sizes, *flags)

    short = arguments(T=9, B=3, H=64)
    long = arguments(lengths=[70] * 9 + [3], H=80)
    torch.set_num_threads(1)
    expected = [forward(*short), forward(*long)]
    torch.set_num_threads(count)
    for first, second in ((0, 1), (1, 0)):
        found = forwards(forward, [(short, long)[first], (short, long)[second]])
        for one, other in zip(found, (expected[first], expected[second]), strict=True):
            kept = [t for t in other if t is not None]
            assert_equal([t for t in one if t is not None], kept)


@pytest.mark.parametrize("count", [1, 2])
def test_a_forked_child_runs_both_directions(count: int) -> None:
    run_in_a_forked_child(
        """
from rnnlm_kernels import nn
net = nn.GRU(7, 65, bidirectional=True, backend="cpu").requires_grad_(False)
x = torch.randn(20, 1, 7)
expected = net(x)[0]
""",
        "assert torch.equal(net(x)[0], expected)",
        count,
    )


# --- when ----------------------------------------------------------------------------------------


def under_a_profiler(net: torch.nn.Module, x: Tensor) -> None:
    """It shows the operators of both directions."""
    with torch.profiler.profile() as profile:
        net(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["rnnlm_kernels::gru"] == 2


def under_a_transform(net: torch.nn.Module, x: Tensor) -> None:
    torch.func.jvp(lambda t: net(t)[0], (x,), (x,))


def in_one_direction(net: torch.nn.Module, x: Tensor) -> None:
    model("GRU", bidirectional=False)(x)


def one_direction_frozen(net: torch.nn.Module, x: Tensor) -> None:
    """The frozen one saves nothing for backward."""
    for name, weight in net.named_parameters():
        weight.requires_grad_("reverse" in name)
    net(x)[0].sum().backward()
    assert [w.grad is None for w in net.parameters()] == [True] * 4 + [False] * 4


APART = [
    under_a_dispatch_mode,
    on_a_subclass,
    under_a_profiler,
    under_a_trace,
    under_a_transform,
    in_one_direction,
    one_direction_frozen,
]


@pytest.mark.parametrize("use", APART, ids=lambda use: use.__name__)
def test_whoever_watches_sees_operators_of_one_direction(use: Callable[..., None]) -> None:
    net, (x, _) = model("GRU"), inputs(T=20, B=2)
    with watched() as names:
        use(net, x)
    assert names == []


def test_a_compiler_sees_operators_of_one_direction() -> None:
    net, (x, _) = model("GRU").requires_grad_(False), inputs(T=20, B=2)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    expected = net(x)[0]
    found = torch.compile(net, backend=backend, fullgraph=True)(x)[0]
    assert seen.count("rnnlm_kernels.gru.default") == 2
    torch.testing.assert_close(found, expected)


# --- autograd ------------------------------------------------------------------------------------


def small(kind: str, **options: Any) -> tuple[torch.nn.Module, Tensor]:
    name, own = KINDS[kind]
    torch.manual_seed(0)
    make = getattr(rnnlm_kernels.nn, name)
    net = make(2, 3, bidirectional=True, dtype=torch.float64, backend="cpu", **own, **options)
    return net, torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)


def as_function(net: torch.nn.Module) -> Callable[..., Any]:
    names = [name for name, _ in net.named_parameters()]

    def function(x: Tensor, *weights: Tensor) -> list[Tensor]:
        output, states = torch.func.functional_call(net, dict(zip(names, weights, strict=True)), x)
        return [output, *(states if isinstance(states, tuple) else (states,))]

    return function


@every_kind
def test_first_and_second_derivatives(kind: str) -> None:
    net, x = small(kind)
    arguments = (x, *net.parameters())
    with watched() as names:
        assert torch.autograd.gradcheck(as_function(net), arguments)
    assert any(name.endswith("_backward") for name in names)
    assert torch.autograd.gradgradcheck(as_function(net), arguments)


@every_kind
def test_a_graph_of_the_gradients_comes_from_the_operators(kind: str) -> None:
    net, x = small(kind)
    results = run(net, x, None)
    leaves = [x, *net.parameters()]
    plain = torch.autograd.grad(results, leaves, slopes(results), retain_graph=True)
    with watched() as names:
        grads = torch.autograd.grad(results, leaves, slopes(results), create_graph=True)
    assert names == []
    assert all(grad.requires_grad for grad in grads)
    assert_equal([g.detach() for g in grads], list(plain))


@every_kind
def test_several_gradients_at_once_are_those_of_one_after_the_other(kind: str) -> None:
    net, x = small(kind)
    output, leaves = net(x)[0], [x, *net.parameters()]
    batched = torch.randn(3, *output.shape, dtype=torch.float64)
    found = torch.autograd.grad(output, leaves, batched, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(output, leaves, one, retain_graph=True) for one in batched]
    for one, others in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(others))


@every_kind
def test_a_direction_without_a_gradient_is_left_out(kind: str) -> None:
    net, x = small(kind)
    weights = dict(net.named_parameters())
    _, states = net(x)
    final = (states[0] if isinstance(states, tuple) else states)[0]  # of the forward direction
    with in_turn():
        _, expected_states = net(x)
    expected_final = (
        expected_states[0] if isinstance(expected_states, tuple) else expected_states
    )[0]
    arguments = {"allow_unused": True}
    found = torch.autograd.grad(final.sum(), weights.values(), **arguments)
    expected = torch.autograd.grad(expected_final.sum(), weights.values(), **arguments)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("wanted", ["weight_hh", "bias_ih", "weight_ih_l0_reverse", "none but x"])
@every_kind
def test_gradients_of_some_tensors_alone(kind: str, wanted: str) -> None:
    net, x = small(kind)
    x = x.detach()
    for name, weight in net.named_parameters():
        weight.requires_grad_(wanted in name)
    x.requires_grad_(wanted == "none but x")
    leaves = [t for t in (x, *net.parameters()) if t.requires_grad]

    def grads() -> list[Tensor]:
        results = run(net, x, None)
        return list(torch.autograd.grad(results, leaves, slopes(results)))

    with in_turn():
        expected = grads()
    assert_equal(grads(), expected)


@every_kind
def test_hooks_and_checkpoints_of_what_is_saved(kind: str) -> None:
    net, (x, _) = model(kind), inputs(T=20, B=2)
    leaves = list(net.parameters())
    output = net(x)[0]
    expected = torch.autograd.grad(output, leaves, slopes([output]))
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    with watched() as names:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = net(x)[0]
        found = torch.autograd.grad(output, leaves, slopes([output]))
        assert packed
        assert_equal(list(found), list(expected))
        output = checkpoint(net, x, use_reentrant=False)[0]
        output.backward(*slopes([output]))
    assert_equal([w.grad for w in leaves], list(expected))
    assert len(names) == 5


def test_a_weight_that_was_changed_meanwhile_is_refused() -> None:
    net, (x, _) = model("GRU"), inputs(T=20, B=2)
    output = net(x)[0]
    with torch.no_grad():
        net.weight_hh_l0_reverse.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_what_an_operator_refuses_it_refuses_in_its_words() -> None:
    x, h0 = torch.randn(5, 9, 24), torch.zeros(2, 9, 24)
    good, bad = torch.zeros(72, 24), torch.zeros(72, 23)
    weights = [(good, good, None, None, None), (bad, good, None, None, None)]
    said = []
    for turn in (True, False):
        with in_turn() if turn else watched(), pytest.raises(RuntimeError) as caught:
            functional.gru(x, h0, weights, bidirectional=True, backend="cpu")
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "w_ih" in said[0]
