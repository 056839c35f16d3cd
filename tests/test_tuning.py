"""Tuned tables: which entry answers, which files count, who obeys them, and the command that makes
them. On the emulated device of tests/cuda_emulated.py where kernels have to run."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_emulated import emulated, needs_emulator
from hypothesis import example, given
from hypothesis import strategies as st
from recurrence_cases import CELLS, assert_near_oracle, layer
from typer.testing import CliRunner, Result

import rnnlm_kernels
from rnnlm_kernels import Problem, RecurrenceOptions, tuning
from rnnlm_kernels.backends import cuda, tunable
from rnnlm_kernels.bench import tune as measuring
from rnnlm_kernels.check import CheckResult, Judge
from rnnlm_kernels.cli import app
from rnnlm_kernels.tuning import Case, Entry, Table, Tuned

BF16 = torch.bfloat16
HERE = {"gpu": "Some GPU", "driver": "570.1", "torch": "2.13.0", "kernels": "0123"}
MEASURED = "2026-01-02"


def case(**changes: Any) -> Case:
    sizes = {"hidden": 24, "proj": 0, "packed": False, "steps": 64, "batch": 16}
    return Case(**{"cell": "lstm", "backward": False, "dtype": "bfloat16", **sizes, **changes})


def entry(measured: Case, choice: str = "grid") -> Entry:
    return Entry(measured, choice, {choice: 10.0, "other": 20.0}, MEASURED)


def table(*entries: Entry, backend: str = "cuda", identity: Mapping[str, str] = HERE) -> Table:
    return Table(backend, dict(identity), tuple(entries))


def write(folder: Path, *entries: Entry, identity: Mapping[str, str] = HERE) -> Path:
    return tuning.save(folder, "cuda", identity, entries)


def here(device: int) -> dict[str, str]:
    return HERE


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder, and no shipped table."""
    monkeypatch.setenv(tuning.ENVIRONMENT, str(tmp_path / "user"))
    monkeypatch.setattr(tuning, "_SHIPPED", tmp_path / "shipped")
    tuning.forget()
    tuning._log_once.cache_clear()
    yield tmp_path / "user"
    tuning.forget()


def lookup(asked: Case) -> Tuned | None:
    return tuning.lookup("cuda", 0, asked, here)


# --- which entry answers ------------------------------------------------------------------------


def applies(measured: Case, asked: Case) -> bool:
    """The rule again, in whole numbers."""
    same = measured._replace(steps=0, batch=0) == asked._replace(steps=0, batch=0)
    near = measured.batch <= 2 * asked.batch and asked.batch <= 2 * measured.batch
    return same and near and measured.steps <= 2 * asked.steps


def apart(measured: Case, asked: Case) -> Fraction:
    """By what factors sizes differ; the rule's distance is the logarithm."""
    rows, steps = Fraction(asked.batch, measured.batch), Fraction(asked.steps, measured.steps)
    return max(rows, 1 / rows) * max(steps, 1 / steps)


cases = st.builds(
    case,
    cell=st.sampled_from(["lstm", "gru"]),
    backward=st.booleans(),
    packed=st.just(False) | st.booleans(),
    hidden=st.sampled_from([24, 32]),
    steps=st.integers(1, 40) | st.integers(1, 5000),
    batch=st.integers(1, 12) | st.integers(1, 300),
)


@given(st.lists(cases, max_size=8, unique=True), cases, st.randoms(use_true_random=False))
@example([case(batch=8), case(batch=32)], case(batch=16), random.Random(0))
def test_the_nearest_entry_that_applies_answers(
    measured: list[Case], asked: Case, shuffler: random.Random
) -> None:
    entries = [entry(one, f"way {index}") for index, one in enumerate(measured)]
    found = table(*entries).nearest(asked)
    able = [one for one in entries if applies(one.case, asked)]
    if not able:
        assert found is None
        return
    assert found in able
    nearest = min(apart(one.case, asked) for one in able)
    assert apart(found.case, asked) <= nearest * (1 + Fraction(1, 10**9))
    shuffler.shuffle(entries)
    assert table(*entries).nearest(asked) == found


@given(cases, st.lists(cases, max_size=8))
def test_what_was_measured_answers_for_itself(asked: Case, others: list[Case]) -> None:
    entries = [entry(one, "another") for one in others if one != asked] + [entry(asked, "this")]
    assert table(*entries).nearest(asked).choice == "this"


