"""How a model is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .parallel import this_process


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
        batch: rows (or sentences) read side by side, B, over all processes.
        bptt: tokens per window, T; gradients do not flow further back, the hidden state does.
        random_bptt: windows of random lengths around ``bptt``, see
            :func:`~rnnlm_kernels.lm.data.random_length`; the learning rate of a window is scaled by
            its length over ``bptt``.
        batching: ``"stream"``: windows of the whole text with carried state; ``"sentences"``: whole
            lines, each from a zero state.
        optimizer: ``"adam"``, ``"adamw"`` or ``"sgd"``.
        lr: first learning rate.
        momentum: of SGD.
        betas: of Adam.
        weight_decay: of the optimiser.
        schedule: ``"plateau"``, ``"step"``, ``"cosine"`` or ``"constant"``; see
            :class:`~rnnlm_kernels.lm.optim.LearningRate`.
        decay: factor on the learning rate after an evaluation that is not the best so far
            (``"plateau"``), or after an epoch (``"step"``).
        plateau_patience: evaluations without progress that are let pass before ``decay``.
        decay_after: epochs (from 1) before the first ``decay`` of ``"step"``.
        min_lr: last learning rate of ``"cosine"``.
        warmup: updates during which the learning rate rises to its first value.
        average: the weights used are the mean over all updates since the validation loss was worse
            than the best of all but this many evaluations (NT-ASGD); None: the last weights.
        clip: largest norm of the whole gradient; a larger one is scaled down to it. None: no limit.
        clip_value: largest size of an element of the gradient, cut before ``clip``. None: no limit.
        label_smoothing: share of every target's probability that is spread over all tokens.
        ar: weight of the mean square of the last outputs after dropout.
        tar: weight of the mean square of their change from step to step, before dropout.
        l1, l2: weights of absolute values and squares of parameters, by name pattern; see
            :func:`~rnnlm_kernels.lm.regularization.weight_penalty`.
        accumulate: parts that the rows of a batch are cut into and computed one after the other;
            the update is the same, the memory less.
        precision: ``"float32"``, or ``"bf16"`` / ``"fp16"`` through autocast; with fp16 the loss is
            scaled.
        skip_gram, cbow: weights of these embedding tasks; see
            :class:`~rnnlm_kernels.lm.auxiliary.WordEmbeddingTask`.
        context: words on either side that those tasks look at.
        negatives: random words that those tasks tell from true ones, per word.
        synonyms: weight of :class:`~rnnlm_kernels.lm.auxiliary.SynonymTask`.
        epochs: stop after this many passes over the training part; None: no such limit.
        max_steps: stop after this many updates; None: no such limit. At least one of the two limits
            must be given.
        eval_every: updates between two evaluations, besides those at the end of every epoch.
        patience: stop after this many evaluations in a row without progress; None: never.
        save_every: updates between two checkpoints, besides those after an evaluation.
        eval_batch: rows side by side in evaluation.
        seed: seed of everything random.

    Raises:
        ValueError: a value out of range, or no limit at all.
    """

    batch: int = 20
    bptt: int = 35
    random_bptt: bool = False
    batching: Literal["stream", "sentences"] = "stream"
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 3e-3
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    schedule: Literal["plateau", "step", "cosine", "constant"] = "plateau"
    decay: float = 0.25
    plateau_patience: int = 0
    decay_after: int = 1
    min_lr: float = 0.0
    warmup: int = 0
    average: int | None = None
    clip: float | None = 0.5
    clip_value: float | None = None
    label_smoothing: float = 0.0
    ar: float = 0.0
    tar: float = 0.0
    l1: Mapping[str, float] = field(default_factory=dict)
    l2: Mapping[str, float] = field(default_factory=dict)
    accumulate: int = 1
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    skip_gram: float = 0.0
    cbow: float = 0.0
    context: int = 5
    negatives: int = 5
    synonyms: float = 0.0
    epochs: int | None = None
    max_steps: int | None = None
    eval_every: int | None = None
    patience: int | None = None
    save_every: int = 500
    eval_batch: int = 10
    seed: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in (
            "batch",
            "bptt",
            "decay_after",
            "accumulate",
            "context",
            "negatives",
            "save_every",
            "eval_batch",
            "epochs",
            "max_steps",
            "eval_every",
            "patience",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("lr", "clip", "clip_value"):
            value = getattr(self, name)
            if value is not None and not (value > 0.0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive number, got {value}")
        coefficients = {
            name: getattr(self, name)
            for name in (
                "momentum",
                "weight_decay",
                "plateau_patience",
                "min_lr",
                "warmup",
                "average",
                "label_smoothing",
                "ar",
                "tar",
                "skip_gram",
                "cbow",
                "synonyms",
            )
        }
        coefficients |= {f"l1 of {pattern}": value for pattern, value in self.l1.items()}
        coefficients |= {f"l2 of {pattern}": value for pattern, value in self.l2.items()}
        for name, value in coefficients.items():
            if value is not None and not (value >= 0.0 and math.isfinite(value)):
                raise ValueError(f"{name} must be at least 0, got {value}")
        if self.label_smoothing >= 1.0:
            raise ValueError(f"label_smoothing must be below 1, got {self.label_smoothing}")
        if not 0.0 < self.decay <= 1.0:
            raise ValueError(f"decay must be above 0 and at most 1, got {self.decay}")
        for name, choices in (
            ("batching", ("stream", "sentences")),
            ("optimizer", ("adam", "adamw", "sgd")),
            ("schedule", ("plateau", "step", "cosine", "constant")),
            ("precision", ("float32", "bf16", "fp16")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.epochs is None and self.max_steps is None:
            raise ValueError("give epochs, max_steps, or both: training needs an end")
        if self.batching == "sentences" and self.random_bptt:
            raise ValueError("random_bptt belongs to batching='stream'; sentences have no windows")
        if self.accumulate > self.batch:
            raise ValueError(
                f"accumulate={self.accumulate} parts cannot be cut from batch={self.batch} rows"
            )

    def check_processes(self) -> None:
        """Refuses what the processes that train together cannot share.

        Raises:
            ValueError: the rows cannot be dealt evenly, or sentences would have to be.
        """
        world = this_process().world
        if world == 1:
            return
        if self.batch % world:
            raise ValueError(f"batch={self.batch} rows cannot be dealt evenly to {world} processes")
        if self.batching == "sentences":
            raise ValueError("several processes share streams only; use batching='stream'")
