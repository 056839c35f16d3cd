"""Optimisers and learning rates, put together from torch's own."""

from __future__ import annotations

import math

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from .config import TrainConfig


def make_optimizer(
    config: TrainConfig, parameters: list[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimiser that a configuration names.

    ``weight_decay`` is torch's: added to the gradient by ``"adam"`` and ``"sgd"``, decoupled from
    it (Loshchilov and Hutter 2019) by ``"adamw"``. On CPUs and with CUDA torch's fused updates run,
    one pass over the parameters (docs/performance-log.md).
    """
    lr, decay = config.lr, config.weight_decay
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=lr, momentum=config.momentum, weight_decay=decay, fused=fused
        )
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=lr, betas=config.betas, weight_decay=decay, fused=fused)


class LearningRate:
    """The learning rate of every update: a schedule times warm-up.

    Schedules:
        plateau: multiplied by ``decay`` after an evaluation that is not the best so far (after more
            than ``plateau_patience`` such in a row).
        step: multiplied by ``decay`` after epoch number ``decay_after`` (from 1) and every later
            one.
        cosine: falls from ``lr`` to ``min_lr`` over ``total_steps`` updates like half a cosine
            (Loshchilov and Hutter 2017), and stays there.
        constant: stays.

    During the first ``warmup`` updates all of that is multiplied by 1/warmup, 2/warmup, ...

    Args:
        config: of the training.
        optimizer: its groups' ``lr`` is what the schedules of torch change.
        total_steps: updates of the whole training, for ``cosine``.
    """

    def __init__(
        self, config: TrainConfig, optimizer: torch.optim.Optimizer, total_steps: int
    ) -> None:
        self._warmup = config.warmup
        self._optimizer = optimizer
        self._plateau: ReduceLROnPlateau | None = None
        self._per_epoch: LambdaLR | None = None
        self._per_update: LambdaLR | None = None
        if config.schedule == "plateau":
            self._plateau = ReduceLROnPlateau(
                optimizer,
                factor=config.decay,
                patience=config.plateau_patience,
                threshold=0.0,
                threshold_mode="abs",
                eps=0.0,
            )
        elif config.schedule == "step":
            decay, after = config.decay, config.decay_after
            self._per_epoch = LambdaLR(optimizer, lambda e: decay ** max(0, e - after + 1))
        elif config.schedule == "cosine":
            least = config.min_lr / config.lr

            def factor(step: int) -> float:
                done = min(1.0, step / total_steps)
                return least + (1.0 - least) * 0.5 * (1.0 + math.cos(math.pi * done))

            self._per_update = LambdaLR(optimizer, factor)

    @property
    def base(self) -> float:
        """The schedule's rate, before warm-up."""
        return float(self._optimizer.param_groups[0]["lr"])

    def warm(self, step: int) -> float:
        """Factor on the rate of update ``step`` (from 0)."""
        return min(1.0, (step + 1) / self._warmup) if self._warmup else 1.0

    def after_update(self) -> None:
        """Says that an update has been made."""
        if self._per_update is not None:
            self._per_update.step()

    def after_evaluation(self, loss: float) -> None:
        """Says how the validation part was predicted."""
        if self._plateau is not None:
            self._plateau.step(loss)

    def after_epoch(self) -> None:
        """Says that an epoch has ended."""
        if self._per_epoch is not None:
            self._per_epoch.step()

    @property
    def _schedulers(self) -> list[LRScheduler]:
        every = (self._plateau, self._per_epoch, self._per_update)
        return [each for each in every if each is not None]

    def state_dict(self) -> list[dict]:
        """What :meth:`load_state_dict` takes; plain values."""
        return [
            {k: v for k, v in each.state_dict().items() if k in _CHANGING}
            for each in self._schedulers
        ]

    def load_state_dict(self, states: list[dict]) -> None:
        """Goes on where another left off; the rate itself is the optimiser's."""
        for each, state in zip(self._schedulers, states, strict=True):
            each.load_state_dict(state)


# What changes in a schedule of torch during training; the rest follows from the configuration.
_CHANGING = frozenset(
    {
        "last_epoch",
        "_step_count",
        "_last_lr",
        "best",
        "num_bad_epochs",
        "cooldown_counter",
        "lr_lambdas",  # None for every function; LambdaLR wants to see it
    }
)


class NonMonotonicTrigger:
    """Says when averaging should begin (NT-ASGD, Merity et al. 2018, algorithm 1).

    It does once a validation loss is worse than the best of all but the last ``patience``.

    Example:
        >>> trigger = NonMonotonicTrigger(patience=2)
        >>> [trigger.add(loss) for loss in (5.0, 4.0, 4.2, 4.1, 4.3)]
        [False, False, False, False, True]
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.losses: list[float] = []

    def add(self, loss: float) -> bool:
        """Adds a validation loss and returns whether averaging should begin now."""
        earlier = self.losses[: -self.patience] if self.patience else self.losses
        pull = bool(earlier) and loss > min(earlier)
        self.losses.append(loss)
        return pull
