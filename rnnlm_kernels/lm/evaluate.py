"""Loss and perplexity of a model over every token of a text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import StreamBatches
from .model import RNNLanguageModel


def perplexity(loss: float) -> float:
    """``exp(loss)`` of a mean loss in nats; infinity instead of an overflow."""
    return math.exp(loss) if loss < 709.0 else (math.nan if math.isnan(loss) else math.inf)


def bits(loss: float) -> float:
    """Nats to bits: for a character model, bits per character."""
    return loss / math.log(2.0)


@dataclass(frozen=True)
class Score:
    """How well a text was predicted.

    Attributes:
        total: summed negative log-likelihood, in nats.
        tokens: number of predicted tokens.
    """

    total: float
    tokens: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per token, in nats."""
        return self.total / self.tokens

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return perplexity(self.loss)

    @property
    def bits(self) -> float:
        """Bits per token."""
        return bits(self.loss)


@torch.no_grad()
def evaluate(model: RNNLanguageModel, tokens: Tensor, *, batch: int = 10, bptt: int = 100) -> Score:
    """Predicts every token of a text but the first, exactly once, with carried hidden state.

    The text is read in ``batch`` rows side by side, each starting from a zero state: ``batch=1`` is
    the strict reading, more rows are faster and cost each row a cold start. ``bptt`` only bounds
    the memory and does not change the figure. Dropout is off; the model's training mode is put back
    afterwards.

    Args:
        model: any device.
        tokens: int64 [N], N >= 2.
        batch: rows read side by side.
        bptt: tokens of a row read at once.

    Returns:
        The sum over exactly N-1 tokens.
    """
    was_training = model.training
    model.eval()
    try:
        batches = StreamBatches(tokens, batch, bptt, keep_tail=True)
        batches.to(next(model.parameters()).device)
        total = 0.0
        state = None
        for inputs, targets in batches:
            nll, state = model.loss(inputs, targets, state)
            total += float(nll)
    finally:
        model.train(was_training)
    return Score(total, batches.predictions)
