"""Dropout as recurrent language models use it: one mask for a whole window, on rows, on weights.

All of them scale what is kept by ``1 / (1 - p)``, so that nothing has to change in evaluation, and
none of them does anything there. Sources: Gal and Ghahramani 2016 (masks constant in time, whole
words), Merity et al. 2018 (dropped recurrent weights).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import rnnlm_kernels


def kept(shape: tuple[int, ...], p: float, like: Tensor) -> Tensor:
    """A fresh mask: 0 with probability ``p``, else ``1 / (1 - p)``."""
    return rnnlm_kernels.dropout(like.new_ones(shape), p)


class LockedDropout(nn.Module):
    """Dropout whose mask is the same at every time step of a call.

    Args:
        p: probability of dropping a feature of a row.

    Example:
        >>> y = LockedDropout(0.5)(torch.ones(4, 1, 8))
        >>> bool((y == y[0]).all())
        True
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Drops features of ``x``.

        Args:
            x: [T, B, H]; or [N, H] of a packed sequence.
            rows: of a packed sequence: int64 [N], the batch row of each position.
        """
        mask = self.mask(x.shape[:-1], x.shape[-1], x, rows)
        return x if mask is None else x * mask

    def mask(
        self, positions: tuple[int, ...], width: int, like: Tensor, rows: Tensor | None = None
    ) -> Tensor | None:
        """A fresh mask of features, [B, width] or packed [N, width]; None: nothing is dropped.

        Args:
            positions: (T, B), or (N,) of a packed sequence with its ``rows``.
            like: says dtype and device.
        """
        if not self.training or self.p == 0.0:
            return None
        if rows is None:
            return kept((positions[-1], width), self.p, like)
        return kept((int(rows.max()) + 1, width), self.p, like)[rows]

    def extra_repr(self) -> str:
        return f"p={self.p}"


class ElementDropout(nn.Module):
    """Dropout of every element for itself, callable like :class:`LockedDropout`.

    Args:
        p: probability of dropping an element.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Drops elements of ``x``; ``rows`` makes no difference."""
        return rnnlm_kernels.dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def embed_with_dropped_rows(
    embedding: nn.Embedding,
    tokens: Tensor,
    p: float,
    dropout: LockedDropout | ElementDropout | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Looks tokens up in an embedding of which whole rows (words) are dropped.

    A dropped word is zero wherever it stands in ``tokens``. The mask has one value per word of the
    vocabulary; no copy of the matrix is made. It is applied together with a locked ``dropout``, by
    :func:`rnnlm_kernels.embedding_dropout`.

    Args:
        embedding: in evaluation none of its words is dropped.
        tokens: int64 [T, B], or [N] of a packed sequence; any shape without ``dropout``.
        p: probability of dropping a word.
        dropout: what drops features of the vectors, if anything does.
        rows: of a packed sequence: int64 [N], the batch row of each position.
    """
    weight = embedding.weight
    row_scale = mask = None
    if embedding.training and p > 0.0:
        row_scale = kept((embedding.num_embeddings,), p, weight)
    if isinstance(dropout, LockedDropout):
        mask = dropout.mask(tokens.shape, embedding.embedding_dim, weight, rows)
    if row_scale is None and mask is None:
        vectors = embedding(tokens)
    else:
        vectors = rnnlm_kernels.embedding_dropout(tokens, weight, row_scale=row_scale, mask=mask)
    if dropout is None or mask is not None:
        return vectors
    return dropout(vectors, rows)


def call_with_dropped_weights(layer: nn.Module, p: float, *inputs: Any, **options: Any) -> Any:
    """Calls a recurrent layer with elements of its ``W_hh`` dropped (DropConnect).

    The layer is not changed. For this one call its recurrent weights are replaced by masked ones,
    through which the gradient flows to the parameters. So there is nothing to undo for evaluation,
    copying, or saving, and the names in the ``state_dict`` remain torch's.

    Args:
        layer: LSTM or GRU, ours or torch's; in evaluation nothing is dropped.
        p: probability of dropping a weight.
        inputs, options: the arguments of the call.

    Returns:
        What the layer returns.

    Raises:
        RuntimeError: the layer itself was sharded (FSDP2), so that its weights are whole only while
            it runs. Shard a module around it instead, e.g. the model.

    Example:
        >>> layer = nn.LSTM(3, 4)
        >>> output, state = call_with_dropped_weights(layer, 0.5, torch.ones(2, 1, 3))
        >>> sorted(layer.state_dict())
        ['bias_hh_l0', 'bias_ih_l0', 'weight_hh_l0', 'weight_ih_l0']
    """
    if not layer.training or p == 0.0:
        return layer(*inputs, **options)
    recurrent = {n: w for n, w in layer.named_parameters() if n.startswith("weight_hh")}
    if any(map(_is_sharded, recurrent.values())):
        # FSDP2 would put the whole weights in the place of the masked ones, without a word.
        raise RuntimeError("weight drop needs whole weights: shard the model, not its layers")
    dropped = {name: rnnlm_kernels.dropout(weight, p) for name, weight in recurrent.items()}
    return torch.func.functional_call(layer, dropped, inputs, options)


def _is_sharded(weight: Tensor) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)
