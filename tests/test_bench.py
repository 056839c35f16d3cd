"""The benchmark: what it refuses, how it counts, and that its files can be read back."""

from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rnnlm_kernels.bench import grids, harness, machine, measure, report, targets
from rnnlm_kernels.bench.contenders import (
    PLAIN,
    TORCH,
    Contender,
    ContenderError,
    compiling,
    contenders,
    torch_contender,
    torch_layer,
)
from rnnlm_kernels.bench.measure import TimingOptions, interleave, quantiles, saved_for_backward
from rnnlm_kernels.bench.plot import ratio_plot
from rnnlm_kernels.bench.results import (
    FAILED,
    OK,
    WRONG,
    Measurement,
    Results,
    fill_ratios,
    geomean,
    geomeans,
)
from rnnlm_kernels.bench.workload import (
    CELLS,
    DTYPES,
    LENGTHS,
    MODES,
    Setup,
    Workload,
    captured,
    flops,
    precision,
    row_lengths,
    setup,
    trial,
)
from rnnlm_kernels.files import write_atomically

QUICK = TimingOptions(budget_s=0.0, min_samples=2, max_samples=2, min_sample_s=0.0, warmup=1)
TINY = Workload("lstm", 4, 5, 3, 5)

workloads = st.builds(
    Workload,
    cell=st.sampled_from(CELLS),
    seq_len=st.integers(1, 9),
    batch=st.integers(1, 5),
    input_size=st.integers(1, 5),
    hidden_size=st.integers(1, 5),
    num_layers=st.integers(1, 2),
    dtype=st.sampled_from(list(DTYPES)),
    lengths=st.sampled_from(LENGTHS),
    mode=st.sampled_from(MODES),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 3),
)


def measurement(workload: Workload = TINY, contender: str = "cpu", **values: object) -> Measurement:
    return Measurement(workload, 1, contender, **values)  # type: ignore[arg-type]


