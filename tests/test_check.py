"""The correctness rule: it passes what is right, and nothing that is wrong in any one place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rnnlm_kernels import BackendError, check
from rnnlm_kernels.bench.contenders import PLAIN, TORCH, plain_layer, torch_layer
from rnnlm_kernels.bench.workload import CELLS, DTYPES, Setup, Workload, setup
from rnnlm_kernels.check import Judge, check_all, check_problem, default_problems, errors, limit
from rnnlm_kernels.dispatch import backends

AVAILABLE = [name for name, module in backends().items() if module.available()[0]]


def tiny(cell: str = "lstm", **changes: object) -> Workload:
    sizes = {"seq_len": 6, "batch": 3, "input_size": 5, "hidden_size": 7, "mode": "training"}
    return Workload(cell=cell, **{**sizes, **changes})  # type: ignore[arg-type]


class Altered(nn.Module):
    """torch's layer with its output sent through a function: a kernel with one fault."""

    def __init__(self, layer: nn.Module, alter: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.alter = alter
        for name, weight in layer.named_parameters():
            self.register_parameter(name, weight)
        self.inner = [layer]  # in a list, so that the parameters are not registered twice

    def forward(self, x: Tensor, state: object) -> tuple[Tensor, object]:
        output, final = self.inner[0](x, state)
        return self.alter(output), final


def altered(alter: Callable[[Tensor], Tensor]) -> Callable[[Setup], nn.Module]:
    return lambda inputs: Altered(torch_layer(inputs), alter)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * 1.01


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_every_backend_passes(cell: str, dtype: str, backend: str) -> None:
    result = check_problem(tiny(cell, dtype=dtype), backend)
    assert result.ok, result.summary()


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("cell", CELLS)
def test_every_backend_passes_packed_stacked_bidirectional(cell: str, backend: str) -> None:
    workload = tiny(cell, lengths="packed", num_layers=2, bidirectional=True, bias=False)
    result = check_problem(workload, backend)
    assert result.ok, result.summary()


def test_outputs_states_and_every_gradient_are_compared() -> None:
    names = {row.name for row in Judge(tiny("lstm")).check(torch_layer, TORCH).rows}
    assert {"output", "h_n", "c_n", "output (no_grad)", "h_n (no_grad)", "c_n (no_grad)"} <= names
    assert {f"grad {leaf}" for leaf in ("x", "h0", "c0", "weight_ih_l0", "bias_hh_l0")} <= names


def test_inference_compares_outputs_only() -> None:
    names = {row.name for row in Judge(tiny(mode="inference")).check(torch_layer, TORCH).rows}
    assert names == {"output", "h_n", "c_n"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_torch_passes_its_own_rule(cell: str, dtype: str) -> None:
    result = Judge(tiny(cell, dtype=dtype)).check(torch_layer, TORCH)
    assert result.comparator == TORCH
    assert result.ok, result.summary()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_relative_error_of_a_few_percent_is_refused(dtype: str) -> None:
    result = Judge(tiny(dtype=dtype)).check(altered(lambda output: output * 1.05), "wrong")
    assert not result.ok
    assert "is wrong" in result.summary()


def test_an_error_in_one_element_is_refused() -> None:
    def spoil(output: Tensor) -> Tensor:
        delta = torch.zeros_like(output)
        delta.view(-1)[-1] = 1e-4
        return output + delta

    failures = Judge(tiny()).check(altered(spoil), "wrong").failures
    assert {row.name for row in failures} == {"output", "output (no_grad)"}


def test_a_right_output_with_a_wrong_gradient_is_refused() -> None:
    result = Judge(tiny()).check(altered(WrongGradient.apply), "wrong")
    assert not result.ok
    assert all(row.name.startswith("grad ") for row in result.failures)


def test_a_missing_gradient_is_refused() -> None:
    class LosesTheGraph(Altered):
        def forward(self, x: Tensor, state: object) -> tuple[Tensor, object]:
            output, final = super().forward(x, state)
            return output.detach(), final.detach()

    result = Judge(tiny("gru")).check(
        lambda inputs: LosesTheGraph(torch_layer(inputs), lambda output: output), "wrong"
    )
    assert all(row.name.startswith("grad ") for row in result.failures)
    assert {row.note for row in result.failures} == {"no gradient"}


@pytest.mark.parametrize(
    ("alter", "note"),
    [
        pytest.param(lambda output: output * float("nan"), "not finite", id="nan"),
        pytest.param(lambda output: output / 0.0, "not finite", id="inf"),
        pytest.param(lambda output: output.double(), "dtype", id="dtype"),
        pytest.param(lambda output: output[:-1], "shape", id="shape"),
    ],
)
def test_what_cannot_be_compared_is_refused(alter: Callable[[Tensor], Tensor], note: str) -> None:
    result = Judge(tiny(mode="inference")).check(altered(alter), "wrong")
    (row,) = result.failures
    assert math.isinf(row.our_error)
    assert note in row.note


@pytest.mark.parametrize("lengths", ["dense", "packed"])
@pytest.mark.parametrize(
    ("cell", "changes"),
    [
        pytest.param("lstm", {}, id="lstm"),
        pytest.param("lstm", {"num_layers": 2, "bidirectional": True}, id="lstm-stacked-bidir"),
        pytest.param("lstm", {"proj_size": 4, "bidirectional": True}, id="lstm-projected"),
        pytest.param("gru", {"num_layers": 2, "bidirectional": True}, id="gru-stacked-bidir"),
        pytest.param("gru", {"bias": False}, id="gru-no-bias"),
    ],
)
def test_plain_pytorch_is_torch_in_float64(cell: str, changes: dict, lengths: str) -> None:
    """The oracle of the GRU that torch lacks is the same code that agrees with torch here."""
    result = Judge(tiny(cell, dtype="float64", lengths=lengths, **changes)).check(
        plain_layer, PLAIN
    )
    assert result.ok, result.summary()


def test_the_gru_that_torch_lacks_is_compared_with_plain_pytorch() -> None:
    assert Judge(tiny("gru-before")).comparator == PLAIN


def test_where_torch_overflows_plain_pytorch_is_the_comparator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def overflowing(inputs: Setup) -> nn.Module:
        if inputs.x.dtype == torch.float64:
            return torch_layer(inputs)
        return Altered(torch_layer(inputs), lambda output: output * math.inf)

    monkeypatch.setattr(check, "torch_layer", overflowing)
    assert Judge(tiny()).comparator == PLAIN


def test_low_precision_inputs_are_cast_up_not_redrawn() -> None:
    inputs = setup(tiny(dtype="bfloat16"))
    assert torch.equal(inputs.to(torch.float64).x, inputs.x.double())


@given(
    torch_error=st.floats(0, 1e3),
    scale=st.floats(0, 1e3),
    dtype=st.sampled_from(list(DTYPES.values())),
)
def test_limit_allows_twice_torchs_error_and_grows_with_it(
    torch_error: float, scale: float, dtype: torch.dtype
) -> None:
    allowed = limit(torch_error, scale, dtype)
    assert allowed > 2 * torch_error or math.isclose(allowed, 2 * torch_error)
    assert limit(torch_error * 2, scale, dtype) >= allowed
    assert limit(0.0, scale, dtype) > 0
    assert allowed <= 2 * torch_error + 32 * torch.finfo(dtype).eps * max(scale, 1e-3)


@settings(max_examples=30)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8))
def test_rms_error_never_exceeds_the_largest(values: list[float]) -> None:
    difference = torch.tensor(values, dtype=torch.float64)
    largest, rms = errors(difference, torch.zeros_like(difference))
    assert rms <= largest * (1 + 1e-12)
    assert errors(difference, difference) == (0.0, 0.0)


def test_default_problems_reach_every_cell_dtype_and_branch() -> None:
    problems = default_problems()
    everything = {(c, d) for c in CELLS for d in DTYPES}
    # On a CPU, TF32 is float32.
    assert {(p.cell, p.dtype) for p in problems} == {(c, d) for c, d in everything if d != "tf32"}
    on_gpu = default_problems("cuda")
    assert {(p.cell, p.dtype) for p in on_gpu} == everything
    assert {replace(p, device="cpu") for p in on_gpu} >= set(problems)
    for cell in CELLS:
        own = [p for p in problems if p.cell == cell]
        assert {p.lengths for p in own} == {"dense", "packed"}
        assert {p.bidirectional for p in own} == {p.bias for p in own} == {True, False}
        assert any(p.kind == "latency" for p in own)
        assert any(p.num_layers > 1 for p in own)


def test_unknown_backend_raises() -> None:
    with pytest.raises(BackendError, match="abacus"):
        check_problem(tiny(), "abacus")


def test_a_workload_that_a_backend_does_not_run_is_skipped_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check, "runnable", lambda name, workload: (False, "too small"))
    (skipped,) = check_all([tiny()], ["reference"])
    assert isinstance(skipped, check.SkippedCheck)
    assert skipped.reason == "too small"
