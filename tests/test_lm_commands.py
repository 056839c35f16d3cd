"""``rnnlm-kernels eval``, ``score`` and ``generate``; presets, logs and options of ``train``."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from rnnlm_kernels import lm
from rnnlm_kernels.cli import app
from rnnlm_kernels.lm.logs import CSV_NAME, CURVE_NAME, read_log
from rnnlm_kernels.lm.presets import PRESETS

LINE = "A rose is a rose is a rose. And so on, and so forth; the end is not in sight.\n"
SMALL = ["--emb", "8", "--hidden", "12", "--batch", "4", "--bptt", "10", "--threads", "1"]


def _run(*arguments: object, **more) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], **more)


def _ok(*arguments: object, **more) -> str:
    result = _run(*arguments, **more)
    assert result.exit_code == 0, result.output + result.stderr
    return result.output


def _fails(pattern: str, *arguments: object) -> None:
    result = _run(*arguments)
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2, result.output
    assert len(lines) == 1, lines
    assert re.search(pattern, lines[0]), lines[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trainings: ``word`` and ``char``, beside the text."""
    folder = tmp_path_factory.mktemp("trained")
    book = folder / "book.txt"
    book.write_text(LINE * 40, encoding="utf-8")
    for unit in ("word", "char"):
        steps = ["--max-steps", "40", "--lr", "0.02", "--out", folder / unit]
        _ok("train", book, *SMALL, "--unit", unit, *steps)
    return folder


def _figures(output: str) -> dict[str, float]:
    rows = re.findall(r"^ *(\S.*?)  +([\d.]+)%? *$", output, re.M)
    return {name: float(value) for name, value in rows}


def test_eval_prints_the_score_of_the_library(folder: Path) -> None:
    figures = _figures(_ok("eval", folder / "char", folder / "book.txt"))
    model, tokenizer = lm.load_model(folder / "char")
    score = lm.evaluate(model, tokenizer.encode(LINE * 40), batch=1)
    assert figures["loss (nats per token)"] == pytest.approx(score.loss, abs=1e-4)
    assert figures["perplexity"] == pytest.approx(score.perplexity, abs=1e-3)
    assert figures["bits per character"] == pytest.approx(score.bits, abs=1e-4)


def test_eval_knows_cache_sentences_and_the_last_checkpoint(folder: Path) -> None:
    book = folder / "book.txt"
    plain, cached, alone, last = (
        _figures(_ok("eval", folder / "word", book, *options))["loss (nats per token)"]
        for options in ([], ["--cache", "100,1.0,0.3"], ["--sentences"], ["--which", "last"])
    )
    assert cached < plain
    assert alone != plain
    assert last == plain  # the training ended with its best evaluation
    assert "<unk> among the tokens" in _ok("eval", folder / "word", book)


def test_eval_learns_dynamically_and_plots_the_gradients(folder: Path, tmp_path: Path) -> None:
    flow = tmp_path / "flow.png"
    book = folder / "book.txt"
    plain = _figures(_ok("eval", folder / "char", book))["loss (nats per token)"]
    output = _ok("eval", folder / "char", book, "--dynamic", "1,0.01", "--gradient-flow", flow)
    assert _figures(output)["loss (nats per token)"] < plain
    assert flow.read_bytes().startswith(b"\x89PNG")
    _fails("exclude each other", "eval", folder / "char", book, "--dynamic", "1", "--sentences")
    _fails("--dynamic should be", "eval", folder / "char", book, "--dynamic", "fast")
    _fails("lr must be at least 0", "eval", folder / "char", book, "--dynamic=-1")


def test_score_gives_every_token_and_their_sum(folder: Path) -> None:
    lines = _ok("score", folder / "word", folder / "book.txt").splitlines()
    rows = [line.split("\t") for line in lines]
    assert rows[0] == ["position", "token", "nats", "probability"]
    body = rows[1:-1]
    model, tokenizer = lm.load_model(folder / "word")
    losses = lm.token_losses(model, tokenizer.encode(LINE * 40))
    assert [float(row[2]) for row in body] == pytest.approx(losses.tolist(), abs=1e-4)
    assert [row[1] for row in body[:3]] == ["rose", "is", "a"]
    for row in body[:20]:
        assert float(row[3]) == pytest.approx(math.exp(-float(row[2])), rel=1e-4)
    assert float(rows[-1][2]) == pytest.approx(float(losses.sum()), rel=1e-5)


def test_score_reads_standard_input(folder: Path) -> None:
    output = _ok("score", folder / "char", "-", input="A rose\n")
    assert [line.split("\t")[1] for line in output.splitlines()[1:-1]] == [*" rose", "\\n"]