class Doubled(nn.Module):
    """torch's layer with twice its output: fast and wrong."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, weight in layer.named_parameters():
            self.register_parameter(name, weight)
        self.inner = [layer]

    def forward(self, x: Tensor, state: object) -> tuple[Tensor, object]:
        output, final = self.inner[0](x, state)
        return output * 2, final


def crash(inputs: Setup) -> nn.Module:
    raise RuntimeError("the kernel fell over\nand more lines of it")


RIGHT = Contender("right", torch_layer)
DOUBLED = Contender("doubled", lambda inputs: Doubled(torch_layer(inputs)))
CRASHING = Contender("crashing", crash)


@pytest.fixture(scope="module")
def small_run() -> Results:
    grid = [TINY, TINY.with_mode("training")]
    results = harness.new_results(command="test", options=QUICK)
    return harness.run(
        grid, [torch_contender(), RIGHT, DOUBLED, CRASHING], options=QUICK, results=results
    )


# What the harness refuses, and what it survives


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_wrong_kernel_is_not_timed(small_run: Results, mode: str) -> None:
    (m,) = [
        m for m in small_run.measurements if m.contender == "doubled" and m.workload.mode == mode
    ]
    assert m.status == WRONG
    assert m.median_us is m.ratio is m.saved_bytes is None
    assert "is wrong" in m.note


def test_a_wrong_gradient_stops_training_but_not_inference() -> None:
    class WrongBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad * 2

    class Layer(Doubled):
        def forward(self, x: Tensor, state: object) -> tuple[Tensor, object]:
            output, final = self.inner[0](x, state)
            return WrongBackward.apply(output), final

    wrong = Contender("wrong backward", lambda inputs: Layer(torch_layer(inputs)))
    results = harness.run([TINY, TINY.with_mode("training")], [wrong], options=QUICK)
    assert [m.status for m in results.measurements] == [OK, WRONG]


def test_a_crashing_kernel_is_a_result_not_the_end(small_run: Results) -> None:
    crashed = [m for m in small_run.measurements if m.contender == "crashing"]
    assert [m.status for m in crashed] == [FAILED, FAILED]
    assert crashed[0].note == "the kernel fell over"


def test_the_right_kernel_beside_them_is_timed(small_run: Results) -> None:
    timed = [m for m in small_run.measurements if m.contender in (TORCH, "right")]
    assert len(timed) == 4
    assert small_run.complete
    for m in timed:
        assert m.status == OK
        assert m.median_us is not None
        assert m.us_per_step == pytest.approx(m.median_us / 4)
        assert (m.ratio is None) == (m.contender == TORCH)
        assert (m.saved_bytes is None) == (m.workload.mode == "inference")


def test_an_interrupted_run_keeps_what_it_measured() -> None:
    def interrupt_the_second(workload: Workload, threads: int) -> None:
        if workload.hidden_size == 6:
            raise KeyboardInterrupt

    results = harness.new_results()
    grid = [TINY, replace(TINY, hidden_size=6)]
    with pytest.raises(KeyboardInterrupt):
        harness.run(
            grid,
            [torch_contender(), RIGHT],
            options=QUICK,
            results=results,
            progress=interrupt_the_second,
        )
    assert not results.complete
    assert [m.workload for m in results.measurements] == [TINY, TINY]
    assert results.measurements[1].ratio is not None


def test_a_run_out_of_time_says_how_many_problems_it_left_out() -> None:
    grid = [TINY, TINY.with_mode("training")]
    results = harness.run(grid, [torch_contender()], options=QUICK, total_s=0.0)
    assert (results.measurements, results.left_out) == ([], 2)
    assert "last 2 problems" in report.to_markdown(results)
    in_time = harness.run(grid, [torch_contender()], options=QUICK, total_s=1e6)
    assert (len(in_time.measurements), in_time.left_out) == (2, 0)


def test_a_long_sequence_may_be_checked_over_its_first_steps() -> None:
    class WrongAtTheEnd(Doubled):
        def forward(self, x: Tensor, state: object) -> tuple[Tensor, object]:
            output, final = self.inner[0](x, state)
            return torch.cat([output[:3], output[3:] * 2]), final

    wrong = Contender("wrong at the end", lambda inputs: WrongAtTheEnd(torch_layer(inputs)))
    for steps, status in ((3, OK), (4, WRONG), (None, WRONG)):
        results = harness.run([TINY], [wrong], options=QUICK, check_steps=steps)
        assert [m.status for m in results.measurements] == [status]
        assert results.settings["check_steps"] == steps


def test_thread_counts_are_set_for_the_run_and_restored_after_it() -> None:
    before = torch.get_num_threads()
    seen = []

    def spy(inputs: Setup) -> nn.Module:
        seen.append(torch.get_num_threads())
        return torch_layer(inputs)

    results = harness.run(
        [TINY], [Contender("spy", spy, trusted=True)], threads=[1, 2], options=QUICK
    )
    assert [m.threads for m in results.measurements] == [1, 2]
    assert seen == [1, 2]
    assert torch.get_num_threads() == before


def test_where_torch_has_no_layer_plain_pytorch_is_the_rival() -> None:
    workload = replace(TINY, cell="gru-before")
    results = harness.run([workload], contenders(["reference"]), options=QUICK)
    plain, ours = results.measurements
    assert (plain.contender, plain.ratio) == (PLAIN, None)
    assert ours.ratio == pytest.approx(plain.median_us / ours.median_us)  # type: ignore[operator]


def test_compiling_has_a_time_limit() -> None:
    slow = Contender("slow", torch_layer, compile_limit_s=0.01)

    def compile_for_ever() -> None:
        with compiling(slow):
            while True:
                pass

    with pytest.raises(ContenderError, match="limit") as caught:
        compile_for_ever()
    assert caught.value.status == "does not compile"


def test_a_compiler_error_is_told_in_one_line() -> None:
    slow = Contender("slow", torch_layer, compile_limit_s=60.0)
    with pytest.raises(ContenderError, match=r"^no RNN here$"), compiling(slow):
        raise AssertionError("no RNN here\nlong explanation")


# Timing


class FakeClock:
    """Steps advance it, so a test knows what should have been measured."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def step(self, name: str, seconds: float) -> measure.Step:
        def run() -> None:
            self.now += seconds
            self.calls.append(name)

        return run


