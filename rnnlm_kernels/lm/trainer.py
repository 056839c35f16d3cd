"""The training loop: truncated BPTT, clipping, plateau decay, checkpoints, exact resume."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .checkpoint import (
    CHECKPOINT_NAME,
    CheckpointError,
    CheckpointWriteError,
    load_checkpoint,
    save_checkpoint,
)
from .data import Corpus, StreamBatches, Vocabulary
from .evaluate import Score, bits, evaluate, perplexity
from .model import ModelConfig, RNNLanguageModel, State, detach_state

logger = logging.getLogger("rnnlm_kernels")


class DivergenceError(RuntimeError):
    """The loss or its gradient is no longer a finite number."""


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
        batch: rows read side by side, B.
        bptt: tokens per window, T; gradients do not flow further back, the hidden state does.
        optimizer: ``"adam"`` or ``"sgd"``.
        lr: first learning rate.
        decay: factor on the learning rate after an epoch whose validation loss is not below the
            best one so far.
        clip: largest norm of the whole gradient; a larger one is scaled down to it.
        epochs: stop after this many passes over the training part; None: no such limit.
        max_steps: stop after this many updates; None: no such limit. At least one of the two limits
            must be given.
        save_every: updates between two checkpoints, besides those at the end of every epoch.
        eval_batch: rows side by side in evaluation.
        seed: seed of the dropout masks.

    Raises:
        ValueError: a value out of range, or no limit at all.
    """

    batch: int = 20
    bptt: int = 35
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 3e-3
    decay: float = 0.25
    clip: float = 0.5
    epochs: int | None = None
    max_steps: int | None = None
    save_every: int = 500
    eval_batch: int = 10
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "bptt", "save_every", "eval_batch", "epochs", "max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if not (value > 0.0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive number, got {value}")
        if not 0.0 < self.decay <= 1.0:
            raise ValueError(f"decay must be above 0 and at most 1, got {self.decay}")
        if self.optimizer not in ("adam", "sgd"):
            raise ValueError(f"optimizer must be 'adam' or 'sgd', got {self.optimizer!r}")
        if self.epochs is None and self.max_steps is None:
            raise ValueError("give epochs, max_steps, or both: training needs an end")


@dataclass(frozen=True)
class StepRecord:
    """One update.

    Attributes:
        step: its number, from 1.
        epoch: the pass over the training part it belongs to, from 0.
        loss: mean loss of the window before the update, in nats per token, with dropout.
        tokens: predicted tokens in the window.
        seconds: wall-clock time of the update.
        grad_norm: norm of the whole gradient before clipping.
        lr: learning rate used.
    """

    step: int
    epoch: int
    loss: float
    tokens: int
    seconds: float
    grad_norm: float
    lr: float

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return perplexity(self.loss)

    @property
    def bits(self) -> float:
        """Bits per token."""
        return bits(self.loss)


@dataclass(frozen=True)
class EpochRecord:
    """The end of a pass over the training part.

    Attributes:
        epoch: its number, from 0.
        step: updates so far.
        valid: score on the validation part.
        improved: whether it is the best so far; if not, the learning rate has been lowered.
        lr: learning rate of the next epoch.
    """

    epoch: int
    step: int
    valid: Score
    improved: bool
    lr: float


Record = StepRecord | EpochRecord


