"""The backend "cuda" from PyTorch down to the launchers, on the emulator: what it accepts and says,
that modules train through it, and what becomes of a launch that goes wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from cuda_emulated import Emulated, both_passes, emulated, needs_emulator
from recurrence_cases import CELLS, Layer, assert_near_oracle, cotangents, layer
from typer.testing import CliRunner

import rnnlm_kernels
from rnnlm_kernels import BackendError, Problem, RecurrenceOptions, dispatch
from rnnlm_kernels.backends import cuda
from rnnlm_kernels.bench.workload import Workload
from rnnlm_kernels.check import check_problem
from rnnlm_kernels.cli import app

BF16 = torch.bfloat16
every_cell = pytest.mark.parametrize("cell", CELLS)
every_tier = pytest.mark.parametrize("tier", cuda.TIERS[1:])
persistent = pytest.mark.parametrize("tier", ["cluster", "grid"])


def problem(**changes: Any) -> Problem:
    given = {"cell": "lstm", "input_size": 8, "hidden_size": 32, "dtype": BF16, "device": "cpu"}
    return Problem(**{**given, **changes})


@pytest.fixture
def device() -> Iterator[Emulated]:
    with emulated() as device:
        yield device


# --- without a GPU ------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_the_backend_says_so_and_others_do_the_work() -> None:
    ok, reason = cuda.available()
    assert not ok
    assert "without CUDA" in reason or "no CUDA device" in reason
    with pytest.raises(BackendError, match=r"backend='cuda' cannot run .*backends that can: .*cpu"):
        dispatch.plan(problem(), "cuda")
    assert dispatch.choose(problem(device="cuda")) == "reference"


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_asking_what_a_gpu_would_do_does_not_need_the_emulator_or_a_gpu() -> None:
    text = rnnlm_kernels.explain(problem(device="cuda"))
    assert f"cuda: cannot run ({cuda.available()[1]})" in text


# --- what it accepts ----------------------------------------------------------------------------


@needs_emulator
def test_every_dtype_of_the_kernels_is_supported(device: Emulated) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert cuda.supports(problem(dtype=dtype))[0]


REFUSED = {
    "device": (problem(device="meta"), "tensors are on meta"),
    "dtype": (problem(dtype=torch.float8_e4m3fn), "no kernel for torch.float8"),
    "option": (problem(options=RecurrenceOptions(layer_norm=True)), "not built: layer_norm"),
}


@needs_emulator
@pytest.mark.parametrize(("given", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_named(given: Problem, reason: str, device: Emulated) -> None:
    ok, said = cuda.supports(given)
    assert not ok
    assert reason in said


@needs_emulator
def test_old_gpus_are_refused_by_their_compute_capability() -> None:
    with emulated(compute_capability=75):
        assert cuda.supports(problem()) == (
            False,
            "the device has compute capability 7.5, and 8.0 is needed",
        )
    with emulated(compute_capability=80):
        assert cuda.supports(problem())[0]


@needs_emulator
def test_a_gpu_takes_its_tensors_without_being_asked(device: Emulated) -> None:
    layer("lstm").call()
    assert device.ran == ["stepwise"]


# --- what it says -------------------------------------------------------------------------------


@needs_emulator
def test_explain_shows_tiers_reasons_and_forecasts() -> None:
    with emulated(sms=132):
        text = rnnlm_kernels.explain(
            problem(hidden_size=1024, seq_len=512, batch=16, training=True), "cuda"
        )
    plan = text.splitlines()[1].strip()
    assert plan.startswith("cuda: fused lstm [forward: grid, 1 group of 64 CTAs, 16 rows each; ")
    assert "; backward: grid, " in plan
    assert "(by the cost model; derived us per step, forward: stepwise 3, grid 0.8" in plan
    assert "not block or cluster: the hidden size is above what it holds; backward: " in plan


@needs_emulator
def test_explain_without_sizes_says_that_they_decide(device: Emulated) -> None:
    assert "the tier depends on T and B" in rnnlm_kernels.explain(problem(), "cuda")


@needs_emulator
def test_explain_follows_the_environment_and_what_went_wrong(monkeypatch) -> None:
    given = problem(seq_len=300, batch=8)
    with emulated("block"):
        assert "[forward: block" in rnnlm_kernels.explain(given, "cuda")
        assert "by RNNLM_CUDA_TIER=block" in rnnlm_kernels.explain(given, "cuda")
        monkeypatch.setenv(cuda.ENVIRONMENT, "grid")
        assert "[forward: grid" in rnnlm_kernels.explain(given, "cuda")
        monkeypatch.setenv(cuda.ENVIRONMENT, "cluster")
        text = rnnlm_kernels.explain(problem(hidden_size=520, seq_len=300, batch=8), "cuda")
        assert "[forward: cluster cannot]" in text
    with emulated(drop=20, wait_polls=2000) as device:
        fail("grid")
        device.native.cuda_take_failure(0)
        text = rnnlm_kernels.explain(given, "cuda")
        assert "not grid: it is off since it failed on this device" in text


@needs_emulator
def test_info_shows_what_a_plan_depends_on_and_what_went_wrong() -> None:
    with emulated(sms=20, compute_capability=89, shared_per_block=99 * 1024, cooperative=False):
        line = "compute capability 8.9, 20 SMs, 99 KB of shared memory for a CTA, no cooperative"
        assert cuda.state() == {"cuda:0": line + " launches"}
    with emulated(drop=20, wait_polls=2000) as device:
        fail("grid")
        device.native.cuda_take_failure(0)
        shown = CliRunner().invoke(app, ["info", "--json"])
        assert (
            "tier grid is off: a launch waited too long"
            in json.loads(shown.output)["cuda"]["cuda:0"]
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_info_without_a_gpu_says_why() -> None:
    shown = CliRunner().invoke(app, ["info", "--json"])
    assert json.loads(shown.output)["cuda"] == {"cuda": cuda.available()[1]}


# --- which tier ---------------------------------------------------------------------------------


@needs_emulator
@every_tier
@every_cell
def test_a_tier_that_is_asked_for_runs_both_passes(cell: str, tier: str) -> None:
    with emulated(tier) as device:
        assert_near_oracle(layer(cell, T=3, B=9, H=24), BF16, backend="cuda")
        assert device.ran == both_passes(tier)


@needs_emulator
def test_without_being_asked_short_sequences_run_stepwise_and_long_ones_do_not() -> None:
    with emulated() as device, torch.no_grad():
        layer("gru", T=1, H=24).to(BF16).call(backend="cuda")
        layer("gru", T=100, H=24).to(BF16).call(backend="cuda")
    assert device.ran == ["stepwise", "block"]


@needs_emulator
def test_an_unknown_tier_is_refused_with_those_there_are(device: Emulated, monkeypatch) -> None:
    monkeypatch.setenv(cuda.ENVIRONMENT, "fast")
    match = r"RNNLM_CUDA_TIER='fast' is not a tier; expected one of \['auto', 'stepwise', "
    with pytest.raises(ValueError, match=match):
        layer("gru").call(backend="cuda")
    with pytest.raises(ValueError, match=match):
        rnnlm_kernels.explain(problem(), "cuda")


@needs_emulator
def test_a_tier_that_cannot_run_a_layer_says_why_and_what_to_do() -> None:
    with (
        emulated("grid") as device,
        pytest.raises(
            NotImplementedError,
            match=r"grid tier cannot run .* float16 and float32\. RNNLM_CUDA_TIER=auto takes",
        ),
    ):
        layer("lstm").call(backend="cuda")
    assert device.ran == []


@needs_emulator
@pytest.mark.skipif(cuda._precision is None, reason="torch has one switch only")
def test_tf32_is_used_where_torch_uses_it_in_its_own_layers(monkeypatch) -> None:
    rnn = torch.backends.cudnn.rnn
    before = rnn.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            rnn.fp32_precision = precision
            assert cuda._allow_tf32(torch.float32) == (precision == "tf32")
            assert not cuda._allow_tf32(torch.float64)
            assert not cuda._allow_tf32(BF16)
    finally:
        rnn.fp32_precision = before


@pytest.mark.parametrize("allowed", [True, False])
def test_before_torch_2_9_tf32_follows_the_switch_of_cudnn(allowed: bool, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "_precision", None)
    with torch.backends.cudnn.flags(allow_tf32=allowed):
        assert cuda._allow_tf32(torch.float32) == allowed


# --- through the modules ------------------------------------------------------------------------

WORKLOADS = {
    "lstm-stacked-bidirectional": {"cell": "lstm", "num_layers": 2, "bidirectional": True},
    "gru-stacked-bidirectional": {"cell": "gru", "num_layers": 2, "bidirectional": True},
    "lstm-packed": {"cell": "lstm", "lengths": "packed", "bidirectional": True},
    "gru-packed": {"cell": "gru", "lengths": "packed", "bidirectional": True},
    "gru-before-packed": {"cell": "gru-before", "lengths": "packed", "bidirectional": True},
    "lstm-projection": {"cell": "lstm", "proj_size": 8, "num_layers": 2},
}


def runnable() -> list[Any]:
    """Every tier with every workload and dtype that it has kernels for."""
    cases = [("stepwise", "float32", name) for name in WORKLOADS]
    cases += [("stepwise", "bfloat16", name) for name in WORKLOADS]
    cases += [
        (tier, "bfloat16", name)
        for tier in cuda.TIERS[2:]
        for name, options in WORKLOADS.items()
        if "proj_size" not in options
    ]
    return [
        pytest.param(tier, dtype, WORKLOADS[name], id=f"{tier}-{dtype}-{name}")
        for tier, dtype, name in cases
    ]


@needs_emulator
@pytest.mark.parametrize(("tier", "dtype", "options"), runnable())
def test_modules_are_right_by_the_rule_of_the_check(tier: str, dtype: str, options: dict) -> None:
    """Outputs, final states and all gradients, against torch's own layer."""
    workload = Workload(
        seq_len=9, batch=6, input_size=12, hidden_size=32, dtype=dtype, mode="training", **options
    )
    with emulated(tier) as device:
        result = check_problem(workload, "cuda")
    assert result.ok, result.summary()
    assert set(device.ran) == set(both_passes(tier))


