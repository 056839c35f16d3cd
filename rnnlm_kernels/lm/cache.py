"""The continuous cache: words seen a moment ago are likely again (Grave et al. 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .data.stream import IGNORE_INDEX


@dataclass(frozen=True)
class CacheConfig:
    """A continuous cache beside a trained model; nothing about it is trained.

    The model's probability of a token becomes ``(1 - share) p_model + share p_cache``, where the
    cache gives each of the last ``window`` tokens a weight ``exp(flatness h_t . h_i)``: ``h_i`` is
    what the model's head saw before that token, ``h_t`` what it sees now.

    Attributes:
        window: tokens that are remembered.
        flatness: the larger, the more the cache looks at the most similar position only.
        share: weight of the cache.

    Raises:
        ValueError: a value out of range.

    Source: https://arxiv.org/abs/1612.04426.
    """

    window: int = 500
    flatness: float = 0.6
    share: float = 0.1

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if not 0.0 <= self.share < 1.0:
            raise ValueError(f"share must be at least 0 and below 1, got {self.share}")
        if not math.isfinite(self.flatness):
            raise ValueError(f"flatness must be finite, got {self.flatness}")


class ContinuousCache:
    """Remembers features and tokens of a stream of rows that is read window by window.

    Args:
        config: see :class:`CacheConfig`.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self._features: Tensor | None = None  # [M, B, E]
        self._targets: Tensor | None = None  # [M, B]

    def nll(self, features: Tensor, targets: Tensor, model_nll: Tensor) -> Tensor:
        """The loss with the cache's help; afterwards the window is remembered.

        Args:
            features: [T, B, E], what the head saw.
            targets: int64 [T, B]; positions with -100 do not count.
            model_nll: [T, B], negative log-likelihoods by the model alone.

        Returns:
            [T, B].
        """
        steps = features.shape[0]
        if self._features is not None and self._targets is not None:
            features = torch.cat([self._features, features])
            targets = torch.cat([self._targets, targets])
        past = features.shape[0] - steps
        now = features[past:]
        scores = self.config.flatness * torch.einsum("tbe,mbe->btm", now.float(), features.float())
        distance = (
            torch.arange(past, past + steps, device=now.device)[:, None]
            - torch.arange(past + steps, device=now.device)[None]
        )
        within = (distance >= 1) & (distance <= self.config.window)  # [T, M + T]
        seen = within & (targets != IGNORE_INDEX).T[:, None]  # [B, T, M + T]
        log_weight = scores.masked_fill(~seen, float("-inf")).log_softmax(-1)
        same = seen & (targets[past:].T[:, :, None] == targets.T[:, None])
        # Where nothing has been seen the softmax is NaN, and the model has to do alone.
        any_seen = seen.any(-1)
        log_cache = log_weight.masked_fill(~same, float("-inf")).logsumexp(-1)  # [B, T]
        share = self.config.share
        mixed = torch.logaddexp(
            math.log1p(-share) - model_nll.T, log_cache + (math.log(share) if share else -math.inf)
        )
        self._features = features[-self.config.window :]
        self._targets = targets[-self.config.window :]
        result = torch.where(any_seen, -mixed, model_nll.T)
        return F.threshold(result, 0.0, 0.0).T