def test_samples_alternate_in_abba_order() -> None:
    clock = FakeClock()
    options = replace(QUICK, min_samples=4, max_samples=4)
    interleave({"a": clock.step("a", 1), "b": clock.step("b", 1)}, options, clock=clock)
    assert "".join(clock.calls) == "ab" + "abbaabba"  # one warm-up call each, then the samples


def test_a_stopwatch_takes_the_place_of_the_clock() -> None:
    runs = []

    def stopwatch(run: measure.Step) -> float:
        run()
        runs.append(run)
        return 0.5

    samples = interleave({"a": lambda: None, "b": lambda: None}, QUICK, stopwatch=stopwatch)
    assert samples == {"a": [0.5] * 2, "b": [0.5] * 2}
    assert len(runs) == 2 * (1 + 2)  # a warm-up call and two samples of each


def test_short_steps_are_repeated_to_fill_a_sample() -> None:
    clock = FakeClock()
    options = TimingOptions(budget_s=0.0, min_samples=2, max_samples=2, min_sample_s=1.0)
    samples = interleave(
        {"a": clock.step("a", 0.25), "b": clock.step("b", 2.0)}, options, clock=clock
    )
    assert samples == {"a": [0.25] * 2, "b": [2.0] * 2}
    # Warm-up, then two samples of four calls and one untimed call before each.
    assert clock.calls.count("a") == 2 + 2 * (1 + 4)


def test_the_budget_ends_sampling_after_a_whole_pair_of_rounds() -> None:
    clock = FakeClock()
    options = replace(QUICK, budget_s=5.0, min_samples=2, max_samples=100)
    samples = interleave({"a": clock.step("a", 1), "b": clock.step("b", 1)}, options, clock=clock)
    assert len(samples["a"]) == len(samples["b"]) == 4


def test_a_workload_that_exhausts_patience_ends_with_fewer_samples() -> None:
    clock = FakeClock()
    options = replace(QUICK, budget_s=5.0, min_samples=10, max_samples=100)
    samples = interleave({"a": clock.step("a", 9), "b": clock.step("b", 9)}, options, clock=clock)
    assert len(samples["a"]) == 2


@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=30))
def test_quantiles_are_ordered_and_inside_the_samples(samples: list[float]) -> None:
    q = quantiles(samples)
    low, high = 1e6 * min(samples), 1e6 * max(samples)
    ordered = [low, q.q20_us, q.median_us, q.q80_us, high]
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(ordered))


# Ratios


def test_ratio_is_the_rivals_time_over_ours_per_workload_and_thread_count() -> None:
    other = replace(TINY, batch=9)
    found = [
        measurement(TINY, TORCH, median_us=30.0, saved_bytes=100, peak_bytes=200),
        measurement(TINY, "cpu", median_us=10.0, saved_bytes=40, peak_bytes=50),
        measurement(other, TORCH, median_us=5.0),
        measurement(other, "cpu", median_us=10.0),
        Measurement(TINY, 2, "cpu", median_us=10.0),  # nobody to compare with
    ]
    fill_ratios(found)
    assert [m.ratio for m in found] == [None, 3.0, None, 0.5, None]
    assert found[1].saved_ratio == 0.4
    assert found[1].peak_ratio == 0.25


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.floats(0.1, 10))
def test_geomean_scales_and_inverts(values: list[float], factor: float) -> None:
    mean = geomean(values)
    assert min(values) * (1 - 1e-9) <= mean <= max(values) * (1 + 1e-9)
    assert geomean(v * factor for v in values) == pytest.approx(mean * factor)
    assert geomean(1 / v for v in values) == pytest.approx(1 / mean)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "dense"),
        ({"lengths": "packed"}, "packed"),
        ({"batch": 4}, "short"),
        ({"seq_len": 1}, "short"),
        ({"batch": 4, "lengths": "packed"}, "packed"),
        ({"seq_len": 1, "batch": 1}, "latency"),
    ],
    ids=str,
)
def test_kinds_of_problems(changes: dict, kind: str) -> None:
    assert replace(TINY, **changes).kind == kind


