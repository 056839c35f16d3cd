"""Further rivals of the benchmark, the roofline, and the counting of instructions."""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bench import QUICK, RIGHT, TINY, FakeClock, measurement
from torch import Tensor, nn
from typer.testing import CliRunner

from rnnlm_kernels.bench import grids, harness, measure, onnx_runtime, report, roofline, targets
from rnnlm_kernels.bench.contenders import (
    ONNX,
    PLAIN,
    TORCH,
    TORCH_COMPILE,
    Contender,
    ContenderError,
    contenders,
    onnx_contender,
    plain_layer,
    torch_contender,
    torch_layer,
)
from rnnlm_kernels.bench.results import (
    OK,
    UNSUPPORTED,
    WRONG,
    Measurement,
    Results,
    fill_ratios,
    geomeans,
)
from rnnlm_kernels.bench.workload import CELLS, Setup, Workload, flops, setup
from rnnlm_kernels.check import Judge
from rnnlm_kernels.cli import app

ROOT = Path(__file__).resolve().parent.parent
INSTRUCTIONS = ROOT / "benchmarks" / "instructions.py"


# ONNX's weights


def onnx_lstm(x: Tensor, h: Tensor, c: Tensor, W: Tensor, R: Tensor, B: Tensor) -> Tensor:
    """The equations of ONNX's operator specification, gates i, o, f, c; the last h."""
    for step in x:
        i, o, f, g = (step @ W.T + h @ R.T + sum(B.chunk(2))).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return h


def onnx_gru(x: Tensor, h: Tensor, linear_before_reset: bool, *weights: Tensor) -> Tensor:
    """The same, gates z, r, h."""
    W, R, B = weights
    (wz, wr, wh), (rz, rr, rh) = W.chunk(3), R.chunk(3)
    bz, br, bh, cz, cr, ch = B.chunk(6)
    for step in x:
        z = (step @ wz.T + h @ rz.T + bz + cz).sigmoid()
        r = (step @ wr.T + h @ rr.T + br + cr).sigmoid()
        new = r * (h @ rh.T + ch) if linear_before_reset else (r * h) @ rh.T + ch
        h = (1 - z) * (step @ wh.T + bh + new).tanh() + z * h
    return h


@pytest.mark.parametrize("cell", CELLS)
def test_onnx_equations_with_repacked_weights_are_torchs_layer(cell: str) -> None:
    inputs = setup(Workload(cell, 4, 2, 3, 5, dtype="float64", bidirectional=True))
    layer = (plain_layer if cell == "gru-before" else torch_layer)(inputs)
    _, (h_n, *_) = inputs.call(layer, inputs.x, inputs.state)
    found = onnx_runtime.layer_weights(inputs, 0)
    for direction, x in enumerate((inputs.x, inputs.x.flip(0))):
        own = [found[name][direction] for name in ("W", "R", "B")]
        state = [s[direction] for s in inputs.state]
        last = onnx_lstm(x, *state, *own) if cell == "lstm" else None
        if last is None:
            last = onnx_gru(x, *state, cell == "gru", *own)
        torch.testing.assert_close(last, h_n[direction])


@given(st.sampled_from(CELLS), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_reordering_gates_moves_every_row_once(cell: str, hidden: int, columns: int) -> None:
    gates = len(onnx_runtime.GATE_ORDER[cell])
    rows = torch.arange(gates * hidden * columns).view(gates * hidden, columns)
    moved = onnx_runtime.reorder_gates(rows, cell)
    assert sorted(moved.flatten().tolist()) == rows.flatten().tolist()
    assert torch.equal(moved[:hidden], rows[:hidden]) == (cell == "lstm")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"mode": "training"}, "inference"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"lengths": "packed"}, "padded"),
        ({"proj_size": 2}, "projection"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_onnx_says_what_it_does_not_run(
    changes: dict, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_runtime, "missing_packages", list)
    assert not onnx_runtime.refusal(TINY)
    workload = replace(TINY, **changes)
    with pytest.raises(ContenderError, match=word) as caught:
        onnx_contender().build(setup(workload))
    assert caught.value.status == UNSUPPORTED


def test_a_missing_package_is_named_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_runtime, "PACKAGES", ("onnx_that_nobody_has", "os"))
    assert onnx_runtime.missing_packages() == ["onnx_that_nobody_has"]
    assert onnx_runtime.versions() == {}
    reason = onnx_runtime.refusal(TINY)
    assert "onnx_that_nobody_has" in reason
    assert "rnnlm-kernels[rivals]" in reason


