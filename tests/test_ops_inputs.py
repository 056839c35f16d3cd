"""What the operators refuse, and that unusual but legal tensors give what ordinary ones give."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from recurrence_cases import (
    CELLS,
    Layer,
    cotangents,
    layer,
    layer_cases,
    results_and_gradients,
    run_python,
)
from torch import Tensor

import rnnlm_kernels
from rnnlm_kernels import ops

every_cell = pytest.mark.parametrize("cell", CELLS)


def zeros(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(*shape, **{"dtype": torch.float64, **kwargs})


def refused(given: Layer, match: str, error: type[Exception] = RuntimeError) -> None:
    """Eagerly, as an operator call, and with a graph."""
    reset = () if given.cell == "lstm" else (given.options["reset"],)
    cells = (True,) if given.cell == "lstm" else ()
    flags = (given.batch_sizes, *reset, given.reverse, False, *cells, None)
    operator = getattr(torch.ops.rnnlm_kernels, given.cell.removesuffix("-before"))
    with pytest.raises(error, match=match):
        given.call()
    with pytest.raises(error, match=match):
        operator(*given.tensors, *flags)
    if given.get("x").is_floating_point():
        with pytest.raises(error, match=match):
            given.map(lambda t: t.detach().clone().requires_grad_()).call()


# --- refused ------------------------------------------------------------------------------------

# T, B, I, H = 4, 3, 2, 5; G gates
SHAPES = {  # name: (tensor, its wrong shape, what the message says)
    "x-unbatched": ("x", (4, 2), r"dense x \[T, B, I\] should have 3 dimensions, got 2"),
    "x-4d": ("x", (1, 4, 3, 2), "dense x .* 3 dimensions, got 4"),
    "x-no-steps": ("x", (0, 3, 2), "sequence length to be larger than 0"),
    "x-features": ("x", (4, 3, 7), r"w_ih should have shape \[\d+, 7\]"),
    "x-batch": ("x", (4, 9, 2), r"h0 should have shape \[9, 5\]"),
    "h0-rows": ("h0", (2, 5), r"h0 should have shape \[3, 5\], got \[2, 5\]"),
    "h0-one-row-is-not-broadcast": ("h0", (1, 5), "h0 should have shape"),
    "h0-width": ("h0", (3, 6), r"h0 should have shape \[3, 5\], got \[3, 6\]"),
    "h0-layers": ("h0", (2, 3, 5), "h0 should"),
    "w_ih-rows": ("w_ih", (13, 2), "w_ih should have shape"),
    "w_ih-1d": ("w_ih", (13,), "w_ih should have shape"),
    "w_hh-rows": ("w_hh", (13, 5), "w_hh should"),
    "w_hh-width": ("w_hh", (60, 6), "w_hh should"),
    "w_hh-1d": ("w_hh", (60,), "w_hh should"),
    "b_ih": ("b_ih", (5,), "b_ih should have shape"),
    "b_ih-2d": ("b_ih", (1, 15), "b_ih should have shape"),
    "b_hh": ("b_hh", (4,), "b_hh should have shape"),
}
LSTM_SHAPES = {
    "c0-rows": ("c0", (2, 5), r"c0 should have shape \[3, 5\], got \[2, 5\]"),
    "c0-width": ("c0", (3, 4), r"c0 should have shape \[3, 5\], got \[3, 4\]"),
    "c0-layers": ("c0", (1, 3, 5), "c0 should have shape"),
    "w_hr-width": ("w_hr", (5, 6), r"w_hr should have shape \[5, 5\], got \[5, 6\]"),
    "w_hr-1d": ("w_hr", (5,), "w_hr should have shape"),
}


@pytest.mark.parametrize(("name", "shape", "match"), SHAPES.values(), ids=SHAPES)
@every_cell
def test_wrong_shapes_are_named(cell: str, name: str, shape: tuple, match: str) -> None:
    refused(layer(cell).having(**{name: zeros(*shape)}), match)


@pytest.mark.parametrize(("name", "shape", "match"), LSTM_SHAPES.values(), ids=LSTM_SHAPES)
def test_wrong_shapes_of_the_lstms_own_tensors_are_named(name, shape, match) -> None:
    refused(layer("lstm").having(**{name: zeros(*shape)}), match)


@pytest.mark.parametrize(("name", "shape", "match"), [*SHAPES.values()][:8], ids=[*SHAPES][:8])
def test_fake_tensors_are_checked_alike(name: str, shape: tuple, match: str) -> None:
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        given = layer("lstm").having(**{name: zeros(*shape)})
        with pytest.raises(RuntimeError, match=match):
            given.call()


@every_cell
def test_a_projected_input_of_another_width_or_with_a_bias_is_named(cell: str) -> None:
    given = layer(cell, projected=True)
    width = len(given.get("w_hh"))
    match = rf"without w_ih, x should be \dH = {width} wide, got \[4, 3, 7\]"
    refused(given.having(x=zeros(4, 3, 7)), match)
    refused(given.having(b_ih=zeros(width)), "without w_ih there should be no b_ih")


@every_cell
def test_another_dtype_is_named(cell: str) -> None:
    given = layer(cell, **({"proj": 2} if cell == "lstm" else {}))
    for name in given.names[1:]:
        wrong = given.having(**{name: given.get(name).float()})
        match = rf"{name} should have the dtype of x \(torch.float64\), got torch.float32"
        refused(wrong, match, ValueError)


@every_cell
def test_another_device_is_named(cell: str) -> None:
    given = layer(cell, **({"proj": 2} if cell == "lstm" else {}))
    for name in given.names[1:]:
        wrong = given.having(**{name: given.get(name).to("meta")})
        with pytest.raises(RuntimeError, match=rf"{name} should be on the device of x \(cpu\)"):
            wrong.call()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@every_cell
def test_only_floating_point_is_taken(cell: str, dtype: torch.dtype) -> None:
    given = layer(cell)
    refused(given.to(dtype), "x should be a floating-point tensor", ValueError)


BATCH_SIZES = {  # of a packed x of 7 rows and an h0 of 3 rows, rightly [3, 2, 2]
    "int32": (torch.tensor([3, 2, 2], dtype=torch.int32), "batch_sizes should be an int64"),
    "float": (torch.tensor([3.0, 2.0, 2.0]), "batch_sizes should be an int64"),
    "device": (torch.tensor([3, 2, 2], device="meta"), "batch_sizes .* on the CPU, got .* meta"),
    "2d": (torch.tensor([[3, 2, 2]]), r"batch_sizes should be \[T\] with T > 0, got \[1, 3\]"),
    "no-steps": (torch.zeros(0, dtype=torch.int64), r"batch_sizes should be \[T\] with T > 0"),
    "increasing": (torch.tensor([3, 1, 3]), "batch_sizes should be positive and never increase"),
    "zero": (torch.tensor([3, 4, 0]), "batch_sizes should be positive"),
    "ends-in-zero": (torch.tensor([3, 3, 1, 0]), "batch_sizes should be positive"),
    "negative": (torch.tensor([3, 3, 2, -1]), "batch_sizes should be positive"),
    "sum": (torch.tensor([3, 2, 1]), r"x should have sum\(batch_sizes\) = 6 rows, got 7"),
    "first": (torch.tensor([2, 2, 2, 1]), r"h0 should have batch_sizes\[0\] = 2 rows, got 3"),
}


@pytest.mark.parametrize(("batch_sizes", "match"), BATCH_SIZES.values(), ids=BATCH_SIZES)
@every_cell
def test_wrong_batch_sizes_are_named(cell: str, batch_sizes: Tensor, match: str) -> None:
    right = layer(cell, lengths=(3, 3, 1))
    refused(Layer(cell, right.tensors, batch_sizes, False), match)


def test_packed_input_with_time_and_batch_is_refused() -> None:
    given = layer("gru", lengths=(3, 2)).having(x=zeros(5, 2, 2))
    refused(given, r"packed x \[N, I\] should have 2 dimensions, got 3")


def test_unknown_resets_and_backends_are_named() -> None:
    given = layer("gru")
    with pytest.raises(ValueError, match=r"reset should be .*after.*before.*'middle'"):
        ops.gru(*given.tensors, reset="middle")
    with pytest.raises(rnnlm_kernels.BackendError, match=r"'fast' is not a backend; .*'cpu'"):
        ops.gru(*given.tensors, backend="fast")


# --- taken --------------------------------------------------------------------------------------

LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "offset": lambda t: torch.cat([t.flatten().new_full((3,), math.nan), t.flatten()])[3:].view(
        t.shape
    ),
}


def assert_same_results(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("lengths", [None, (3, 2, 1)], ids=["dense", "packed"])
@every_cell
def test_the_layout_of_a_tensor_in_memory_is_of_no_account(cell, lengths, layout) -> None:
    given = layer(cell, lengths=lengths, **({"proj": 2} if cell == "lstm" else {}))
    expected = results_and_gradients(given, given.call)
    found = results_and_gradients(
        given, lambda *tensors: given.call(*(None if t is None else layout(t) for t in tensors))
    )
    assert_same_results(found, expected)
    with torch.no_grad():
        for mine, other in zip(given.map(layout).call(), given.call(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@every_cell
def test_zero_stride_tensors(cell: str) -> None:
    """One row for the batch, one vector for all steps, one number for a bias."""
    given = layer(cell)
    expanded = given.having(
        x=given.get("x")[:1, :1].expand(4, 3, 2),
        h0=given.get("h0")[:1].expand(3, 5),
        b_ih=given.get("b_ih")[:1].expand(given.get("b_ih").shape),
    )
    if cell == "lstm":
        expanded = expanded.having(c0=given.get("c0")[:1, :1].expand(3, 5))
    assert expanded.get("x").stride() == (0, 0, 1)
    for mine, other in zip(expanded.call(), expanded.refer(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    assert_same_results(
        results_and_gradients(expanded, expanded.call),
        results_and_gradients(expanded, expanded.refer),
    )


@every_cell
def test_batch_sizes_may_be_strided(cell: str) -> None:
    packed = layer(cell, lengths=(3, 2, 1))
    strided = Layer(cell, packed.tensors, packed.batch_sizes.repeat_interleave(2)[::2], False)
    for mine, other in zip(strided.call(), packed.call(), strict=True):
        assert torch.equal(mine, other)


@every_cell
def test_lazily_negated_tensors(cell: str) -> None:
    """Views such as ``z.conj().imag`` are negated only when read."""
    given = layer(cell)
    for name in given.names:
        if given.get(name) is None:
            continue
        lazy = given.having(**{name: torch._neg_view(given.get(name))})
        negated = given.having(**{name: -given.get(name)})
        for mine, other in zip(lazy.call(), negated.call(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12, msg=name)


@every_cell
def test_a_tensor_subclass_in_any_place_reaches_its_own_code(cell: str) -> None:
    """In a process of its own: such a tensor has no memory that a kernel could read."""
    run_python(
        f"""
