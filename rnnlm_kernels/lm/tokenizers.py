"""What a token is, and its number: words, characters, bytes, or subwords (BPE).

Every tokenizer turns a text into int64 numbers and back, and is saved as plain JSON.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Unit = Literal["word", "char", "byte", "bpe"]
UNITS: tuple[Unit, ...] = ("word", "char", "byte", "bpe")

UNK = "<unk>"
EOS = "<eos>"

# A word is a run of letters, digits and underscores. A run of one repeated punctuation mark is a
# single token: a title underlined with 60 asterisks would otherwise be 60 tokens that are free to
# predict, and flatter every figure.
_WORD = re.compile(r"\n|<unk>|<eos>|\w+|([^\w\s])\1*")


class Tokenizer(ABC):
    """Texts to numbers and back.

    Attributes:
        unit: what one token is.
        unk: number of the token that stands for everything unknown, None where there is none.
        eos: number of the token that ends a line, None where there is none.
        lossless: whether decoding gives back the very text.
    """

    unit: Unit
    unk: int | None = None
    eos: int | None = None
    lossless: bool = True

    @abstractmethod
    def __len__(self) -> int:
        """Number of different tokens."""

    @abstractmethod
    def encode(self, text: str) -> Tensor:
        """Numbers of the tokens of ``text``: int64 [N]."""

    @abstractmethod
    def decode(self, numbers: Tensor | Sequence[int]) -> str:
        """The text of ``numbers``."""

    @abstractmethod
    def token(self, number: int) -> str:
        """How one token is written, to show it to a person."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """All of it as plain values; :func:`tokenizer_from_json` is the inverse."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tokenizer):
            return NotImplemented
        return self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(unit={self.unit!r}, {len(self)} tokens)"


def tokenize(text: str, unit: Unit) -> Sequence[str]:
    r"""Splits ``text`` into words or characters.

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


class Vocabulary(Tokenizer):
    """Words or characters. Number 0 is ``<unk>``, the token of everything unknown.

    Args:
        unit: ``"word"`` or ``"char"``, the tokens that :meth:`encode` makes of a text.
        tokens: all tokens, ``<unk>`` first, no token twice.

    Raises:
        ValueError: ``<unk>`` is not first, or a token appears twice.
    """

    def __init__(self, unit: Unit, tokens: Sequence[str]) -> None:
        if unit not in ("word", "char"):
            raise ValueError(f"unit must be 'word' or 'char', got {unit!r}")
        self.unit = unit
        self.tokens = list(tokens)
        self._number = {token: number for number, token in enumerate(self.tokens)}
        if not self.tokens or self.tokens[0] != UNK:
            raise ValueError(f"the first token of a vocabulary must be {UNK}")
        if len(self._number) != len(self.tokens):
            raise ValueError("a vocabulary must not hold a token twice")
        self.unk = 0
        self.eos = self._number.get("\n" if unit == "char" else EOS)
        self.lossless = unit == "char"

    @classmethod
    def build(
        cls, tokens: Iterable[str], unit: Unit, *, min_count: int = 1, max_size: int | None = None
    ) -> Vocabulary:
        """Collects the tokens seen at least ``min_count`` times, the most frequent first.

        Args:
            tokens: the training tokens; see :func:`tokenize`.
            unit: how those tokens were made.
            min_count: rarer tokens become ``<unk>``.
            max_size: keep at most this many tokens, ``<unk>`` included; None keeps all.
        """
        return cls.from_counts(Counter(tokens), unit, min_count=min_count, max_size=max_size)

    @classmethod
    def from_counts(
        cls,
        counts: Mapping[str, int],
        unit: Unit,
        *,
        min_count: int = 1,
        max_size: int | None = None,
    ) -> Vocabulary:
        """As :meth:`build`, from the number of times each token was seen."""
        if max_size is not None and max_size < 1:
            raise ValueError(f"max_size must be at least 1, got {max_size}")
        # Ties go by spelling, so that the numbers do not depend on the order of the text.
        known = sorted(
            (t for t, n in counts.items() if n >= min_count and t != UNK),
            key=lambda t: (-counts[t], t),
        )
        return cls(unit, [UNK, *known][:max_size])

    def __len__(self) -> int:
        return len(self.tokens)

    def numbers(self, tokens: Iterable[str]) -> Tensor:
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
        tokens = [self.tokens[number] for number in _plain(numbers)]
        if self.unit == "char":
            return "".join("\ufffd" if token == UNK else token for token in tokens)
        return " ".join("\n" if token == EOS else token for token in tokens)

    def token(self, number: int) -> str:
        """The token as it stands in the vocabulary."""
        return self.tokens[number]

    def to_json(self) -> dict[str, Any]:
        """Unit and tokens."""
        return {"unit": self.unit, "tokens": self.tokens}


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8: nothing is unknown, nothing has to be learnt.

    Example:
        >>> ByteTokenizer().encode("é!").tolist()
        [195, 169, 33]
    """

    unit = "byte"
    eos = ord("\n")

    def __len__(self) -> int:
        return 256

    def encode(self, text: str) -> Tensor:
        """The bytes of ``text``: int64 [N]."""
        return torch.tensor(list(text.encode("utf-8")), dtype=torch.int64)

    def decode(self, numbers: Tensor | Sequence[int]) -> str:
        """The text of these bytes; what is not UTF-8 becomes U+FFFD."""
        return bytes(_plain(numbers)).decode("utf-8", errors="replace")

    def token(self, number: int) -> str:
        """The character of an ASCII byte, or ``<0xC3>``."""
        return chr(number) if number < 128 else f"<0x{number:02X}>"

    def to_json(self) -> dict[str, Any]:
        """Its unit says it all."""
        return {"unit": self.unit}