def test_geomeans_keep_cells_dtypes_modes_and_kinds_apart() -> None:
    apart = [
        TINY,
        TINY.with_mode("training"),
        replace(TINY, cell="gru"),
        replace(TINY, dtype="bfloat16"),
        replace(TINY, lengths="packed"),
        replace(TINY, seq_len=1, batch=1),
    ]
    together = replace(TINY, hidden_size=50)
    found = [measurement(w, ratio=2.0) for w in apart] + [measurement(together, ratio=8.0)]
    means = geomeans(found)
    assert len(means) == len(apart)
    assert next(iter(means.values())) == (pytest.approx(4.0), 2)


# Memory


class SavesKnownBytes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, w: Tensor) -> Tensor:
        workspace = torch.zeros(1000, dtype=torch.uint8)
        gates = torch.zeros(50)
        ctx.save_for_backward(x, x.view(-1), w, gates, gates[:10], workspace)
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad * 2, None


def test_saved_storages_count_once_without_parameters() -> None:
    x, w = torch.zeros(4, 5, requires_grad=True), nn.Parameter(torch.zeros(300))
    saved = saved_for_backward(lambda: SavesKnownBytes.apply(x, w), [w])
    assert saved.total == 4 * 20 + 4 * 50 + 1000
    assert saved.workspace == 1000


def test_torchs_onednn_workspace_is_seen() -> None:
    inputs = setup(Workload("lstm", 8, 4, 16, 16, mode="training"))
    ready = trial(torch_layer(inputs), inputs)
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    saved = saved_for_backward(ready.forward, ready.layer.parameters())
    gates_and_cells = 8 * 4 * 5 * 16 * 4
    assert saved.workspace >= gates_and_cells
    assert saved.total > saved.workspace


def test_peak_sees_a_large_temporary() -> None:
    megabytes = 64

    def step() -> None:
        torch.ones(megabytes * 2**18)

    peak = measure.peak_bytes(step, "cpu")
    if peak is None:
        pytest.skip("this system does not say")
    assert 0.9 * megabytes * 2**20 < peak < 1.5 * megabytes * 2**20


# Workloads and grids


@settings(max_examples=40, deadline=None)
@given(workloads)
def test_setup_gives_a_layer_what_it_wants_and_the_same_bits_twice(workload: Workload) -> None:
    first, second = setup(workload), setup(workload)
    assert torch.equal(first.x, second.x)
    assert all(torch.equal(first.weights[n], second.weights[n]) for n in first.weights)
    if workload.cell != "gru-before" and workload.dtype in ("float32", "float64"):
        ready = trial(torch_layer(first), first)
        ready.step()
        assert ready.forward().shape == first.cotangents[0].shape


@given(workloads)
def test_lengths_are_between_half_and_all_of_the_steps(workload: Workload) -> None:
    lengths = row_lengths(workload).tolist()
    assert lengths[0] == workload.seq_len
    assert lengths == sorted(lengths, reverse=True)
    least = workload.seq_len / 2 if workload.lengths == "packed" else workload.seq_len
    assert all(least <= length <= workload.seq_len for length in lengths)


@given(workloads)
def test_training_is_three_forwards_of_work(workload: Workload) -> None:
    assert flops(workload.with_mode("training")) == 3 * flops(workload.with_mode("inference"))


def test_flops_by_hand() -> None:
    assert flops(Workload("lstm", 35, 20, 200, 200)) == 2 * 35 * 20 * 4 * 200 * 400
    assert flops(Workload("gru", 1, 1, 3, 5)) == 2 * 3 * 5 * 8
    two_layers_bidirectional = Workload("gru", 1, 1, 3, 5, num_layers=2, bidirectional=True)
    assert flops(two_layers_bidirectional) == 2 * 2 * 3 * 5 * (3 + 5) + 2 * 2 * 3 * 5 * (10 + 5)
    projected = Workload("lstm", 1, 1, 3, 5, proj_size=2)
    assert flops(projected) == 2 * (4 * 5 * (3 + 2) + 5 * 2)
    packed = Workload("lstm", 10, 3, 4, 4, lengths="packed")
    assert flops(packed) == 2 * int(row_lengths(packed).sum()) * 4 * 4 * 8


