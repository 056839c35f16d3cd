"""Batches of whole sentences (lines) as packed sequences, each from a zero state."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from .text import CorpusError

Span = tuple[int, int]


def sentence_spans(tokens: Tensor, eos: int) -> list[Span]:
    """Start and end (exclusive, after its ``eos``) of every sentence that is not empty.

    Tokens after the last ``eos`` are no whole sentence and are left out.

    Example:
        >>> sentence_spans(torch.tensor([5, 6, 0, 0, 7, 0, 8]), eos=0)
        [(0, 3), (4, 6)]
    """
    ends = (torch.nonzero(tokens == eos).flatten() + 1).tolist()
    return [(start, end) for start, end in zip([0, *ends], ends, strict=False) if end - start > 1]


class SentenceBatches:
    """Sentences of a stream, shuffled, in batches of about equal length.

    A sentence of n tokens is predicted from ``eos`` and its own tokens before: n predictions, the
    last of them ``eos``. No step is spent on padding. For an epoch all sentences are shuffled, then
    sorted by length within groups of 50 batches, and the batches shuffled again, so that a batch
    holds sentences of similar length and an epoch is unlike the one before.

    Args:
        tokens: int64 [N].
        eos: number of the token that ends a sentence.
        batch: sentences per batch; the last batch of an epoch may hold fewer.
        seed: seed of the shuffling; the order of an epoch depends on it and on the epoch alone.

    Raises:
        CorpusError: no sentence, or fewer than ``batch``.

    Example:
        >>> batches = SentenceBatches(torch.tensor([5, 6, 0, 7, 0]), eos=0, batch=2, seed=1)
        >>> inputs, targets = batches.pack(batches.order(epoch=0)[0])
        >>> inputs.data.tolist(), targets.data.tolist(), inputs.batch_sizes.tolist()
        ([0, 0, 5, 7, 6], [5, 7, 6, 0, 0], [2, 2, 1])
    """

    def __init__(self, tokens: Tensor, eos: int, batch: int, seed: int = 1) -> None:
        self._tokens = tokens
        self._eos = eos
        self._spans = sentence_spans(tokens, eos)
        if len(self._spans) < batch:
            raise CorpusError(
                f"the text is too short: {len(self._spans)} sentences (lines) cannot fill "
                f"{batch} rows; use a longer text or a smaller batch"
            )
        self.batch = batch
        self.seed = seed
        self.predictions = sum(end - start for start, end in self._spans)
        self._device = torch.device("cpu")
        # The order last asked for: a training asks for that of its epoch at every update.
        self._order: tuple[int, list[list[Span]]] = (-1, [])

    def __len__(self) -> int:
        return math.ceil(len(self._spans) / self.batch)

    def order(self, epoch: int) -> list[list[Span]]:
        """The spans of every batch of an epoch."""
        if self._order[0] != epoch:
            self._order = (epoch, self._shuffled(epoch))
        return self._order[1]

    def _shuffled(self, epoch: int) -> list[list[Span]]:
        draw = random.Random(f"{self.seed}/{epoch}/sentences")
        spans = list(self._spans)
        draw.shuffle(spans)
        group = 50 * self.batch
        batches: list[list[Span]] = []
        for first in range(0, len(spans), group):
            near = sorted(spans[first : first + group], key=lambda span: span[0] - span[1])
            batches += [near[k : k + self.batch] for k in range(0, len(near), self.batch)]
        draw.shuffle(batches)
        return batches

    def pack(self, spans: list[Span]) -> tuple[PackedSequence, PackedSequence]:
        """Inputs and targets of some sentences, the longest first."""
        spans = sorted(spans, key=lambda span: span[0] - span[1])
        targets = [self._tokens[start:end].to(self._device) for start, end in spans]
        inputs = [torch.nn.functional.pad(each[:-1], (1, 0), value=self._eos) for each in targets]
        return pack_sequence(inputs), pack_sequence(targets)

    def to(self, device: torch.device) -> SentenceBatches:
        """Makes the batches come out on ``device``."""
        self._device = device
        return self
