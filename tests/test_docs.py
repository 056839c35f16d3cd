"""What the documentation shows runs, and what it links to exists."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import rnnlm_kernels
from rnnlm_kernels.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(rnnlm_kernels.__path__, "rnnlm_kernels.")
    if not module.name.endswith(("._C", "__main__"))
)


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)


def commands(page: Path) -> list[list[str]]:
    """Every call of our command that a page shows, in a block of its own or indented."""
    lines = [line.strip() for line in page.read_text("utf-8").splitlines()]
    shown = [line.split("  #")[0] for line in lines if line.startswith("rnnlm-kernels ")]
    return [shlex.split(line, comments=True)[1:] for line in shown]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    if name.startswith("rnnlm_kernels.triton."):
        pytest.importorskip("triton")
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page are one program, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in fenced(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


def test_readme_has_python_to_run() -> None:
    assert fenced(ROOT / "README.md", "python")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_shown_exist(page: Path) -> None:
    """Every option of every command that a page shows is one that --help knows."""
    for words in commands(page):
        path = [words[0]] + [w for w in words[1:2] if w == "report"]
        outcome = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "400"})
        assert outcome.exit_code == 0, (words, outcome.output)
        for option in (w.split("=")[0] for w in words if w.startswith("--")):
            assert option in outcome.output, (words, option)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_table_is_the_committed_result() -> None:
    """No figure in the README but what a result file holds."""
    readme = (ROOT / "README.md").read_text("utf-8")
    script = runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))
    pattern = r"\]\((benchmarks/results/[^)]+/)(default|full)\.(?:png|md)\)"
    shown = dict.fromkeys(re.findall(pattern, readme))  # in the order of the README
    results = {
        (folder, name): json.loads((ROOT / folder / f"{name}.json").read_text("utf-8"))
        for folder, name in shown
    }
    assert {name for _, name in results} == {"default", "full"}
    for result in results.values():
        assert result["complete"]
        assert not result["commit"]["modified"]
    full = [result for (_, name), result in results.items() if name == "full"]
    assert script["table"](full) in readme


def test_readme_claims_of_a_gpu_only_what_was_measured_on_one() -> None:
    """The table is that of a committed result, or says that there is none."""
    script = runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))
    files = sorted(ROOT.glob("benchmarks/results/gpu-*/gpu.json"))
    tables = [script["gpu_table"](json.loads(file.read_text("utf-8"))) for file in files]
    readme = (ROOT / "README.md").read_text("utf-8")
    shown = [table for table in tables or [script["gpu_table"](None)] if table in readme]
    assert len(shown) == 1


def test_a_gpu_table_shows_what_a_result_holds_and_what_it_lacks() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))
    group = {"cell": "gru", "kind": "dense", "dtype": "bfloat16", "mode": "training", "ratio": 0.5}
    lines = script["gpu_table"]({"geomeans": [group]}).splitlines()
    assert "| GRU bfloat16 | not yet measured | **0.50x** |" in lines
    assert lines.count("| GRU float16 | not yet measured | not yet measured |") == 1