@pytest.mark.parametrize(
    "changes",
    [
        {"cell": "rnn"},
        {"dtype": "int8"},
        {"mode": "sleeping"},
        {"lengths": "ragged"},
        {"seq_len": 0},
        {"hidden_size": -1},
        {"proj_size": 5},
        {"cell": "gru", "proj_size": 2},
        {"runner": "compiled"},
        {"runner": "graph"},  # of CUDA, on a CPU
    ],
    ids=str,
)
def test_an_impossible_workload_raises(changes: dict) -> None:
    (name,) = list(changes)[-1:]
    with pytest.raises(ValueError, match=name):
        replace(TINY, **changes)


def test_grids_have_no_twins_and_the_default_is_part_of_the_full_one() -> None:
    default, full = grids.default_grid(), grids.full_grid()
    assert len(set(default)) == len(default)
    assert len(set(full)) == len(full)
    assert set(default) <= set(full)
    assert not {w.shape for w in default} & {"70,80,400,1150", "64,16,1024,1024"}
    gpu = grids.gpu_grid()
    assert len(set(gpu)) == len(gpu)
    rivals = grids.rivals_grid()
    assert len(set(rivals)) == len(rivals)
    assert set(rivals) <= set(full)


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda t: t.title)
def test_the_grid_of_its_device_speaks_about_every_target(target: targets.Target) -> None:
    grid = grids.gpu_grid() if target.device == "cuda" else grids.default_grid()
    grid = grids.rivals_grid() if target.rival else grid
    assert any(target.selects(measurement(w)) for w in grid)


def test_a_gpu_run_that_ends_early_has_met_every_target_and_every_dtype_alike() -> None:
    begun = grids.gpu_grid()[:128]
    for target in targets.TARGETS:
        if target.device == "cuda":
            assert any(target.selects(measurement(w)) for w in begun), target.title
    counts = {sum(w.dtype == dtype for w in begun) for dtype in DTYPES if dtype != "float64"}
    assert counts == {32}


def test_gpu_targets_and_cpu_targets_are_apart() -> None:
    slow = {"ratio": 0.5, "peak_ratio": 0.5, "saved_ratio": 0.1}
    gru = Workload("gru", 4, 5, 256, 256, dtype="bfloat16", mode="training")
    on_gpu = targets.judge([measurement(replace(gru, device="cuda:0"), **slow)])
    assert {v.target.title: v.met for v in on_gpu} == {
        "GRU bfloat16 on a GPU, training, mean": False,
        "Any problem on a GPU, slowest": False,
        "Training on a GPU, peak memory, mean": True,
    }
    assert all(v.target.device == "cpu" for v in targets.judge([measurement(gru, **slow)]))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"mode": "training"}, True),
        ({"device": "cpu"}, False),
        ({"cell": "gru"}, False),
        ({"dtype": "bfloat16"}, False),
        ({"hidden_size": 1152}, False),
        ({"hidden_size": 200}, False),
        ({"input_size": 200}, False),
        ({"batch": 12}, False),
        ({"batch": 136}, False),
        ({"num_layers": 2}, False),
        ({"bidirectional": True}, False),
        ({"lengths": "packed"}, False),
    ],
    ids=str,
)
def test_where_cudnn_is_persistent(changes: dict, expected: bool) -> None:
    workload = Workload("lstm", 4, 16, 128, 512, dtype="float16", device="cuda")
    assert replace(workload, **changes).cudnn_is_persistent is expected


def test_select_refuses_unknown_names_and_empty_choices() -> None:
    with pytest.raises(ValueError, match="cell should be one of"):
        grids.select(grids.default_grid(), cells=["rnn"])
    with pytest.raises(ValueError, match="no problem"):
        grids.select(grids.default_grid(), cells=["gru-before"])


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5", "a,b,c,d"])
def test_a_shape_is_four_integers(text: str) -> None:
    with pytest.raises(ValueError, match="T,B,I,H"):
        grids.parse_shape(text)


