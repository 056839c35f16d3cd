"""Loss and perplexity of a model over every token of a text, as a sum or token by token."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import CacheConfig, ContinuousCache
from .data.sentences import SentenceBatches, sentence_spans
from .data.stream import StreamBatches
from .model import RNNLanguageModel, State, detach_state
from .parallel import sum_over_processes, this_process


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


@contextmanager
def evaluation_mode(model: RNNLanguageModel) -> Iterator[None]:
    """Without dropout and gradients; the model's training mode is put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def evaluate(
    model: RNNLanguageModel,
    tokens: Tensor,
    *,
    batch: int = 10,
    bptt: int = 100,
    cache: CacheConfig | None = None,
) -> Score:
    """Predicts every token of a text but the first, exactly once, with carried hidden state.

    The text is read in ``batch`` rows side by side, each starting from a zero state: ``batch=1`` is
    the strict reading, more rows are faster and cost each row a cold start. ``bptt`` only bounds
    the memory and does not change the figure: a recurrent state has no window, every token is
    predicted from all that came before it in its row. Dropout is off; the model's training mode is
    put back afterwards. In a training of several processes each reads its share of the rows.

    Args:
        model: any device.
        tokens: int64 [N], N >= 2.
        batch: rows read side by side.
        bptt: tokens of a row read at once.
        cache: also look into a continuous cache, which starts empty in every row.

    Returns:
        The sum over exactly N-1 tokens.
    """
    batches = StreamBatches(tokens, batch, bptt, keep_tail=True)
    predictions = batches.predictions
    process = this_process()
    batches.shard(process.rank, process.world).to(next(model.parameters()).device)
    total = 0.0
    with evaluation_mode(model):
        memory = ContinuousCache(cache) if cache is not None else None
        state: State | None = None
        for inputs, targets in batches if batches.batch else ():
            encoded = model.encode(inputs, state)
            state = encoded.state
            if memory is None:
                total += float(model.nll(encoded, targets))
            else:
                nll = model.nll(encoded, targets, reduction="none")
                total += float(memory.nll(encoded.features, targets, nll).sum())
    return Score(sum_over_processes(total), predictions)


def evaluate_sentences(
    model: RNNLanguageModel, tokens: Tensor, eos: int, *, batch: int = 10
) -> Score:
    """Predicts every sentence (line) for itself, from ``eos`` and a zero state.

    Args:
        model: any device.
        tokens: int64 [N] with at least one whole sentence.
        eos: number of the token that ends a sentence.
        batch: sentences read at once; does not change the figure.

    Returns:
        The sum over all tokens of whole sentences, each ``eos`` included.
    """
    whole = sentence_spans(tokens, eos)
    batches = SentenceBatches(tokens, eos, max(1, min(batch, len(whole))))
    batches.to(next(model.parameters()).device)
    process = this_process()
    total = 0.0
    with evaluation_mode(model):
        for spans in batches.order(epoch=0)[process.rank :: process.world]:
            total += float(model.loss(*batches.pack(spans))[0])
    return Score(sum_over_processes(total), batches.predictions)


def evaluate_dynamically(
    model: RNNLanguageModel,
    tokens: Tensor,
    *,
    lr: float,
    decay: float = 0.0,
    bptt: int = 20,
    clip: float = 0.25,
) -> Score:
    """Predicts a text while learning from what has been read (dynamic evaluation).

    After every window of ``bptt`` tokens, once it has been scored, a copy of the model makes a step
    of gradient descent on it, and moves by ``decay`` of the way back to the trained weights. No
    token is learnt from before it has been predicted. The model itself stays as it is.

    Args:
        model: any device.
        tokens: int64 [N], N >= 2, read in one row.
        lr: rate of the steps; 0 is :func:`evaluate` with ``batch=1``.
        decay: share of the way back, from 0 to 1.
        bptt: tokens per step.
        clip: largest norm of a step's gradient, of the mean loss of the window.

    Returns:
        The sum over exactly N-1 tokens.

    Raises:
        ValueError: ``lr`` or ``decay`` out of range.

    Source: Krause et al. 2018, https://arxiv.org/abs/1709.07432, with plain gradient descent.
    """
    if not 0.0 <= lr < math.inf:
        raise ValueError(f"lr must be at least 0, got {lr}")
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay must be between 0 and 1, got {decay}")
    learner = copy.deepcopy(model).eval()
    trained = [parameter.detach().clone() for parameter in learner.parameters()]
    parameters = list(learner.parameters())
    optimizer = torch.optim.SGD(parameters, lr=lr)
    batches = StreamBatches(tokens, 1, bptt, keep_tail=True).to(parameters[0].device)
    total = 0.0
    state: State | None = None
    for inputs, targets in batches:
        with torch.enable_grad():
            nll, after = learner.loss(inputs, targets, state)
            state = detach_state(after)
            total += float(nll.detach())
            optimizer.zero_grad(set_to_none=True)
            (nll / targets.numel()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        if decay:
            with torch.no_grad():
                for parameter, first in zip(parameters, trained, strict=True):
                    parameter.lerp_(first, decay)
    return Score(total, batches.predictions)


def token_losses(model: RNNLanguageModel, tokens: Tensor, *, chunk: int = 1000) -> Tensor:
    """Negative log-likelihood of every token but the first, read in one go from a zero state.

    Args:
        model: any device.
        tokens: int64 [N], N >= 2.
        chunk: tokens read at once; bounds the memory, does not change the figures.

    Returns:
        float32 [N-1], in nats.
    """
    device = next(model.parameters()).device
    losses = []
    with evaluation_mode(model):
        state: State | None = None
        for inputs, targets in StreamBatches(tokens, 1, chunk, keep_tail=True).to(device):
            nll, state = model.loss(inputs, targets, state, reduction="none")
            losses.append(nll[:, 0])
    return torch.cat(losses)
