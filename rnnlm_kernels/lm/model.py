"""The language model: embedding, a stack of recurrent layers, attention if wanted, and a head."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnlm_kernels

from .attention import WindowedAttention
from .dropout import (
    ElementDropout,
    LockedDropout,
    call_with_dropped_weights,
    embed_with_dropped_rows,
)
from .heads import AdaptiveHead, Head, LinearHead, Reduction, TiedAdaptiveHead, checked_cutoffs

Cell = Literal["lstm", "gru"]
LayerKind = Literal["ours", "torch"]
LayerState = Tensor | tuple[Tensor, Tensor]
# One entry per layer: h [1, B, H] of a GRU, (h, c) of an LSTM; then the memory of the attention, if
# any. The batch is dimension 1 of every tensor.
State = list[LayerState]

# Repeated tokens are looked for where the input's projection takes so many multiply-adds, and used
# where that saves so many for every gate of a position, which is then written and read once more.
_LITTLE_WORK = 10_000_000
_WORK_OF_A_GATE = 64


@dataclass(frozen=True)
class ModelConfig:
    """What a model is made of; enough to build it again.

    Attributes:
        vocab_size: number of different tokens, V.
        cell: ``"lstm"`` or ``"gru"``.
        reset: where a GRU applies its reset gate: ``"after"`` the recurrent product, as torch does,
            or ``"before"`` it, as in Cho et al. 2014.
        emb: width of the embedding, E.
        hidden: width of the recurrent layers, H: one number for all, or one per layer.
        layers: number of recurrent layers; follows from ``hidden`` where that is one per layer.
        dropout: probability of dropping an element of the last output, and of the places below
            that are None.
        dropout_input: the same for the embedded tokens.
        dropout_hidden: the same for the output between two layers.
        dropout_embedding: probability of dropping a word of the vocabulary from the embedding.
        weight_drop: probability of dropping an element of every ``W_hh``.
        locked: the masks of the first three are the same at every step of a window.
        tied: the head uses the embedding matrix as its weight (Press and Wolf 2017). With E != H a
            linear map from H to E stands before it.
        head: ``"linear"``, or ``"adaptive"``: an adaptive softmax.
        cutoffs: of the adaptive softmax: numbers of tokens at which its groups end.
        attention: positions that every position attends to between the last layer and the head; 0:
            no attention.
        attention_heads: heads of the attention.
        init: first values of all parameters are uniform within plus and minus this; None: torch's
            rule for the layers, 0.1 for embedding and head, zero biases in the head.
        layer: ``"ours"``: :class:`rnnlm_kernels.LSTM` / :class:`rnnlm_kernels.GRU`; ``"torch"``:
            the layers of ``torch.nn``. The parameters have the same names, shapes and first values.
        backend: backend of our layers, None for the automatic choice.
        memory: ``"low"``: our layers keep no gates for backward and rebuild them; see
            :class:`rnnlm_kernels.LSTM`.

    Raises:
        ValueError: a value out of range, or a combination that does not exist.
    """

    vocab_size: int
    cell: Cell = "lstm"
    reset: Literal["after", "before"] = "after"
    emb: int = 200
    hidden: int | tuple[int, ...] = 200
    layers: int = 1
    dropout: float = 0.3
    dropout_input: float | None = None
    dropout_hidden: float | None = None
    dropout_embedding: float = 0.0
    weight_drop: float = 0.0
    locked: bool = False
    tied: bool = True
    head: Literal["linear", "adaptive"] = "linear"
    cutoffs: tuple[int, ...] = ()
    attention: int = 0
    attention_heads: int = 1
    init: float | None = None
    layer: LayerKind = "ours"
    backend: str | None = None
    memory: Literal["fast", "low"] = "fast"

    def __post_init__(self) -> None:
        object.__setattr__(self, "cutoffs", tuple(self.cutoffs))
        if not isinstance(self.hidden, int):
            object.__setattr__(self, "hidden", tuple(self.hidden))
            if self.layers not in (1, len(self.widths)):
                raise ValueError(f"hidden names {len(self.widths)} widths, layers is {self.layers}")
            object.__setattr__(self, "layers", len(self.widths))
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"hidden must be at least 1, got {self.hidden}")
        for name in ("vocab_size", "emb", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            "dropout",
            "dropout_input",
            "dropout_hidden",
            "dropout_embedding",
            "weight_drop",
        ):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
        for name, choices in (
            ("cell", ("lstm", "gru")),
            ("reset", ("after", "before")),
            ("head", ("linear", "adaptive")),
            ("layer", ("ours", "torch")),
            ("memory", ("fast", "low")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.head == "adaptive":
            checked_cutoffs(self.cutoffs, self.vocab_size)
        elif self.cutoffs:
            raise ValueError("cutoffs belong to head='adaptive'")
        if self.attention < 0:
            raise ValueError(f"attention must be at least 0, got {self.attention}")
        if self.attention and self.widths[-1] % max(1, self.attention_heads):
            raise ValueError(
                f"attention_heads must divide the last width {self.widths[-1]}, got "
                f"{self.attention_heads}"
            )
        if self.init is not None and not self.init > 0.0:
            raise ValueError(f"init must be above 0, got {self.init}")
        if self.reset == "before" and self.cell == "lstm":
            raise ValueError("reset='before' is a variant of the GRU; an LSTM has no reset gate")
        if self.reset == "before" and self.layer == "torch":
            raise ValueError("torch.nn.GRU has no reset='before'; only layer='ours' does")
        if self.backend is not None and self.layer == "torch":
            raise ValueError(
                "backend chooses among our kernels; it has no meaning with layer='torch'"
            )
        if self.memory == "low" and self.layer == "torch":
            raise ValueError("torch.nn has no memory='low'; only layer='ours' does")

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of every recurrent layer."""
        return (self.hidden,) * self.layers if isinstance(self.hidden, int) else self.hidden


