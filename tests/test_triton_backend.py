"""The backend "triton" from PyTorch down to the choice of kernels: what it accepts and says, and
that nobody without a GPU pays for it. The kernels are interpreted on the CPU."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from recurrence_cases import CELLS, Layer, assert_near_oracle, layer, run_python
from triton_interpreted import LIMITS, identity, interpreted, needs_triton

import rnnlm_kernels
from rnnlm_kernels import BackendError, Problem, RecurrenceOptions, dispatch, tuning
from rnnlm_kernels.backends import BACKENDS, cpu, cuda, triton, tunable
from rnnlm_kernels.ops import planning
from rnnlm_kernels.triton import tiles
from rnnlm_kernels.triton.launch import Limits

BF16 = torch.bfloat16
every_cell = pytest.mark.parametrize("cell", CELLS)


def problem(**changes: Any) -> Problem:
    given = {"cell": "lstm", "input_size": 8, "hidden_size": 32, "dtype": BF16, "device": "cpu"}
    return Problem(**{**given, **changes})


@contextmanager
def pretended_gpu(
    capability: tuple[int, int] = (9, 0), *, hip: str | None = None
) -> Iterator[None]:
    """torch says that it has a GPU. What asks no more than what it is like can be tested so."""
    properties = SimpleNamespace(
        multi_processor_count=132, shared_memory_per_block_optin=227 * 1024, warp_size=32
    )
    caches = (triton._limits, dispatch._choose, planning._choose)
    for cache in caches:
        cache.cache_clear()
    with (
        mock.patch.multiple(
            torch.cuda,
            is_available=lambda: True,
            current_device=lambda: 0,
            device_count=lambda: 1,
            get_device_properties=lambda index: properties,
            get_device_capability=lambda index: capability,
        ),
        mock.patch.object(torch.version, "hip", hip),
    ):
        yield
    for cache in caches:
        cache.cache_clear()


# --- without a GPU --------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_the_backend_says_so_and_others_do_the_work() -> None:
    assert triton.available() == (False, "torch sees no GPU")
    with pytest.raises(BackendError, match=r"backend='triton' cannot run .*backends that can: .*"):
        dispatch.plan(problem(), "triton")
    assert "triton: cannot run (torch sees no GPU)" in rnnlm_kernels.explain(problem())


def test_triton_is_not_imported_for_the_cpu() -> None:
    code = (
        "import sys, torch, rnnlm_kernels\n"
        "before = 'triton' in sys.modules\n"  # some versions of torch do it
        "layer = rnnlm_kernels.LSTM(3, 4)\n"
        "layer(torch.randn(2, 2, 3))[0].sum().backward()\n"
        "rnnlm_kernels.explain(layer)\n"
        "print(before or 'triton' not in sys.modules)\n"
    )
    assert run_python(code).strip().endswith("True")


def test_a_gpu_without_triton_is_not_enough() -> None:
    def find_spec(name: str) -> None:
        assert name == "triton"

    with pretended_gpu(), mock.patch.object(importlib.util, "find_spec", find_spec):
        assert triton.available() == (False, "triton is not installed")


# --- what it accepts and what is chosen -----------------------------------------------------------


@pytest.mark.skipif(cuda.available()[0], reason="the CUDA backend goes first")
@needs_triton
def test_a_gpu_without_our_cuda_build_gets_triton_and_explain_says_so() -> None:
    with pretended_gpu():
        assert not cuda.available()[0]
        layer = problem(device="cuda", hidden_size=512, batch=16, seq_len=9, training=True)
        assert dispatch.choose(layer) == "triton"
        text = rnnlm_kernels.explain(layer)
        assert "triton: fused lstm [forward: stepwise, 16 rows x 16 units" in text
        assert "backward: stepwise" in text
        assert f"cuda: cannot run ({cuda.available()[1]})" in text
        # Sizes that are not known, as under torch.compile.
        assert "the tile depends on B" in rnnlm_kernels.explain(
            problem(device="cuda", hidden_size=512)
        )


def test_the_order_of_preference_is_cuda_triton_cpu_reference() -> None:
    assert list(BACKENDS) == ["cuda", "triton", "cpu", "reference"]
    assert tunable()["triton"] is triton


def test_the_contract_is_the_cpus() -> None:
    for name in ("lstm_forward", "lstm_backward", "gru_forward", "gru_backward"):
        expected = list(inspect.signature(getattr(cpu, name)).parameters)
        expected.remove("call")  # for calls that are made together, on CPUs only
        assert list(inspect.signature(getattr(triton, name)).parameters) == expected


REFUSED = {
    "cpu": (problem(), "tensors are on cpu"),
    "float64": (problem(device="cuda", dtype=torch.float64), "no kernel for torch.float64"),
    "option": (
        problem(device="cuda", options=RecurrenceOptions(layer_norm=True)),
        "not built: layer_norm",
    ),
}


@pytest.mark.parametrize(("given", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_the_kernels_do_not_cover_is_refused_by_name(given: Problem, reason: str) -> None:
    with pretended_gpu():
        ok, words = triton.supports(given)
        assert not ok
        assert reason in words


def test_old_gpus_are_refused() -> None:
    with pretended_gpu((7, 5)):
        ok, reason = triton.supports(problem(device="cuda"))
        assert not ok
        assert "compute capability 7.5, and 8.0 is needed" in reason


def test_amds_gpus_are_taken_and_their_products_are_not_tf32() -> None:
    with pretended_gpu(hip="6.4"):
        assert triton.supports(problem(device="cuda"))[0]
        assert not cuda.available()[0]
        with mock.patch.object(triton, "_allow_tf32", return_value=True):
            assert not triton._tf32(torch.float32)


def test_what_torch_does_not_say_of_a_device_is_assumed_small() -> None:
    with (
        pretended_gpu(),
        mock.patch.object(
            torch.cuda,
            "get_device_properties",
            return_value=SimpleNamespace(multi_processor_count=8),
        ),
    ):
        assert triton._limits(0) == Limits(8, 99 * 1024, 32)


# --- which family ---------------------------------------------------------------------------------


def families(given: Layer, kernel: str = "auto", **options: Any) -> set[str]:
    """The families that a call without gradients uses."""
    with interpreted(kernel, **options) as ran, torch.no_grad():
        given.call(backend="triton")
    return set(ran)


@needs_triton
@every_cell
def test_small_layers_run_in_one_launch_and_others_a_launch_a_step(cell: str) -> None:
    assert families(layer(cell, H=32).to(BF16)) == {"sequence"}
    assert families(layer(cell, 1, 1, 2, 300).to(BF16)) == {"stepwise"}


@needs_triton
def test_a_projection_runs_stepwise_and_nothing_persistent_runs_unasked() -> None:
    assert families(layer("lstm", H=32, proj=3).to(BF16)) == {"stepwise"}
    with interpreted():
        for hidden in (16, 300, 1024):
            text = rnnlm_kernels.explain(
                problem(hidden_size=hidden, batch=4, seq_len=9), backend="triton"
            )
            assert "persistent" not in text.splitlines()[1]


@needs_triton
def test_the_environment_names_the_family() -> None:
    given = layer("lstm", H=24).to(BF16)
    assert families(given, "stepwise") == {"stepwise"}
    with interpreted("stepwise"):
        text = rnnlm_kernels.explain(problem(batch=3, seq_len=4), backend="triton")
        assert "by RNNLM_TRITON_KERNEL=stepwise" in text
    with interpreted("sequence"), pytest.raises(RuntimeError, match="cannot run this lstm layer"):
        layer("lstm", H=500).to(BF16).call(backend="triton")
    with interpreted("fast"), pytest.raises(ValueError, match="'fast' is not a kernel"):
        given.call(backend="triton")


@needs_triton
def test_captured_packed_input_runs_stepwise_for_only_the_host_knows_its_lengths() -> None:
    """A copy of them to the device would be repeated at every replay, from freed memory."""
    given = layer("gru", H=16, lengths=(3, 1)).to(BF16)
    with interpreted() as ran, mock.patch.object(triton, "_offsets", return_value=None):
        given.call(backend="triton")
        assert ran[-1] == "stepwise"
    with (
        interpreted("sequence"),
        mock.patch.object(triton, "_offsets", return_value=None),
        pytest.raises(RuntimeError, match="cannot be captured with packed input"),
    ):
        given.call(backend="triton")


# --- measured choices -----------------------------------------------------------------------------


@needs_triton
@every_cell
@pytest.mark.parametrize("backward", [False, True])
def test_candidates_are_different_ways_and_the_usual_one_is_first(
    cell: str, backward: bool
) -> None:
    name, reset = cell.split("-")[0], "before" if cell == "gru-before" else "after"
    for hidden in (17, 300, 1024):
        given = problem(
            cell=name,
            hidden_size=hidden,
            batch=40,
            seq_len=9,
            training=True,
            options=RecurrenceOptions(reset=reset),
        )
        with interpreted():
            ways = triton.candidates(given, backward)
            usual = triton._choose(triton._case(given, backward), BF16, 0)
        first = next(iter(ways))
        assert first.split()[0] == usual.family
        assert len(ways) == len(set(ways)) > 1
        for way in ways:
            assert triton._named(way, "").name == way


@needs_triton
@every_cell
def test_every_candidate_is_right(cell: str) -> None:
    given = layer(cell, 2, 33, 2, 20)
    sizes = (cell, False, BF16, 33, 20, LIMITS)
    for tile in tiles.alternatives(*sizes):
        name = triton._Way("stepwise", tile, "").name
        with interpreted() as ran, triton.forced(False, name), triton.forced(True, name):
            assert_near_oracle(given, BF16, backend="triton")
            assert set(ran) == {"stepwise"}


def test_a_way_that_does_not_exist_cannot_be_forced() -> None:
    for name in ("grid", "auto", "sequence 16x16x16-w4-s1", "stepwise 16x16"):
        with (
            pytest.raises(ValueError, match="is not a way of the backend triton"),
            triton.forced(False, name),
        ):
            pass


@needs_triton
def test_a_table_chooses_before_the_rule_and_after_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tuning.ENVIRONMENT, str(tmp_path))
    tuning.forget()
    tile = tiles.Tile(32, 16, 16, 4, 2)
    choice = f"stepwise {tile.name}"
    case = tuning.Case("lstm", False, "bfloat16", 24, 0, False, 4, 3)
    entry = tuning.Entry(case, choice, {choice: 1.0}, "2026-01-02")
    tuning.save(tmp_path, "triton", identity(0), [entry])
    given = layer("lstm", H=24).to(BF16)
    try:
        with interpreted() as ran, torch.no_grad():
            used = []
            stepwise = triton._family("stepwise")
            launch = stepwise._launch

            def watched(kernel: Any, tile: tiles.Tile, *args: Any, **kw: Any) -> None:
                used.append(tile)
                launch(kernel, tile, *args, **kw)

            with mock.patch.object(stepwise, "_launch", watched):
                expected = given.call(backend="triton")
            assert set(used) == {tile}
            text = rnnlm_kernels.explain(
                problem(hidden_size=24, batch=3, seq_len=4), backend="triton"
            )
            assert f"by the tuned table of {tmp_path}" in text
            assert str(tile) in text
        assert set(ran) == {"stepwise"}
        assert families(given, "sequence") == {"sequence"}
        torch.testing.assert_close(
            expected[0], given.call(backend="reference")[0], atol=1e-2, rtol=0
        )
    finally:
        tuning.forget()


# --- under torch's compiler -----------------------------------------------------------------------


@needs_triton
def test_a_compiled_module_has_one_graph_and_the_same_results() -> None:
    torch.manual_seed(0)
    ours = rnnlm_kernels.GRU(3, 9, backend="triton")
    x = torch.randn(4, 2, 3)
    with interpreted("stepwise") as ran:
        expected = ours(x)[0]
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        found = compiled(x)[0]
        found.sum().backward()
    assert "stepwise" in ran
    torch.testing.assert_close(found, expected)
    assert ours.weight_hh_l0.grad is not None


# --- the page about it ----------------------------------------------------------------------------


def test_the_page_that_reads_a_kernel_shows_the_source() -> None:
    root = Path(__file__).resolve().parent.parent
    page = (root / "docs/triton.md").read_text("utf-8")
    source = (root / "rnnlm_kernels/triton/steps.py").read_text("utf-8")
    kernel = source[source.index("def lstm_step(") : source.index("def projection_step(")]
    shown = [line.strip() for line in page.splitlines() if line.startswith("    ")]
    lines = {line.strip() for line in kernel.splitlines()}
    assert len(shown) > 10
    assert [line for line in shown if line not in lines] == []
