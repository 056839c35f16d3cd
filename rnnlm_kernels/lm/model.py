"""The language model: embedding, a stack of recurrent layers, and a head over the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnnlm_kernels

from .data import IGNORE_INDEX

Cell = Literal["lstm", "gru"]
LayerKind = Literal["ours", "torch"]
LayerState = Tensor | tuple[Tensor, Tensor]
# One entry per layer: h [1, B, H] of a GRU, (h, c) of an LSTM.
State = list[LayerState]


@dataclass(frozen=True)
class ModelConfig:
    """What a model is made of; enough to build it again.

    Attributes:
        vocab_size: number of different tokens, V.
        cell: ``"lstm"`` or ``"gru"``.
        reset: where a GRU applies its reset gate: ``"after"`` the recurrent product, as torch does,
            or ``"before"`` it, as in Cho et al. 2014.
        emb: width of the embedding, E.
        hidden: width of every recurrent layer, H.
        layers: number of recurrent layers.
        dropout: probability of dropping an element of the embedding, of the output between two
            layers, and of the last output.
        tied: the head uses the embedding matrix as its weight (Press and Wolf 2017). With E != H a
            linear map from H to E stands before it.
        layer: ``"ours"``: :class:`rnnlm_kernels.LSTM` / :class:`rnnlm_kernels.GRU`; ``"torch"``:
            the layers of ``torch.nn``. The parameters have the same names, shapes and first values.
        backend: backend of our layers, None for the automatic choice.

    Raises:
        ValueError: a value out of range, or a combination that does not exist.
    """

    vocab_size: int
    cell: Cell = "lstm"
    reset: Literal["after", "before"] = "after"
    emb: int = 200
    hidden: int = 200
    layers: int = 1
    dropout: float = 0.3
    tied: bool = True
    layer: LayerKind = "ours"
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "emb", "hidden", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        for name, choices in (
            ("cell", ("lstm", "gru")),
            ("reset", ("after", "before")),
            ("layer", ("ours", "torch")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.reset == "before" and self.cell == "lstm":
            raise ValueError("reset='before' is a variant of the GRU; an LSTM has no reset gate")
        if self.reset == "before" and self.layer == "torch":
            raise ValueError("torch.nn.GRU has no reset='before'; only layer='ours' does")
        if self.backend is not None and self.layer == "torch":
            raise ValueError(
                "backend chooses among our kernels; it has no meaning with layer='torch'"
            )


def _recurrent_layer(config: ModelConfig, input_size: int) -> nn.Module:
    if config.layer == "torch":
        kind = nn.LSTM if config.cell == "lstm" else nn.GRU
        return kind(input_size, config.hidden)
    if config.cell == "lstm":
        return rnnlm_kernels.LSTM(input_size, config.hidden, backend=config.backend)
    return rnnlm_kernels.GRU(input_size, config.hidden, reset=config.reset, backend=config.backend)


class RNNLanguageModel(nn.Module):
    """A recurrent language model: p(next token | all tokens before it).

    Args:
        config: sizes and kinds.
        seed: seed of the first parameter values; the global random state is left as it was. None
            draws them from the global random state.

    Example:
        >>> model = RNNLanguageModel(ModelConfig(vocab_size=10, emb=4, hidden=4), seed=0)
        >>> logits, state = model(torch.zeros(3, 2, dtype=torch.int64))
        >>> logits.shape
        torch.Size([3, 2, 10])
    """

    def __init__(self, config: ModelConfig, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        if seed is None:
            self._build()
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self._build()

    def _build(self) -> None:
        config = self.config
        self.embedding = nn.Embedding(config.vocab_size, config.emb)
        widths = [config.emb] + [config.hidden] * config.layers
        # One module per layer instead of num_layers: the dropout between layers then is ours, drawn
        # alike for either kind of layer, and layers of different width or kind have a place to go.
        self.layers = nn.ModuleList(_recurrent_layer(config, width) for width in widths[:-1])
        self.dropout = nn.Dropout(config.dropout)
        to_embedding = config.tied and config.hidden != config.emb
        self.projection = nn.Linear(config.hidden, config.emb) if to_embedding else nn.Identity()
        self.head = nn.Linear(config.emb if config.tied else config.hidden, config.vocab_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.head.weight, -0.1, 0.1)
        nn.init.zeros_(self.head.bias)
        if config.tied:
            self.head.weight = self.embedding.weight

    def features(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """What the head sees of every position.

        Args:
            tokens: int64 [T, B].
            state: of the tokens before, as returned; None starts from zeros.

        Returns:
            features [T, B, E if tied else H] and the state after the last token.
        """
        hidden = self.dropout(self.embedding(tokens))
        following: State = []
        for index, layer in enumerate(self.layers):
            hidden, layer_state = layer(hidden, None if state is None else state[index])
            hidden = self.dropout(hidden)
            following.append(layer_state)
        return self.projection(hidden), following

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits of the token after each position, [T, B, V], and the state after the last."""
        features, state = self.features(tokens, state)
        return self.head(features), state

    def loss(
        self, tokens: Tensor, targets: Tensor, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Negative log-likelihood of ``targets``, summed (in nats).

        Kept apart from :meth:`forward` because a caller who wants the loss has no use for the
        logits as such.

        Args:
            tokens: int64 [T, B].
            targets: int64 [T, B]; positions with -100 do not count.
            state: of the tokens before; None starts from zeros.

        Returns:
            The sum (a scalar) and the state after the last token.
        """
        logits, state = self(tokens, state)
        total = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        return total, state

    def parameter_count(self) -> int:
        """Number of trained values; a shared matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())


def detach_state(state: State) -> State:
    """The same values without their history: the cut of truncated BPTT."""
    return [
        (each[0].detach(), each[1].detach()) if isinstance(each, tuple) else each.detach()
        for each in state
    ]
