"""Inference calls of one layer that look like one before: the same results by a shorter way.

Every test counts which way a call went: ``infer`` is the short one, for calls with a known plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnlm_kernels
from rnnlm_kernels import functional, ops
from rnnlm_kernels.ops import planning

pytest.importorskip("rnnlm_kernels._C")

INPUT, HIDDEN = 6, 20
KINDS = ("LSTM", "GRU")
every_kind = pytest.mark.parametrize("kind", KINDS)

# Constructor arguments of layers that may go the short way.
SHORT = {
    "LSTM": {"kind": "LSTM"},
    "LSTM-no-bias": {"kind": "LSTM", "bias": False},
    "LSTM-projection": {"kind": "LSTM", "proj_size": 5},
    "LSTM-batch-first": {"kind": "LSTM", "batch_first": True},
    "LSTM-low-memory": {"kind": "LSTM", "memory": "low"},
    "GRU": {"kind": "GRU"},
    "GRU-no-bias": {"kind": "GRU", "bias": False},
    "GRU-batch-first": {"kind": "GRU", "batch_first": True},
    "GRU-reset-before": {"kind": "GRU", "reset": "before"},
}
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
STEPS_AND_ROWS = {"one-step": (1, 1), "one-step-rows": (1, 7), "steps-of-one-row": (4, 1)}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The calls that went the short way so far; no plan is known at the start."""
    taken: list[str] = []

    def counted(cell: str, infer: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            taken.append(cell)
            return infer(*args)

        return call

    monkeypatch.delenv("RNNLM_BACKEND", raising=False)
    for cell in (ops.lstm_layer, ops.gru_layer):
        monkeypatch.setattr(cell, "infer", counted(cell.__name__, cell.infer))
    planning.known_plans.clear()
    yield taken
    planning.known_plans.clear()


def layer_of(kind: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(rnnlm_kernels, kind)(INPUT, HIDDEN, dtype=dtype, **options).eval()


def states_of(layer: Any, rows: int | None = 1) -> Any:
    """Initial states; ``rows=None``: unbatched."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    batch = () if rows is None else (rows,)
    dtype = layer.weight_hh_l0.dtype
    h = torch.randn(count, *batch, layer.proj_size or HIDDEN).to(dtype)
    return (h, torch.randn(count, *batch, HIDDEN).to(dtype)) if layer.mode == "LSTM" else h


def flat(result: Any) -> list[Tensor]:
    output, states = result
    return [output, *states] if isinstance(states, tuple) else [output, states]


def assert_same_bits(found: Any, expected: Any) -> None:
    for one, other in zip(flat(found), flat(expected), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


def ordinary(call: Callable[[], Any]) -> Any:
    """The result of a call when nothing is known."""
    planning.known_plans.clear()
    return call()


def known(kind: str, short: list[str], **options: Any) -> tuple[Any, Tensor, Any]:
    """A layer, an input and states of which a call would go the short way."""
    layer = layer_of(kind, **options)
    x, hx = torch.randn(1, 1, INPUT), states_of(layer)
    with torch.no_grad():
        layer(x, hx)
        assert not short
        layer(x, hx)
        assert len(short) == 1
    short.clear()
    return layer, x, hx


# --- the same results -----------------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False], ids=["states", "no-states"])
@pytest.mark.parametrize("sizes", STEPS_AND_ROWS.values(), ids=STEPS_AND_ROWS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("options", SHORT.values(), ids=SHORT)
def test_the_short_way_gives_the_same_bits(
    options: dict[str, Any],
    dtype: torch.dtype,
    sizes: tuple[int, int],
    given: bool,
    short: list[str],
) -> None:
    layer = layer_of(**options, dtype=dtype)
    steps, rows = sizes
    for mode in (torch.no_grad, torch.inference_mode):
        shape = (rows, steps, INPUT) if layer.batch_first else (steps, rows, INPUT)
        x = torch.randn(shape).to(dtype)
        hx = states_of(layer, rows) if given else None
        with mode():
            expected = ordinary(lambda: layer(x, hx))  # noqa: B023
            short.clear()
            found = layer(x, hx)
        assert len(short) == 1
        assert_same_bits(found, expected)
        assert all(t.is_inference() == (mode is torch.inference_mode) for t in flat(found))


@every_kind
def test_unbatched_input_goes_the_short_way(kind: str, short: list[str]) -> None:
    layer = layer_of(kind)
    x, hx = torch.randn(1, INPUT), states_of(layer, rows=None)
    with torch.no_grad():
        expected = layer(x, hx)
        assert_same_bits(layer(x, hx), expected)
    assert len(short) == 1


@every_kind
@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bidirectional": True}], ids=str)
def test_several_layers_or_directions_go_the_ordinary_way(
    kind: str, options: dict[str, Any], short: list[str]
) -> None:
    layer = layer_of(kind, **options)
    x, hx = torch.randn(1, 1, INPUT), states_of(layer)
    with torch.no_grad():
        assert_same_bits(layer(x, hx), layer(x, hx))
    assert not short


@every_kind
def test_results_have_storages_of_their_own(kind: str, short: list[str]) -> None:
    layer, x, hx = known(kind, short)
    with torch.no_grad():
        tensors = [*flat(layer(x, hx)), *flat(layer(x, hx)), x, *flat((x, hx))[1:]]
    assert len(short) == 2
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


@every_kind
def test_a_state_may_be_fed_back(kind: str, short: list[str]) -> None:
    layer = layer_of(kind)
    steps = torch.randn(5, 1, INPUT)
    with torch.no_grad():
        expected, last = layer(steps)
        hx, outputs = None, []
        for x in steps.split(1):
            output, hx = layer(x, hx)
            outputs.append(output)
    assert len(short) == 3  # not the first one without states, nor the first one with
    assert torch.equal(torch.cat(outputs), expected)
    assert_same_bits((expected, hx), (expected, last))


@pytest.mark.parametrize(
    ("kind", "options", "others"),
    [
        pytest.param("GRU", {"reset": "after"}, {"reset": "before"}, id="reset"),
        pytest.param("GRU", {}, {"batch_first": True}, id="GRU-batch-first"),
        pytest.param("LSTM", {}, {"batch_first": True}, id="LSTM-batch-first"),
        pytest.param("LSTM", {}, {"return_cells": True}, id="return-cells"),
    ],
)
def test_layers_with_other_options_do_not_share_a_plan(
    kind: str, options: dict[str, Any], others: dict[str, Any], short: list[str]
) -> None:
    one, other = layer_of(kind, **options), layer_of(kind, **others)
    x = torch.randn(3, 4, INPUT)
    with torch.no_grad():
        expected = ordinary(lambda: other(x))
        planning.known_plans.clear()
        for _ in range(2):
            one(x)
        assert len(short) == 1
        found = other(x)
    assert len(found) == len(expected)
    assert_same_bits(found[:2], expected[:2])


# --- what a call sees of its tensors --------------------------------------------------------------


def replaced(layer: Any) -> None:
    layer.weight_hh_l0 = torch.nn.Parameter(torch.randn_like(layer.weight_hh_l0))


def assigned_data(layer: Any) -> None:
    layer.weight_ih_l0.data = torch.randn_like(layer.weight_ih_l0)


def written_data(layer: Any) -> None:
    layer.bias_hh_l0.data.clamp_(-0.01, 0.01)


def loaded(layer: Any) -> None:
    layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()})


def stepped(layer: Any) -> None:
    for weight in layer.parameters():
        weight.grad = torch.ones_like(weight)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


CHANGES = (replaced, assigned_data, written_data, loaded, stepped)


@every_kind
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_next_call_sees_changed_weights(
    kind: str, change: Callable[[Any], None], short: list[str]
) -> None:
    layer, x, hx = known(kind, short)
    with torch.no_grad():
        before = layer(x, hx)
        change(layer)
        short.clear()
        found = layer(x, hx)
        assert len(short) == 1
        assert not torch.equal(found[0], before[0])
        assert_same_bits(found, ordinary(lambda: layer(x, hx)))


@every_kind
def test_hooks_run(kind: str, short: list[str]) -> None:
    layer, x, hx = known(kind, short)
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    layer.register_forward_hook(lambda module, args, result: (result[0] + 1, result[1]))
    with torch.no_grad():
        found = layer(x, hx)
        twice = layer.forward(x * 2, hx)
    assert torch.equal(found[0], twice[0] + 1)


@every_kind
def test_a_parametrized_weight_is_computed_anew(kind: str, short: list[str]) -> None:
    layer, x, hx = known(kind, short)
    with torch.no_grad():
        plain = layer(x, hx)
        torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
        layer.parametrizations.weight_hh_l0.original0.mul_(3)
        found = layer(x, hx)
        assert not torch.equal(found[0], plain[0])
        assert_same_bits(found, ordinary(lambda: layer(x, hx)))


@every_kind
def test_functional_call_uses_the_weights_it_is_given(kind: str, short: list[str]) -> None:
    layer, x, hx = known(kind, short)
    others = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
    with torch.no_grad():
        found = torch.func.functional_call(layer, others, (x, hx))
        layer.load_state_dict(others)
        assert_same_bits(found, ordinary(lambda: layer(x, hx)))


# --- who leaves the short way ---------------------------------------------------------------------


@every_kind
def test_gradients_are_wanted(kind: str, short: list[str]) -> None:
    layer, x, hx = known(kind, short)
    layer(x, hx)[0].sum().backward()
    assert not short
    assert all(p.grad is not None for p in layer.parameters())


@every_kind
def test_autocast(kind: str, short: list[str]) -> None:
    layer, x, hx = known(kind, short)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x, hx)[0].dtype == torch.bfloat16
    assert not short


@every_kind
def test_a_compiler(kind: str, short: list[str]) -> None:
    layer, x, hx = known(kind, short)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(x, hx)
        assert not short
        assert_same_bits(found, layer(x, hx))


@every_kind
def test_a_tracer(kind: str, short: list[str]) -> None:
    layer, x, _ = known(kind, short)
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        short.clear()
        traced = torch.jit.trace(layer, (x,), check_trace=False)
    assert not short
    assert "rnnlm_kernels::" in str(traced.inlined_graph)


@every_kind
def test_a_profiler_sees_the_operator(kind: str, short: list[str]) -> None:
    layer, x, hx = known(kind, short)
    with torch.no_grad(), torch.profiler.profile() as profile:
        layer(x, hx)
    assert not short
    assert f"rnnlm_kernels::{kind.lower()}" in {event.key for event in profile.key_averages()}


@every_kind
def test_a_dispatch_mode_sees_the_operator(kind: str, short: list[str]) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    layer, x, hx = known(kind, short)
    with torch.no_grad(), Mode():
        layer(x, hx)
    assert not short
    assert f"rnnlm_kernels.{kind.lower()}.default" in seen


@every_kind
def test_a_functional_transform(kind: str, short: list[str]) -> None:
    layer, x, _ = known(kind, short)
    with torch.no_grad():
        found = torch.func.vmap(lambda x: layer(x)[0])(torch.stack([x, -x]))
        assert not short
        torch.testing.assert_close(found, torch.stack([layer(x)[0], layer(-x)[0]]))


@every_kind
def test_forward_mode_derivatives(kind: str, short: list[str]) -> None:
    layer, x, hx = known(kind, short)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        layer(x, hx)
    assert not short


@every_kind
def test_a_tensor_subclass(kind: str, short: list[str]) -> None:
    class Named(Tensor):
        pass

    layer, x, hx = known(kind, short)
    with torch.no_grad():
        layer(x.as_subclass(Named), hx)
    assert not short


@every_kind
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_another_backend(
    kind: str, way: str, short: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x, hx = known(kind, short)
    if way == "argument":
        layer.backend = "reference"
    else:
        monkeypatch.setenv("RNNLM_BACKEND", "reference")
    with torch.no_grad():
        for _ in range(2):
            layer(x, hx)
    assert not short


def lazily_negated(t: Tensor) -> Tensor:
    return torch._neg_view(-t)


def with_strides(t: Tensor) -> Tensor:
    return torch.stack([t, t], -1)[..., 0]


@every_kind
@pytest.mark.parametrize("what", ["input", "state", "weight"])
@pytest.mark.parametrize("like", [lazily_negated, with_strides], ids=lambda f: f.__name__)
def test_tensors_that_a_kernel_cannot_read(
    kind: str, what: str, like: Callable[[Tensor], Tensor], short: list[str]
) -> None:
    layer, x, hx = known(kind, short)
    with torch.no_grad():
        expected = layer(x, hx)
        short.clear()
        if what == "input":
            x = like(x)
        elif what == "state":
            hx = (like(hx[0]), hx[1]) if kind == "LSTM" else like(hx)
        else:
            layer.weight_hh_l0 = torch.nn.Parameter(like(layer.weight_hh_l0.detach()))
        for _ in range(2):
            assert_same_bits(layer(x, hx), expected)
    assert not short


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        pytest.param(kind, options, name, id=f"{kind}-{name}")
        for kind, options in (("LSTM", {"proj_size": 5}), ("GRU", {}))
        for name in dict(layer_of(kind, **options).named_parameters())
    ],
)
def test_each_weight_counts(
    kind: str, options: dict[str, Any], name: str, short: list[str]
) -> None:
    layer, x, hx = known(kind, short, **options)
    with torch.no_grad():
        expected = layer(x, hx)
        short.clear()
        weight = getattr(layer, name).detach()
        setattr(layer, name, torch.nn.Parameter(with_strides(weight)))
        assert_same_bits(layer(x, hx), expected)
        assert not short
        setattr(layer, name, torch.nn.Parameter(weight[1:].clone()))
        with pytest.raises((RuntimeError, ValueError)):
            layer(x, hx)
    assert not short


@every_kind
def test_batch_first_input_whose_transpose_is_contiguous(kind: str, short: list[str]) -> None:
    """Its copy has the same shape and is contiguous itself; its transpose is not."""
    layer = layer_of(kind, batch_first=True)
    x = torch.randn(3, 4, INPUT).transpose(0, 1)
    with torch.no_grad():
        results = [layer(t) for t in (x, x.clone(), x.contiguous(), x, x.contiguous())]
    assert not short
    for output, states in results:
        assert torch.equal(output, results[0][0])
        assert_same_bits((x, states), (x, results[0][1]))


# --- what is wrong is refused as before -----------------------------------------------------------

WRONG: dict[str, Callable[[Any, Tensor, Any], Any]] = {
    "dtype-of-input": lambda layer, x, hx: layer(x.double(), hx),
    "dtype-of-state": lambda layer, x, hx: layer(x, retyped(hx)),
    "dtype-of-weight": lambda layer, x, hx: with_weight(layer, torch.Tensor.double)(x, hx),
    "shape-of-weight": lambda layer, x, hx: with_weight(layer, lambda w: w[:, 1:].clone())(x, hx),
    "size-of-input": lambda layer, x, hx: layer(x[..., 1:].clone(), hx),
    "dimensions-of-input": lambda layer, x, hx: layer(x[None], hx),
    "rows-of-state": lambda layer, x, hx: layer(x, states_of(layer, rows=2)),
    "no-steps": lambda layer, x, hx: layer(x[:0], hx),
    "backend": lambda layer, x, hx: changed(layer, backend="none")(x, hx),
    "memory": lambda layer, x, hx: changed(layer, memory="none")(x, hx),
}


def retyped(hx: Any) -> Any:
    return tuple(t.double() for t in hx) if isinstance(hx, tuple) else hx.double()


def with_weight(layer: Any, change: Callable[[Tensor], Tensor]) -> Any:
    layer.weight_hh_l0 = torch.nn.Parameter(change(layer.weight_hh_l0.detach()))
    return layer


def changed(layer: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def refusal(call: Callable[[], Any]) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    return caught.type, str(caught.value)


@every_kind
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_call_is_refused_with_the_same_words(
    kind: str, wrong: Callable[[Any, Tensor, Any], Any], short: list[str]
) -> None:
    layer = layer_of(kind)
    x, hx = torch.randn(1, 1, INPUT), states_of(layer)
    state = {name: p.detach().clone() for name, p in layer.named_parameters()}
    with torch.no_grad():
        expected = refusal(lambda: wrong(layer, x, hx))
        layer = layer_of(kind)
        layer.load_state_dict(state)
        for _ in range(2):
            layer(x, hx)
        short.clear()
        for _ in range(2):  # neither is a refused call remembered
            assert refusal(lambda: wrong(layer, x, hx)) == expected
            if "weight" in expected[1] or "w_" in expected[1]:
                break  # the weight has been replaced
    assert not short


@every_kind
def test_states_of_more_layers_than_there_are_give_those_of_the_first(
    kind: str, short: list[str]
) -> None:
    """The function takes what the module would refuse."""
    layer, function = layer_of(kind), getattr(functional, kind.lower())
    x, h = torch.randn(1, 1, INPUT), torch.randn(2, 1, HIDDEN)
    for hx in [(h[:1], h), (h, h[:1]), (h, h)] if kind == "LSTM" else [h]:
        with torch.no_grad():
            for _ in range(2):
                h_n = function(x, hx, layer._weights())[1]
                assert h_n.shape == (1, 1, HIDDEN)
    assert not short


def test_biases_that_are_there_but_not_wanted_are_ignored(short: list[str]) -> None:
    layer = layer_of("GRU")
    x = torch.randn(1, 1, INPUT)
    with torch.no_grad():
        with_biases, without = (
            [functional.gru(x, None, layer._weights(), has_biases=has)[0] for _ in range(2)]
            for has in (True, False)
        )
    assert len(short) == 1
    assert torch.equal(without[0], without[1])
    assert not torch.equal(with_biases[1], without[1])


def test_only_so_many_plans_are_kept() -> None:
    layer = rnnlm_kernels.GRU(1, 1)
    with torch.no_grad():
        for steps in range(1, 1100):
            layer(torch.zeros(steps, 1, 1))
    assert 0 < len(planning.known_plans) <= 1024