@needs_emulator
def test_nothing_to_do_is_no_call(device: Emulated) -> None:
    given = layer("lstm", B=0).leaves()
    outputs = given.call(backend="cuda")
    gradients = torch.autograd.grad(outputs, given.present, cotangents(outputs))
    assert all(not g.any() for g in gradients)
    assert device.ran == []


# --- what the native functions refuse -----------------------------------------------------------


def call(given: Layer, **changes: Any) -> tuple[torch.Tensor, ...]:
    """An operator call with something changed in what the backend gets for it."""
    with mock.patch.multiple(cuda, **changes):
        return given.call(backend="cuda")


@needs_emulator
def test_too_small_a_workspace_is_refused(device: Emulated) -> None:
    with pytest.raises(ValueError, match=r"workspace has 16 bytes and the call needs \d+"):
        call(layer("lstm"), _needs=lambda *_: (16, False))
    assert device.ran == []


@needs_emulator
def test_a_workspace_that_is_not_aligned_is_refused(device: Emulated) -> None:
    def empty(nbytes: int, like: torch.Tensor) -> torch.Tensor:
        room = torch.empty(nbytes + 512, dtype=torch.uint8)
        return room[-room.data_ptr() % 256 + 8 :]

    with pytest.raises(ValueError, match="workspace is not aligned to 256 bytes"):
        call(layer("lstm"), _empty=empty)