import torch
from recurrence_cases import layer

class Wrapper(torch.Tensor):
    @staticmethod
    def __new__(cls, tensor):
        return torch.Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype)

    def __init__(self, tensor):
        self.tensor = tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        seen.append(func)
        args = [a.tensor if isinstance(a, cls) else a for a in args]
        return func(*args, **(kwargs or dict()))

given = layer({cell!r})
expected = given.call()[0]
for name in given.names:
    if given.get(name) is not None:
        seen = []
        output = given.having(**{{name: Wrapper(given.get(name))}}).call()[0]
        assert torch.equal(output, expected), name
        assert "rnnlm_kernels" in str(seen), name
"""
    )


@pytest.mark.parametrize("lengths", [None, (3, 2, 1)], ids=["dense", "packed"])
@every_cell
def test_gradients_may_be_expanded_or_transposed(cell: str, lengths: Any) -> None:
    given = layer(cell, lengths=lengths).leaves()
    for loss in (
        lambda outputs: sum(o.sum() for o in outputs),
        lambda outputs: sum((o.transpose(0, 1).reshape(-1).sin()).sum() for o in outputs),
    ):
        found = torch.autograd.grad(loss(given.call()), given.present)
        expected = torch.autograd.grad(loss(given.refer()), given.present)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@every_cell
def test_an_empty_batch_gives_empty_results_and_zero_weight_gradients(cell, backend) -> None:
    given = layer(cell, B=0, **({"proj": 2} if cell == "lstm" else {}))
    results = results_and_gradients(given, lambda *t: given.call(*t, backend=backend))
    assert results["output"].shape == (4, 0, 2 if cell == "lstm" else 5)
    assert results["h_n"].shape == given.get("h0").shape
    for name in given.names:
        grad, tensor = results[f"grad {name}"], given.get(name)
        assert grad.shape == tensor.shape
        assert not grad.any()


@every_cell
def test_no_features_leave_the_bias_to_speak(cell: str) -> None:
    given = layer(cell, I=0)
    assert_same_results(
        results_and_gradients(given, given.call), results_and_gradients(given, given.refer)
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@every_cell
def test_nan_and_infinity_come_out_where_the_reference_has_them(cell: str, value: float) -> None:
    given = layer(cell, T=3)
    for name in given.names:
        if given.get(name) is None:
            continue
        spoiled = given.get(name).clone()
        spoiled.view(-1)[1] = value
        problem = given.having(**{name: spoiled})
        found = results_and_gradients(problem, problem.call)
        for key, expected in results_and_gradients(problem, problem.refer).items():
            assert torch.equal(found[key].isnan(), expected.isnan()), f"{key} of {name}"
            torch.testing.assert_close(found[key], expected, equal_nan=True, msg=f"{key} of {name}")


@every_cell
def test_results_share_no_memory_with_inputs_or_each_other(cell: str) -> None:
    for grad in (False, True):
        given = layer(cell, T=1, B=1)
        given = given.leaves() if grad else given
        tensors = [*given.call(), *given.present]
        addresses = [t.untyped_storage().data_ptr() for t in tensors]
        assert len(set(addresses)) == len(addresses)


@every_cell
def test_gradients_share_no_memory_with_each_other(cell: str) -> None:
    """Both biases have the same gradient, and whoever scales one in place must not scale two."""
    given = layer(cell, T=1, B=1).leaves()
    outputs = given.call()
    grads = torch.autograd.grad(outputs, given.present, cotangents(outputs))
    addresses = [g.untyped_storage().data_ptr() for g in grads]
    assert len(set(addresses)) == len(addresses)


@every_cell
def test_inputs_are_left_as_they_were(cell: str) -> None:
    given = layer(cell, **({"proj": 2} if cell == "lstm" else {})).leaves()
    before = [t.detach().clone() for t in given.present]
    outputs = given.call()
    grads = cotangents(outputs)
    kept = [g.clone() for g in grads]
    torch.autograd.grad(outputs, given.present, grads)
    assert all(torch.equal(a, b) for a, b in zip(before, given.present, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cells_have_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    given = layer("lstm", dtype=dtype).leaves()
    outputs = given.call(backend="cpu")
    assert {o.dtype for o in outputs} == {dtype}
    grads = torch.autograd.grad(outputs, given.present, cotangents(outputs))
    assert {g.dtype for g in grads} == {dtype}
    assert ops.lstm(*given.tensors)[3] is None


# --- states as a one-layer module holds them ----------------------------------------------------


def with_layer_dimension(given: Layer) -> Layer:
    states = ("h0", "c0") if given.cell == "lstm" else ("h0",)
    return given.having(**{name: given.get(name).unsqueeze(0) for name in states})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("cell", "variant"), layer_cases())
def test_a_leading_layer_dimension_of_the_states_changes_shapes_only(
    cell: str, variant: dict[str, Any], backend: str
) -> None:
    plain = layer(cell, **variant)
    lifted = with_layer_dimension(plain)

    def run(of: Layer) -> dict[str, Tensor]:
        return results_and_gradients(of, lambda *tensors: of.call(*tensors, backend=backend))

    expected, found = run(plain), run(lifted)
    assert found["h_n"].shape == (1, *expected["h_n"].shape)
    for name, value in expected.items():
        assert torch.equal(found[name].reshape(value.shape), value), name


@every_cell
def test_second_derivatives_and_transforms_take_a_leading_layer_dimension(cell: str) -> None:
    given = with_layer_dimension(layer(cell, T=2, B=2, I=2, H=2)).leaves()
    assert torch.autograd.gradgradcheck(given.of_present(given.call), given.present)
    jacobian = torch.func.jacrev(given.of_present(lambda *t: given.call(*t)[1]))(*given.present)
    assert jacobian.shape == (*given.get("h0").shape, *given.get("x").shape)


@pytest.mark.parametrize(("cell", "variant"), layer_cases())
def test_a_gradient_does_not_depend_on_which_others_are_asked_for(
    cell: str, variant: dict[str, Any]
) -> None:
    """Among them: with no gradient of the initial states the kernels stop a product earlier."""
    leaves = layer(cell, **variant).leaves()
    outputs = leaves.call(backend="cpu")
    everything = torch.autograd.grad(outputs, leaves.present, cotangents(outputs))
    names = [n for n, t in zip(leaves.names, leaves.tensors, strict=True) if t is not None]
    for name, expected in zip(names, everything, strict=True):
        alone = leaves.map(Tensor.detach)
        alone = alone.having(**{name: alone.get(name).requires_grad_()})
        outputs = alone.call(backend="cpu")
        (found,) = torch.autograd.grad(outputs, alone.get(name), cotangents(outputs))
        assert torch.equal(found, expected), name
