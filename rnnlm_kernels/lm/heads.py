"""From features to probabilities over the vocabulary, and to the loss.

A head is called for logits [..., V] (log-probabilities are logits too) and asked for the negative
log-likelihood of targets with :meth:`nll`, which need not compute all logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnnlm_kernels

from .data.stream import IGNORE_INDEX

Reduction = Literal["sum", "mean", "none"]

# Rows of logits that are computed together on a CPU, and their bytes. Of a vocabulary of thousands
# the loss by itself takes fewer, to spare memory: here that is a small part of what training needs,
# and with more rows the weight is read, and its gradient written, less often.
_ROWS, _FEW_ROWS = 480, 256
_LOGITS_BYTES = 32 << 20
_LARGE_VOCABULARY = 2_500


class LinearHead(nn.Linear):
    """One matrix over the whole vocabulary.

    Loss and gradient are computed some hundreds of rows at a time, and the logits of a large window
    are never all there: :func:`rnnlm_kernels.linear_cross_entropy`.
    """

    def nll(
        self,
        features: Tensor,
        targets: Tensor,
        reduction: Reduction = "sum",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Negative log-likelihood in nats, in float32.

        Args:
            features: [N, E].
            targets: int64 [N]; positions with -100 do not count (are 0).
            reduction: ``"sum"``: a scalar; ``"mean"``: that over the positions that count;
                ``"none"``: [N].
            label_smoothing: share of the target's probability that is spread evenly over all
                tokens (Szegedy et al. 2016).
        """
        return rnnlm_kernels.linear_cross_entropy(
            features,
            self.weight,
            targets,
            linear_bias=self.bias,
            ignore_index=IGNORE_INDEX,
            reduction=reduction,
            label_smoothing=label_smoothing,
            dtype=torch.float32,
            chunk_size=rows_at_once(len(features), len(self.weight), features.device),
        )