def _recurrent_layer(config: ModelConfig, input_size: int, width: int) -> nn.Module:
    if config.layer == "torch":
        kind = nn.LSTM if config.cell == "lstm" else nn.GRU
        return kind(input_size, width)
    how: dict[str, Any] = {"backend": config.backend, "memory": config.memory}
    if config.cell == "lstm":
        return rnnlm_kernels.LSTM(input_size, width, **how)
    return rnnlm_kernels.GRU(input_size, width, reset=config.reset, **how)


@dataclass(frozen=True)
class Encoded:
    """What a model makes of some tokens before the head.

    Attributes:
        features: what the head sees, [T, B, E if tied else H]; [N, ...] of packed tokens.
        state: the state after the last token.
        raw: outputs of the last recurrent layer before dropout, [T, B, H] or [N, H].
        dropped: the same after dropout.
        batch_sizes: of packed tokens, else None.
    """

    features: Tensor
    state: State
    raw: Tensor
    dropped: Tensor
    batch_sizes: Tensor | None = None


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
        widths = (config.emb, *config.widths)
        # One module per layer instead of num_layers: the dropout between layers then is ours, drawn
        # alike for either kind of layer, and layers may differ in width.
        self.layers = nn.ModuleList(
            _recurrent_layer(config, *pair) for pair in itertools.pairwise(widths)
        )
        kind = LockedDropout if config.locked else ElementDropout
        places = (config.dropout_input, config.dropout_hidden)
        self.dropout_input, self.dropout_hidden = (
            kind(config.dropout if p is None else p) for p in places
        )
        self.dropout = kind(config.dropout)
        self.attention: WindowedAttention | None = None
        if config.attention:
            self.attention = WindowedAttention(widths[-1], config.attention, config.attention_heads)
        to_embedding = config.tied and widths[-1] != config.emb
        self.projection = nn.Linear(widths[-1], config.emb) if to_embedding else nn.Identity()
        self.head = self._make_head(config.emb if config.tied else widths[-1])
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        if config.init is not None:
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -config.init, config.init)
        if config.tied:
            self.head.weight = self.embedding.weight

    def _make_head(self, width: int) -> Head:
        config = self.config
        if config.head == "adaptive" and config.tied:
            return TiedAdaptiveHead(width, config.vocab_size, config.cutoffs)
        if config.head == "adaptive":
            return AdaptiveHead(width, config.vocab_size, list(config.cutoffs))
        head = LinearHead(width, config.vocab_size)
        nn.init.uniform_(head.weight, -0.1, 0.1)
        nn.init.zeros_(head.bias)
        return head

    def encode(self, tokens: Tensor | PackedSequence, state: State | None = None) -> Encoded:
        """Everything but the head.

        Args:
            tokens: int64 [T, B], or packed.
            state: of the tokens before, as returned; None starts from zeros.
        """
        packed = tokens if isinstance(tokens, PackedSequence) else None
        rows = None if packed is None else packed_rows(packed)
        numbers = tokens if isinstance(tokens, Tensor) else tokens.data
        config = self.config
        different, index = self._different(numbers)
        dropped = embed_with_dropped_rows(
            self.embedding, different, config.dropout_embedding, self.dropout_input, rows
        )
        raw = dropped
        following: State = []
        for number, layer in enumerate(self.layers):
            inputs, options = _inputs(dropped, packed, index if number == 0 else None)
            raw, layer_state = call_with_dropped_weights(
                *(layer, config.weight_drop, inputs, None if state is None else state[number]),
                **options,
            )
            if isinstance(raw, PackedSequence):
                raw = raw.data
            last = number + 1 == len(self.layers)
            dropped = (self.dropout if last else self.dropout_hidden)(raw, rows)
            following.append(layer_state)
        features = dropped
        if self.attention is not None:
            memory = None if state is None else state[len(self.layers)]
            if packed is None:
                features, memory = self.attention(features, memory)
            else:
                features, memory = self._attend_packed(packed._replace(data=features))
            following.append(memory)
        sizes = None if packed is None else packed.batch_sizes
        return Encoded(self.projection(features), following, raw, dropped, sizes)

    def _different(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """The different ones among ``tokens``, and the place of each position's among them.

        That is for the first layer to project every token once. It cannot where positions of one
        token differ, by dropout; where it would gain little, or keep for backward what
        ``memory="low"`` is to spare, all tokens are returned, and None.
        """
        first: Any = self.layers[0]
        drops = self.dropout_input.training and self.dropout_input.p > 0.0
        spares = self.config.memory == "low" and torch.is_grad_enabled()
        if self.config.layer != "ours" or drops or spares or not _values_are_known(tokens):
            return tokens, None
        count, width = tokens.numel(), self.config.emb
        if count * width * first.weight_ih_l0.shape[0] < _LITTLE_WORK:
            return tokens, None
        different, index = torch.unique(tokens, return_inverse=True)
        saved = (count - different.numel()) * width
        return (tokens, None) if saved < count * _WORK_OF_A_GATE else (different, index)

    def _attend_packed(self, packed: PackedSequence) -> tuple[Tensor, LayerState]:
        # No position sees a later one, so what stands in the padding does not matter.
        plain = PackedSequence(packed.data, packed.batch_sizes)
        padded, lengths = pad_packed_sequence(plain)
        assert self.attention is not None
        y, memory = self.attention(padded)
        return pack_padded_sequence(y, lengths).data, memory

    def features(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """What the head sees of every position, and the state after the last."""
        encoded = self.encode(tokens, state)
        return encoded.features, encoded.state

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits of the token after each position, [T, B, V], and the state after the last."""
        encoded = self.encode(tokens, state)
        return self.head(encoded.features), encoded.state

    def loss(
        self,
        tokens: Tensor | PackedSequence,
        targets: Tensor | PackedSequence,
        state: State | None = None,
        *,
        reduction: Reduction = "sum",
        label_smoothing: float = 0.0,
    ) -> tuple[Tensor, State]:
        """Negative log-likelihood of ``targets`` in nats.

        Kept apart from :meth:`forward` because a caller who wants the loss has no use for the
        logits as such.

        Args:
            tokens: int64 [T, B], or packed.
            targets: int64 [T, B]; positions with -100 do not count. Packed like ``tokens``.
            state: of the tokens before; None starts from zeros.
            reduction: ``"sum"``, ``"mean"`` over the positions that count, or ``"none"`` for one
                value per position.
            label_smoothing: see :meth:`~rnnlm_kernels.lm.heads.LinearHead.nll`.

        Returns:
            A scalar, or without reduction [T, B], [N] of packed tokens; and the state after the
            last token.
        """
        encoded = self.encode(tokens, state)
        return self.nll(encoded, targets, reduction, label_smoothing), encoded.state

    def nll(
        self,
        encoded: Encoded,
        targets: Tensor | PackedSequence,
        reduction: Reduction = "sum",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """The loss of what :meth:`encode` returned; see :meth:`loss`."""
        numbers = targets if isinstance(targets, Tensor) else targets.data
        flat = encoded.features.flatten(0, -2)
        nll = self.head.nll(flat, numbers.flatten(), reduction, label_smoothing)
        return nll.view_as(numbers) if reduction == "none" else nll

    def parameter_count(self) -> int:
        """Number of trained values; a shared matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())


def _inputs(
    vectors: Tensor, packed: PackedSequence | None, index: Tensor | None
) -> tuple[Tensor | PackedSequence, dict[str, Any]]:
    """Input and options of a call of a layer; ``packed`` says how the positions are packed."""
    if index is not None:
        return vectors, {"index": index if packed is None else packed._replace(data=index)}
    return (vectors if packed is None else packed._replace(data=vectors)), {}


def _values_are_known(tokens: Tensor) -> bool:
    """Whether it costs nothing to look at ``tokens``: on a GPU it would be waiting."""
    return (
        tokens.is_cpu
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
        and not torch._C._are_functorch_transforms_active()
    )


def packed_rows(packed: PackedSequence) -> Tensor:
    """The batch row of every position of a packed sequence: int64 [N]."""
    rows = [torch.arange(size) for size in packed.batch_sizes.tolist()]
    return torch.cat(rows).to(packed.data.device)


def map_state(state: State, function: Callable[[Tensor], Tensor]) -> State:
    """Applies a function to every tensor of a state."""
    return [
        (function(each[0]), function(each[1])) if isinstance(each, tuple) else function(each)
        for each in state
    ]


def detach_state(state: State) -> State:
    """The same values without their history: the cut of truncated BPTT."""
    return map_state(state, Tensor.detach)


def select_rows(state: State, rows: Tensor | slice) -> State:
    """The state of some rows of a batch, in this order, repeated where they are."""
    return map_state(state, lambda tensor: tensor[:, rows].contiguous())


def join_rows(states: Sequence[State]) -> State:
    """One state of several batches side by side."""
    joined: State = []
    for parts in zip(*states, strict=True):
        if isinstance(parts[0], tuple):
            first, second = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
            joined.append((first, second))
        else:
            joined.append(torch.cat(parts, dim=1))
    return joined
