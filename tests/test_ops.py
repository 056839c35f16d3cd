"""The operators under autograd, torch.compile and torch.func, on the real kernels.

What they refuse and how they treat unusual tensors: test_ops_inputs.py.
"""

from __future__ import annotations

from collections.abc import Iterator
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
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from rnnlm_kernels import ops

every_cell = pytest.mark.parametrize("cell", CELLS)
every_case = pytest.mark.parametrize(("cell", "options"), layer_cases())


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operator(cell: str, suffix: str = "") -> Any:
    """``torch.ops.rnnlm_kernels.lstm`` and so on."""
    return getattr(torch.ops.rnnlm_kernels, cell.removesuffix("-before") + suffix).default


def arguments(given: Layer, *, save: bool) -> tuple[Any, ...]:
    """Positional arguments of the registered forward operator."""
    if given.cell == "lstm":
        return (*given.tensors, given.batch_sizes, given.reverse, save, True, None)
    reset = given.options["reset"]
    return (*given.tensors, given.batch_sizes, reset, given.reverse, save, None)


def backward_arguments(given: Layer) -> tuple[Any, ...]:
    """Positional arguments of the registered backward operator, after a saving forward."""
    with torch.no_grad():
        outputs = operator(given.cell)(*arguments(given, save=True))
    grads = cotangents(outputs[:-1])
    needs = [t is not None for t in given.tensors]
    if given.cell == "lstm":
        kept, flags = (outputs[0], outputs[3], outputs[4]), (given.reverse, True, None)
    else:
        kept, flags = (outputs[0], outputs[2]), (given.options["reset"], given.reverse, None)
    return (*grads, *given.tensors, given.batch_sizes, *kept, *flags, needs)


# --- opcheck ------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [True, False], ids=["save", "no-save"])
@every_case
def test_opcheck_of_the_forward_operators(cell: str, options: dict, save: bool) -> None:
    given = layer(cell, **options, dtype=torch.float32).leaves()
    torch.library.opcheck(operator(cell), arguments(given, save=save))


@every_case
def test_opcheck_of_the_backward_operators(cell: str, options: dict) -> None:
    given = layer(cell, **options, dtype=torch.float32)
    torch.library.opcheck(operator(cell, "_backward"), backward_arguments(given))


@every_case
def test_opcheck_of_differentiating_the_backward_operators(cell: str, options: dict) -> None:
    """Tracing it is left out for packed input, whose reference reads the row counts, and elsewhere
    for speed: torch.compile itself refuses second derivatives."""
    given = layer(cell, **options, dtype=torch.float32).leaves()
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not options:
        checks.append("test_aot_dispatch_dynamic")
    args = backward_arguments(given)
    torch.library.opcheck(operator(cell, "_backward"), args, test_utils=checks)


@every_cell
def test_opcheck_without_cells_and_without_gradients(cell: str) -> None:
    args = list(arguments(layer(cell, dtype=torch.bfloat16), save=False))
    if cell == "lstm":
        args[-2] = False  # return_cells
    torch.library.opcheck(operator(cell), tuple(args))


# --- derivatives --------------------------------------------------------------------------------


def on_kernels(given: Layer) -> Any:
    return given.of_present(lambda *tensors: given.call(*tensors, backend="cpu"))


@every_case
def test_gradcheck(cell: str, options: dict) -> None:
    given = layer(cell, H=4, **options).leaves()
    assert torch.autograd.gradcheck(on_kernels(given), given.present)


@every_case
def test_gradgradcheck(cell: str, options: dict) -> None:
    given = layer(cell, I=2, H=3, **{**options, **({"proj": 2} if "proj" in options else {})})
    given = given.leaves()
    assert torch.autograd.gradgradcheck(on_kernels(given), given.present)


@every_cell
def test_third_derivatives(cell: str) -> None:
    given = layer(cell, T=2, B=1, I=1, H=1).leaves()

    def gradient(*tensors: Tensor) -> tuple[Tensor, ...]:
        output = on_kernels(given)(*tensors)[0]
        return torch.autograd.grad(output.sin().sum(), tensors, create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, given.present)


@every_case
def test_every_gradient_equals_the_references(cell: str, options: dict) -> None:
    given = layer(cell, H=19, **options)
    found = results_and_gradients(given, lambda *t: given.call(*t, backend="cpu"))
    for name, value in results_and_gradients(given, given.refer).items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@every_case