RULE = {
    "twice-the-rows": ({"batch": 32}, True),
    "half-the-rows": ({"batch": 8}, True),
    "more-than-twice-the-rows": ({"batch": 33}, False),
    "less-than-half-the-rows": ({"batch": 7}, False),
    "half-the-steps": ({"steps": 32}, True),
    "less-than-half-the-steps": ({"steps": 31}, False),
    "any-number-of-steps-above": ({"steps": 10**6}, True),
    "another-hidden-size": ({"hidden": 32}, False),
    "another-pass": ({"backward": True}, False),
    "another-cell": ({"cell": "gru"}, False),
    "another-dtype": ({"dtype": "float16"}, False),
    "packed": ({"packed": True}, False),
    "a-projection": ({"proj": 8}, False),
    "no-rows": ({"batch": 0}, False),
}


@pytest.mark.parametrize(("change", "answered"), RULE.values(), ids=RULE)
def test_an_entry_answers_for(change: dict[str, Any], answered: bool) -> None:
    assert (table(entry(case())).nearest(case(**change)) is not None) == answered


def test_of_equally_near_entries_the_larger_answers() -> None:
    rows = table(entry(case(batch=8), "few"), entry(case(batch=32), "many"))
    assert rows.nearest(case(batch=16)).choice == "many"
    steps = table(entry(case(steps=128), "long"), entry(case(steps=32), "short"))
    assert steps.nearest(case(steps=64)).choice == "long"


def test_a_problem_becomes_the_case_that_a_call_of_it_looks_up() -> None:
    options = RecurrenceOptions(reset="before", packed=True)
    problem = Problem("gru", 5, 24, torch.float32, "cpu", seq_len=7, batch=3, options=options)
    assert Case.of(problem, True, tf32=True) == Case(
        "gru-before", True, "tf32", hidden=24, proj=0, packed=True, steps=7, batch=3
    )
    with pytest.raises(ValueError, match="depends on T and B"):
        Case.of(Problem("gru", 5, 24), False)


# --- which files count --------------------------------------------------------------------------


@given(st.lists(cases, max_size=4, unique=True), st.dictionaries(st.text(), st.text(), max_size=4))
def test_a_table_survives_its_file(measured: list[Case], identity: dict[str, str]) -> None:
    given_table = table(*map(entry, measured), identity=identity)
    assert Table.from_json(given_table.to_json()) == given_table


def test_a_fresh_table_is_used(folder: Path) -> None:
    path = write(folder, entry(case()))
    assert path == folder / "cuda-some-gpu.json"
    assert lookup(case(batch=20)) == Tuned("grid", path, MEASURED)
    assert lookup(case(batch=2)) is None


STALE: dict[str, dict[str, str]] = {
    **{field: {field: "another"} for field in HERE if field != "gpu"},
    "one-that-it-lacks": {"triton": "3.7"},
}


