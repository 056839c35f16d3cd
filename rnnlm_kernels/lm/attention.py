"""Attention of every position over those before it, between the recurrent layers and the head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The positions before the window [M, B, H], and which of them exist [M, B, 1] (bool).
Memory = tuple[Tensor, Tensor]


class WindowedAttention(nn.Module):
    """Causal multi-head attention over the last ``window`` positions, itself included.

    A learnt number per head and distance is added to every score, so the order of the positions
    counts and a longer text needs no more parameters. The result is added to the input; the last
    map starts at zero, so a new module passes its input on unchanged.

    The ``window - 1`` positions before a call are carried as a memory, which makes reading a text
    in pieces, down to single tokens, the same as reading it at once. Gradients end at the memory,
    as they do at a carried hidden state.

    Args:
        width: features of a position, H.
        window: positions that are seen.
        heads: must divide ``width``.

    Raises:
        ValueError: ``window`` below 1, or ``heads`` does not divide ``width``.

    Example:
        >>> attention = WindowedAttention(8, window=3)
        >>> y, (memory, valid) = attention(torch.randn(5, 2, 8))
        >>> y.shape, memory.shape
        (torch.Size([5, 2, 8]), torch.Size([2, 2, 8]))
    """

    def __init__(self, width: int, window: int, heads: int = 1) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if heads < 1 or width % heads:
            raise ValueError(f"heads must divide the width {width}, got {heads}")
        self.window = window
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.distance_bias = nn.Parameter(torch.zeros(heads, window))

    def forward(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Attends.

        Args:
            x: [T, B, H].
            memory: as returned by the call before; None: nothing came before.

        Returns:
            [T, B, H] and the memory of the next call.
        """
        steps, batch, width = x.shape
        valid = torch.ones(steps, batch, 1, dtype=torch.bool, device=x.device)
        seen = x
        if memory is not None:
            seen = torch.cat([memory[0].to(x.dtype), x])
            valid = torch.cat([memory[1], valid])
        past = seen.shape[0] - steps

        q = self._split(self.query(x))  # [B, heads, T, d]
        key, value = self.key_value(seen).chunk(2, dim=-1)
        k, v = self._split(key), self._split(value)  # [B, heads, M + T, d]
        distance = (
            torch.arange(past, past + steps, device=x.device)[:, None]
            - torch.arange(past + steps, device=x.device)[None]
        )  # [T, M + T]
        within = (distance >= 0) & (distance < self.window)
        bias = self.distance_bias[:, distance.clamp(0, self.window - 1)]  # [heads, T, M + T]
        allowed = within & valid.permute(1, 2, 0)[:, None]  # [B, 1, T, M + T]
        mask = bias.to(q.dtype).masked_fill(~allowed, float("-inf"))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = x + self.out(y.permute(2, 0, 1, 3).reshape(steps, batch, width))

        keep = self.window - 1
        first = max(0, seen.shape[0] - keep)
        missing = max(0, keep - seen.shape[0])
        return y, (
            F.pad(seen[first:].detach(), (0, 0, 0, 0, missing, 0)),
            F.pad(valid[first:], (0, 0, 0, 0, missing, 0)),
        )

    def _split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).permute(1, 2, 0, 3)

    def extra_repr(self) -> str:
        return f"window={self.window}, heads={self.heads}"
