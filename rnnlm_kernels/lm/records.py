"""What a training says about its course."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .evaluate import Score, bits, perplexity


@dataclass(frozen=True)
class StepRecord:
    """One update.

    Attributes:
        step: its number, from 1.
        epoch: the pass over the training part it belongs to, from 0.
        loss: mean loss of the window before the update, in nats per token, with dropout (and label
            smoothing).
        tokens: predicted tokens in the window, over all processes.
        seconds: wall-clock time of the update.
        grad_norm: norm of the whole gradient before clipping; infinite where half precision
            overflowed and the update was left out.
        lr: learning rate used.
        parts: penalties and auxiliary losses, already weighted, by name.
    """

    step: int
    epoch: int
    loss: float
    tokens: int
    seconds: float
    grad_norm: float
    lr: float
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return perplexity(self.loss)

    @property
    def bits(self) -> float:
        """Bits per token."""
        return bits(self.loss)


@dataclass(frozen=True)
class EvalRecord:
    """An evaluation on the validation part.

    Attributes:
        epoch: the pass over the training part, from 0.
        step: updates so far.
        valid: score on the validation part.
        improved: whether it is the best so far.
        lr: learning rate from now on.
        averaged: whether the mean of the weights was evaluated (NT-ASGD).
    """

    epoch: int
    step: int
    valid: Score
    improved: bool
    lr: float
    averaged: bool = False


@dataclass(frozen=True)
class EpochRecord(EvalRecord):
    """The evaluation at the end of a pass over the training part."""


Record = StepRecord | EvalRecord
