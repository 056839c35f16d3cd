"""Contiguous streams of tokens, for truncated back-propagation with a carried state.

A text is one long stream of tokens. :class:`StreamBatches` cuts it into ``batch`` rows that are
read side by side from left to right, ``bptt`` tokens at a time. Window ``k+1`` of a row continues
window ``k`` of the same row, so the hidden state can be carried from one to the next.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import torch
from torch import Tensor

from .text import CorpusError

# The value torch's cross entropy skips by default; marks the positions after the end of a row.
IGNORE_INDEX = -100


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

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self._inputs.shape[0]

    def __len__(self) -> int:
        return math.ceil(self.length / self.bptt)

    def window(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of positions ``start`` to ``start + length``, each int64 [t, B]."""
        span = slice(start, start + length)
        return self._inputs[span], self._targets[span]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of window ``index``, each int64 [t, B] with t <= bptt."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return self.window(index * self.bptt, self.bptt)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[index] for index in range(len(self)))

    def to(self, device: torch.device) -> StreamBatches:
        """Moves the stream to ``device`` once, so that no window has to be copied."""
        self._inputs, self._targets = self._inputs.to(device), self._targets.to(device)
        return self

    def shard(self, rank: int, world: int) -> StreamBatches:
        """Keeps the rows of one process out of ``world``: consecutive, as equal as can be.

        The shares of all processes are the stream. One may be empty when there are more processes
        than rows.
        """
        first, last = (self.batch * index // world for index in (rank, rank + 1))
        self._inputs = self._inputs[:, first:last].contiguous()
        self._targets = self._targets[:, first:last].contiguous()
        self.batch = last - first
        self.predictions = int((self._targets != IGNORE_INDEX).sum())
        return self


def random_length(bptt: int, seed: int, epoch: int, position: int) -> int:
    """Length of the window at ``position``, drawn as in AWD-LSTM (Merity et al. 2018, section 5).

    The centre is ``bptt`` in 95 of 100 cases and half of it otherwise; around it a normal
    distribution of deviation 5, and never below 5. So the windows of every epoch begin elsewhere,
    and every pair of neighbours is at times within one window.

    The draw depends on the arguments alone: a resumed training draws what the uninterrupted one
    would have drawn.

    Example:
        >>> random_length(70, seed=1, epoch=0, position=0) == random_length(70, 1, 0, 0)
        True
    """
    draw = random.Random(f"{seed}/{epoch}/{position}")
    centre = bptt if draw.random() < 0.95 else bptt / 2
    return max(min(5, bptt), round(draw.gauss(centre, 5)))