@pytest.mark.parametrize("changes", STALE.values(), ids=STALE)
def test_a_stale_table_is_refused_with_one_warning(
    changes: dict[str, str], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(folder, entry(case()))
    now = HERE | changes

    def identity(device: int) -> dict[str, str]:
        return now

    with caplog.at_level(logging.WARNING, "rnnlm_kernels"):
        assert tuning.lookup("cuda", 0, case(), identity) is None
        assert tuning.lookup("cuda", 0, case(batch=17), identity) is None
        tuning.forget()
        assert tuning.lookup("cuda", 0, case(), identity) is None
    (message,) = (record.message for record in caplog.records)
    ((field, value),) = changes.items()
    assert str(path) in message
    assert f"{field}: {HERE.get(field, 'nothing')!r} in the table, {value!r} here" in message
    assert "`rnnlm-kernels tune --backend cuda`" in message


def test_a_table_of_another_gpu_or_backend_is_refused(folder: Path) -> None:
    """Copied by hand, for each has a file name of its own."""
    path = write(folder, entry(case()), identity=HERE | {"gpu": "Other GPU"})
    path.rename(folder / "cuda-some-gpu.json")
    (source,) = tuning.sources("cuda", 0, here)
    assert source.refusal == "it is stale (gpu: 'Other GPU' in the table, 'Some GPU' here)"
    (folder / "triton-some-gpu.json").write_text(table(entry(case())).to_json())
    (source,) = tuning.sources("triton", 0, here)
    assert source.refusal == "it is stale (backend: 'cuda' in the table, 'triton' here)"


def without(data: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != name}


def first(data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The table with something changed in its first entry."""
    return data | {"entries": [data["entries"][0] | changes]}


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a-list": (lambda data: [data], "not a table of"),
    "something-else": (lambda data: data | {"kind": "x"}, "not a table of"),
    "of-a-later-format": (lambda data: data | {"format": 2}, "format: 2 in the table, 1 here"),
    "without-its-device": (lambda data: without(data, "measured_on"), "measured_on"),
    "without-entries": (lambda data: without(data, "entries"), "lacks"),
    "an-entry-of-words": (lambda data: data | {"entries": ["x"]}, "not an object"),
    "a-size-of-words": (lambda data: first(data, hidden="24"), "hidden of an entry is '24'"),
    "a-size-of-truth": (lambda data: first(data, hidden=True), "hidden of an entry is True"),
    "a-size-of-nothing": (lambda data: first(data, batch=0), "impossible sizes"),
    "a-time-before-zero": (lambda data: first(data, us={"grid": -1}), "a time of an entry is -1"),
    "a-time-of-nan": (lambda data: first(data, us={"grid": float("nan")}), "time .* is nan"),
    "a-time-beyond-all": (lambda data: first(data, us={"grid": 10**400}), "a time of an entry"),
    "a-choice-not-measured": (lambda data: first(data, choice="x"), "'x' .* was not measured"),
    "a-day-that-is-none": (lambda data: first(data, measured="2026-02-31"), "'2026-02-31'"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_table_is_refused_with_the_reason(
    damage: Callable[[dict[str, Any]], Any],
    reason: str,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = write(folder, entry(case()))
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    assert lookup(case()) is None
    (source,) = tuning.sources("cuda", 0, here)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(source.refusal)
    assert "it is damaged" in caplog.text


VALID = table(entry(case())).to_json().encode()
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(
    st.binary(max_size=50)
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.integers(0, len(VALID) - 3).map(lambda length: VALID[:length])
)
@example(b"[" * 100_000)
@example(b"9" * 5000)
@example('"\ud800"'.encode("utf-8", "surrogatepass"))
def test_no_content_of_a_file_raises(tmp_path_factory: Any, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "cuda-some-gpu.json"
    path.write_bytes(content)
    assert "it is damaged" in tuning.read(path, "cuda", HERE).refusal


def test_a_folder_in_the_place_of_a_table_is_damage(folder: Path) -> None:
    (folder / "cuda-some-gpu.json").mkdir(parents=True)
    assert lookup(case()) is None
    (source,) = tuning.sources("cuda", 0, here)
    assert source.refusal == "it is damaged (Is a directory)"


def test_the_users_table_goes_before_the_shipped_one(folder: Path) -> None:
    write(folder, entry(case(), "mine"))
    shipped = write(folder.parent / "shipped", entry(case(), "x"), entry(case(hidden=32), "theirs"))
    assert lookup(case()).choice == "mine"
    assert lookup(case(hidden=32)) == Tuned("theirs", shipped, MEASURED)


def test_a_shipped_table_that_does_not_fit_is_no_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder.parent / "shipped", entry(case()), identity=HERE | {"driver": "old"})
    with caplog.at_level(logging.INFO, "rnnlm_kernels"):
        assert lookup(case()) is None
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_where_the_tables_are(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tuning.user_folder() == folder
    monkeypatch.delenv(tuning.ENVIRONMENT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tuning.user_folder() == tmp_path / "cache" / "rnnlm-kernels" / "tuned"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tuning.user_folder() == tmp_path / "home" / ".cache" / "rnnlm-kernels" / "tuned"


def test_off_leaves_every_table_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, entry(case()))
    assert lookup(case()) is not None
    monkeypatch.setenv(tuning.ENVIRONMENT, tuning.OFF)
    assert lookup(case()) is None
    monkeypatch.setenv(tuning.ENVIRONMENT, str(folder))
    assert lookup(case()) is not None


def test_a_file_is_read_once_and_a_device_is_not_asked_without_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def identity(device: int) -> dict[str, str]:
        asked.append(device)
        return HERE

    assert tuning.lookup("cuda", 3, case(), identity) is None
    assert asked == []
    path = write(folder, entry(case()))
    for batch in range(8, 33):
        assert tuning.lookup("cuda", 3, case(batch=batch), identity) is not None
    path.unlink()
    assert tuning.lookup("cuda", 3, case(batch=33 - 2), identity) is not None
    assert asked == [3]


def test_saving_adds_replaces_and_drops_what_is_stale(folder: Path) -> None:
    write(folder, entry(case()), entry(case(hidden=32)))
    path = write(folder, entry(case(), "block"), entry(case(hidden=40)))
    saved = Table.from_json(path.read_bytes())
    assert [(one.case.hidden, one.choice) for one in saved.entries] == [
        (24, "block"),
        (32, "grid"),
        (40, "grid"),
    ]
    newer = HERE | {"driver": "580.2"}
    assert write(folder, entry(case(hidden=48)), identity=newer) == path
    assert Table.from_json(path.read_bytes()) == table(entry(case(hidden=48)), identity=newer)


def test_a_save_that_fails_leaves_the_table_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(folder, entry(case()))

    def full_disk(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write(folder, entry(case(hidden=32)))
    assert os.listdir(folder) == [path.name]
    assert Table.from_json(path.read_bytes()) == table(entry(case()))


# --- what identifies a device -------------------------------------------------------------------


def test_a_table_depends_on_the_gpu_its_driver_the_versions_and_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Rel\n")
    monkeypatch.setattr(tuning, "_DRIVER_FILE", driver)
    properties = SimpleNamespace(name="A GPU", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    module = SimpleNamespace(
        cuda_device_limits=lambda device: {"sms": 66},
        build_info=lambda: {"cuda_version": "13.0.1", "kernels": "0123"},
    )
    monkeypatch.setattr(cuda, "native", module)
    assert cuda.identity(0) == {
        "gpu": "A GPU",
        "compute_capability": "9.0",
        "sms": "66",
        "driver": "570.86.15",
        "runtime": str(torch.version.cuda),
        "torch": torch.__version__,
        "rnnlm_kernels": rnnlm_kernels.__version__,
        "nvcc": "13.0.1",
        "kernels": "0123",
    }


def test_without_the_systems_word_a_driver_is_known_by_its_api(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_DRIVER_FILE", tmp_path / "absent")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    assert tuning._driver() == "API 13000"
    monkeypatch.delattr(torch._C, "_cuda_getDriverVersion")
    assert tuning._driver() == "unknown"


def test_a_fingerprint_changes_with_every_name_and_byte(tmp_path: Path) -> None:
    def of(files: Mapping[str, str]) -> str:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        return tuning.fingerprint(tmp_path, [tmp_path / name for name in files])

    texts = {"a/x": "1", "b/x": "2"}
    others = ({"a/x": "1"}, {"a/x": "2", "b/x": "1"}, {"a/x": "1", "b/y": "2"}, {"a/x": "12"})
    assert of(texts) == of(dict(reversed(texts.items())))
    assert len({of(texts), *map(of, others)}) == 5


# --- who obeys ----------------------------------------------------------------------------------


def identity_of(sms: int) -> dict[str, str]:
    with emulated(sms=sms):
        return cuda.identity(0)


def both(choice: str, backward: str | None = None, **changes: Any) -> list[Entry]:
    """Entries for forward and backward of `case`."""
    return [
        entry(case(**changes), choice),
        entry(case(**changes, backward=True), backward or choice),
    ]


SMS = 8
LONG = {"T": 100, "B": 9, "H": 24}  # the cost model takes the block tier


@needs_emulator
@pytest.mark.parametrize("cell", CELLS)
def test_the_environment_goes_before_the_table_and_the_table_before_the_model(
    cell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path, *both("grid", "cluster", cell=cell, steps=3, batch=9), identity=identity_of(SMS)
    )
    given_layer = layer(cell, T=3, B=9, H=24)
    with emulated(sms=SMS, tables=tmp_path) as device:
        assert_near_oracle(given_layer, BF16, backend="cuda")
        monkeypatch.setenv(cuda.ENVIRONMENT, "block")
        assert_near_oracle(given_layer, BF16, backend="cuda")
        monkeypatch.setenv(cuda.ENVIRONMENT, "auto")
        monkeypatch.setenv(tuning.ENVIRONMENT, "off")
        assert_near_oracle(given_layer, BF16, backend="cuda")
        monkeypatch.setenv(cuda.ENVIRONMENT, "block")
        with cuda.forced(False, "cluster"):
            assert_near_oracle(given_layer, BF16, backend="cuda")
        monkeypatch.setenv(cuda.ENVIRONMENT, "auto")
        assert device.ran[:4] == ["grid", "cluster", "block", "block"]
        assert set(device.ran[4:6]) & {"grid", "cluster"} == set()
        assert device.ran[6:] == ["cluster", "block"]


@needs_emulator
def test_explain_names_the_table_and_its_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, *both("grid", "cluster"), identity=identity_of(SMS))
    problem = Problem("lstm", 8, 24, BF16, "cpu", seq_len=100, batch=9, training=True)
    with emulated(sms=SMS, tables=tmp_path):
        text = rnnlm_kernels.explain(problem, "cuda")
        assert "[forward: grid, " in text
        assert "; backward: cluster, " in text
        assert f"(by the tuned table of {path}, measured {MEASURED}; derived us" in text
        monkeypatch.setenv(cuda.ENVIRONMENT, "block")
        assert "by RNNLM_CUDA_TIER=block; derived us" in rnnlm_kernels.explain(problem, "cuda")
    path.unlink()
    write(tmp_path, entry(case(backward=True), "grid"), identity=identity_of(SMS))
    with emulated(sms=SMS, tables=tmp_path):
        text = rnnlm_kernels.explain(problem, "cuda")
        assert f"(by the cost model, backward by the tuned table of {path}, measured" in text


UNABLE = {
    "not-on-this-gpu": ("cluster", {"compute_capability": 80}),
    "not-of-this-version": ("warp", {}),
    "not-a-choice": ("auto", {}),
}


@needs_emulator
@pytest.mark.parametrize(("choice", "settings"), UNABLE.values(), ids=UNABLE)
def test_a_tier_that_cannot_run_gives_way_to_the_model(
    choice: str, settings: dict[str, int], tmp_path: Path
) -> None:
    write(tmp_path, *both(choice), identity=identity_of(SMS))
    problem = Problem("lstm", 8, 24, BF16, "cpu", seq_len=100, batch=9)
    with emulated(sms=SMS, tables=tmp_path, **settings) as device, torch.no_grad():
        assert "(by the cost model;" in rnnlm_kernels.explain(problem, "cuda")
        layer("lstm", **LONG).to(BF16).call(backend="cuda")
        assert device.ran == ["block"]


@needs_emulator
def test_tensors_that_a_tuned_tier_cannot_take_run_stepwise(tmp_path: Path) -> None:
    write(tmp_path, *both("grid"), identity=identity_of(SMS))
    given_layer = layer("lstm", **LONG).to(BF16)
    h0 = given_layer.get("h0")
    crooked = torch.empty(h0.numel() + 1, dtype=BF16)[1:].view_as(h0).copy_(h0)
    with emulated(sms=SMS, tables=tmp_path) as device, torch.no_grad():
        given_layer.having(h0=crooked).call(backend="cuda")
        assert device.ran == ["stepwise"]


@needs_emulator
@pytest.mark.parametrize("choice", ["stepwise", "block", "grid"])
@pytest.mark.parametrize("lengths", [(7, 5, 5, 1), (1, 1)], ids=["several-steps", "one-step"])
def test_packed_sequences_have_entries_of_their_own(
    choice: str, lengths: tuple[int, ...], tmp_path: Path
) -> None:
    """Of one step the model would take the stepwise tier, which needs no offsets on the device."""
    sizes = {"steps": lengths[0], "batch": len(lengths)}
    entries = both(choice, packed=True, **sizes) + both("cluster", **sizes)
    write(tmp_path, *entries, identity=identity_of(SMS))
    with emulated(sms=SMS, tables=tmp_path) as device:
        assert_near_oracle(layer("lstm", lengths=lengths, H=24), BF16, backend="cuda")
        assert device.ran == [choice, choice]


@needs_emulator
def test_a_tuned_tier_that_failed_is_not_tried_again(tmp_path: Path) -> None:
    write(tmp_path, *both("grid"), identity=identity_of(SMS))
    given_layer = layer("lstm", **LONG).to(BF16)
    with emulated(sms=SMS, tables=tmp_path, drop=20, wait_polls=2000) as device, torch.no_grad():
        assert given_layer.call(backend="cuda")[0].isnan().all()
        with pytest.raises(RuntimeError, match="failed in the grid tier"):
            given_layer.call(backend="cuda")
        device.native.emulator_configure(drop=0)
        device.ran.clear()
        assert given_layer.call(backend="cuda")[0].isfinite().all()
        assert device.ran == ["block"]


@needs_emulator
def test_candidates_are_the_tiers_that_can_with_the_usual_one_first() -> None:
    problem = Problem("lstm", 8, 24, BF16, "cpu", seq_len=100, batch=9, training=True)
    with emulated(sms=SMS):
        found = cuda.candidates(problem, True)
        assert list(found) == ["block", "stepwise", "cluster", "grid"]
        assert found["grid"].startswith("grid, ")
    with emulated(sms=SMS, compute_capability=80):
        assert list(cuda.candidates(problem, False)) == ["block", "stepwise", "grid"]


def test_a_forced_pass_is_free_again_after_the_block_whatever_happens() -> None:
    def tiers() -> list[str]:
        return [cuda.TIERS[cuda._tier(backward)] for backward in (False, True)]

    with suppress(KeyboardInterrupt), cuda.forced(True, "grid"):
        assert tiers() == ["auto", "grid"]
        with cuda.forced(False, "block"), cuda.forced(True, "cluster"):
            assert tiers() == ["block", "cluster"]
        assert tiers() == ["auto", "grid"]
        raise KeyboardInterrupt
    assert tiers() == ["auto", "auto"]


# --- the command --------------------------------------------------------------------------------

TINY = ("--hidden", "24", "--batch", "3", "--steps", "3", "--samples", "2")


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["tune", *map(str, words)], env={"COLUMNS": "200"})


@needs_emulator
def test_tune_measures_writes_and_is_obeyed(tmp_path: Path) -> None:
    with emulated(sms=SMS):
        done = run(*TINY, "--cell", "gru", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    path = tmp_path / "cuda-emulated.json"
    assert f"wrote {path}" in done.output.replace("\n", "")
    saved = Table.from_json(path.read_bytes())
    assert [one.case for one in saved.entries] == [
        Case("gru", backward, "bfloat16", 24, 0, False, steps=3, batch=3)
        for backward in (False, True)
    ]
    for one in saved.entries:
        pairs = set() if one.case.backward else {"grid-pairs"}
        assert set(one.us) == {"stepwise", "block", "cluster", "grid"} | pairs
        assert one.us[one.choice] <= min(one.us.values()) / (1 - measuring.LEAST_GAIN) + 0.01
        assert one.case.label in done.output
    assert done.output.count("chosen") == 3  # one in the title
    # Whichever was chosen: it is what runs, and what `info` and `explain` say.
    with emulated(sms=SMS, tables=tmp_path) as device:
        assert_near_oracle(layer("gru", T=3, B=3, H=24), BF16, backend="cuda")
        assert device.ran == [one.choice for one in saved.entries]
        shown = json.loads(CliRunner().invoke(app, ["info", "--json"]).output)["tuned"]
        assert shown == {str(path): f"in use for cuda, {saved.words}"}
    with emulated(sms=SMS + 1, tables=tmp_path):
        shown = json.loads(CliRunner().invoke(app, ["info", "--json"]).output)["tuned"]
        assert shown == {
            str(path): f"not used: it is stale (sms: '{SMS}' in the table, '{SMS + 1}' here)"
        }


@needs_emulator
def test_every_candidate_is_timed_in_its_own_tier_and_a_pass_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran = []

    def interleave(steps: Mapping[str, Callable[[], None]], *_: Any, **__: Any) -> dict[str, list]:
        for name, step in steps.items():
            device.ran.clear()
            step()
            ran.append((name, device.ran.copy()))
        return {name: [1.0] for name in steps}

    monkeypatch.setattr(measuring, "interleave", interleave)
    (workload,) = measuring.problems(
        "cpu", cells=["lstm"], dtypes=["bfloat16"], hidden=[24], batch=[3], steps=[3]
    )
    with emulated(sms=SMS) as device:
        outcomes = list(measuring.tune(workload, "cuda", options=measuring.TimingOptions()))
    assert [outcome.case.backward for outcome in outcomes] == [False, True]
    assert len(ran) == 9  # pairs have a forward pass only
    assert all(tiers == [name] for name, tiers in ran)


@needs_emulator
def test_a_candidate_whose_numbers_are_wrong_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = cuda.lstm_forward

    def spoiled(*arguments: Any) -> None:
        forward(*arguments)
        if cuda.TIERS[cuda._tier(False)] == "block":
            arguments[-5].add_(0.5)  # output

    monkeypatch.setattr(cuda, "lstm_forward", spoiled)
    with emulated(sms=SMS):
        done = run(*TINY, "--cell", "lstm", "--out", tmp_path)
    assert done.exit_code == 1, done.output
    assert "forward: block: output is wrong" in done.output
    forward_entry, backward_entry = Table.from_json(
        (tmp_path / "cuda-emulated.json").read_bytes()
    ).entries
    assert "block" not in forward_entry.us
    assert "block" in backward_entry.us


@needs_emulator
def test_a_candidate_that_fails_is_refused_and_never_chosen(tmp_path: Path) -> None:
    """Here: one whose messages get lost."""
    with emulated(sms=SMS, drop=20, wait_polls=2000):
        done = run(*TINY, "--steps", "5", "--batch", "9", "--cell", "lstm", "--out", tmp_path)
    assert done.exit_code == 1, done.output
    assert "refused" in done.output
    saved = Table.from_json((tmp_path / "cuda-emulated.json").read_bytes())
    for one in saved.entries:
        assert one.choice in ("stepwise", "block")
    assert {"stepwise", "block"} == set(saved.entries[0].us)


@needs_emulator
def test_the_failure_of_an_earlier_launch_is_not_held_against_a_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, failures = Judge.check, ["an earlier call failed"]

    def checked(self: Judge, *arguments: Any) -> CheckResult:
        if failures:
            raise RuntimeError(failures.pop())
        return check(self, *arguments)

    monkeypatch.setattr(Judge, "check", checked)
    with emulated(sms=SMS):
        done = run(*TINY, "--cell", "gru", "--out", tmp_path)
    assert done.exit_code == 0, done.output


@needs_emulator
def test_what_there_is_no_choice_for_is_said_and_not_saved(tmp_path: Path) -> None:
    with emulated(sms=SMS):
        done = run(*TINY, "--dtype", "float64", "--cell", "gru", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "gru float64 H=24 B=3 T=3 forward: there is only stepwise" in done.output
    assert "nothing was measured" in done.output
    assert list(tmp_path.iterdir()) == []


@needs_emulator
def test_an_interrupt_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tune(workload: Any, backend: str, **options: Any) -> Iterator[measuring.Outcome]:
        if workload.hidden_size > 24:
            raise KeyboardInterrupt
        yield measuring.Outcome(case(), {"block": "", "grid": ""}, {"block": 2.0, "grid": 1.0})

    monkeypatch.setattr("rnnlm_kernels.cli.tune.tune", tune)
    with emulated(sms=SMS):
        done = run(*TINY, "--hidden", "32", "--out", tmp_path)
    assert done.exit_code == 130
    assert "interrupted" in done.output
    (saved,) = Table.from_json((tmp_path / "cuda-emulated.json").read_bytes()).entries
    assert (saved.case, saved.choice, saved.us) == (case(), "grid", {"block": 2.0, "grid": 1.0})


@needs_emulator
def test_no_problem_is_begun_when_the_time_is_over(tmp_path: Path) -> None:
    with emulated(sms=SMS):
        done = run(*TINY, "--budget-seconds", "0", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "2 problems were left out" in done.output


def test_the_usual_way_stays_unless_another_is_clearly_faster() -> None:
    ways = {"usual": "", "other": "", "third": ""}
    choose = [
        ({"usual": 100.0, "other": 98.0, "third": 99.0}, "usual"),
        ({"usual": 100.0, "other": 96.0, "third": 95.0}, "third"),
        ({"other": 96.0, "third": 95.9}, "third"),
        ({}, None),
    ]
    for us, expected in choose:
        assert measuring.Outcome(case(), ways, us).choice == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_tune_says_what_is_missing(tmp_path: Path) -> None:
    done = run("--out", tmp_path / "tables")
    assert done.exit_code == 2
    assert f"backend 'cuda' is not available here: {cuda.available()[1]}" in done.output
    assert not (tmp_path / "tables").exists()


def test_a_backend_without_a_choice_is_refused() -> None:
    done = run("--backend", "cpu")
    assert done.exit_code == 2
    assert f"--backend should be one of {', '.join(tunable())}, got 'cpu'" in done.output


@needs_emulator
def test_switched_off_tune_wants_to_know_where_to_write() -> None:
    with emulated(sms=SMS):
        done = run(*TINY)
    assert done.exit_code == 2
    assert "RNNLM_TUNED_DIR=off leaves tables alone; --out is needed" in done.output