class BpeTokenizer(Tokenizer):
    """Subwords by byte-pair encoding, made and applied by Hugging Face's ``tokenizers``.

    Args:
        description: the JSON text that ``tokenizers`` writes; any tokenizer of that library will
            do. Needs the extra ``rnnlm-kernels[lm]``.

    Raises:
        ValueError: not a tokenizer.
        ModuleNotFoundError: ``tokenizers`` is not installed.

    Example:
        >>> bpe = BpeTokenizer.train(["low lower lowest\\n"] * 9, 270)
        >>> bpe.decode(bpe.encode("slow flow\\n"))
        'slow flow\\n'
    """

    unit = "bpe"

    def __init__(self, description: str) -> None:
        try:
            self._backend = _tokenizers().Tokenizer.from_str(description)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"not a tokenizer of the tokenizers library: {error}") from None
        self._description = description
        for name in (EOS, "</s>", "<|endoftext|>", "\u010a"):  # the last is a line end, byte-level
            self.eos = self._backend.token_to_id(name)
            if self.eos is not None:
                break
        self.unk = self._backend.token_to_id(UNK)

    @classmethod
    def train(cls, lines: Iterable[str], size: int) -> BpeTokenizer:
        """Learns ``size`` subwords over bytes; a line end is always a token of its own.

        Raises:
            ValueError: ``size`` is below the 256 bytes that every text is made of.
        """
        if size < 256:
            raise ValueError(f"a byte-level BPE vocabulary has at least 256 tokens, got {size}")
        library = _tokenizers()
        backend = library.Tokenizer(library.models.BPE())
        backend.pre_tokenizer = library.pre_tokenizers.Sequence(
            [
                library.pre_tokenizers.Split("\n", "isolated"),
                library.pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        backend.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=size,
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(lines, trainer)
        return cls(backend.to_str())

    @classmethod
    def load(cls, path: str | Path) -> BpeTokenizer:
        """Reads a ``tokenizer.json`` of the ``tokenizers`` library.

        Raises:
            ValueError: the file cannot be read or is no tokenizer.
        """
        try:
            description = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the tokenizer {path}: {error}") from None
        return cls(description)

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    def encode(self, text: str) -> Tensor:
        """Numbers of the subwords of ``text``: int64 [N]."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return torch.tensor(ids, dtype=torch.int64)

    def decode(self, numbers: Tensor | Sequence[int]) -> str:
        """The text of these subwords; half a character becomes U+FFFD."""
        return self._backend.decode(_plain(numbers), skip_special_tokens=False)

    def token(self, number: int) -> str:
        """The text of the subword, or its name where it is no whole character."""
        text = self.decode([number])
        return self._backend.id_to_token(number) if "\ufffd" in text or not text else text

    def to_json(self) -> dict[str, Any]:
        """Unit and the description by the ``tokenizers`` library."""
        return {"unit": self.unit, "description": self._description}


def tokenizer_from_json(plain: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that :meth:`Tokenizer.to_json` described.

    Raises:
        ValueError, KeyError, TypeError: it describes none.
    """
    unit = plain["unit"]
    if unit == "byte":
        return ByteTokenizer()
    if unit == "bpe":
        return BpeTokenizer(plain["description"])
    return Vocabulary(unit, plain["tokens"])


def _plain(numbers: Tensor | Sequence[int]) -> list[int]:
    return numbers.flatten().tolist() if isinstance(numbers, Tensor) else list(numbers)


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "subword tokens need the package tokenizers: pip install 'rnnlm-kernels[lm]'"
        ) from None
    return tokenizers