@needs_emulator
@persistent
def test_without_offsets_a_packed_sequence_runs_stepwise_or_not_at_all(tier, monkeypatch) -> None:
    """While a CUDA graph is captured there are none."""
    given = layer("gru", lengths=(200, 3), H=24).to(BF16)
    with emulated() as device, torch.no_grad():
        call(given, _offsets=lambda *_: None)
        assert device.ran == ["stepwise"]
        monkeypatch.setenv(cuda.ENVIRONMENT, tier)
        with pytest.raises(ValueError, match="offsets is a null pointer for a packed sequence"):
            call(given, _offsets=lambda *_: None)


@needs_emulator
@persistent
def test_tensors_that_begin_anywhere_run_stepwise_or_not_at_all(tier, monkeypatch) -> None:
    given = layer("lstm", T=100, H=24).to(BF16)
    h0 = torch.empty(given.get("h0").numel() + 1, dtype=BF16)[1:].view_as(given.get("h0"))
    crooked = given.having(h0=h0.copy_(given.get("h0")))
    with emulated() as device, torch.no_grad():
        expected = given.call(backend="cuda")
        found = crooked.call(backend="cuda")
        assert device.ran == ["block", "stepwise"]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0.05, atol=0.02)
        monkeypatch.setenv(cuda.ENVIRONMENT, tier)
        with pytest.raises(ValueError, match="h0 is not aligned to 16 bytes"):
            crooked.call(backend="cuda")