def test_any_single_result_can_be_differentiated(cell: str, options: dict, backend: str) -> None:
    """The gradients of the other results are undefined then."""
    given = layer(cell, **options).leaves()
    for index in range(4 if cell == "lstm" else 2):
        result, expected = given.call(backend=backend)[index], given.refer()[index]
        (weight,) = cotangents([expected])
        found = torch.autograd.grad((result * weight).sum(), given.present)
        wanted = torch.autograd.grad(
            (expected * weight).sum(), given.present, allow_unused=True, materialize_grads=True
        )
        for mine, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@every_cell
def test_gradients_of_one_tensor_equal_those_taken_together(cell: str, backend: str) -> None:
    options = {"proj": 3} if cell == "lstm" else {}
    given = layer(cell, **options)
    together = results_and_gradients(given, lambda *t: given.call(*t, backend=backend))
    for name in given.names:
        wanted = given.get(name).clone().requires_grad_()
        outputs = given.having(**{name: wanted}).call(backend=backend)
        assert all(o.requires_grad for o in outputs)
        (grad,) = torch.autograd.grad(outputs, wanted, cotangents(outputs))
        assert torch.equal(grad, together[f"grad {name}"]), name


@pytest.mark.parametrize("cells", [True, False], ids=["cells", "no-cells"])
@every_case
def test_backward_makes_up_for_what_forward_did_not_save(
    cell: str, options: dict, cells: bool
) -> None:
    """As for a layer that was traced or exported, and then trained after all."""
    given = layer(cell, **options).leaves()
    found = []
    for save in (False, True):
        args = list(arguments(given, save=save))
        if cell == "lstm":
            args[-2] = cells  # return_cells
        outputs = operator(cell)(*args)
        assert (outputs[-1].numel() > 0) == save
        outputs = outputs[: 3 if cell == "lstm" else 2]
        found.append(torch.autograd.grad(outputs, given.present, cotangents(outputs)))
    for made_up, saved in zip(*found, strict=True):
        torch.testing.assert_close(made_up, saved, rtol=1e-12, atol=1e-12)


@every_cell
def test_gradients_accumulate_over_a_tensor_used_twice(cell: str) -> None:
    """One tensor as both biases and both states."""
    given = layer(cell, I=5, H=5).leaves()
    shared = given.having(b_hh=given.get("b_ih"), w_hh=given.get("w_ih"))
    if cell == "lstm":
        shared = shared.having(c0=given.get("h0"))
    inputs = [given.get(name) for name in ("x", "h0", "w_ih", "b_ih")]
    outputs, expected = shared.call(backend="cpu"), shared.refer()
    found = torch.autograd.grad(outputs, inputs, cotangents(outputs))
    wanted = torch.autograd.grad(expected, inputs, cotangents(expected))
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@every_cell
def test_changing_a_saved_tensor_before_backward_is_noticed(cell: str) -> None:
    for index in range(3 if cell == "lstm" else 1):
        given = layer(cell).leaves()
        outputs = given.call(backend="cpu")
        changed = (outputs[0], given.get("w_hh"), outputs[-1])[index]
        with torch.no_grad():
            changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(outputs[0].sum(), given.get("x"))