@pytest.mark.parametrize(
    "changes",
    [{}, {"bias": False}, {"bidirectional": True, "num_layers": 2}, {"num_layers": 2}],
    ids=["plain", "no-bias", "bidirectional-stack", "stack"],
)
@pytest.mark.parametrize("cell", CELLS)
def test_onnx_runtime_computes_the_same_layer(cell: str, changes: dict) -> None:
    for package in onnx_runtime.PACKAGES:
        pytest.importorskip(package)
    judge = Judge(Workload(cell, 6, 3, 4, 5, **changes))
    found = judge.check(onnx_contender().build, ONNX)
    assert found.ok, found.summary()


def test_onnx_runtime_reads_new_tensors_and_new_values() -> None:
    for package in onnx_runtime.PACKAGES:
        pytest.importorskip(package)
    inputs = setup(TINY)
    layer, expected = onnx_runtime.OnnxLayer(inputs), torch_layer(inputs)
    x = inputs.x.clone()
    for change in (lambda: x, lambda: x.mul_(2), lambda: x.clone(), lambda: x.flip(0)):
        given = change()
        torch.testing.assert_close(
            inputs.call(layer, given, inputs.state)[0],
            inputs.call(expected, given, inputs.state)[0],
        )


# In the harness


def test_who_has_no_gradients_is_asked_for_none() -> None:
    class Detached(nn.Module):
        def __init__(self, inputs: Setup) -> None:
            super().__init__()
            self.layer = [torch_layer(inputs)]

        @torch.no_grad()
        def forward(self, x: Tensor, state: Any) -> Any:
            return self.layer[0](x, state)

    grid = [TINY, TINY.with_mode("training")]
    for differentiable, status in ((False, OK), (True, WRONG)):
        contender = Contender("detached", Detached, differentiable=differentiable)
        results = harness.run(grid, [contender], options=QUICK)
        assert results.measurements[1].status == ("failed" if status == OK else WRONG)
        assert results.measurements[0].status == OK


def test_onnx_runtime_stays_where_torch_has_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_runtime, "missing_packages", list)
    monkeypatch.setattr(onnx_runtime, "OnnxLayer", plain_layer)
    found = harness.run(
        [replace(TINY, cell="gru-before")],
        contenders(["reference"], compile_torch=True, onnx=True),
        options=QUICK,
    ).measurements
    assert [m.contender for m in found] == [PLAIN, "reference", ONNX]
    assert found[1].onnx_ratio == pytest.approx(found[2].median_us / found[1].median_us)  # type: ignore[operator]


def test_what_a_contender_was_seen_to_run_is_its_plan() -> None:
    seen = replace(RIGHT, observed=lambda step: "seen", plan=lambda workload: "planned")
    (m,) = harness.run([TINY], [seen], options=QUICK).measurements
    assert m.plan == "seen"


def test_settling_and_warming_up_costs_nobody_time() -> None:
    clock = FakeClock()
    samples = measure.interleave(
        {"a": clock.step("a", 1.0), "b": clock.step("b", 2.0)},
        QUICK,
        clock=clock,
        settle=clock.step("-", 100.0),
    )
    assert samples == {"a": [1.0] * 2, "b": [2.0] * 2}
    assert "".join(clock.calls) == "-a-b" + "-aa-bb" + "-bb-aa"