def test_generate_continues_a_prompt_repeatably(folder: Path) -> None:
    command = ["generate", folder / "char", "--prompt", "A rose", "--length", 30, "--seed", 4]
    output = _ok(*command)
    assert output == _ok(*command)
    assert output.startswith("A rose")
    assert len(output) == len("A rose") + 30 + 1
    model, tokenizer = lm.load_model(folder / "char")
    text = lm.Generator(model, tokenizer).generate(["A rose"], 30, lm.Sampling(seed=4))
    assert output == text[0] + "\n"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--greedy"], id="greedy"),
        pytest.param(["--temperature", "0.5", "--top-k", "3", "--top-p", "0.9"], id="filters"),
        pytest.param(["--stop"], id="stop"),
        pytest.param(["--beam", "3", "--stop", "--length-power", "0.7"], id="beam"),
        pytest.param(["--prompt", "A", "--prompt", "the end"], id="prompts"),
        pytest.param(["--count", "3"], id="count"),
        pytest.param(["--unknown"], id="unknown"),
    ],
)
@pytest.mark.parametrize("unit", ["word", "char"])
def test_generate_writes_something_with_every_option(folder: Path, unit: str, options) -> None:
    output = _ok("generate", folder / unit, "--length", "8", *options)
    # With --stop a text may end at once: after the prompt, or with nothing but a line end.
    assert len(output) > (0 if "--stop" in options else 5)
    several = {"--prompt": 2, "--count": 3, "--beam": 1}.get(options[0], 0)
    assert output.count("---\n") == several


@pytest.mark.parametrize(
    ("pattern", "arguments"),
    [
        pytest.param("no checkpoint in", ["eval", "nowhere", "book.txt"], id="no-checkpoint"),
        pytest.param("no such text file", ["eval", "word", "nothing.txt"], id="no-text"),
        pytest.param("--cache should be", ["eval", "word", "book.txt", "--cache", "5"], id="cache"),
        pytest.param("too short", ["score", "word", "one.txt"], id="one-word"),
        pytest.param(
            "temperature must be above 0", ["generate", "word", "--temperature", "0"], id="cold"
        ),
        pytest.param(
            "--device 'abacus' cannot be used", ["eval", "word", "book.txt", "--device", "abacus"],
            id="device",
        ),
    ],
)  # fmt: skip
def test_impossible_wishes_are_one_line(folder, monkeypatch, pattern: str, arguments) -> None:
    monkeypatch.chdir(folder)
    (folder / "one.txt").write_text("one")
    _fails(pattern, *arguments)


def test_presets_are_models_and_trainings_that_exist() -> None:
    for name, preset in PRESETS.items():
        model = lm.ModelConfig(10_000, **preset.model)
        lm.TrainConfig(**preset.train)
        assert preset.unit in ("word", "char"), name
        assert model.layers == len(model.widths)
    awd = lm.RNNLanguageModel(lm.ModelConfig(10_000, **PRESETS["awd-lstm"].model), seed=0)
    assert awd.parameter_count() == 24_221_600  # as salesforce/awd-lstm-lm on Penn Treebank
    gru = lm.ModelConfig(99, **PRESETS["seed-gru"].model)
    assert (gru.cell, gru.reset) == ("gru", "before")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_train_and_options_take_precedence(folder, tmp_path, preset: str) -> None:
    out = tmp_path / "run"
    hidden = "12,10,8" if preset == "awd-lstm" else "12"
    small = ["--emb", "8", "--hidden", hidden, "--batch", "2", "--bptt", "9", "--threads", "1"]
    _ok("train", folder / "book.txt", "--preset", preset, *small, "--max-steps", 3, "--out", out)
    payload = lm.load_checkpoint(out)
    assert payload["step"] == 3
    values = PRESETS[preset].values() | {"emb": 8, "batch": 2, "bptt": 9, "epochs": None}
    for name, value in values.items():
        if name in ("unit", "hidden"):
            continue
        place = "model_config" if name in payload["model_config"] else "train_config"
        assert payload[place][name] == value, name
    # The natural way to go on: the same command and --resume.
    again = ["--preset", preset, *small, "--max-steps", 5, "--out", out, "--resume"]
    _ok("train", folder / "book.txt", *again)
    assert lm.load_checkpoint(out)["step"] == 5