# --- compile ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@every_cell
def test_one_compilation_serves_any_length_and_batch(cell: str, training: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    weights = layer(cell, I=3, H=7).leaves()

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def compiled(*tensors: Tensor) -> tuple[Tensor, ...]:
        return weights.call(*tensors, backend="cpu")

    for T, B in ((4, 5), (9, 2), (17, 11)):
        data = layer(cell, T, B, 3, 7, seed=T).leaves()
        names = [n for n in data.names if n.startswith(("w_", "b_"))]
        given = data.having(**{name: weights.get(name) for name in names})
        with torch.set_grad_enabled(training):
            outputs, expected = compiled(*given.tensors), given.call(backend="cpu")
        for mine, other in zip(outputs, expected, strict=True):
            assert torch.equal(mine, other)
        if training:
            found = torch.autograd.grad(outputs, given.present, cotangents(outputs))
            wanted = torch.autograd.grad(expected, given.present, cotangents(expected))
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("_fresh_dynamo")
@every_cell
def test_compiled_packed_input_equals_eager(cell: str) -> None:
    given = layer(cell, lengths=(4, 3, 1), reverse=True)
    compiled = torch.compile(given.call, fullgraph=True, backend="aot_eager")
    found = results_and_gradients(given, compiled)
    for name, value in results_and_gradients(given, given.call).items():
        torch.testing.assert_close(found[name], value, rtol=1e-13, atol=1e-13, msg=name)


# --- torch.func and forward mode ----------------------------------------------------------------


@every_cell
def test_func_grad_equals_backward(cell: str) -> None:
    given = layer(cell).leaves()

    def loss(x: Tensor) -> Tensor:
        return given.having(x=x).call()[0].sin().sum()

    (expected,) = torch.autograd.grad(loss(given.get("x")), given.get("x"))
    torch.testing.assert_close(torch.func.grad(loss)(given.get("x")), expected)


@every_cell
def test_vmap_equals_a_loop(cell: str) -> None:
    given = layer(cell)
    xs = torch.stack([given.get("x") * factor for factor in (1, 2, -1)])
    together = torch.vmap(lambda x: given.having(x=x).call())(xs)
    for index, x in enumerate(xs):
        for whole, alone in zip(together, given.having(x=x).call(), strict=True):
            torch.testing.assert_close(whole[index], alone)


def tangent_by_differences(given: Layer, tangent: Tensor) -> Tensor:
    step = 1e-6
    after, before = (
        given.having(x=given.get("x") + sign * step * tangent).refer()[0] for sign in (1, -1)
    )
    return (after - before) / (2 * step)


@every_cell
def test_func_jvp_equals_differences(cell: str) -> None:
    given = layer(cell)
    tangent = torch.ones_like(given.get("x"))
    _, found = torch.func.jvp(lambda x: given.having(x=x).call()[0], (given.get("x"),), (tangent,))
    torch.testing.assert_close(found, tangent_by_differences(given, tangent), rtol=1e-6, atol=1e-8)


@every_cell
def test_a_dual_tensor_never_loses_its_tangent_silently(cell: str) -> None:
    """Forward mode without torch.func: the tangent is right, or the call says it has none."""
    given = layer(cell)
    tangent = torch.ones_like(given.get("x"))
    with forward_ad.dual_level():
        dual = given.having(x=forward_ad.make_dual(given.get("x"), tangent))
        try:
            found = forward_ad.unpack_dual(dual.call()[0]).tangent
        except NotImplementedError:
            return
    assert found is not None
    torch.testing.assert_close(found, tangent_by_differences(given, tangent), rtol=1e-6, atol=1e-8)


# --- the way around the dispatcher --------------------------------------------------------------


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@every_case
def test_eager_calls_have_the_bits_of_the_operators(cell: str, options: dict) -> None:
    given = layer(cell, **options)
    through = operator(cell)(*arguments(given, save=False))[:-1]
    for mine, other in zip(given.call(), through, strict=True):
        assert torch.equal(mine, other)
    eager = results_and_gradients(given, given.call)

    def registered(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        return operator(cell)(*arguments(Layer(cell, tensors, *given_rest), save=True))[:-1]

    given_rest = (given.batch_sizes, given.reverse)
    for name, value in results_and_gradients(given, registered).items():
        assert torch.equal(eager[name], value), name


@every_cell
def test_eager_calls_do_go_around_the_dispatcher(cell: str, monkeypatch) -> None:
    """Else the test above compares the operators with themselves."""
    given = layer(cell)

    def direct(*args: Any) -> None:
        raise InterruptedError

    room = ops.lstm_layer if cell == "lstm" else ops.gru_layer
    monkeypatch.setattr(room, "forward", direct)
    with pytest.raises(InterruptedError):
        given.call()


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@every_cell
def test_a_dispatch_mode_sees_the_operators(cell: str, grad: bool) -> None:
    given = layer(cell).leaves()
    with Recorder() as recorder, torch.set_grad_enabled(grad):
        output = given.call()[0]
        if grad:
            output.sum().backward()
    assert operator(cell) in recorder.seen
    assert (operator(cell, "_backward") in recorder.seen) == grad


@every_cell
def test_fake_tensors_stay_fake(cell: str) -> None:
    given = layer(cell)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        outputs = given.call()
        fake = torch._subclasses.FakeTensor
        assert all(isinstance(o, fake) for o in outputs)
    assert [o.shape for o in outputs] == [o.shape for o in given.call()]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@every_cell
def test_a_profiler_names_the_operators(cell: str, grad: bool) -> None:
    given = layer(cell).leaves()
    with profile() as profiler, torch.set_grad_enabled(grad):
        output = given.call()[0]
        if grad:
            output.sum().backward()
    names = {event.name for event in profiler.events()}
    name = f"rnnlm_kernels::{cell.removesuffix('-before')}"
    assert name in names
    assert (f"{name}_backward" in names) == grad