@pytest.mark.parametrize(
    ("busy_s", "waited_s"), [(0.0, 0.025), (0.04, 0.075), (9.0, 0.5)], ids=["0", "0.04", "9"]
)
def test_quiet_is_when_no_thread_of_the_process_runs(
    busy_s: float, waited_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = SimpleNamespace(t=0.0)

    def sleep(seconds: float) -> None:
        now.t += seconds

    fake = SimpleNamespace(
        sleep=sleep, perf_counter=lambda: now.t, process_time=lambda: min(now.t, busy_s)
    )
    monkeypatch.setattr(measure, "time", fake)
    measure.wait_for_quiet()
    assert now.t == pytest.approx(waited_s, abs=0.001)


# Ratios to further rivals


@pytest.fixture
def raced() -> list[Measurement]:
    """Two problems with everyone's times, and one that ran without the further rivals."""
    times = {TORCH: 12.0, TORCH_COMPILE: 6.0, ONNX: 3.0, "cpu": 4.0}
    found = [
        measurement(w, name, median_us=factor * time, plan="aten::lstm" if "." in name else "")
        for w, factor in ((TINY, 1.0), (replace(TINY, batch=9), 10.0))
        for name, time in times.items()
    ]
    found += [measurement(replace(TINY, batch=8), n, median_us=5.0) for n in (TORCH, "cpu")]
    fill_ratios(found)
    return found


def test_ratios_to_further_rivals_are_ours_alone(raced: list[Measurement]) -> None:
    ratios = [(m.ratio, m.compile_ratio, m.onnx_ratio) for m in raced if m.contender == "cpu"]
    assert ratios == [(3.0, 1.5, 0.75), (3.0, 1.5, 0.75), (1.0, None, None)]
    for m in raced:
        if m.contender != "cpu":
            assert m.compile_ratio is m.onnx_ratio is None
    for rival, mean in ((TORCH_COMPILE, 1.5), (ONNX, 0.75)):
        ((group, found),) = geomeans(raced, rival).items()
        assert group.contender == "cpu"
        assert found == (pytest.approx(mean), 2)


def test_a_result_holds_and_shows_the_further_rivals(raced: list[Measurement]) -> None:
    results = replace(harness.new_results(), measurements=raced)
    stored = results.to_dict()["further_rivals"]
    assert [(g["rival"], g["problems"]) for g in stored] == [(TORCH_COMPILE, 2), (ONNX, 2)]
    assert Results.from_dict(results.to_dict()).measurements == raced
    page = report.to_markdown(results)
    assert "| lstm f32 inference | ONNX Runtime | cpu | 1 | 2 | 0.75x |" in page
    assert "| lstm | inference | aten::lstm | 2 |" in page


def test_goals_against_a_rival_are_judged_only_where_it_ran(raced: list[Measurement]) -> None:
    def verdicts(found: list[Measurement]) -> dict[str | None, tuple[bool, int]]:
        judged = targets.judge(found)
        return {v.target.rival: (v.met, v.refused) for v in judged if v.target.rival}

    assert verdicts(raced) == {TORCH_COMPILE: (True, 0), ONNX: (False, 0)}
    wrong = measurement(replace(TINY, batch=7), "cpu", status=WRONG)
    assert verdicts([*raced, wrong])[TORCH_COMPILE] == (False, 1)
    assert verdicts([m for m in raced if m.contender not in (TORCH_COMPILE, ONNX)]) == {}


def test_rivals_grid_is_what_onnx_runs_of_the_full_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_runtime, "missing_packages", list)
    runnable = [w for w in grids.full_grid() if not onnx_runtime.refusal(w)]
    assert grids.rivals_grid() == runnable
    assert {w.cell for w in runnable} == set(CELLS)


def test_bench_goes_on_without_onnx_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_runtime, "missing_packages", lambda: ["onnxruntime"])
    shape = ("--shape", "3,2,4,5", "--cell", "gru", "--mode", "inference", "--samples", "2")
    words = ["bench", *shape, "--backend", "reference", "--onnx", "--out", str(tmp_path)]
    outcome = CliRunner().invoke(app, words)
    assert outcome.exit_code == 0, outcome.output
    assert "onnxruntime not installed; pip install 'rnnlm-kernels[rivals]'" in outcome.stderr
    results = Results.load(tmp_path / "custom.json")
    assert [m.contender for m in results.measurements] == [TORCH, "reference"]


# The roof


@pytest.mark.parametrize(
    ("workload", "expected"),
    [
        (Workload("lstm", 2, 3, 4, 5), 4 * 5 * 5 * 4),
        (Workload("gru", 2, 3, 4, 5, dtype="bfloat16"), 3 * 5 * 5 * 2),
        (Workload("lstm", 2, 3, 4, 5, proj_size=2), (4 * 5 * 2 + 2 * 5) * 4),
    ],
    ids=lambda value: value.label if isinstance(value, Workload) else str(value),
)
def test_bytes_that_a_step_reads(workload: Workload, expected: int) -> None:
    assert roofline.weight_bytes(workload) == expected


@pytest.mark.parametrize(
    ("workload", "products", "reads"),
    [
        (TINY, 1, 4),
        (TINY.with_mode("training"), 3, 8),
        (replace(TINY, num_layers=2, bidirectional=True), None, 16),
    ],
    ids=["inference", "training", "stack"],
)
def test_the_roof_is_the_larger_of_products_and_weights(
    workload: Workload, products: int | None, reads: int
) -> None:
    """One product of a layer's work takes 1 s or next to nothing, and so does reading 8 MiB."""
    roof = roofline.Roof(workload)
    product, weights = roof.steps
    once = flops(replace(workload, mode="inference", num_layers=1, bidirectional=False))
    found = roof.least_us({product: [2.0, 1.0], weights: [1e-9, 1.0]})
    assert found == (pytest.approx(1e6 * flops(workload) / once), roofline.PRODUCT)
    assert products is None or found[0] == pytest.approx(1e6 * products)
    least, bound = roof.least_us({product: [1e-9], weights: [1.0]})
    assert bound == roofline.WEIGHTS
    assert least == pytest.approx(1e6 * reads * roofline.weight_bytes(workload) / 2**23, rel=0.01)


