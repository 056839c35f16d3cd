"""An encoded text in three parts: training, validation, test.

A text is read line by line and only its token numbers are kept (8 bytes each). The vocabulary is
made of the training part alone.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..tokenizers import UNITS, BpeTokenizer, ByteTokenizer, Tokenizer, Unit, Vocabulary, tokenize
from .text import DEFAULT_CORPUS, CorpusError, TextSource, default_text

DEFAULT_BPE_SIZE = 8000
_THINGS = {"word": "words", "char": "characters", "byte": "bytes", "bpe": "subwords"}
Part = Literal["train", "valid", "test"]


@dataclass(frozen=True)
class Corpus:
    """An encoded text in three parts.

    Attributes:
        name: where it came from, for messages.
        vocabulary: the tokenizer; its tokens are those of the training part.
        train, valid, test: int64 [N] token numbers, in the order of the text.
        fingerprint: SHA-256 of the text, to recognise it when training is resumed.
    """

    name: str
    vocabulary: Tokenizer
    train: Tensor
    valid: Tensor
    test: Tensor
    fingerprint: str

    def unknown_rate(self, split: Part) -> float:
        """Share of ``<unk>`` among the tokens of a part."""
        if self.vocabulary.unk is None:
            return 0.0
        return float((getattr(self, split) == self.vocabulary.unk).double().mean())


def corpus_from_text(
    text: str,
    *,
    unit: Unit = "word",
    min_count: int | None = None,
    max_size: int | None = None,
    valid_share: float = 0.05,
    test_share: float = 0.05,
    vocabulary: Tokenizer | None = None,
    name: str = "text",
) -> Corpus:
    """Encodes ``text`` and cuts it into training, validation and test part, in this order.

    Args:
        text: the whole text.
        unit: ``"word"``, ``"char"``, ``"byte"`` or ``"bpe"``.
        min_count: rarer words or characters of the training part become ``<unk>``. None: 2 for
            words, so that ``<unk>`` is itself learnt; 1 for characters.
        max_size: largest vocabulary; None keeps all words or characters, and is 8000 subwords.
        valid_share, test_share: share of the tokens in those two parts.
        vocabulary: use this tokenizer, and its unit, instead of making one.
        name: for messages.

    Raises:
        CorpusError: a part would be shorter than the 2 tokens that one prediction takes.
    """
    sources = {"train": TextSource(text=text)}
    shares = (valid_share, test_share)
    return _build(name, sources, unit, min_count, max_size, shares, vocabulary)


def load_corpus(
    path: str | Path | Sequence[str | Path] | None = None,
    *,
    unit: Unit = "word",
    valid: str | Path | None = None,
    test: str | Path | None = None,
    min_count: int | None = None,
    max_size: int | None = None,
    valid_share: float = 0.05,
    test_share: float = 0.05,
    vocabulary: Tokenizer | None = None,
) -> Corpus:
    """The corpus of UTF-8 text files, or of CPython's own help texts when ``path`` is None.

    Args:
        path: a file, or several that are read one after the other.
        valid, test: files of those parts. A part without a file is cut from the end of the training
            text.
        unit, min_count, max_size, valid_share, test_share, vocabulary: see
            :func:`corpus_from_text`.

    Raises:
        CorpusError: see :class:`TextSource` and :func:`corpus_from_text`.
    """
    if path is None:
        sources, name = {"train": TextSource(text=default_text())}, DEFAULT_CORPUS
    else:
        files = [path] if isinstance(path, str | Path) else list(path)
        sources = {"train": TextSource(files)}
        name = sources["train"].name
    for part, file in (("valid", valid), ("test", test)):
        if file is not None:
            sources[part] = TextSource([file])
    shares = (valid_share, test_share)
    return _build(name, sources, unit, min_count, max_size, shares, vocabulary)


def unigram_loss(train: Tensor, tokens: Tensor, vocab_size: int) -> float:
    """Mean loss of the model that knows only how frequent each token was in training.

    One is added to every count, so that unseen tokens are possible. It is the yardstick of every
    language model: what is not well below it has learnt nothing about the order of the tokens.

    Args:
        train: int64 [N], the tokens that are counted.
        tokens: int64 [M], the tokens that are predicted, all but the first.
        vocab_size: number of different tokens.
    """
    counts = torch.bincount(train, minlength=vocab_size).double() + 1.0
    return float(-(counts / counts.sum()).log()[tokens[1:]].mean())


class _Reader:
    """Encodes texts and remembers what it has read, for the fingerprint."""

    def __init__(self, tokenizer: Tokenizer | None, unit: Unit) -> None:
        self.unit = unit
        self._tokenizer = tokenizer
        self._digest = hashlib.sha256()
        # Without a tokenizer tokens are numbered as they come; the vocabulary sorts them later.
        self.seen: dict[str, int] = {}

    def read(self, lines: TextSource) -> Tensor:
        numbers = array("q")
        seen = self.seen
        for line in lines:
            self._digest.update(line.encode("utf-8", "surrogatepass"))
            if self._tokenizer is not None:
                numbers.extend(self._tokenizer.encode(line).tolist())
            else:
                tokens = tokenize(line, self.unit)
                numbers.extend([seen.setdefault(token, len(seen)) for token in tokens])
        return torch.frombuffer(numbers, dtype=torch.int64) if numbers else torch.zeros(0).long()

    @property
    def fingerprint(self) -> str:
        return self._digest.hexdigest()


def _build(
    name: str,
    sources: dict[str, TextSource],
    unit: Unit,
    min_count: int | None,
    max_size: int | None,
    shares: tuple[float, float],
    tokenizer: Tokenizer | None,
) -> Corpus:
    for label, share in zip(("valid_share", "test_share"), shares, strict=True):
        if not 0.0 < share < 0.5:
            raise ValueError(f"{label} must lie between 0 and 0.5, got {share}")
    if tokenizer is not None:
        unit = tokenizer.unit
    elif unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(map(repr, UNITS))}, got {unit!r}")
    # What is cut from the end of the training text.
    cut = {
        part: share
        for part, share in zip(("valid", "test"), shares, strict=True)
        if part not in sources
    }
    if tokenizer is None and unit == "byte":
        tokenizer = ByteTokenizer()
    if tokenizer is None and unit == "bpe":
        lines = _first_share(sources["train"], 1.0 - sum(cut.values()))
        tokenizer = BpeTokenizer.train(lines, max_size or DEFAULT_BPE_SIZE)

    reader = _Reader(tokenizer, unit)
    parts = {part: reader.read(source) for part, source in sources.items()}
    total = len(parts["train"])
    bounds = [1.0 - sum(list(cut.values())[index:]) for index in range(len(cut))]
    pieces = parts["train"].tensor_split([round(total * bound) for bound in bounds])
    parts |= dict(zip(("train", *cut), pieces, strict=True))
    for part, numbers in parts.items():
        if len(numbers) < 2:
            ours = part in ("train", *cut)
            raise CorpusError(
                f"{name if ours else sources[part].name} is too short: "
                f"{total if ours else len(numbers)} {_THINGS[unit]}; every one of the three parts "
                "(training, validation, test) needs 2 or more"
            )
    if tokenizer is None:
        if min_count is None:
            min_count = 2 if unit == "word" else 1
        counts = torch.bincount(parts["train"], minlength=len(reader.seen)).tolist()
        vocabulary = Vocabulary.from_counts(
            dict(zip(reader.seen, counts, strict=True)),
            unit,
            # A token that only the other parts have is as unknown as one nobody has seen.
            min_count=max(1, min_count),
            max_size=max_size,
        )
        table = vocabulary.numbers(reader.seen)
        parts = {part: table[numbers] for part, numbers in parts.items()}
        tokenizer = vocabulary
    train, valid, test = (parts[part] for part in ("train", "valid", "test"))
    return Corpus(name, tokenizer, train, valid, test, reader.fingerprint)


def _first_share(source: TextSource, share: float) -> Iterator[str]:
    """The lines that lie wholly in the first ``share`` of the text."""
    budget = sum(len(line) for line in source) * share
    for line in source:
        budget -= len(line)
        if budget < 0:
            return
        yield line