def test_every_option_of_the_recipe_reaches_the_training(folder, tmp_path) -> None:
    out, pairs = tmp_path / "run", tmp_path / "pairs.tsv"
    pairs.write_text("rose\tend\n")
    given = {
        "cell": "gru", "reset": "before", "layers": 2, "dropout": 0.1, "dropout_input": 0.2,
        "dropout_hidden": 0.3, "dropout_embedding": 0.05, "weight_drop": 0.4, "init": 0.2,
        "attention": 6, "attention_heads": 2, "optimizer": "adamw", "lr": 0.01,
        "weight_decay": 0.01, "schedule": "cosine", "min_lr": 0.001, "warmup": 2, "average": 3,
        "clip": 1.0, "clip_value": 0.5, "label_smoothing": 0.1, "ar": 1.0, "tar": 0.5,
        "accumulate": 2, "precision": "bf16", "skip_gram": 0.1, "cbow": 0.2, "context": 3,
        "negatives": 4, "eval_every": 2, "patience": 9, "eval_batch": 3, "save_every": 2,
        "seed": 7,
    }  # fmt: skip
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    more = ["--locked", "--random-bptt", "--untied", "--l1", "1e-4", "--l2", "head.*=1e-3"]
    more += ["--synonyms", pairs, "--synonym-weight", "0.3", "--tensorboard"]
    output = _ok(
        "train", folder / "book.txt", *SMALL, *options, *more, "--max-steps", 4, "--out", out
    )
    payload = lm.load_checkpoint(out)
    saved = payload["model_config"] | payload["train_config"]
    given |= {"locked": True, "random_bptt": True, "tied": False, "synonyms": 0.3}
    given |= {"l1": {"*": 1e-4}, "l2": {"head.*": 1e-3}, "hidden": 12}
    assert {name: saved[name] for name in given} == given
    for part in ("ar", "tar", "weights", "skip-gram", "cbow", "synonyms"):
        assert re.search(rf"tokens/s.* {part} [\d.e-]+", output), part
    assert any((out / "tensorboard").iterdir())
    rows = read_log(out / CSV_NAME)
    assert {"ar", "tar", "weights", "skip-gram", "cbow", "synonyms"} <= set(rows[0])
    assert (out / CURVE_NAME).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--unit", "byte"], id="byte"),
        pytest.param(["--unit", "bpe", "--max-vocab", "270"], id="bpe"),
        pytest.param(["--batching", "sentences"], id="sentences"),
        pytest.param(["--head", "adaptive", "--cutoffs", "5,10"], id="adaptive"),
        pytest.param(["--hidden", "12,8", "--clip", "0"], id="widths-no-clip"),
    ],
)
def test_every_kind_of_token_and_batch_trains_and_writes(folder, tmp_path, options) -> None:
    out = tmp_path / "run"
    _ok("train", folder / "book.txt", *SMALL, *options, "--max-steps", 3, "--out", out)
    assert _ok("generate", out, "--length", "5", "--prompt", "A rose").startswith("A rose")
    assert "perplexity" in _ok("eval", out, folder / "book.txt")
    _ok("train", folder / "book.txt", "--out", out, "--resume", "--max-steps", 5)


def test_several_texts_and_given_parts(folder, tmp_path) -> None:
    book, out = folder / "book.txt", tmp_path / "run"
    parts = ["--valid", book, "--test", book]
    command = ["train", book, book, *parts, "--out", out]
    output = _ok(*command, *SMALL, "--max-steps", 2)
    assert "book.txt, book.txt: 2,000 + 1,000 + 1,000 word tokens" in output
    _ok(*command, "--resume", "--max-steps", 3)
    _fails("another text", "train", book, book, "--out", out, "--resume", "--max-steps", 4)


def test_a_tokenizer_can_be_given(folder, tmp_path) -> None:
    path, out = tmp_path / "tokenizer.json", tmp_path / "run"
    bpe = lm.BpeTokenizer.train([LINE], 280)
    path.write_text(bpe.to_json()["description"], encoding="utf-8")
    book = folder / "book.txt"
    _ok("train", book, *SMALL, "--tokenizer", path, "--max-steps", 1, "--out", out)
    assert lm.load_model(out)[1] == bpe
    path.write_text("{}")
    _fails("not a tokenizer", "train", book, *SMALL, "--tokenizer", path, "--max-steps", 1)


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        pytest.param("l1 of", ["--l1", "-1"], id="negative"),
        pytest.param("no parameter fits 'nothing'", ["--l2", "nothing=1"], id="pattern"),
        pytest.param("must lie below", ["--head", "adaptive", "--cutoffs", "999"], id="cutoffs"),
        pytest.param("accumulate=9 parts", ["--accumulate", "9"], id="accumulate"),
        pytest.param("label smoothing needs", ["--head", "adaptive", "--cutoffs", "5",
                                               "--label-smoothing", "0.1"], id="smoothing"),
        pytest.param("no pair of synonyms", ["--synonyms", "pairs.tsv"], id="synonyms"),
    ],
)  # fmt: skip
def test_impossible_recipes_are_one_line(folder, monkeypatch, pattern: str, options) -> None:
    monkeypatch.chdir(folder)
    (folder / "pairs.tsv").write_text("this\tthat\n")
    _fails(pattern, "train", "book.txt", *SMALL, "--max-steps", "1", *options)


def test_help_teaches_the_presets() -> None:
    output = _ok("train", "--help", env={"COLUMNS": "200"})
    for preset in PRESETS:
        assert preset in output
    for command in ("eval", "score", "generate"):
        assert _ok(command, "--help")


def test_model_without_parameters_of_training_is_small(folder) -> None:
    """What eval loads does not hold the optimiser."""
    files = {path.name: path.stat().st_size for path in (folder / "char").glob("step-*/*")}
    assert files["model.safetensors"] < files["training.safetensors"]
    model, _ = lm.load_model(folder / "char")
    assert isinstance(model.layers[0].weight_hh_l0, torch.nn.Parameter)