class _RandomStream:
    """A random state of the trainer's own.

    Everything random in training happens inside :meth:`use`. So neither the caller nor a second
    trainer that takes turns with this one can change its dropout masks, and the caller's random
    numbers are not changed either.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        # With a CUDA device named or not, fork_rng and the states below must mean the same one.
        self._cuda = []
        if device.type == "cuda":
            self._cuda = [torch.cuda.current_device() if device.index is None else device.index]
        with torch.random.fork_rng(devices=self._cuda):
            torch.manual_seed(seed)
            self.states = self._read()

    def _read(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in self._cuda)]

    @contextmanager
    def use(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=self._cuda):
            torch.set_rng_state(self.states[0])
            for index, state in zip(self._cuda, self.states[1:], strict=True):
                torch.cuda.set_rng_state(state, index)
            yield
            self.states = self._read()


class Trainer:
    """Trains a model on a corpus.

    Args:
        model: the model, on the device to train on; changed in place.
        corpus: the text; its vocabulary must be the model's.
        config: how to train.
        out: folder for the checkpoint; made when missing. None: nothing is ever written.
        stop: an event that ends training after the current step, e.g. of
            :func:`~rnnlm_kernels.lm.stop_on_signals`.

    Raises:
        ValueError: the model's vocabulary size is not the corpus's.
        CorpusError: the training part cannot fill ``config.batch`` rows.
        CheckpointError: ``out`` cannot be made, or holds a checkpoint already.

    Example:
        >>> from rnnlm_kernels.lm.data import corpus_from_text
        >>> corpus = corpus_from_text("to be or not to be " * 20, unit="char")
        >>> model = RNNLanguageModel(ModelConfig(len(corpus.vocabulary), emb=8, hidden=8), seed=0)
        >>> trainer = Trainer(model, corpus, TrainConfig(batch=4, bptt=10, max_steps=3))
        >>> trainer.run().tokens == corpus.valid.numel() - 1
        True
    """

    def __init__(
        self,
        model: RNNLanguageModel,
        corpus: Corpus,
        config: TrainConfig,
        *,
        out: str | Path | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        if model.config.vocab_size != len(corpus.vocabulary):
            raise ValueError(
                f"the model has vocab_size={model.config.vocab_size}, the corpus has "
                f"{len(corpus.vocabulary)} tokens"
            )
        self.model = model
        self.corpus = corpus
        self.config = config
        self.step = 0
        self.epoch = 0
        # Next window of the training stream. Equal to the number of windows: the epoch still has to
        # be closed.
        self.window = 0
        self.best_valid = math.inf
        device = next(model.parameters()).device
        self._batches = StreamBatches(corpus.train, config.batch, config.bptt).to(device)
        self._random = _RandomStream(config.seed, device)
        self._state: State | None = None
        self._stop = stop if stop is not None else threading.Event()
        if config.optimizer == "adam":
            self._optimizer: torch.optim.Optimizer = torch.optim.Adam(
                model.parameters(), lr=config.lr
            )
        else:
            self._optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
        self.path = None if out is None else _prepare_folder(Path(out)) / CHECKPOINT_NAME
        if self.path is not None and self.path.exists():
            raise CheckpointError(
                f"{self.path} exists already: resume it, or choose another folder"
            )

    @property
    def windows(self) -> int:
        """Windows, and so updates, per epoch."""
        return len(self._batches)

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def total_steps(self) -> int:
        """Updates in the whole training."""
        limits = [self.config.max_steps]
        if self.config.epochs is not None:
            limits.append(self.config.epochs * self.windows)
        return min(limit for limit in limits if limit is not None)

    @property
    def done(self) -> bool:
        """Whether the end that the configuration names has been reached."""
        config = self.config
        if config.max_steps is not None and self.step >= config.max_steps:
            return True
        return config.epochs is not None and self.epoch >= config.epochs

    def records(self) -> Iterator[Record]:
        """Trains until done or asked to stop, with a record after every update and every epoch.

        The caller may do anything between two records, also train something else. At the end,
        however it comes about (but for an exception), the checkpoint is written.

        Raises:
            DivergenceError: loss or gradient is not finite; the model keeps the values before that
                update.
            CheckpointWriteError: the last checkpoint cannot be written. Failing to write one on the
                way is logged as a warning, and training goes on.
        """
        while not self.done and not self._stop.is_set():
            if self.window == self.windows:
                yield self._end_epoch()
                self._save_on_the_way()
            else:
                yield self._update()
                if self.step % self.config.save_every == 0:
                    self._save_on_the_way()
        self.save()

    def run(self, on_record: Callable[[Record], object] | None = None) -> Score:
        """Trains until done or asked to stop.

        Args:
            on_record: called with every record.

        Returns:
            The score on the validation part at the end.
        """
        for record in self.records():
            if on_record is not None:
                on_record(record)
        return self.score("valid")

    def score(self, split: Literal["train", "valid", "test"]) -> Score:
        """The model's score on a part of the corpus."""
        tokens = getattr(self.corpus, split)
        return evaluate(self.model, tokens, batch=self.config.eval_batch)

    def _update(self) -> StepRecord:
        start = time.perf_counter()
        inputs, targets = self._batches[self.window]
        tokens = targets.numel()
        lr = self.lr
        self.model.train()
        self._optimizer.zero_grad(set_to_none=True)
        with self._random.use():
            total, state = self.model.loss(inputs, targets, self._state)
            mean = total / tokens
            mean.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip))
        loss = float(mean.detach())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergenceError(
                f"update {self.step + 1}: loss {loss}, gradient norm {norm}; try a smaller "
                f"learning rate than {lr:g} or a smaller clip than {self.config.clip:g}"
            )
        self._optimizer.step()
        self._state = detach_state(state)
        self.step += 1
        self.window += 1
        seconds = time.perf_counter() - start
        return StepRecord(self.step, self.epoch, loss, tokens, seconds, norm, lr)

    def _end_epoch(self) -> EpochRecord:
        valid = self.score("valid")
        improved = valid.loss < self.best_valid
        if improved:
            self.best_valid = valid.loss
        else:
            for group in self._optimizer.param_groups:
                group["lr"] *= self.config.decay
        record = EpochRecord(self.epoch, self.step, valid, improved, self.lr)
        self.epoch += 1
        self.window = 0
        self._state = None
        return record

    def save(self) -> None:
        """Writes the checkpoint; does nothing without a folder.

        Raises:
            CheckpointWriteError: it cannot be written.
        """
        if self.path is not None:
            save_checkpoint(self._payload(), self.path)

    def _save_on_the_way(self) -> None:
        try:
            self.save()
        except CheckpointWriteError as error:
            logger.warning("%s; training goes on", error)

    def _payload(self) -> dict[str, Any]:
        vocabulary = self.corpus.vocabulary
        return {
            "model_config": dataclasses.asdict(self.model.config),
            "train_config": dataclasses.asdict(self.config),
            "vocabulary": {"unit": vocabulary.unit, "tokens": vocabulary.tokens},
            "corpus": {"name": self.corpus.name, "fingerprint": self.corpus.fingerprint},
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "random": self._random.states,
            "state": self._state,
            "step": self.step,
            "epoch": self.epoch,
            "window": self.window,
            "best_valid": self.best_valid,
        }

    @classmethod
    def resume(
        cls,
        out: str | Path,
        corpus: Corpus,
        *,
        epochs: int | None = None,
        max_steps: int | None = None,
        device: torch.device | str = "cpu",
        stop: threading.Event | None = None,
    ) -> Trainer:
        """The trainer as it was when it wrote its checkpoint.

        It goes on exactly as if it had never stopped.

        Args:
            out: folder of the checkpoint.
            corpus: the same text, read in the same way.
            epochs, max_steps: a new end of training; with both None the end stays as it was.
            device: device to train on; exact only on the kind of device, and with the number of
                threads, used before.
            stop: as in the constructor.

        Raises:
            CheckpointError: no checkpoint there, a damaged one, or one of another text, vocabulary
                or model.
        """
        path = Path(out) / CHECKPOINT_NAME
        payload = load_checkpoint(path)
        model, vocabulary = _model_from_payload(payload, path)
        saved = payload["corpus"]
        if saved["fingerprint"] != corpus.fingerprint:
            raise CheckpointError(
                f"{path} was trained on another text: {saved['name']} (SHA-256 "
                f"{saved['fingerprint'][:12]}...), not {corpus.name} ({corpus.fingerprint[:12]}...)"
            )
        if vocabulary != corpus.vocabulary:
            raise CheckpointError(
                f"{path} has another vocabulary ({vocabulary.unit}, {len(vocabulary)} tokens) than "
                f"the corpus ({corpus.vocabulary.unit}, {len(corpus.vocabulary)} tokens): read the "
                "text with the same settings"
            )
        model.to(device)
        config = TrainConfig(**payload["train_config"])
        if epochs is not None or max_steps is not None:
            config = dataclasses.replace(config, epochs=epochs, max_steps=max_steps)
        trainer = cls(model, corpus, config, stop=stop)
        trainer._optimizer.load_state_dict(payload["optimizer"])
        if len(payload["random"]) == len(trainer._random.states):
            trainer._random.states = payload["random"]
        else:
            logger.warning(
                "%s was written on another kind of device: dropout masks start anew", path
            )
        trainer._state = _state_to(payload["state"], device)
        for name in ("step", "epoch", "window", "best_valid"):
            setattr(trainer, name, payload[name])
        trainer.path = path
        return trainer


def load_model(path: str | Path) -> tuple[RNNLanguageModel, Vocabulary]:
    """The model of a checkpoint, on the CPU and in evaluation mode, and its vocabulary.

    Args:
        path: the checkpoint file, or the folder that holds it.

    Raises:
        CheckpointError: no checkpoint there, or a damaged one.
    """
    model, vocabulary = _model_from_payload(load_checkpoint(path), Path(path))
    return model.eval(), vocabulary


def _model_from_payload(payload: dict[str, Any], path: Path) -> tuple[RNNLanguageModel, Vocabulary]:
    try:
        vocabulary = Vocabulary(payload["vocabulary"]["unit"], payload["vocabulary"]["tokens"])
        model = RNNLanguageModel(ModelConfig(**payload["model_config"]), seed=0)
        model.load_state_dict(payload["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this release: {error}") from error
    return model, vocabulary


def _prepare_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Find out now, not after an hour, that nothing can be written there.
        probe = folder / f".{CHECKPOINT_NAME}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror or error}") from error
    return folder


def _state_to(state: State | None, device: torch.device | str) -> State | None:
    if state is None:
        return None
    return [
        (each[0].to(device), each[1].to(device)) if isinstance(each, tuple) else each.to(device)
        for each in state
    ]
