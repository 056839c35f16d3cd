"""Who computes a problem: argument, then RNNLM_BACKEND, then automatic; and what is said of it."""

from __future__ import annotations

import logging
from dataclasses import fields

import pytest
import torch
from recurrence_cases import CELLS, NATIVE, layer, run_python

import rnnlm_kernels
from rnnlm_kernels import BackendError, Problem, RecurrenceOptions, dispatch, options
from rnnlm_kernels.dispatch import ENVIRONMENT, backends, explain, plan

BEST = "cpu" if NATIVE else "reference"
needs_native = pytest.mark.skipif(not NATIVE, reason="the native module was not built")
LSTM = Problem("lstm", 8, 16)
# A value that differs from the default, of every option that no backend of this version runs.
NOT_BUILT = {
    "zoneout_h": 0.1,
    "zoneout_c": 0.1,
    "weight_drop": 0.5,
    "layer_norm": True,
    "resets": True,
    "lengths": True,
}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)


# --- argument > environment > automatic ---------------------------------------------------------


@pytest.mark.parametrize("environment", [None, "", "auto"])
@pytest.mark.parametrize("argument", [None, "auto"])
def test_automatic_takes_the_first_backend_that_can(monkeypatch, argument, environment) -> None:
    if environment is not None:
        monkeypatch.setenv(ENVIRONMENT, environment)
    assert plan(LSTM, argument).backend == BEST


def test_the_environment_beats_automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert plan(LSTM).backend == "reference"


@needs_native
def test_the_argument_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert plan(LSTM, "cpu").backend == "cpu"
    assert plan(LSTM, "auto").backend == "cpu"
    monkeypatch.setenv(ENVIRONMENT, "cpu")
    assert plan(LSTM, "reference").backend == "reference"


@needs_native
@pytest.mark.parametrize("cell", CELLS)
def test_operators_follow_the_environment_from_call_to_call(cell, monkeypatch) -> None:
    """The plan of a layer is remembered; a changed environment is another plan."""
    given = layer(cell).leaves()
    run = []
    kernel = f"{cell.removesuffix('-before')}_forward"
    forward = getattr(backends()["cpu"], kernel)
    monkeypatch.setattr(
        backends()["cpu"], kernel, lambda *args: (run.append(cell), forward(*args))[1]
    )
    for environment, calls in (("cpu", 1), ("reference", 1), ("cpu", 2), ("reference", 2)):
        monkeypatch.setenv(ENVIRONMENT, environment)
        given.call()
        assert len(run) == calls
    given.call(backend="cpu")
    assert len(run) == 3


