"""``rnnlm-kernels train`` as a user drives it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from rnnlm_kernels import lm
from rnnlm_kernels.cli import app

LINE = "A rose is a rose is a rose. And so on, and so forth; the end is not in sight.\n"
# Small enough for every test to take a second or two.
SMALL = ["--emb", "8", "--hidden", "12", "--batch", "4", "--bptt", "10", "--threads", "1"]


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(LINE * 40, encoding="utf-8")
    return path


def _train(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def _fails(result: Result, code: int, pattern: str) -> None:
    """One line on stderr that says what is wrong; no traceback."""
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == code, result.output
    assert len(lines) == 1, lines
    assert re.search(pattern, lines[0]), lines[0]


def _table(output: str) -> dict[str, list[str]]:
    """Rows of the final table by their first cell."""
    rows = (re.split(r"[│┃|]", line)[1:-1] for line in output.splitlines() if "│" in line)
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--unit", "word", "--layers", "2", "--lr", "0.02"], id="word-lstm"),
        pytest.param(["--unit", "char", "--cell", "gru", "--lr", "0.02"], id="char-gru"),
        pytest.param(["--cell", "gru", "--reset", "before", "--lr", "0.02"], id="gru-before"),
        pytest.param(["--memory", "low", "--lr", "0.02"], id="low-memory"),
        pytest.param(["--layer", "torch", "--optimizer", "sgd", "--untied"], id="torch-sgd"),
    ],
)
def test_training_prints_its_course_and_a_table(book: Path, options: list[str]) -> None:
    result = _train(book, *SMALL, *options, "--epochs", "8")
    assert result.exit_code == 0, result.output
    char = "char" in options
    quality = r" *\d+\.\d+ bits/char" if char else r"ppl +\d+\.\d"
    assert re.search(
        rf"step +\d+/\d+  loss +\d+\.\d+  {quality}  grad +\d+\.\d+  lr \S+  [\d,]+ tokens/s",
        result.output,
    )
    assert result.output.count("ends") == 8
    rows = _table(result.output)
    baseline = rows["unigram baseline"]
    kind = "GRU" if "gru" in options else "LSTM"
    trained = rows[f"{kind}, {'torch' if 'torch' in options else 'ours'}"]
    assert len(trained) == 4
    # Better than knowing the frequencies only: the order of words was learnt.
    assert float(trained[0]) < float(baseline[0])
    assert int(trained[3].replace(",", "")) > 0
    assert "nothing will be saved" in result.output.lower()


def test_default_corpus_needs_no_file() -> None:
    result = _train(*SMALL, "--max-steps", "2", "--unit", "char")
    assert result.exit_code == 0, result.output
    assert "pydoc_data.topics" in result.output


def test_both_kinds_of_layer_are_shown_side_by_side(book: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = _train(book, *SMALL, "--layer", "both", "--max-steps", "6", "--out", out)
    assert result.exit_code == 0, result.output
    rows = _table(result.output)
    assert {"LSTM, ours", "LSTM, torch"} <= set(rows)
    found = re.search(
        r"ours / torch: (\S+)x tokens/s; training losses differ by at most (\S+) in the first 6 "
        r"updates, validation losses by (\S+)",
        result.output,
    )
    assert found, result.output
    assert float(found[1]) > 0
    assert float(found[2]) < 1e-4
    assert float(found[3]) < 1e-4
    for kind in ("ours", "torch"):
        assert lm.load_model(out / kind)[0].config.layer == kind
    # Both go on together.
    result = _train(book, "--out", out, "--resume", "--max-steps", "9")
    assert result.exit_code == 0, result.output
    assert {lm.load_checkpoint(out / kind)["step"] for kind in ("ours", "torch")} == {9}


def test_a_run_in_two_parts_ends_like_one_run(book: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    results = [
        _train(book, *SMALL, "--max-steps", "30", "--out", whole),
        _train(book, *SMALL, "--max-steps", "13", "--out", parts),
        _train(book, "--out", parts, "--resume", "--max-steps", "30"),
    ]
    assert [result.exit_code for result in results] == [0, 0, 0]
    assert "resume after update 13" in results[2].output
    one, other = lm.load_checkpoint(whole), lm.load_checkpoint(parts)
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    assert (
        _table(results[0].output)["LSTM, ours"][:3] == _table(results[2].output)["LSTM, ours"][:3]
    )


def test_threads_are_put_back(book: Path) -> None:
    before = torch.get_num_threads()
    result = _train(book, *SMALL, "--max-steps", "1", "--threads", before + 1)
    assert f"{before + 1} threads" in result.output
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        pytest.param(None, "no such text file", id="missing"),
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b"na\xefve " * 99, "not UTF-8", id="latin-1"),
        pytest.param(b"too few words", "too short", id="short"),
        pytest.param(b"just enough to cut " * 12, "cannot fill 99 rows", id="short-for-batch"),
    ],
)
def test_unusable_text_is_one_line_and_leaves_nothing(
    tmp_path: Path, content: bytes | None, pattern: str
) -> None:
    book, out = tmp_path / "book.txt", tmp_path / "run"
    if content is not None:
        book.write_bytes(content)
    _fails(_train(book, "--max-steps", "1", "--batch", "99", "--out", out), 2, pattern)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        pytest.param(["--resume"], "--resume needs --out", id="resume-without-out"),
        pytest.param(["--dropout", "1.5"], "dropout", id="dropout"),
        pytest.param(["--lr", "-1"], "lr must be a positive number", id="lr"),
        pytest.param(["--clip", "nan"], "clip must be a positive number", id="clip"),
        pytest.param(["--reset", "before"], "an LSTM has no reset gate", id="lstm-before"),
        pytest.param(
            ["--cell", "gru", "--reset", "before", "--layer", "both"],
            "torch.nn.GRU has no reset='before'",
            id="torch-before",
        ),
        pytest.param(["--layer", "torch", "--backend", "cpu"], "backend", id="torch-backend"),
        pytest.param(["--layer", "torch", "--memory", "low"], "memory='low'", id="torch-memory"),
        pytest.param(["--backend", "abacus"], "abacus", id="unknown-backend"),
    ],
)
def test_impossible_options_are_one_line_and_leave_nothing(
    book: Path, tmp_path: Path, options: list[str], pattern: str
) -> None:
    out = tmp_path / "run"
    place = [] if "--resume" in options else ["--out", out]
    _fails(_train(book, *SMALL, "--max-steps", "1", *place, *options), 2, pattern)
    assert not out.exists()


@pytest.mark.parametrize(
    "options", [["--hidden", "0"], ["--unit", "syllable"], ["--cell", "rnn"]], ids=" ".join
)
def test_options_out_of_range_are_refused_by_name(book: Path, options: list[str]) -> None:
    result = _train(book, *options)
    assert result.exit_code == 2
    assert options[0] in result.stderr


def test_out_that_holds_a_run_is_not_overwritten(book: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert _train(book, *SMALL, "--max-steps", "1", "--out", out).exit_code == 0
    before = (out / lm.CHECKPOINT_NAME).read_bytes()
    for layer in ("ours", "both"):
        result = _train(book, *SMALL, "--max-steps", "1", "--out", out, "--layer", layer)
        _fails(result, 2, "holds a checkpoint already: add --resume")
    assert (out / lm.CHECKPOINT_NAME).read_bytes() == before


def test_resume_refuses_what_does_not_match(book: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _fails(_train(book, "--out", out, "--resume"), 2, "no checkpoint in")
    assert _train(book, *SMALL, "--max-steps", "1", "--out", out).exit_code == 0
    more = ["--out", out, "--resume", "--max-steps", "2"]
    _fails(_train(book, *more, "--hidden", "13"), 2, "--hidden 13 differs .* which has 12")
    _fails(_train(book, *more, "--unit", "char"), 2, "--unit char differs .* which has word")
    _fails(_train(book, *more, "--layer", "torch"), 2, "--layer torch differs .* which has ours")
    _fails(_train(book, *more, "--min-count", "99"), 2, "another vocabulary")
    _fails(_train(*more), 2, "was trained on book.txt: give that text again")
    book.write_text(LINE * 41, encoding="utf-8")
    _fails(_train(book, *more), 2, "another text")
    assert lm.load_checkpoint(out)["step"] == 1
    # Saying again what the checkpoint says is no mismatch.
    book.write_text(LINE * 40, encoding="utf-8")
    assert _train(book, *more, "--hidden", "12", "--cell", "lstm").exit_code == 0
    assert lm.load_checkpoint(out)["step"] == 2


def test_resuming_an_ended_run_says_so(book: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert _train(book, *SMALL, "--max-steps", "1", "--out", out).exit_code == 0
    result = _train(book, "--out", out, "--resume")
    assert result.exit_code == 0
    assert "This training has ended" in result.output


def test_damaged_checkpoint_is_one_line(book: Path, tmp_path: Path) -> None:
    (tmp_path / lm.CHECKPOINT_NAME).write_bytes(b"PK but not really")
    _fails(_train(book, "--out", tmp_path, "--resume"), 2, "damaged or no checkpoint")


def test_divergence_is_one_line(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nll = lm.RNNLanguageModel.nll

    def broken(self: lm.RNNLanguageModel, *arguments: object, **more: object) -> torch.Tensor:
        return nll(self, *arguments, **more) * float("nan")

    monkeypatch.setattr(lm.RNNLanguageModel, "nll", broken)
    _fails(_train(book, *SMALL, "--max-steps", "3"), 1, "update 1: loss nan.* smaller learning")


def test_exhausted_memory_is_one_line(book: Path) -> None:
    # 4 * hidden * hidden floats: far beyond any address space.
    _fails(_train(book, "--hidden", 2_000_000_000), 1, "not enough memory")


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_says_how_to_go_on(book: Path, tmp_path: Path, name: str) -> None:
    number, out = signal.Signals[name], tmp_path / "my run"
    command = [sys.executable, "-u", "-m", "rnnlm_kernels", "train", str(book), *SMALL]
    command += ["--max-steps", "1000000", "--out", str(out)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(("step", "epoch")):
            process.send_signal(number)
            break
    rest, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, rest + errors
    assert errors == ""
    step = lm.load_checkpoint(out)["step"]
    assert step > 0
    files = {name for name in _files(out) if not name.startswith("step-")}
    assert files == {lm.CHECKPOINT_NAME, "curve.png", "metrics.csv"}
    assert f"Interrupted after update {step:,} and saved." in rest
    assert f"rnnlm-kernels train {book} --out '{out}' --resume" in rest
    result = _train(book, "--out", out, "--resume", "--max-steps", step + 2)
    assert result.exit_code == 0, result.output
    assert lm.load_checkpoint(out)["step"] == step + 2


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_second_signal_ends_at_once() -> None:
    with lm.stop_on_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        assert stop.signal_number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_former_signal_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with lm.stop_on_signals():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_help_names_every_option() -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["train", "--help"])
    assert result.exit_code == 0
    for option in ("--unit", "--cell", "--reset", "--bptt", "--resume", "--layer", "--threads"):
        assert option in result.output