def rows_at_once(rows: int, vocab_size: int, device: torch.device) -> int | None:
    """How many rows' logits :class:`LinearHead` computes together; None: as the loss has it."""
    most = min(_ROWS, _LOGITS_BYTES // (4 * vocab_size))
    if device.type != "cpu" or vocab_size < _LARGE_VOCABULARY or min(rows, most) <= _FEW_ROWS:
        return None
    return -(-rows // -(-rows // most))


def checked_cutoffs(cutoffs: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Cutoffs of an adaptive softmax, refused unless they rise within the vocabulary."""
    if not cutoffs or list(cutoffs) != sorted(set(cutoffs)) or cutoffs[0] < 1:
        raise ValueError(f"cutoffs must rise and be at least 1, got {tuple(cutoffs)}")
    if cutoffs[-1] >= vocab_size:
        raise ValueError(f"cutoffs must lie below the vocabulary size {vocab_size}, got {cutoffs}")
    return tuple(cutoffs)


class AdaptiveHead(nn.AdaptiveLogSoftmaxWithLoss):
    """torch's adaptive softmax (Grave et al. 2017): rare tokens get narrower vectors.

    Args:
        in_features: width of the features.
        n_classes: size of the vocabulary, the most frequent tokens first.
        cutoffs: ends of the groups of tokens; the first group is the head itself.
    """

    def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
        """Log-probabilities [..., V]."""
        log_p = self.log_prob(features.flatten(0, -2))
        return log_p.view(*features.shape[:-1], -1)

    def nll(
        self,
        features: Tensor,
        targets: Tensor,
        reduction: Reduction = "sum",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Negative log-likelihood, as :meth:`LinearHead.nll`, without label smoothing."""
        refuse_smoothing(label_smoothing)
        counted = targets != IGNORE_INDEX
        safe = torch.where(counted, targets, 0)
        nll = -super().forward(features, safe).output.float()
        return _reduced(torch.where(counted, nll, 0.0), counted, reduction)


class TiedAdaptiveHead(nn.Module):
    """An adaptive softmax on a full matrix over the vocabulary, so that it can be the embedding.

    The tokens are cut into groups by frequency. The head chooses among the tokens of the first
    group and the other groups; within a group a softmax over its tokens follows. Only the groups
    that occur among the targets are computed.

    Args:
        in_features: width of the features, E.
        n_classes: size of the vocabulary, V, the most frequent tokens first.
        cutoffs: ends of the groups; the last group ends with the vocabulary.

    Raises:
        ValueError: the cutoffs do not rise within the vocabulary.

    Source: Grave et al. 2017, https://arxiv.org/abs/1609.04309.

    Example:
        >>> head = TiedAdaptiveHead(4, 10, cutoffs=[3, 6])
        >>> round(float(head(torch.randn(1, 4)).exp().sum()), 4)
        1.0
    """

    def __init__(self, in_features: int, n_classes: int, cutoffs: Sequence[int]) -> None:
        super().__init__()
        self.cutoffs = checked_cutoffs(cutoffs, n_classes)
        self.weight = nn.Parameter(torch.empty(n_classes, in_features).uniform_(-0.1, 0.1))
        self.bias = nn.Parameter(torch.zeros(n_classes))
        groups = len(self.cutoffs)
        self.group_weight = nn.Parameter(torch.empty(groups, in_features).uniform_(-0.1, 0.1))
        self.group_bias = nn.Parameter(torch.zeros(groups))

    def _head(self, features: Tensor) -> Tensor:
        first = self.cutoffs[0]
        weight = torch.cat([self.weight[:first], self.group_weight])
        bias = torch.cat([self.bias[:first], self.group_bias])
        return F.linear(features, weight, bias).float().log_softmax(-1)

    def _group(self, features: Tensor, low: int, high: int) -> Tensor:
        logits = F.linear(features, self.weight[low:high], self.bias[low:high])
        return logits.float().log_softmax(-1)

    def _bounds(self) -> list[tuple[int, int]]:
        ends = (*self.cutoffs[1:], len(self.weight))
        return list(zip(self.cutoffs, ends, strict=True))

    def forward(self, features: Tensor) -> Tensor:
        """Log-probabilities [..., V]."""
        head = self._head(features)
        first = self.cutoffs[0]
        groups = [
            head[..., first + index, None] + self._group(features, low, high)
            for index, (low, high) in enumerate(self._bounds())
        ]
        return torch.cat([head[..., :first], *groups], dim=-1)

    def nll(
        self,
        features: Tensor,
        targets: Tensor,
        reduction: Reduction = "sum",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Negative log-likelihood, as :meth:`LinearHead.nll`, without label smoothing."""
        refuse_smoothing(label_smoothing)
        head = self._head(features)
        first = self.cutoffs[0]
        choice = targets.clamp(0, first - 1)
        for index, (low, _) in enumerate(self._bounds()):
            choice = torch.where(targets >= low, first + index, choice)
        nll = -head.gather(1, choice[:, None])[:, 0]
        for low, high in self._bounds():
            rows = torch.nonzero((targets >= low) & (targets < high))[:, 0]
            if len(rows):
                within = self._group(features[rows], low, high)
                log_p = within.gather(1, (targets[rows] - low)[:, None])[:, 0]
                nll = nll.index_add(0, rows, -log_p)
        counted = targets != IGNORE_INDEX
        return _reduced(torch.where(counted, nll, 0.0), counted, reduction)


def _reduced(nll: Tensor, counted: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return nll
    return nll.sum() / counted.sum() if reduction == "mean" else nll.sum()


def refuse_smoothing(label_smoothing: float) -> None:
    """Raises a ValueError for label smoothing, which needs every token's probability."""
    if label_smoothing:
        raise ValueError("label smoothing needs head='linear': it looks at every token")


Head = LinearHead | AdaptiveHead | TiedAdaptiveHead