@needs_emulator
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"steps": 0}, "steps is 0", id="no-steps"),
        pytest.param({"batch": -1}, "batch is -1", id="negative-batch"),
        pytest.param({"hidden": 2**31}, "hidden is 2147483648", id="huge"),
        pytest.param({"w_hh": 0}, "w_hh is a null pointer", id="null-weights"),
        pytest.param({"saved": 0}, "saved is a null pointer", id="null-saved"),
        pytest.param({"concurrent": 0}, "concurrent is 0", id="one-of-none"),
        pytest.param({"device": 1}, "invalid device ordinal", id="absent-device"),
    ],
)
def test_wrong_native_arguments_are_named(device: Emulated, change, message: str) -> None:
    names = "dtype steps batch batch_sizes reverse hidden reset_before grad_output grad_h_n w_hh h0"
    names += " output saved dgates candidate db dh0 device stream offsets workspace workspace_bytes"
    arguments = dict.fromkeys([*names.split(), "tier", "allow_tf32", "concurrent"], 0)
    ones = dict.fromkeys(("steps", "batch", "hidden", "concurrent"), 1)
    arguments.update(**ones, **dict.fromkeys(("w_hh", "h0", "output"), 256))
    arguments.update(dict.fromkeys(("saved", "dgates", "candidate", "workspace"), 256))
    with pytest.raises((ValueError, RuntimeError), match=message):
        device.native.cuda_gru_backward(*{**arguments, **change}.values())


# --- what can go wrong on the device ------------------------------------------------------------


def fail(tier: str) -> Layer:
    """Runs a layer that loses a message on the device of the block; returns the layer."""
    given = layer("lstm", T=5, B=9, H=40).to(BF16)
    with mock.patch.dict("os.environ", {cuda.ENVIRONMENT: tier}), torch.no_grad():
        results = given.call(backend="cuda")
    assert all(result.isnan().all() for result in results)
    return given


@needs_emulator
@persistent
def test_after_a_failure_one_call_raises_and_then_another_tier_does_the_work(
    tier: str, monkeypatch
) -> None:
    with emulated(drop=20, wait_polls=2000, sms=4) as device:
        given = fail(tier)
        with pytest.raises(
            RuntimeError,
            match=f"an earlier call on CUDA device 0 failed in the {tier} tier: a launch waited too"
            " long .* set to NaN. This call did nothing: .*RNNLM_CUDA_TIER=stepwise",
        ):
            given.call(backend="cuda")
        assert device.native.cuda_take_failure(0) == ""
        device.native.emulator_configure(drop=0)
        assert device.native.cuda_device_limits(0)["off"].keys() == {tier}
        device.ran.clear()
        assert_near_oracle(given, BF16, backend="cuda")
        assert tier not in device.ran
        monkeypatch.setenv(cuda.ENVIRONMENT, tier)
        with pytest.raises(NotImplementedError, match="off since it failed on this device"):
            given.call(backend="cuda")


