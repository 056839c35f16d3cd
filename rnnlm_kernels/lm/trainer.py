"""The training loop: truncated BPTT, clipping, schedules, evaluation, checkpoints, exact resume."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from .checkpoint import (
    CHECKPOINT_NAME,
    CheckpointError,
    CheckpointWriteError,
    Which,
    has_checkpoint,
    load_checkpoint,
    require_safetensors,
    save_checkpoint,
)
from .config import TrainConfig
from .data import Corpus, CorpusError, SentenceBatches, StreamBatches, random_length
from .evaluate import Score, evaluate, evaluate_sentences
from .model import (
    ModelConfig,
    RNNLanguageModel,
    State,
    detach_state,
    join_rows,
    map_state,
    select_rows,
)
from .objective import Objective, Tokens
from .optim import LearningRate, NonMonotonicTrigger, make_optimizer
from .parallel import any_over_processes, gather_rows, sum_over_processes, this_process
from .records import EpochRecord, EvalRecord, Record, StepRecord
from .tokenizers import Tokenizer, tokenizer_from_json

logger = logging.getLogger("rnnlm_kernels")

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# So often may half precision overflow in a row before training has failed.
_OVERFLOWS = 30


class DivergenceError(RuntimeError):
    """The loss or its gradient is no longer a finite number."""


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

    Under ``torchrun``, inside :func:`~rnnlm_kernels.lm.process_group`, every process makes the same
    trainer; each reads its share of the rows, and process 0 writes the files.

    Args:
        model: the model, on the device to train on; changed in place.
        corpus: the text; its vocabulary must be the model's.
        config: how to train.
        out: folder for the checkpoints; made when missing. None: nothing is ever written.
        stop: an event that ends training after the current step, e.g. of
            :func:`~rnnlm_kernels.lm.stop_on_signals`.
        synonyms: pairs for the synonym task, of :func:`~rnnlm_kernels.lm.load_synonyms`.

    Raises:
        ValueError: the model's vocabulary size is not the corpus's; sentences without a token that
            ends them; rows that the processes cannot share.
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
        synonyms: Tensor | None = None,
    ) -> None:
        if model.config.vocab_size != len(corpus.vocabulary):
            raise ValueError(
                f"the model has vocab_size={model.config.vocab_size}, the corpus has "
                f"{len(corpus.vocabulary)} tokens"
            )
        config.check_processes()
        self.model = model
        self.corpus = corpus
        self.config = config
        self.step = 0
        self.epoch = 0
        # Next token of every row (next batch of sentences). At the end: the epoch still has to be
        # closed.
        self.position = 0
        self.best_valid = math.inf
        self.average: AveragedModel | None = None
        self._process = this_process()
        self._device = next(model.parameters()).device
        self._data = self._make_data()
        # Each process has masks of its own.
        self._random = _RandomStream(config.seed + 7919 * self._process.rank, self._device)
        self._state: State | None = None
        self._stop = stop if stop is not None else threading.Event()
        self._synonyms = synonyms
        counts = torch.bincount(corpus.train, minlength=len(corpus.vocabulary))
        self._objective = Objective(model, config, counts, synonyms)
        self._call: torch.nn.Module = self._objective
        if self._process.world > 1:
            self._call = DistributedDataParallel(
                self._objective,
                # A group of rare words need not occur in every process's window.
                find_unused_parameters=model.config.head == "adaptive",
            )
        self._parameters = list(self._objective.parameters())
        self._optimizer = make_optimizer(config, self._parameters)
        self._rate = LearningRate(config, self._optimizer, self.total_steps)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=config.precision == "fp16")
        self._overflows = 0
        self._trigger = NonMonotonicTrigger(config.average or 0)
        self._without_progress = 0
        # Where the last checkpoint was written; it is not written twice.
        self._saved_at: tuple[int, int, int] | None = None
        # After how many updates the validation part was last read, and with what result.
        self._evaluated: tuple[int, Score] = (-1, Score(math.nan, 1))
        self.out = None if out is None else _prepare_folder(Path(out))
        if self.out is not None and has_checkpoint(self.out):
            raise CheckpointError(f"{self.out} exists already: resume it, or choose another folder")

    def _make_data(self) -> StreamBatches | SentenceBatches:
        config, tokens = self.config, self.corpus.train
        if config.batching == "sentences":
            return SentenceBatches(tokens, self._eos, config.batch, config.seed).to(self._device)
        stream = StreamBatches(tokens, config.batch, config.bptt)
        return stream.shard(self._process.rank, self._process.world).to(self._device)

    @property
    def _eos(self) -> int:
        eos = self.corpus.vocabulary.eos
        if eos is None:
            raise CorpusError(f"{self.corpus.name} has no line ends, and so no sentences")
        return eos

    @property
    def windows(self) -> int:
        """Windows, and so updates, per epoch; of random lengths: about so many."""
        if isinstance(self._data, StreamBatches) and self.config.random_bptt:
            return max(1, round(self._data.length / (0.975 * self.config.bptt)))
        return len(self._data)

    @property
    def parts(self) -> list[str]:
        """Names of the penalties and auxiliary losses in every :class:`StepRecord`."""
        return self._objective.part_names

    @property
    def _end(self) -> int:
        """Where an epoch ends, in the units of ``position``."""
        return self._data.length if isinstance(self._data, StreamBatches) else len(self._data)

    @property
    def _place(self) -> tuple[int, int, int]:
        return self.step, self.epoch, self.position

    @property
    def lr(self) -> float:
        """Learning rate of the next update, before warm-up."""
        return self._rate.base

    @property
    def total_steps(self) -> int:
        """Updates in the whole training; with random lengths and no ``max_steps`` about so many."""
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
        if config.patience is not None and self._without_progress >= config.patience:
            return True
        return config.epochs is not None and self.epoch >= config.epochs

    @property
    def best_model(self) -> RNNLanguageModel:
        """The model to use: of averaged weights once averaging has begun."""
        if self.average is None:
            return self.model
        averaged = self.average.module
        assert isinstance(averaged, RNNLanguageModel)
        return averaged

    def records(self) -> Iterator[Record]:
        """Trains until done or asked to stop, with a record after every update and evaluation.

        The caller may do anything between two records, also train something else. When the end
        that the configuration names is reached, the model is evaluated once more. At the end,
        however it comes about (but for an exception), the checkpoint is written.

        Raises:
            DivergenceError: loss or gradient is not finite; the model keeps the values before that
                update.
            CheckpointWriteError: the last checkpoint cannot be written. Failing to write one on the
                way is logged as a warning, and training goes on.
        """
        while not self.done and not any_over_processes(self._stop.is_set()):
            if self.position >= self._end:
                record = self._end_epoch()
                yield record
                self._save_on_the_way(best=record.improved)
                continue
            yield self._update()
            every = self.config.eval_every
            if every and self.step % every == 0 and self.position < self._end:
                evaluated = self._evaluate(EvalRecord)
                yield evaluated
                self._save_on_the_way(best=evaluated.improved)
            elif self.step % self.config.save_every == 0:
                self._save_on_the_way()
        best = False
        if self.done and self.step and self._evaluated[0] != self.step:
            # Looked at, but without consequences for the schedule: a later end may be given, and
            # training must then go on as if this had not been one.
            valid = self._valid_score()
            best = valid.loss < self.best_valid
            yield EvalRecord(self.epoch, self.step, valid, best, self.lr, self.average is not None)
        if best or self._saved_at != self._place:
            self.save(best=best)

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
        return self._valid_score()

    def score(self, split: Literal["train", "valid", "test"]) -> Score:
        """The score of :attr:`best_model` on a part of the corpus."""
        tokens = getattr(self.corpus, split)
        if self.config.batching == "sentences":
            return evaluate_sentences(
                self.best_model, tokens, self._eos, batch=self.config.eval_batch
            )
        return evaluate(self.best_model, tokens, batch=self.config.eval_batch)

    def _valid_score(self) -> Score:
        if self._evaluated[0] != self.step:
            self._evaluated = (self.step, self.score("valid"))
        return self._evaluated[1]

    def _next_batch(self) -> tuple[list[tuple[Tokens, Tokens]], int, int, float]:
        """The parts of the next batch, its tokens, the position after it, its share of ``lr``."""
        config = self.config
        if isinstance(self._data, SentenceBatches):
            spans = self._data.order(self.epoch)[self.position]
            parts = [spans[k :: config.accumulate] for k in range(config.accumulate)]
            tokens = sum(end - start for start, end in spans)
            packed: list[tuple[Tokens, Tokens]] = [self._data.pack(part) for part in parts if part]
            return packed, tokens, self.position + 1, 1.0
        length, scale = config.bptt, 1.0
        if config.random_bptt:
            length = random_length(config.bptt, config.seed, self.epoch, self.position)
            scale = length / config.bptt
        inputs, targets = self._data.window(self.position, length)
        rows = zip(
            inputs.tensor_split(config.accumulate, dim=1),
            targets.tensor_split(config.accumulate, dim=1),
            strict=True,
        )
        dealt: list[tuple[Tokens, Tokens]] = [pair for pair in rows if pair[0].numel()]
        tokens = targets.numel() * self._process.world
        return dealt, tokens, self.position + len(inputs), scale

    def _update(self) -> StepRecord:
        start = time.perf_counter()
        config = self.config
        parts, tokens, following, scale = self._next_batch()
        lr = self.lr * self._rate.warm(self.step) * scale
        self.model.train()
        self._optimizer.zero_grad(set_to_none=True)
        loss, extras, states = self._gradients(parts, tokens)
        self._scaler.unscale_(self._optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm_tensor = torch.nn.utils.get_total_norm(gradients)
        norm = float(norm_tensor)
        if config.clip_value is not None:
            torch.nn.utils.clip_grad_value_(self._parameters, config.clip_value)
            if config.clip is not None:
                torch.nn.utils.clip_grad_norm_(self._parameters, config.clip)
        elif config.clip is not None and norm + 1e-6 > config.clip:
            # torch's factor, clip / (norm + 1e-6), would be 1 for any other norm.
            torch.nn.utils.clip_grads_with_norm_(self._parameters, config.clip, norm_tensor)
        self._check_finite(loss, norm, lr)
        self._step_with(lr)
        if self.average is not None:
            self.average.update_parameters(self.model)
        self._state = states
        self.step += 1
        self.position = following
        self._rate.after_update()
        seconds = time.perf_counter() - start
        return StepRecord(self.step, self.epoch, loss, tokens, seconds, norm, lr, extras)

    def _gradients(
        self, parts: list[tuple[Tokens, Tokens]], tokens: int
    ) -> tuple[float, dict[str, float], State | None]:
        """Back-propagates the batch part by part: mean loss, other parts, state after it."""
        local = tokens / self._process.world
        total = 0.0
        extras: dict[str, float] = {}
        states: list[State] = []
        first = 0
        autocast: Any = nullcontext()
        if self.config.precision != "float32":
            autocast = torch.autocast(self._device.type, dtype=_DTYPES[self.config.precision])
        with self._random.use():
            for index, (inputs, targets) in enumerate(parts):
                state = None
                if isinstance(inputs, Tensor):
                    last = first + inputs.shape[1]
                    if self._state is not None:
                        state = select_rows(self._state, slice(first, last))
                    first = last
                reduce_now = index + 1 == len(parts)
                with self._no_sync(not reduce_now):
                    with autocast:
                        objective, nll, others, after = self._call(inputs, targets, state, local)
                    self._scaler.scale(objective).backward()
                total += float(nll.detach())
                for name, value in others.items():
                    extras[name] = extras.get(name, 0.0) + float(value.detach())
                states.append(detach_state(after))
        total = sum_over_processes(total)
        carried = None
        if self.config.batching == "stream":
            carried = states[0] if len(states) == 1 else join_rows(states)
        return total / tokens, extras, carried

    def _no_sync(self, skip: bool) -> Any:
        if skip and isinstance(self._call, DistributedDataParallel):
            return self._call.no_sync()
        return nullcontext()

    def _check_finite(self, loss: float, norm: float, lr: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            self._overflows = 0
            return
        self._overflows += 1
        if self._scaler.is_enabled() and math.isfinite(loss) and self._overflows < _OVERFLOWS:
            return  # the scaler leaves this update out and scales less from now on
        raise DivergenceError(
            f"update {self.step + 1}: loss {loss}, gradient norm {norm}; try a smaller "
            f"learning rate than {lr:g} or a smaller clip than {self.config.clip}"
        )

    def _step_with(self, lr: float) -> None:
        """An update at a learning rate that holds for it alone."""
        groups = self._optimizer.param_groups
        kept = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = lr
        self._scaler.step(self._optimizer)
        self._scaler.update()
        for group, rate in zip(groups, kept, strict=True):
            group["lr"] = rate

    def _evaluate(self, kind: type[EvalRecord]) -> EvalRecord:
        averaged = self.average is not None
        valid = self._valid_score()
        improved = valid.loss < self.best_valid
        if improved:
            self.best_valid = valid.loss
        self._without_progress = 0 if improved else self._without_progress + 1
        self._rate.after_evaluation(valid.loss)
        if self.config.average is not None and not averaged and self._trigger.add(valid.loss):
            self.average = AveragedModel(self.model)
        return kind(self.epoch, self.step, valid, improved, self.lr, averaged)

    def _end_epoch(self) -> EvalRecord:
        self._rate.after_epoch()
        record = self._evaluate(EpochRecord)
        self.epoch += 1
        self.position = 0
        self._state = None
        return record

    def save(self, *, best: bool = False) -> None:
        """Writes a checkpoint; does nothing without a folder.

        Args:
            best: it is also the best one so far.

        Raises:
            CheckpointWriteError: it cannot be written.
        """
        if self.out is not None:
            payload = self._payload()
            if self._process.rank == 0:
                save_checkpoint(payload, self.out, best=best)
            self._saved_at = self._place

    def _save_on_the_way(self, *, best: bool = False) -> None:
        try:
            self.save(best=best)
        except CheckpointWriteError as error:
            logger.warning("%s; training goes on", error)

    def _payload(self) -> dict[str, Any]:
        random = [self._random.states]
        state = self._state
        if self._process.world > 1:
            random = [[] for _ in range(self._process.world)]
            dist.all_gather_object(random, self._random.states)
            state = None if state is None else map_state(state, gather_rows)
        return {
            "model_config": dataclasses.asdict(self.model.config),
            "train_config": dataclasses.asdict(self.config),
            "tokenizer": self.corpus.vocabulary.to_json(),
            "corpus": {"name": self.corpus.name, "fingerprint": self.corpus.fingerprint},
            "step": self.step,
            "epoch": self.epoch,
            "position": self.position,
            "model": self.best_model.state_dict(),
            "training": {
                "optimizer": self._optimizer.state_dict(),
                "rate": self._rate.state_dict(),
                "scaler": self._scaler.state_dict(),
                "tasks": self._objective.tasks.state_dict(),
                "synonyms": self._synonyms,
                "raw_model": None if self.average is None else self.model.state_dict(),
                "averaged_updates": None if self.average is None else self.average.n_averaged,
                "valid_losses": self._trigger.losses,
                "without_progress": self._without_progress,
                "best_valid": self.best_valid,
                "random": random,
                "state": state,
            },
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
        """The trainer as it was when it wrote its last checkpoint.

        It goes on exactly as if it had never stopped.

        Args:
            out: folder of the checkpoint.
            corpus: the same text, read in the same way.
            epochs, max_steps: a new end of training; with both None the end stays as it was.
            device: device to train on; exact only on the kind of device, and with the number of
                threads and processes, used before.
            stop: as in the constructor.

        Raises:
            CheckpointError: no checkpoint there, a damaged one, or one of another text, vocabulary
                or model.
        """
        payload = load_checkpoint(out)
        model, vocabulary = _model_from_payload(payload, Path(out))
        saved = payload["corpus"]
        if saved["fingerprint"] != corpus.fingerprint:
            raise CheckpointError(
                f"{out} was trained on another text: {saved['name']} (SHA-256 "
                f"{saved['fingerprint'][:12]}...), not {corpus.name} ({corpus.fingerprint[:12]}...)"
            )
        if vocabulary != corpus.vocabulary:
            raise CheckpointError(
                f"{out} has another vocabulary ({vocabulary.unit}, {len(vocabulary)} tokens) than "
                f"the corpus ({corpus.vocabulary.unit}, {len(corpus.vocabulary)} tokens): read the "
                "text with the same settings"
            )
        model.to(device)
        end = {"epochs": epochs, "max_steps": max_steps}
        if epochs is None and max_steps is None:
            end = {}
        try:
            config = TrainConfig(**(payload["train_config"] | end))
            training = payload["training"]
            trainer = cls(model, corpus, config, stop=stop, synonyms=training["synonyms"])
            for name in ("step", "epoch", "position"):
                setattr(trainer, name, payload[name])
            trainer._restore(training, Path(out))
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{out} does not fit this release: {error}") from error
        trainer.out = Path(out)
        return trainer

    def _restore(self, training: dict[str, Any], out: Path) -> None:
        if training["raw_model"] is not None:
            self.average = AveragedModel(self.model)
            self.average.n_averaged.copy_(training["averaged_updates"])
            self.model.load_state_dict(training["raw_model"])
        fused = [group["fused"] for group in self._optimizer.param_groups]
        self._optimizer.load_state_dict(training["optimizer"])
        for group, its_own in zip(self._optimizer.param_groups, fused, strict=True):
            group["fused"] = its_own  # the device's, not that of the device it was written on
        self._rate.load_state_dict(training["rate"])
        self._scaler.load_state_dict(training["scaler"])
        self._objective.tasks.load_state_dict(training["tasks"])
        self._trigger.losses = training["valid_losses"]
        self._without_progress = training["without_progress"]
        self.best_valid = training["best_valid"]
        process = self._process
        random = training["random"]
        if len(random) == process.world and len(random[0]) == len(self._random.states):
            self._random.states = random[process.rank]
        else:
            logger.warning(
                "%s was written on another kind of device or by another number of processes: "
                "dropout masks start anew",
                out,
            )
        if training["state"] is not None:
            rows = self.config.batch // process.world
            first = rows * process.rank
            state = select_rows(training["state"], slice(first, first + rows))
            self._state = map_state(state, lambda tensor: tensor.to(self._device))


def load_model(path: str | Path, which: Which | None = None) -> tuple[RNNLanguageModel, Tokenizer]:
    """The model of a checkpoint, on the CPU and in evaluation mode, and its tokenizer.

    Args:
        path: the folder that was trained into, or one ``step-...`` folder in it.
        which: ``"best"`` or ``"last"``; None: the best, or the last where none was evaluated.

    Raises:
        CheckpointError: no checkpoint there, or a damaged one.
    """
    if which is None and has_checkpoint(path, "best"):
        which = "best"
    model, vocabulary = _model_from_payload(load_checkpoint(path, which), Path(path))
    return model.eval(), vocabulary


def _model_from_payload(payload: dict[str, Any], path: Path) -> tuple[RNNLanguageModel, Tokenizer]:
    try:
        vocabulary = tokenizer_from_json(payload["tokenizer"])
        model = RNNLanguageModel(ModelConfig(**payload["model_config"]), seed=0)
        model.load_state_dict(payload["model"])
        if len(vocabulary) != model.config.vocab_size:
            raise ValueError(
                f"{len(vocabulary)} tokens, but the model knows {model.config.vocab_size}"
            )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this release: {error}") from error
    return model, vocabulary


def _prepare_folder(folder: Path) -> Path:
    require_safetensors()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Find out now, not after an hour, that nothing can be written there.
        probe = folder / f".{CHECKPOINT_NAME}.{this_process().rank}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror or error}") from error
    return folder