def test_a_measurement_has_its_share_of_the_roof() -> None:
    grid = [TINY, replace(TINY, lengths="packed"), replace(TINY, dtype="bfloat16", mode="training")]
    for m in harness.run(grid, [torch_contender()], options=QUICK).measurements:
        assert m.roofline == pytest.approx(m.roof_us / m.median_us)  # type: ignore[operator]
        assert m.roof_us > 0  # type: ignore[operator]
        assert m.bound in (roofline.PRODUCT, roofline.WEIGHTS)
        assert report.format_roofline(m).endswith(f" of {m.bound}")


# Instructions


@pytest.fixture(scope="module")
def instructions() -> dict[str, Any]:
    return runpy.run_path(str(INSTRUCTIONS))


PROFILE = """# callgrind format
version: 1
part: 1
desc: Timerange: Basic block 0 - 957236
desc: Trigger: Client Request: {name}

positions: line
events: Ir
summary: 0

fn=(0) begin
0 3

totals: {total}
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PROFILE.format(name="1 ONNX Runtime", total=17), ("1 ONNX Runtime", 17)),
        (PROFILE.format(name="x", total=17).replace("Client Request: x", "Program end"), None),
        ("desc: Trigger: Client Request: 0 cpu\n", None),
    ],
    ids=["a-mark", "the-end", "cut-short"],
)
def test_callgrinds_files(instructions: dict[str, Any], text: str, expected: object) -> None:
    assert instructions["parse_profile"](text) == expected


def test_instructions_per_step_and_unit(instructions: dict[str, Any]) -> None:
    grid = [TINY, replace(TINY, cell="gru")]  # 4 steps, 5 x 5 units
    counts = {(0, "cpu"): 2000.0, (0, TORCH): 4000.0, (0, ONNX): 1000.0, (1, "cpu"): 200.0}
    counts[1, TORCH] = 1600.0
    rows = instructions["rows_of"](grid, counts)
    assert rows[0]["contenders"]["cpu"] == {
        "instructions": 2000,
        "per step": 500.0,
        "per step and unit": 20.0,
    }
    assert [row["ratios"] for row in rows] == [{TORCH: 2.0, ONNX: 0.5}, {TORCH: 8.0}]
    assert instructions["summary"]([*rows, *rows]) == {
        "lstm": {TORCH: 2.0, ONNX: 0.5},
        "gru": {TORCH: 8.0},
    }
    shown = instructions["table"](rows)
    assert "| lstm f32 4,5,3,5 | inference | 20.0 | 40.0 | 10.0 | 2.00x | 0.50x |" in shown
    assert "| 2.0 | 16.0 | - | 8.00x | - |" in shown


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts scripts on an otherwise nearly empty PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setenv("CC", "fake-cc")

    def put(name: str, script: str) -> None:
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)

    return put


def test_counting_runs_the_command_under_valgrind_held_to_avx2(
    instructions: dict[str, Any], tools: Callable[[str, str], None]
) -> None:
    tools("fake-cc", "exit 0")
    mark = "desc: Trigger: Client Request"
    tools(
        "valgrind",
        f"""
        test "$RNNLM_CPU_ISA $ATEN_CPU_CAPABILITY $ONEDNN_MAX_CPU_ISA" = "avx2 avx2 AVX2" || exit 3
        for word in "$@"; do
          case "$word" in --callgrind-out-file=*) file="${{word#*=}}" ;; esac
        done
        printf '{mark}: 0 cpu\\ntotals: 100\\n' > "$file.1"
        printf '{mark}: 12 ONNX Runtime\\ntotals: 50\\n' > "$file.2"
        printf 'desc: Trigger: Program termination\\ntotals: 7\\n' > "$file.3"
        """,
    )
    calls = instructions["CALLS"]
    assert instructions["count"](["program"]) == {(0, "cpu"): 100 / calls, (12, ONNX): 50 / calls}
    tools("valgrind", "exit 5")
    with pytest.raises(SystemExit, match="ended with 5"):
        instructions["count"](["program"])
    tools("fake-cc", "exit 1")
    with pytest.raises(SystemExit, match="headers"):
        instructions["count"](["program"])


def test_counting_without_a_compiler_names_it(
    instructions: dict[str, Any], tools: Callable[[str, str], None]
) -> None:
    tools("valgrind", "exit 0")
    with pytest.raises(SystemExit, match="fake-cc was not found"):
        instructions["count"](["program"])


def test_marked_runs_are_warm_and_named(
    instructions: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    marks: list[str] = []
    library = SimpleNamespace(
        begin=lambda: marks.append("begin"), end=lambda name: marks.append(name.decode())
    )
    monkeypatch.setattr(instructions["ctypes"], "CDLL", lambda path: library)
    monkeypatch.setattr(onnx_runtime, "missing_packages", lambda: ["onnx"])
    instructions["run_marked"]([TINY, replace(TINY, cell="gru-before")], Path("marks.so"))
    assert marks == ["begin", "0 cpu", "begin", "0 torch", "begin", "1 cpu"]
