"""Tokenizers: round trips, what they are saved as, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rnnlm_kernels import lm

TEXT = "Der Fluß fließt; the river flows.\nflowing, flowed, überflutet\n" * 9
LOSSLESS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
BPE = lm.BpeTokenizer.train(TEXT.splitlines(keepends=True), 300)


@given(text=LOSSLESS)
def test_bytes_and_subwords_lose_nothing(text: str) -> None:
    for tokenizer in (lm.ByteTokenizer(), BPE):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.lossless


@given(text=LOSSLESS)
def test_subwords_are_the_same_line_by_line(text: str) -> None:
    lines = [part + "\n" for part in text.split("\n")]
    whole = BPE.encode("".join(lines)).tolist()
    assert whole == [number for line in lines for number in BPE.encode(line).tolist()]


def test_subwords_are_fewer_than_bytes_and_end_lines_alone() -> None:
    numbers = BPE.encode(TEXT)
    assert len(numbers) < len(TEXT.encode()) / 2
    assert BPE.decode([BPE.eos]) == "\n"
    assert int((numbers == BPE.eos).sum()) == TEXT.count("\n")


@pytest.mark.parametrize(
    "tokenizer",
    [
        lm.ByteTokenizer(),
        BPE,
        lm.Vocabulary.build(TEXT, "char"),
        lm.Vocabulary("word", ["<unk>", "<eos>", "a"]),
    ],
    ids=lambda each: each.unit,
)
def test_json_brings_a_tokenizer_back(tokenizer: lm.Tokenizer) -> None:
    copy = lm.tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert copy == tokenizer
    assert type(copy) is type(tokenizer)
    assert torch.equal(copy.encode(TEXT), tokenizer.encode(TEXT))
    assert copy.eos == tokenizer.eos
    assert len(copy) == len(tokenizer)
    assert copy != lm.Vocabulary("char", ["<unk>", "x"])


@pytest.mark.parametrize(
    ("unit", "end"), [("char", "\n"), ("word", "<eos>"), ("byte", "\n"), ("bpe", "\n")]
)
def test_every_unit_knows_the_end_of_a_line(unit: str, end: str) -> None:
    corpus = lm.corpus_from_text(TEXT, unit=unit, max_size=280 if unit == "bpe" else None)
    eos = corpus.vocabulary.eos
    assert eos is not None
    assert corpus.vocabulary.token(eos) == end


def test_bpe_learns_from_the_training_part_only() -> None:
    text = "aaaa bbbb\n" * 90 + "zqzqzqzq\n" * 12
    corpus = lm.corpus_from_text(text, unit="bpe", max_size=300)
    assert len(corpus.vocabulary.encode("aaaa bbbb")) <= 3
    assert len(corpus.vocabulary.encode("zqzqzqzq")) == 8
    assert corpus.unknown_rate("test") == 0.0


def test_saved_tokenizer_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(BPE.to_json()["description"], encoding="utf-8")
    assert lm.BpeTokenizer.load(path) == BPE


@pytest.mark.parametrize("content", [None, b"not json", b"{}", b"\xff\xfe"], ids=str)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer"):
        lm.BpeTokenizer.load(path)


def test_too_small_a_subword_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 256"):
        lm.BpeTokenizer.train(["text"], 100)


def test_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'rnnlm-kernels\[lm\]'"):
        lm.BpeTokenizer.train(["text"], 300)


def test_tokens_are_shown_readably() -> None:
    assert lm.ByteTokenizer().token(195) == "<0xC3>"
    assert lm.ByteTokenizer().token(65) == "A"
    euro = BPE.encode("€").tolist()
    assert len(euro) == 3
    assert "\ufffd" not in "".join(map(BPE.token, euro))
