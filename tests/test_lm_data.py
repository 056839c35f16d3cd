"""The text, its tokens, and the layout of the batches."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_packed_sequence

from rnnlm_kernels import lm
from rnnlm_kernels.lm.data import (
    EOS,
    IGNORE_INDEX,
    UNK,
    TextSource,
    default_text,
    random_length,
    read_text,
    tokenize,
)

# Any text that UTF-8 can hold, including line ends, and some that looks like the special tokens.
TEXTS = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.sampled_from([UNK, EOS, "\n", " ", "...", "don't", "a\n\nb"]),
    ),
    max_size=8,
).map("".join)


@given(text=TEXTS)
def test_characters_lose_nothing(text: str) -> None:
    vocabulary = lm.Vocabulary.build(tokenize(text, "char"), "char")
    assert vocabulary.decode(vocabulary.encode(text)) == text


@given(text=TEXTS)
def test_decoded_words_encode_to_the_same_numbers(text: str) -> None:
    vocabulary = lm.Vocabulary.build(tokenize(text, "word"), "word", min_count=2)
    numbers = vocabulary.encode(text)
    assert torch.equal(vocabulary.encode(vocabulary.decode(numbers)), numbers)


@given(text=TEXTS)
def test_words_keep_everything_but_white_space(text: str) -> None:
    kept = "".join(token for token in tokenize(text, "word") if token != EOS)
    assert kept == "".join(text.replace(EOS, "").split())


def test_vocabulary_is_ordered_by_frequency_and_cut() -> None:
    tokens = ["b", "b", "b", "a", "a", "d", "c", UNK]
    build = lm.Vocabulary.build
    assert build(tokens, "word").tokens == [UNK, "b", "a", "c", "d"]
    assert build(tokens, "word", min_count=2).tokens == [UNK, "b", "a"]
    assert build(tokens, "word", max_size=2).tokens == [UNK, "b"]
    assert build(tokens, "word", max_size=2).encode("b a z").tolist() == [1, 0, 0]


@pytest.mark.parametrize("tokens", [["a", UNK], [], [UNK, "a", "a"]], ids=str)
def test_vocabulary_refuses_what_is_none(tokens: list[str]) -> None:
    with pytest.raises(ValueError, match=r"vocabulary"):
        lm.Vocabulary("word", tokens)


def test_unknown_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="unit"):
        lm.corpus_from_text("some text", unit="syllable")  # type: ignore[arg-type]


SIZES = {
    "length": st.integers(2, 200),
    "batch": st.integers(1, 12),
    "bptt": st.integers(1, 20),
}


def _rows(batches: lm.StreamBatches) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs).T, torch.cat(targets).T  # [B, L]


@given(**SIZES)
def test_training_rows_joined_are_the_stream(length: int, batch: int, bptt: int) -> None:
    tokens = torch.arange(length)
    if length - 1 < batch:
        with pytest.raises(lm.CorpusError, match="too short"):
            lm.StreamBatches(tokens, batch, bptt)
        return
    batches = lm.StreamBatches(tokens, batch, bptt)
    inputs, targets = _rows(batches)
    predictions = (length - 1) // batch * batch
    assert batches.predictions == predictions
    assert torch.equal(inputs.flatten(), tokens[:predictions])
    assert torch.equal(targets.flatten(), tokens[1 : predictions + 1])


@given(**SIZES)
def test_evaluation_predicts_every_token_once(length: int, batch: int, bptt: int) -> None:
    tokens = torch.arange(length)
    batches = lm.StreamBatches(tokens, batch, bptt, keep_tail=True)
    inputs, targets = (rows.flatten() for rows in _rows(batches))
    real = targets != IGNORE_INDEX
    assert batches.predictions == length - 1
    assert torch.equal(targets[real], tokens[1:])
    assert torch.equal(inputs[real], tokens[:-1])


@given(**SIZES)
def test_a_window_continues_the_one_before(length: int, batch: int, bptt: int) -> None:
    batches = lm.StreamBatches(torch.arange(length), min(batch, length - 1), bptt)
    windows = list(batches)
    assert len(windows) == len(batches)
    assert all(1 <= len(inputs) <= bptt for inputs, _ in windows)
    for (_, targets), (following, _) in pairwise(windows):
        assert torch.equal(targets[-1], following[0])


def test_a_window_that_is_not_there_raises() -> None:
    batches = lm.StreamBatches(torch.arange(9), 2, 2)
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_unigram_loss_of_equal_counts_is_log_of_the_size() -> None:
    train = torch.arange(8).repeat(3)
    assert lm.unigram_loss(train, train, 8) == pytest.approx(math.log(8))


def test_unigram_loss_of_an_unseen_token_is_finite() -> None:
    loss = lm.unigram_loss(torch.zeros(6, dtype=torch.int64), torch.tensor([0, 1]), 2)
    assert loss == pytest.approx(-math.log(1 / 8))


def test_parts_joined_are_the_text() -> None:
    text = "".join(chr(97 + (k * k) % 26) for k in range(500))
    corpus = lm.corpus_from_text(text, unit="char")
    joined = torch.cat([corpus.train, corpus.valid, corpus.test])
    assert corpus.vocabulary.decode(joined) == text
    assert [part.numel() for part in (corpus.train, corpus.valid, corpus.test)] == [450, 25, 25]


def test_vocabulary_knows_the_training_part_only() -> None:
    corpus = lm.corpus_from_text("a" * 90 + "b" * 10, unit="char")
    assert corpus.vocabulary.tokens == [UNK, "a"]
    assert corpus.unknown_rate("train") == 0.0
    assert corpus.unknown_rate("test") == 1.0


def test_default_corpus_repeats_no_paragraph() -> None:
    paragraphs = [part for part in default_text().split("\n\n") if part]
    assert len(paragraphs) == len(set(paragraphs))
    assert default_text() == default_text()
    assert len(default_text()) > 200_000


def test_files_are_read_as_utf8_without_mark_or_carriage_returns(tmp_path) -> None:
    path = tmp_path / "text"
    path.write_bytes("\ufeffgr\u00fc\u00df\r\nGott\r".encode())
    assert read_text(path) == "gr\u00fc\u00df\nGott\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "no such text file", id="missing"),
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b" \n\t\n", "is empty", id="white-space"),
        pytest.param(b"caf\xe9 au lait", r"not UTF-8: byte 0xe9 at position 3", id="latin-1"),
        pytest.param(b"one two three", "too short", id="short"),
    ],
)
def test_unusable_files_are_named(tmp_path, content: bytes | None, message: str) -> None:
    path = tmp_path / "book.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(lm.CorpusError, match=message) as error:
        lm.load_corpus(path)
    assert "book.txt" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_is_no_text(tmp_path) -> None:
    with pytest.raises(lm.CorpusError, match="cannot read"):
        lm.load_corpus(tmp_path)


def test_several_files_are_one_text(tmp_path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("the end" * 20)
    other.write_text("of it\n" * 20)
    joined = lm.corpus_from_text(one.read_text() + "\n" + other.read_text(), unit="char")
    corpus = lm.load_corpus([one, other], unit="char")
    assert corpus.fingerprint == joined.fingerprint
    assert corpus.vocabulary == joined.vocabulary
    assert torch.equal(corpus.train, joined.train)
    assert corpus.name == "one, other"


@pytest.mark.parametrize("parts", [("valid",), ("test",), ("valid", "test")], ids="-".join)
def test_given_parts_are_used_and_the_others_cut(tmp_path, parts: tuple[str, ...]) -> None:
    text = tmp_path / "text"
    text.write_text("abcdefghij" * 10)
    files = {part: tmp_path / part for part in parts}
    for file in files.values():
        file.write_text("jihgf")
    corpus = lm.load_corpus(text, unit="char", **files)
    for part in ("valid", "test"):
        decoded = corpus.vocabulary.decode(getattr(corpus, part))
        assert decoded == ("jihgf" if part in parts else "fghij")
    assert len(corpus.train) == 100 - 5 * (2 - len(parts))


def test_given_parts_are_in_the_fingerprint(tmp_path) -> None:
    text, valid = tmp_path / "text", tmp_path / "valid"
    text.write_text("abcdefghij" * 10)
    prints = set()
    for content in ("abc", "abd"):
        valid.write_text(content)
        prints.add(lm.load_corpus(text, unit="char", valid=valid).fingerprint)
    assert len(prints) == 2


def test_a_short_given_part_is_named(tmp_path) -> None:
    (tmp_path / "text").write_text("abcdefghij" * 10)
    (tmp_path / "little").write_text("a")
    with pytest.raises(lm.CorpusError, match=r"little is too short: 1 characters"):
        lm.load_corpus(tmp_path / "text", unit="char", valid=tmp_path / "little")


def test_bad_byte_is_counted_over_lines(tmp_path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"one\ntwo\nthr\xe9\n")
    with pytest.raises(lm.CorpusError, match=r"byte 0xe9 at position 11"):
        read_text(path)


@given(text=TEXTS)
def test_lines_joined_are_the_text(text: str) -> None:
    lines = list(TextSource(text=text))
    assert "".join(lines) == text
    assert all("\n" not in line[:-1] for line in lines)


@given(length=st.integers(60, 200), batch=st.integers(1, 9), world=st.integers(1, 5))
def test_shards_are_the_stream(length: int, batch: int, world: int) -> None:
    whole = lm.StreamBatches(torch.arange(length), batch, 7)
    shards = [lm.StreamBatches(torch.arange(length), batch, 7) for _ in range(world)]
    for rank, shard in enumerate(shards):
        shard.shard(rank, world)
    assert sum(shard.predictions for shard in shards) == whole.predictions
    for index, (inputs, targets) in enumerate(whole):
        rows = [shard[index] for shard in shards]
        assert torch.equal(torch.cat([row[0] for row in rows], 1), inputs)
        assert torch.equal(torch.cat([row[1] for row in rows], 1), targets)


def test_random_lengths_are_those_of_the_paper_and_repeatable() -> None:
    drawn = [random_length(70, 1, 0, position) for position in range(4000)]
    assert drawn == [random_length(70, 1, 0, position) for position in range(4000)]
    assert drawn != [random_length(70, 1, 1, position) for position in range(4000)]
    assert drawn != [random_length(70, 2, 0, position) for position in range(4000)]
    halves = sum(length < 53 for length in drawn)  # half of the way between 35 and 70
    assert 0.03 < halves / len(drawn) < 0.07
    long = torch.tensor([float(length) for length in drawn if length >= 53])
    assert abs(float(long.mean()) - 70) < 0.5
    assert abs(float(long.std()) - 5) < 0.3
    assert min(random_length(6, 1, 0, position) for position in range(500)) == 5


SENTENCES = st.lists(st.lists(st.integers(1, 9), max_size=9), min_size=4, max_size=40)


@given(sentences=SENTENCES, batch=st.integers(1, 5), epoch=st.integers(0, 3))
def test_an_epoch_has_every_sentence_once(sentences: list[list[int]], batch: int, epoch: int):
    tokens = torch.tensor([number for each in sentences for number in [*each, 0]])
    expected = sorted([*each, 0] for each in sentences if each)
    if len(expected) < batch:
        return
    batches = lm.SentenceBatches(tokens, 0, batch)
    seen = []
    order = batches.order(epoch)
    assert len(order) == len(batches)
    for spans in order:
        inputs, targets = batches.pack(spans)
        padded, lengths = pad_packed_sequence(targets, batch_first=True)
        rows = [row[:size].tolist() for row, size in zip(padded, lengths, strict=True)]
        seen += rows
        before, _ = pad_packed_sequence(inputs, batch_first=True)
        for row, size, target in zip(before, lengths, rows, strict=True):
            assert row[:size].tolist() == [0, *target[:-1]]
    assert sorted(seen) == expected
    assert batches.predictions == sum(map(len, expected))


def test_sentence_order_differs_between_epochs_and_is_repeatable() -> None:
    tokens = torch.tensor([1, 2, 0] * 50)
    one, other = (lm.SentenceBatches(tokens, 0, 5, seed=3) for _ in range(2))
    assert one.order(0) == other.order(0)
    assert one.order(0) != one.order(1)


def test_sentences_of_a_batch_are_of_similar_length() -> None:
    lengths = torch.randint(1, 40, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = torch.tensor([n for length in lengths for n in [1] * length + [0]])
    spread = [
        max(b - a for a, b in spans) - min(b - a for a, b in spans)
        for spans in lm.SentenceBatches(tokens, 0, 8).order(0)
    ]
    assert sum(spread) / len(spread) < 3


def test_a_text_without_sentences_is_refused() -> None:
    with pytest.raises(lm.CorpusError, match="0 sentences"):
        lm.SentenceBatches(torch.ones(50, dtype=torch.int64), 0, 2)
