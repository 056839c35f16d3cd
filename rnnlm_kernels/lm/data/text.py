"""Reading text files line by line, and the text that is there without a file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

DEFAULT_CORPUS = "pydoc_data.topics"


class CorpusError(ValueError):
    """A text that cannot be used: missing, not UTF-8, empty or too short."""


class TextSource:
    r"""A text that is read line by line, as often as it is iterated over.

    Args:
        files: UTF-8 files, read one after the other; byte-order marks are dropped, all line ends
            become ``\n``, and a file that does not end with one gets it if another follows.
        text: a text in memory, instead of files.

    Iterating raises:
        CorpusError: no such file, not a readable file, not UTF-8 (names the first bad byte), or
            nothing but white space.

    Example:
        >>> list(TextSource(text="one\ntwo"))
        ['one\n', 'two']
    """

    def __init__(self, files: Sequence[str | Path] = (), text: str | None = None) -> None:
        self.files = [Path(file) for file in files]
        self.text = text

    @property
    def name(self) -> str:
        """The names of the files, for messages."""
        return ", ".join(file.name for file in self.files) or "text"

    def __iter__(self) -> Iterator[str]:
        if self.text is not None:
            yield from re.findall(r"[^\n]*\n|[^\n]+", self.text)
        for index, file in enumerate(self.files):
            line = ""
            for line in _lines(file):
                yield line
            if index + 1 < len(self.files) and not line.endswith("\n"):
                yield "\n"


def _lines(path: Path) -> Iterator[str]:
    blank = True
    offset = 0
    try:
        with open(path, "rb") as file:
            for raw in file:
                try:
                    line = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise CorpusError(
                        f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at position "
                        f"{offset + error.start}; convert it first, e.g. with iconv -t UTF-8"
                    ) from None
                if not offset:
                    line = line.removeprefix("\ufeff")
                offset += len(raw)
                blank = blank and not line.strip()
                yield line.replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        raise CorpusError(f"no such text file: {path}") from None
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror or error}") from None
    if blank:
        raise CorpusError(f"{path} is empty")


def read_text(path: str | Path) -> str:
    r"""The text of a UTF-8 file, without byte-order mark and with ``\n`` line ends.

    Raises:
        CorpusError: see :class:`TextSource`.
    """
    return "".join(TextSource([path]))


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