@pytest.mark.parametrize("cell", CELLS)
def test_backward_runs_where_forward_ran(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each backend saves what only it can read."""
    for backend in backends():
        if not backends()[backend].available()[0]:
            continue
        given = layer(cell).leaves()
        output = given.call(backend=backend)[0]
        found = torch.autograd.grad(output.sum(), given.present)
        expected = torch.autograd.grad(given.refer()[0].sum(), given.present)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


# --- refusals -----------------------------------------------------------------------------------


def test_unknown_names_are_refused_with_who_asked_and_what_there_is(monkeypatch) -> None:
    with pytest.raises(BackendError, match=r"backend='fast' is not a backend.*'cpu', 'reference'"):
        plan(LSTM, "fast")
    monkeypatch.setenv(ENVIRONMENT, "quick")
    with pytest.raises(BackendError, match=r"RNNLM_BACKEND='quick' is not a backend.*'cpu'"):
        plan(LSTM)
    assert plan(LSTM, "reference").backend == "reference"


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        pytest.param(Problem("lstm", 8, 16, device="cuda"), "tensors are on cuda", id="device"),
        pytest.param(Problem("gru", 8, 16, device="meta"), "tensors are on meta", id="meta"),
        pytest.param(
            Problem("gru", 8, 16, torch.float8_e4m3fn), "no kernel for torch.float8", id="dtype"
        ),
    ],
)
@needs_native
def test_what_cannot_run_says_why_and_what_can(problem, reason, monkeypatch) -> None:
    with pytest.raises(BackendError) as raised:
        plan(problem, "cpu")
    message = str(raised.value)
    assert message.startswith("backend='cpu' cannot run")
    assert reason in message
    assert "backends that can: ['reference']" in message
    assert str(problem) in message
    assert plan(problem).backend == "reference"
    monkeypatch.setenv(ENVIRONMENT, "cpu")
    with pytest.raises(BackendError, match="RNNLM_BACKEND='cpu' cannot run"):
        plan(problem)


@needs_native
def test_an_operator_refuses_what_its_backend_cannot_run() -> None:
    given = layer("lstm").map(lambda t: t.to("meta"))
    with pytest.raises(BackendError, match="tensors are on meta"):
        given.call(backend="cpu")
    assert given.call(backend="reference")[0].is_meta


def test_integers_are_refused_by_every_backend() -> None:
    with pytest.raises(BackendError, match=r"no backend can run .*cpu: .*reference: .*int64"):
        plan(Problem("lstm", 8, 16, torch.int64))


def test_every_option_is_built_or_listed_here() -> None:
    """A new option has to be refused by the backends that do not run it."""
    names = {f.name for f in fields(RecurrenceOptions)}
    assert names == options.BUILT_OPTIONS | NOT_BUILT.keys()


@pytest.mark.parametrize("name", NOT_BUILT)
@pytest.mark.parametrize("backend", backends())
def test_options_that_are_not_built_are_refused_by_name(backend: str, name: str) -> None:
    problem = Problem("lstm", 8, 16, options=RecurrenceOptions(**{name: NOT_BUILT[name]}))
    ok, reason = backends()[backend].supports(problem)
    assert not ok
    assert name in reason
    for choice in (backend, None) if backends()[backend].available()[0] else (None,):
        with pytest.raises(BackendError, match=rf"options not built: {name}"):
            plan(problem, choice)


@pytest.mark.parametrize(
    "built",
    [{}, {"reset": "before"}, {"reverse": True}, {"packed": True}, {"return_cells": True}],
    ids=str,
)
@pytest.mark.parametrize("backend", backends())
def test_options_that_are_built_are_not_refused(backend: str, built: dict) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    problem = Problem("gru", 8, 16, device=device, options=RecurrenceOptions(**built))
    ok, reason = backends()[backend].supports(problem)
    assert ok == backends()[backend].available()[0], reason
    assert "options not built" not in reason


def test_unknown_cells_and_resets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cell should be one of .*lstm.*gru.*'rnn'"):
        Problem("rnn", 8, 16)
    with pytest.raises(ValueError, match=r"reset should be one of .*after.*before.*'middle'"):
        RecurrenceOptions(reset="middle")


def test_problems_and_plans_are_keys() -> None:
    assert {Problem("gru", 8, 16): 1}[Problem("gru", 8, 16)] == 1
    assert plan(LSTM) == plan(Problem("lstm", 8, 16))


# --- what is said -------------------------------------------------------------------------------


def test_a_fallback_is_warned_of_once_per_reason(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._warn_once.cache_clear()
    dispatch._choose.cache_clear()
    with caplog.at_level(logging.WARNING, logger="rnnlm_kernels"):
        for hidden in (3, 4, 5):
            plan(Problem("gru", 8, hidden, device="cuda"))
        plan(Problem("gru", 8, 3, device="cuda"), "reference")
    (record,) = caplog.records
    assert "reference" in record.message
    assert "cuda" in record.message


def test_asking_for_the_reference_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="rnnlm_kernels"):
        plan(Problem("gru", 8, 77), "reference")
    assert not caplog.records


def test_explain_a_problem_names_the_plan_and_every_other_backend() -> None:
    problem = Problem("gru", 8, 16, torch.bfloat16, seq_len=35, batch=20, training=True)
    first, taken, *others = explain(problem).splitlines()
    assert first == "gru(reset=after) T=35 B=20 I=8 H=16 bfloat16 cpu training"
    assert taken.strip().startswith(f"{BEST}: ")
    assert {line.split(":")[0].strip() for line in others} == backends().keys() - {BEST}
    assert all("could run" in line or "cannot run (" in line for line in others)


def test_explain_says_what_stands_in_the_way() -> None:
    text = explain(Problem("lstm", 8, 16, options=RecurrenceOptions(layer_norm=True)))
    assert "cannot run: no backend can run" in text
    assert text.count("options not built: layer_norm") >= 2
    assert "could run (" in explain(LSTM, "reference") or not NATIVE


def test_explain_a_module_goes_through_its_layers() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 3),
        rnnlm_kernels.LSTM(3, 7, num_layers=2, bidirectional=True),
        rnnlm_kernels.GRU(3, 9, reset="before", backend="reference"),
    )
    text = explain(model)
    assert text.count("lstm T=") == 4
    assert "gru(reset=before) T=any B=any I=3 H=9" in text
    assert "1: LSTM(3, 7" in text
    assert "2: GRU(3, 9" in text
    gru = text[text.index("2: GRU") :].splitlines()
    assert gru[2].strip().startswith("reference: ")


def test_explain_a_module_with_nothing_of_ours_says_what_to_do() -> None:
    text = explain(torch.nn.LSTM(3, 4))
    assert "no rnnlm_kernels layer" in text
    assert "replace" in text


def test_build_info_says_what_was_built() -> None:
    info = rnnlm_kernels.build_info()
    assert info["version"] == rnnlm_kernels.__version__
    assert info["native"] == NATIVE
    if NATIVE:
        assert {"compiler", "isas", "cuda", "cuda_archs", "cpu"} <= info.keys()
        assert info["cpu"]["isa"] in info["isas"]
        assert info["cpu"]["isa"] in plan(LSTM).tile
    else:
        assert info["import_error"]


# --- without the native module ------------------------------------------------------------------


def test_without_the_native_module_layers_work_and_warn_once() -> None:
    printed = run_python(
        """
import sys
sys.modules["rnnlm_kernels._C"] = None  # importing it fails
import torch, rnnlm_kernels
info = rnnlm_kernels.build_info()
assert info["native"] is False and "_C" in info["import_error"], info
torch.manual_seed(0)
for kind, sizes in (("LSTM", (3, 4)), ("GRU", (3, 4)), ("LSTM", (5, 6))):
    theirs = getattr(torch.nn, kind)(*sizes, num_layers=2, bidirectional=True)
    ours = getattr(rnnlm_kernels, kind)(*sizes, num_layers=2, bidirectional=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, sizes[0], requires_grad=True)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    (mine,) = torch.autograd.grad(ours(x)[0].sum(), x)
    torch.testing.assert_close(mine, torch.autograd.grad(theirs(x)[0].sum(), x)[0])
try:
    rnnlm_kernels.GRU(3, 4, backend="cpu")(x[:, :, :3])
except rnnlm_kernels.BackendError as error:
    print("refused:", error)
print(rnnlm_kernels.explain(ours).splitlines()[2])
"""
    )
    assert printed.count("running the slow reference backend") == 1
    assert "refused: backend='cpu' cannot run" in printed
    assert "rnnlm_kernels._C is missing" in printed
    assert "backends that can: ['reference']" in printed