# Targets


def test_targets_are_met_at_their_bound_and_missed_below_it() -> None:
    gru = Workload("gru", 4, 5, 3, 5)
    ratios = {1.2: True, 1.19: False}
    for ratio, expected in ratios.items():
        (verdict,) = targets.judge([measurement(gru, ratio=ratio)])
        assert verdict.met is expected
        assert verdict.value == pytest.approx(ratio)


def test_saved_bytes_must_be_few() -> None:
    training = TINY.with_mode("training")
    verdicts = targets.judge([measurement(training, ratio=1.0, saved_ratio=0.6)])
    (saved,) = [v for v in verdicts if v.target.figure == "most saved"]
    assert (saved.value, saved.met) == (0.6, False)


def test_a_wrong_kernel_meets_no_target() -> None:
    gru = Workload("gru", 4, 5, 3, 5)
    found = [
        measurement(gru, ratio=9.0),
        measurement(replace(gru, batch=6), status=WRONG),
    ]
    (verdict,) = targets.judge(found)
    assert (verdict.met, verdict.word) == (False, "missed, 1 refused")


# Files


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.builds(
            Measurement,
            workload=workloads,
            threads=st.integers(1, 8),
            contender=st.sampled_from([TORCH, "cpu"]),
            status=st.sampled_from([OK, WRONG]),
            note=st.text(max_size=20),
            median_us=st.none() | st.floats(0.1, 1e6),
            saved_bytes=st.none() | st.integers(0, 2**40),
            ratio=st.none() | st.floats(0.01, 100),
        ),
        max_size=4,
    )
)
def test_results_survive_json(found: list[Measurement]) -> None:
    results = replace(harness.new_results(), measurements=found, complete=True)
    again = Results.from_dict(json.loads(json.dumps(results.to_dict())))
    assert again == results


def test_files_name_no_host_and_no_path(small_run: Results, tmp_path: Path) -> None:
    small_run.save(tmp_path / "r.json")
    text = (tmp_path / "r.json").read_text()
    for private in (str(tmp_path), str(Path.home()), str(Path(__file__).parents[1])):
        assert private not in text
    assert not {"host", "hostname", "node", "path"} & json.loads(text)["machine"].keys()


def test_csv_has_a_line_per_measurement(small_run: Results, tmp_path: Path) -> None:
    small_run.save_csv(tmp_path / "r.csv")
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["contender"] for r in rows] == [m.contender for m in small_run.measurements]
    assert float(rows[0]["median_us"]) == small_run.measurements[0].median_us


