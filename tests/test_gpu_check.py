"""scripts/gpu_check.sh, which runs where GPUs are scarce, works as far as a CPU can show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_emulated import needs_emulator
from typer.testing import CliRunner

from rnnlm_kernels.bench.grids import gpu_grid
from rnnlm_kernels.bench.results import Results
from rnnlm_kernels.cli import app
from rnnlm_kernels.tuning import Table

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="a script for Linux")


def gpu_check(*arguments: str | Path, **environment: str) -> tuple[int, str]:
    own = {k: v for k, v in os.environ.items() if not k.startswith(("RNNLM_", "PYTEST_"))}
    done = subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        env=own | {"PYTHON": sys.executable} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    return done.returncode, done.stdout


@LINUX_ONLY
@needs_emulator
@pytest.mark.slow
def test_the_dry_run_goes_through_every_stage(tmp_path: Path) -> None:
    code, output = gpu_check("--dry-run", tmp_path)
    assert code == 0, output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["ok"]
    names = [stage["stage"] for stage in summary["stages"]]
    assert names == [
        *("tools", "build", "plan", "tests", "check", "bench", "tune", "triton", "emulator")
    ]
    for name in names:
        assert (tmp_path / "logs" / f"{name}.txt").is_file()

    assert json.loads((tmp_path / "check.json").read_text())["ok"]
    assert Results.load(tmp_path / "custom.json").complete
    (tuned,) = (tmp_path / "tuned").iterdir()
    assert len(Table.from_json(tuned.read_bytes()).entries) == 2
    plans = (tmp_path / "plan.txt").read_text().splitlines()
    assert len(plans) == 1 + len(gpu_grid())
    assert all("us/step" in line for line in plans[1:])
    for name, kinds in (
        ("emulator", {"stepwise", "block", "cluster", "grid", "grid-pairs"}),
        ("triton", {"stepwise", "sequence"}),
    ):
        lines = (tmp_path / "logs" / f"{name}.txt").read_text().splitlines()
        assert {line.split()[1] for line in lines if line.startswith("ok")} == kinds
    assert json.loads((tmp_path / "triton" / "head.json").read_text())


# Stands in for the interpreter of a machine with a GPU: knows which GPU that is, and says what it
# was told to do. The GPU tests fail.
PRETENDER = f"""#!/bin/bash
if [[ $1 == -c && $2 == *is_available* ]]; then exit 0; fi
if [[ $1 == - ]]; then
  code=$(cat)
  if [[ $code == *get_device_capability* ]]; then echo gpu-example 90a-real; exit 0; fi
  exec '{sys.executable}' -c "$code" "${{@:2}}"
fi
echo "$* for $RNNLM_CUDA_ARCHS, tier $RNNLM_CUDA_TIER"
[[ $* != "-m pytest"* ]]
"""
PASSES_ON = """#!/bin/bash
while [[ $1 != */python ]]; do shift; done
exec "$@"
"""


@LINUX_ONLY
def test_on_a_gpu_every_stage_runs_whatever_fails(tmp_path: Path) -> None:
    """The order of things and the command lines, with stand-ins for all that needs a GPU."""
    tools, out = tmp_path / "tools", tmp_path / "out"
    tools.mkdir()
    for name, text in (
        ("python", PRETENDER),
        ("compute-sanitizer", PASSES_ON),
        ("ncu", PASSES_ON),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    code, output = gpu_check(out, PATH=path, PYTHON=str(tools / "python"))
    assert code == 1, output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["gpu"] == "gpu-example"
    results = {stage["stage"]: stage["result"] for stage in summary["stages"]}
    sanitizers = {"memcheck", "racecheck", "synccheck", "initcheck"}
    assert set(results) == sanitizers | {
        *("tools", "build", "plan", "tests", "check", "bench", "tune", "triton", "profile"),
        "memcheck-triton",
    }
    assert {stage for stage, result in results.items() if result != "ok"} == {"tests"}

    said = {name: (out / "logs" / f"{name}.txt").read_text() for name in results}
    assert "setup.py -q build_ext --inplace for 90a-real" in said["build"]
    assert "--grid gpu --device cuda --backend cuda" in said["bench"]
    assert all("gpu_tiny.py check" in said[tool] for tool in sanitizers)
    assert "gpu_tiny.py triton" in said["memcheck-triton"]
    assert "gpu_tiny.py profile for , tier grid" in said["profile"]
    triton = said["triton"].splitlines()
    assert "linear_cross_entropy.py --device cuda" in triton[1]
    commands = [said["bench"], said["tune"], triton[0], (out / "triton/check.json").read_text()]
    for line in commands:
        command, *words = line.split(" for ")[0].removeprefix("-m rnnlm_kernels ").split()
        offered = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "400"}).output
        assert all(word in offered for word in words if word.startswith("--")), command


@LINUX_ONLY
def test_stages_that_get_no_time_are_failures_with_a_summary(tmp_path: Path) -> None:
    code, output = gpu_check("--dry-run", tmp_path, RNNLM_GPU_CHECK_SECONDS="1")
    assert code == 1, output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {stage["result"] for stage in summary["stages"]} == {"no time left"}
    assert "not ok: tools, build" in output


@LINUX_ONLY
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    code, output = gpu_check(tmp_path / "out")
    assert (code, output) == (2, "gpu_check.sh: torch sees no GPU\n")
    assert not (tmp_path / "out").exists()