# Arguments of the backend's functions, from the end, that a kernel writes.
WRITTEN = {"lstm_forward": 5, "lstm_backward": 6, "gru_forward": 3, "gru_backward": 4}


@needs_emulator
@persistent
@every_cell
def test_a_launch_that_failed_leaves_nothing_but_nan(cell: str, tier: str) -> None:
    """All memory that forward, then backward, was to write; and so whatever is computed from it."""
    given = layer(cell, T=4, B=9, H=24).to(BF16).leaves()
    written: list[torch.Tensor] = []

    def watched(name: str) -> Any:
        function = getattr(cuda, name)

        def run(*arguments: Any) -> None:
            tensors = [t for t in arguments[-WRITTEN[name] :] if t is not None]
            written.extend(t.zero_() for t in tensors)
            function(*arguments)

        return run

    for forward_fails in (True, False):
        written.clear()
        with (
            emulated(tier, sms=4, wait_polls=2000, drop=20 if forward_fails else 0) as device,
            mock.patch.multiple(cuda, **{name: watched(name) for name in WRITTEN}),
        ):
            outputs = given.call(backend="cuda")
            if not forward_fails:
                written.clear()
                device.native.emulator_configure(drop=20)
                gradients = torch.autograd.grad(outputs, given.present, cotangents(outputs))
                assert all(gradient.isnan().all() for gradient in gradients)
            assert set(device.ran) == {tier}
            assert f"failed in the {tier} tier" in device.native.cuda_take_failure(0)
        assert len(written) >= 3
        assert all(tensor.isnan().all() for tensor in written)


@needs_emulator
def test_a_failure_can_be_asked_for_and_is_then_no_surprise() -> None:
    with emulated(drop=20, wait_polls=2000, sms=4) as device:
        given = fail("grid")
        assert "failed in the grid tier" in device.native.cuda_take_failure(0)
        device.native.emulator_configure(drop=0)
        assert_near_oracle(given, BF16, backend="cuda")


@needs_emulator
def test_a_launch_that_did_not_fail_leaves_no_word(device: Emulated) -> None:
    layer("lstm", T=5, H=40).to(BF16).call(backend="cuda")
    assert device.native.cuda_take_failure(0) == ""
    assert device.native.cuda_device_limits(0)["off"] == {}


@needs_emulator
def test_a_launch_that_the_device_refuses_is_replaced_and_not_tried_again() -> None:
    """As in a partition of the device that has fewer SMs than the device says."""
    given = layer("lstm", T=16, B=8, H=136).to(BF16)
    with emulated(sms=9, compute_capability=80) as device:
        device.native.cuda_device_limits(0)
        device.native.emulator_configure(sms=4)
        assert_near_oracle(given, BF16, backend="cuda")
        assert device.ran == ["stepwise", "stepwise"]
        (why,) = device.native.cuda_device_limits(0)["off"].values()
        assert "cooperative launch" in why
        refused = [one for one in device.native.emulator_log() if one["cooperative"]]
        assert refused == []


@needs_emulator
def test_a_refused_launch_of_a_tier_that_was_asked_for_is_an_error() -> None:
    with emulated("grid", sms=9) as device, torch.no_grad():
        device.native.cuda_device_limits(0)
        device.native.emulator_configure(sms=4)
        with pytest.raises(NotImplementedError, match="too many blocks in cooperative launch"):
            layer("lstm", H=136).to(BF16).call(backend="cuda")