@pytest.mark.parametrize(
    "text",
    ["", "not json", "[]", '{"kind": "something else"}', '{"kind": "rnnlm-kernels benchmark"}'],
    ids=["empty", "text", "list", "foreign", "no-schema"],
)
def test_what_is_not_a_result_raises(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=r"result|JSON"):
        Results.load(tmp_path / "r.json")


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.json"
    write_atomically(path, "old")

    def full_disk(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["r.json"]


def test_report_is_made_from_the_json_alone(small_run: Results, tmp_path: Path) -> None:
    small_run.save(tmp_path / "r.json")
    written = report.write(Results.load(tmp_path / "r.json"), tmp_path, "r")
    text = written.markdown.read_text()
    assert text == report.to_markdown(small_run, plot="r.png" if written.plot else None)
    for m in small_run.measurements:
        assert f"| {m.workload.label} | {m.workload.mode} | {m.contender}" in text
    assert "is wrong" in text
    assert "the kernel fell over" in text


def test_markdown_tables_are_rectangular(small_run: Results) -> None:
    small_run.measurements[-1].note = "a | b\nc"
    width = 0
    for line in report.to_markdown(small_run).splitlines():
        if not line.startswith("|"):
            width = 0
            continue
        cells = line.replace("\\|", "").count("|")
        assert cells == (width or cells)
        width = cells


def test_plot_is_a_png_and_absent_without_ratios(small_run: Results) -> None:
    pytest.importorskip("matplotlib")
    picture = ratio_plot(small_run)
    assert picture is not None
    assert picture.startswith(b"\x89PNG")
    assert ratio_plot(replace(small_run, measurements=[])) is None


def test_a_gpu_grid_is_drawn_over_sizes(small_run: Results) -> None:
    pytest.importorskip("matplotlib")
    found = [measurement(w, "cuda", ratio=1.0 + w.hidden_size / 512) for w in grids.gpu_grid()]
    many = ratio_plot(replace(small_run, measurements=found))
    few = ratio_plot(replace(small_run, measurements=found[:1]))
    assert many is not None
    assert few is not None
    assert many.startswith(b"\x89PNG")
    width, height = (int.from_bytes(many[i : i + 4], "big") for i in (16, 20))
    assert max(width, height) < 2500  # one bar each would be far more
    assert many != few


def test_an_interrupted_run_says_so(small_run: Results) -> None:
    assert "interrupted" not in report.to_markdown(small_run)
    assert "interrupted" in report.to_markdown(replace(small_run, complete=False))


def test_a_busy_machine_is_mentioned(small_run: Results) -> None:
    busy = replace(small_run, load_before=10.0 * small_run.machine["cores"])
    assert "busy" in report.to_markdown(busy)
    assert "busy" not in report.to_markdown(replace(small_run, load_before=0.0))


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ("Intel(R) Xeon(R) Processor", "cpu-intel-xeon-2c"),
        ("Intel(R) Core(TM) i7-9700 CPU @ 3.00GHz", "cpu-intel-core-i7-9700-2c"),
        ("AMD EPYC 9554 64-Core Processor", "cpu-amd-epyc-9554-64-core-2c"),
        ("///", "cpu-unknown-2c"),
    ],
)
def test_short_name_is_a_folder_name(cpu: str, expected: str) -> None:
    assert machine.short_name({"cpu": cpu, "cores": 2}) == expected


def test_gflops_are_flops_over_time(small_run: Results) -> None:
    m = small_run.measurements[0]
    assert m.median_us is not None
    assert m.gflops is not None
    assert math.isclose(m.gflops * 1e9 * m.median_us * 1e-6, flops(m.workload), rel_tol=1e-9)


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "float64"])
def test_a_gpu_is_timed_checked_and_replayed_from_a_graph(dtype: str) -> None:
    eager = Workload("lstm", 8, 4, 64, 64, dtype=dtype, device="cuda", mode="training")
    grid = [
        w for e in (eager.with_mode("inference"), eager) for w in (e, replace(e, runner="graph"))
    ]
    results = harness.run(grid, [torch_contender(), *contenders()[1:]], options=QUICK)
    assert [m.note for m in results.measurements if m.status != OK] == []
    for m in results.measurements:
        assert m.median_us is not None
        assert m.median_us > 0
        assert (m.peak_bytes is None) == (m.workload.runner == "graph")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_computes_what_its_step_computes() -> None:
    inputs = setup(Workload("gru", 6, 3, 32, 32, device="cuda", runner="graph"))
    ready = trial(torch_layer(inputs), inputs)
    seen: list[Tensor] = []
    replayed = captured(replace(ready, step=lambda: seen.append(ready.forward())))
    inputs.x.mul_(0.5)  # a replay reads its inputs anew
    replayed.step()
    torch.cuda.synchronize()
    assert torch.equal(seen[-1], ready.forward())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tf32_is_allowed_where_a_workload_says_so_and_then_as_before() -> None:
    before = torch.backends.cudnn.allow_tf32
    for dtype in ("float32", "tf32"):
        with precision(Workload("lstm", 1, 1, 8, 8, dtype=dtype, device="cuda")):
            assert torch.backends.cudnn.allow_tf32 == (dtype == "tf32")
            assert torch.backends.cuda.matmul.allow_tf32 == (dtype == "tf32")
    assert torch.backends.cudnn.allow_tf32 == before
