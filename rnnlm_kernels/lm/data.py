"""From a text to batches: reading, tokens, vocabulary, contiguous streams.

A text is one long stream of tokens. :class:`StreamBatches` cuts it into ``batch`` rows that are
read side by side from left to right, ``bptt`` tokens at a time. Window ``k+1`` of a row continues
window ``k`` of the same row, so the hidden state can be carried from one to the next.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Unit = Literal["word", "char"]

UNK = "<unk>"
EOS = "<eos>"
# The value torch's cross entropy skips by default; marks the positions after the end of a row.
IGNORE_INDEX = -100
DEFAULT_CORPUS = "pydoc_data.topics"

# A word is a run of letters, digits and underscores. A run of one repeated punctuation mark is a
# single token: a title underlined with 60 asterisks would otherwise be 60 tokens that are free to
# predict, and flatter every figure.
_WORD = re.compile(r"\n|<unk>|<eos>|\w+|([^\w\s])\1*")


class CorpusError(ValueError):
    """A text that cannot be used: missing, not UTF-8, empty or too short."""


def read_text(path: str | Path) -> str:
    r"""The text of a UTF-8 file, without byte-order mark and with ``\n`` line ends.

    Raises:
        CorpusError: no such file, not a readable file, not UTF-8 (names the first bad byte), or
            nothing but white space.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise CorpusError(f"no such text file: {path}") from None
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at position "
            f"{error.start}; convert it first, e.g. with iconv -t UTF-8"
        ) from None
    if not text.strip():
        raise CorpusError(f"{path} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def default_text() -> str:
    """The English help texts that come with CPython, in alphabetical order.

    Every paragraph is there once. About a fifth of the raw text is paragraphs that several topics
    repeat. Kept, they would put test sentences into the training part and make the test perplexity
    look better than it is.

    Raises:
        CorpusError: this Python was installed without its ``pydoc_data`` module.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CorpusError(
            "this Python has no pydoc_data.topics, the default corpus; give a text file instead"
        ) from None
    paragraphs = re.split(r"\n{2,}", "\n\n".join(topics[name] for name in sorted(topics)))
    return "\n\n".join(dict.fromkeys(paragraphs))


def tokenize(text: str, unit: Unit) -> Sequence[str]:
    r"""Splits ``text`` into tokens.

    Args:
        text: any string.
        unit: ``"char"``: every character, nothing is lost. ``"word"``: words, runs of one
            punctuation mark, and ``<eos>`` for every line end; ``<unk>`` and ``<eos>`` in the text
            stay whole. Other white space is dropped.

    Example:
        >>> tokenize("Don't panic...\n", "word")
        ['Don', "'", 't', 'panic', '...', '<eos>']
    """
    if unit == "char":
        return text
    if unit != "word":
        raise ValueError(f"unit must be 'word' or 'char', got {unit!r}")
    tokens = (match.group(0) for match in _WORD.finditer(text))
    return [EOS if token == "\n" else token for token in tokens]


class Vocabulary:
    """The known tokens and their numbers. Number 0 is ``<unk>``, the token of everything unknown.

    Args:
        unit: ``"word"`` or ``"char"``, the tokens that :meth:`encode` makes of a text.
        tokens: all tokens, ``<unk>`` first, no token twice.

    Raises:
        ValueError: ``<unk>`` is not first, or a token appears twice.
    """

    def __init__(self, unit: Unit, tokens: Sequence[str]) -> None:
        if unit not in ("word", "char"):
            raise ValueError(f"unit must be 'word' or 'char', got {unit!r}")
        self.unit: Unit = unit
        self.tokens = list(tokens)
        self._number = {token: number for number, token in enumerate(self.tokens)}
        if not self.tokens or self.tokens[0] != UNK:
            raise ValueError(f"the first token of a vocabulary must be {UNK}")
        if len(self._number) != len(self.tokens):
            raise ValueError("a vocabulary must not hold a token twice")

    @classmethod
    def build(
        cls, tokens: Sequence[str], unit: Unit, *, min_count: int = 1, max_size: int | None = None
    ) -> Vocabulary:
        """Collects the tokens seen at least ``min_count`` times, the most frequent first.

        Args:
            tokens: the training tokens; see :func:`tokenize`.
            unit: how those tokens were made.
            min_count: rarer tokens become ``<unk>``.
            max_size: keep at most this many tokens, ``<unk>`` included; None keeps all.
        """
        if max_size is not None and max_size < 1:
            raise ValueError(f"max_size must be at least 1, got {max_size}")
        counts = Counter(tokens)
        counts.pop(UNK, None)
        # Ties go by spelling, so that the numbers do not depend on the order of the text.
        known = sorted(
            (t for t, n in counts.items() if n >= min_count), key=lambda t: (-counts[t], t)
        )
        return cls(unit, [UNK, *known][:max_size])

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return self.unit == other.unit and self.tokens == other.tokens

    def __repr__(self) -> str:
        return f"Vocabulary(unit={self.unit!r}, {len(self)} tokens)"

    def numbers(self, tokens: Sequence[str]) -> Tensor:
        """Numbers of ``tokens``: int64 [N]."""
        return torch.tensor([self._number.get(token, 0) for token in tokens], dtype=torch.int64)

    def encode(self, text: str) -> Tensor:
        """Numbers of the tokens of ``text``: int64 [N]."""
        return self.numbers(tokenize(text, self.unit))

    def decode(self, numbers: Tensor | Sequence[int]) -> str:
        """A text that encodes to ``numbers`` again.

        Characters come back as they were, an unknown one as U+FFFD. Words are parted by single
        spaces and lines end where ``<eos>`` stood: the spacing of the original is not kept in the
        numbers.
        """
        flat = numbers.flatten().tolist() if isinstance(numbers, Tensor) else numbers
        tokens = [self.tokens[number] for number in flat]
        if self.unit == "char":
            return "".join("\ufffd" if token == UNK else token for token in tokens)
        return " ".join("\n" if token == EOS else token for token in tokens)


@dataclass(frozen=True)
class Corpus:
    """An encoded text in three parts.

    Attributes:
        name: where it came from, for messages.
        vocabulary: the tokens of the training part.
        train, valid, test: int64 [N] token numbers, in the order of the text.
        fingerprint: SHA-256 of the text, to recognise it when training is resumed.
    """

    name: str
    vocabulary: Vocabulary
    train: Tensor
    valid: Tensor
    test: Tensor
    fingerprint: str

    def unknown_rate(self, split: Literal["train", "valid", "test"]) -> float:
        """Share of ``<unk>`` among the tokens of a part."""
        return float((getattr(self, split) == 0).double().mean())


def corpus_from_text(
    text: str,
    *,
    unit: Unit = "word",
    min_count: int | None = None,
    max_size: int | None = None,
    valid_share: float = 0.05,
    test_share: float = 0.05,
    vocabulary: Vocabulary | None = None,
    name: str = "text",
) -> Corpus:
    """Encodes ``text`` and cuts it into training, validation and test part, in this order.

    Args:
        text: the whole text.
        unit: ``"word"`` or ``"char"``.
        min_count: rarer tokens of the training part become ``<unk>``. None: 2 for words, so that
            ``<unk>`` is itself learnt; 1 for characters.
        max_size: largest vocabulary; None keeps all.
        valid_share, test_share: share of the tokens in those two parts.
        vocabulary: use this one, and its unit, instead of building one.
        name: for messages.

    Raises:
        CorpusError: a part would be shorter than the 2 tokens that one prediction takes.
    """
    for label, share in (("valid_share", valid_share), ("test_share", test_share)):
        if not 0.0 < share < 0.5:
            raise ValueError(f"{label} must lie between 0 and 0.5, got {share}")
    if vocabulary is not None:
        unit = vocabulary.unit
    tokens = tokenize(text, unit)
    first = round(len(tokens) * (1.0 - valid_share - test_share))
    second = round(len(tokens) * (1.0 - test_share))
    parts = (tokens[:first], tokens[first:second], tokens[second:])
    if min(len(part) for part in parts) < 2:
        things = "words" if unit == "word" else "characters"
        raise CorpusError(
            f"{name} is too short: {len(tokens)} {things}; every one of its three parts (training, "
            "validation, test) needs 2 or more"
        )
    if vocabulary is None:
        if min_count is None:
            min_count = 2 if unit == "word" else 1
        vocabulary = Vocabulary.build(parts[0], unit, min_count=min_count, max_size=max_size)
    train, valid, test = (vocabulary.numbers(part) for part in parts)
    fingerprint = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return Corpus(name, vocabulary, train, valid, test, fingerprint)


def load_corpus(
    path: str | Path | None = None,
    *,
    unit: Unit = "word",
    min_count: int | None = None,
    max_size: int | None = None,
    vocabulary: Vocabulary | None = None,
) -> Corpus:
    """The corpus of a UTF-8 text file, or of CPython's own help texts when ``path`` is None.

    See :func:`corpus_from_text` for the arguments, :func:`read_text` and :func:`default_text` for
    the errors.
    """
    text = default_text() if path is None else read_text(path)
    name = DEFAULT_CORPUS if path is None else Path(path).name
    return corpus_from_text(
        text, unit=unit, min_count=min_count, max_size=max_size, vocabulary=vocabulary, name=name
    )


def unigram_loss(train: Tensor, tokens: Tensor, vocab_size: int) -> float:
    """Mean loss, in nats per token, of a model that knows only the frequency of each token.

    This is the yardstick: a model that does not beat it has learnt nothing about order. Every count
    is raised by one, so that a token never seen in training does not cost infinity.

    Args:
        train: int64 [N], the tokens that are counted.
        tokens: int64 [M], the tokens that are predicted; as in :func:`rnnlm_kernels.lm.evaluate`,
            all but the first.
        vocab_size: number of different tokens.
    """
    counts = torch.bincount(train, minlength=vocab_size).double() + 1.0
    return float(-(counts / counts.sum()).log()[tokens[1:]].mean())


class StreamBatches:
    """Windows of a token stream, laid out for truncated BPTT with a carried hidden state.

    The stream of N tokens holds N-1 predictions (token k+1 from the tokens up to k). They are dealt
    to ``batch`` rows as consecutive stretches of equal length; no prediction falls between two
    rows, since the last target of a row is the first input of the next.

    Args:
        tokens: int64 [N].
        batch: number of rows.
        bptt: tokens per window; the last window may be shorter.
        keep_tail: False (training): all rows are full and the last ``(N-1) % batch`` predictions
            are left out. True (evaluation): every prediction is there exactly once; rows may end
            early, padded with target ``IGNORE_INDEX``, and a batch larger than the number of
            predictions is cut down to it.

    Raises:
        CorpusError: too few tokens for one prediction per row.

    Example:
        >>> inputs, targets = StreamBatches(torch.arange(8), batch=2, bptt=2)[0]
        >>> inputs.T.tolist(), targets.T.tolist()
        ([[0, 1], [3, 4]], [[1, 2], [4, 5]])
    """

    def __init__(self, tokens: Tensor, batch: int, bptt: int, *, keep_tail: bool = False) -> None:
        if batch < 1 or bptt < 1:
            raise ValueError(f"batch and bptt must be at least 1, got {batch} and {bptt}")
        predictions = tokens.numel() - 1
        if predictions < (1 if keep_tail else batch):
            raise CorpusError(
                f"the text is too short: {tokens.numel()} tokens cannot fill {batch} rows; use a "
                "longer text or a smaller batch"
            )
        if keep_tail:
            batch = min(batch, predictions)
            length = math.ceil(predictions / batch)
            padding = length * batch - predictions
            inputs = torch.nn.functional.pad(tokens[:-1], (0, padding))
            targets = torch.nn.functional.pad(tokens[1:], (0, padding), value=IGNORE_INDEX)
            self.predictions = predictions
        else:
            length = predictions // batch
            self.predictions = length * batch
            inputs, targets = tokens[: self.predictions], tokens[1 : self.predictions + 1]
        self.batch = batch
        self.bptt = bptt
        self._inputs = inputs.view(batch, length).T.contiguous()  # [length, B]
        self._targets = targets.view(batch, length).T.contiguous()

    def __len__(self) -> int:
        return math.ceil(self._inputs.shape[0] / self.bptt)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of window ``index``, each int64 [t, B] with t <= bptt."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        window = slice(index * self.bptt, (index + 1) * self.bptt)
        return self._inputs[window], self._targets[window]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[index] for index in range(len(self)))

    def to(self, device: torch.device) -> StreamBatches:
        """Moves the stream to ``device`` once, so that no window has to be copied."""
        self._inputs, self._targets = self._inputs.to(device), self._targets.to(device)
        return self
