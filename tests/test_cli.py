"""The command line as a user drives it: what it prints, writes, and how it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import rnnlm_kernels
from rnnlm_kernels import __version__, check
from rnnlm_kernels.bench import harness
from rnnlm_kernels.bench.contenders import our_layer
from rnnlm_kernels.bench.results import Results
from rnnlm_kernels.bench.workload import Setup
from rnnlm_kernels.cli import app, bench
from rnnlm_kernels.cli.bench import default_folder
from rnnlm_kernels.cli.errors import terminate_as_interrupt
from rnnlm_kernels.cli.info import typical_problems
from rnnlm_kernels.dispatch import backends

QUICK = ("--samples", "2", "--backend", "reference")
ONE = ("--shape", "3,2,4,5", "--cell", "gru", "--mode", "training")


class Outcome:
    """Exit code and both streams of one run."""

    def __init__(self, *arguments: str) -> None:
        result = CliRunner().invoke(app, list(arguments), prog_name="rnnlm-kernels")
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Another Python that imports the package under test, be it installed or not."""
    source = str(Path(rnnlm_kernels.__file__).parents[1])
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )


def break_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every layer of ours compute with one weight changed."""

    def broken(inputs: Setup, backend: str) -> nn.Module:
        layer = our_layer(inputs, backend)
        with torch.no_grad():
            next(layer.parameters()).view(-1)[0] += 0.5
        return layer

    monkeypatch.setattr(check, "our_layer", broken)
    monkeypatch.setattr("rnnlm_kernels.bench.contenders.our_layer", broken)


def test_python_m_is_the_command() -> None:
    done = python("-m", "rnnlm_kernels", "--version")
    assert done.stdout == f"rnnlm-kernels {__version__}\n", done.stderr


def test_help_teaches_the_commands_and_first_steps() -> None:
    shown = Outcome("--help")
    assert shown.code == 0
    for word in ("info", "check", "bench", "train", "rnnlm_kernels.replace(model)", "First steps"):
        assert word in shown.out


@pytest.mark.parametrize("command", ["info", "check", "bench", "train"])
def test_every_command_has_help(command: str) -> None:
    assert Outcome(command, "--help").code == 0


def test_info_names_every_backend_and_explains_every_plan() -> None:
    shown = Outcome("info")
    assert shown.code == 0
    for word in (*backends(), *typical_problems(), "because", torch.__version__):
        assert word in shown.out


def test_info_as_json() -> None:
    found = json.loads(Outcome("info", "--json").out)
    assert found["backends"].keys() == backends().keys()
    assert all(plan["reason"] for plan in found["plans"].values())


def test_check_passes_and_shows_torchs_error() -> None:
    shown = Outcome("check", "--shape", "3,2,4,5", "--dtype", "float32")
    assert shown.code == 0
    assert "torch's" in shown.out
    assert "problems ok" in shown.out


def test_check_as_json_is_json_only() -> None:
    shown = Outcome("check", "--json", "--shape", "3,2,4,5", "--cell", "gru-before")
    found = json.loads(shown.out)
    assert found["ok"] is True
    assert {row["ok"] for result in found["results"] for row in result["rows"]} == {True}
    assert {result["comparator"] for result in found["results"]} == {"plain PyTorch"}


def test_check_fails_with_code_1_when_a_kernel_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    break_layers(monkeypatch)
    arguments = ("check", "--shape", "3,2,4,5", "--dtype", "float32", "--cell", "lstm")
    shown = Outcome(*arguments)
    assert shown.code == 1
    assert "FAIL" in shown.out
    found = Outcome(*arguments, "--json")
    assert found.code == 1
    assert json.loads(found.out)["ok"] is False


def test_bench_writes_table_and_plot_and_report_makes_them_again(tmp_path: Path) -> None:
    shown = Outcome("bench", *QUICK, *ONE, "--out", str(tmp_path))
    assert shown.code == 0, shown.err
    assert "ratio" in shown.out
    results = Results.load(tmp_path / "custom.json")
    assert results.complete
    assert [m.contender for m in results.measurements] == ["torch", "reference"]
    for suffix in (".csv", ".md"):
        assert (tmp_path / f"custom{suffix}").is_file()

    again = tmp_path / "again"
    remade = Outcome("bench", "report", str(tmp_path / "custom.json"), "--out", str(again))
    assert remade.code == 0
    assert (again / "custom.md").read_text() == (tmp_path / "custom.md").read_text()


def test_bench_records_a_command_without_the_folder(tmp_path: Path) -> None:
    Outcome("bench", *QUICK, *ONE, "--out", str(tmp_path))
    results = Results.load(tmp_path / "custom.json")
    assert results.command.startswith("rnnlm-kernels bench ")
    assert set(" ".join((*QUICK, *ONE)).split()) <= set(results.command.split())
    assert str(tmp_path) not in (tmp_path / "custom.json").read_text()


def test_bench_refuses_a_wrong_kernel_with_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_layers(monkeypatch)
    shown = Outcome("bench", *QUICK, *ONE, "--out", str(tmp_path))
    assert shown.code == 1
    assert "not timed" in shown.out
    _, ours = Results.load(tmp_path / "custom.json").measurements
    assert (ours.status, ours.median_us) == ("wrong", None)


def test_ctrl_c_writes_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_one, calls = harness._measure, []

    def interrupted(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure_one(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(harness, "_measure", interrupted)
    shown = Outcome("bench", *QUICK, "--shape", "3,2,4,5", "--cell", "gru", "--out", str(tmp_path))
    assert shown.code == 130
    assert "interrupted" in shown.err
    results = Results.load(tmp_path / "custom.json")
    assert not results.complete
    assert len(results.measurements) == 2
    assert "interrupted" in (tmp_path / "custom.md").read_text()


def test_sigterm_ends_a_run_as_ctrl_c_does() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), terminate_as_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_list_runs_nothing_and_names_the_grid() -> None:
    shown = Outcome("bench", "--list", "--cell", "lstm", "--lengths", "packed")
    assert shown.code == 0
    assert "1 problems" in shown.out
    assert "lstm f32 1000,8,64,64 packed" in shown.out


def test_full_is_the_grid_of_that_name() -> None:
    named, short = (
        Outcome("bench", "--list", "--grid", "full"),
        Outcome("bench", "--list", "--full"),
    )
    assert named.code == short.code == 0
    assert named.out == short.out
    assert named.out != Outcome("bench", "--list").out


def test_what_is_measured_is_on_disk_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a GPU that hangs, nothing can be asked at the end."""
    monkeypatch.setattr(bench, "KEEP_EVERY_S", 0.0)
    measure_one, kept = harness._measure, []

    def look(*arguments: object) -> object:
        kept.append((tmp_path / "custom.json").exists())
        if kept[-1]:
            half = Results.load(tmp_path / "custom.json")
            assert not half.complete
            assert [m.ratio is None for m in half.measurements] == [True, False]
        return measure_one(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(harness, "_measure", look)
    shown = Outcome("bench", *QUICK, "--shape", "3,2,4,5", "--cell", "gru", "--out", str(tmp_path))
    assert shown.code == 0
    assert kept == [False, True]


def test_a_run_may_be_short_of_time(tmp_path: Path) -> None:
    shape = ("--shape", "3,2,4,5", "--cell", "gru", "--out", str(tmp_path))
    shown = Outcome("bench", *QUICK, *shape, "--budget-seconds", "60", "--check-steps", "2")
    assert shown.code == 0
    results = Results.load(tmp_path / "custom.json")
    assert (results.settings["total_s"], results.settings["check_steps"]) == (60.0, 2)
    assert "--budget-seconds 60.0 --check-steps 2" in results.command


@pytest.mark.parametrize(
    "arguments",
    [
        ("bench", "--grid", "chessboard"),
        ("bench", "--cell", "rnn"),
        ("bench", "--cell", "gru-before"),
        ("bench", "--dtype", "int8"),
        ("bench", "--mode", "sleep"),
        ("bench", "--shape", "1,2,3"),
        ("bench", "--shape", "0,1,1,1"),
        ("bench", "--threads", "0"),
        ("bench", "--threads", "many"),
        ("bench", "--layers", "2"),
        ("bench", "--backend", "abacus"),
        ("bench", "--device", "abacus"),
        ("bench", "report", "no-such-file.json"),
        ("check", "--backend", "abacus"),
        ("check", "--device", "abacus"),
        ("check", "--dtype", "int8"),
        ("check", "--cell", "rnn"),
    ],
    ids=" ".join,
)
def test_wrong_use_is_one_clear_line_and_code_2(arguments: tuple[str, ...]) -> None:
    shown = Outcome(*arguments)
    assert shown.code == 2
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    "arguments", [("bench", "--budget", "x"), ("frobnicate",), ("check", "--no-such-option")]
)
def test_misspelt_use_is_code_2(arguments: tuple[str, ...]) -> None:
    assert Outcome(*arguments).code == 2


def test_two_results_can_be_compared(tmp_path: Path) -> None:
    Outcome("bench", *QUICK, *ONE, "--out", str(tmp_path))
    old = Results.load(tmp_path / "custom.json")
    ours = old.measurements[1]
    assert ours.median_us is not None
    ours.median_us /= 4
    old.save(tmp_path / "faster.json")
    script = Path(__file__).parents[1] / "benchmarks" / "compare.py"
    done = python(str(script), str(tmp_path / "custom.json"), str(tmp_path / "faster.json"))
    assert done.returncode == 0, done.stderr
    assert "4.00x" in done.stdout


def test_results_go_to_the_repository_or_here(tmp_path: Path) -> None:
    assert default_folder("cpu", tmp_path) == tmp_path / "rnnlm-bench-results"
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "rnnlm_kernels" / "bench").mkdir(parents=True)
    inside = tmp_path / "docs"
    inside.mkdir()
    found = default_folder("cpu", inside)
    assert found.parent == tmp_path / "benchmarks" / "results"
    assert found.name.startswith("cpu-")
