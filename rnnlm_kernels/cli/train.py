"""``rnnlm-kernels train``: fits a small language model and says how well, and how fast, it
learnt."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import statistics
from collections.abc import Iterator
from enum import Enum
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rnnlm_kernels import BackendError, lm
from rnnlm_kernels.lm.evaluate import bits, perplexity

LINES_PER_RUN = 20


class UnitChoice(str, Enum):
    word = "word"
    char = "char"


class CellChoice(str, Enum):
    lstm = "lstm"
    gru = "gru"


class ResetChoice(str, Enum):
    after = "after"
    before = "before"


class LayerChoice(str, Enum):
    ours = "ours"
    torch = "torch"
    both = "both"


class OptimizerChoice(str, Enum):
    adam = "adam"
    sgd = "sgd"


# Options whose value belongs to a training from its first update to its last, by the place they
# have in a checkpoint.
_MODEL_OPTIONS = ("cell", "reset", "emb", "hidden", "layers", "dropout", "tied", "backend")
_TRAIN_OPTIONS = ("batch", "bptt", "optimizer", "lr", "decay", "clip", "seed")


def train(
    context: typer.Context,
    text: Annotated[
        Path | None,
        typer.Argument(
            help="UTF-8 text file. Left out: the English help texts that come with Python.",
            show_default=False,
        ),
    ] = None,
    unit: Annotated[UnitChoice, typer.Option(help="What one token is.")] = UnitChoice.word,
    cell: Annotated[CellChoice, typer.Option(help="Kind of recurrent layer.")] = CellChoice.lstm,
    reset: Annotated[
        ResetChoice,
        typer.Option(help="Where a GRU resets: after the recurrent product (torch) or before it."),
    ] = ResetChoice.after,
    emb: Annotated[
        int | None,
        typer.Option(min=1, help="Width of the embedding.", show_default="word 200, char 64"),
    ] = None,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the recurrent layers.")] = 200,
    layers: Annotated[int, typer.Option(min=1, help="Number of recurrent layers.")] = 1,
    dropout: Annotated[
        float | None,
        typer.Option(help="Dropout probability.", show_default="word 0.3, char 0.1"),
    ] = None,
    tied: Annotated[
        bool | None,
        typer.Option(
            "--tied/--untied",
            help="Use the embedding matrix in the head too.",
            show_default="word tied, char untied",
        ),
    ] = None,
    bptt: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens that gradients flow back.", show_default="word 35, char 100"
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Rows read side by side.", show_default="word 20, char 32"),
    ] = None,
    optimizer: Annotated[
        OptimizerChoice, typer.Option(help="Rule of the updates.")
    ] = OptimizerChoice.adam,
    lr: Annotated[
        float | None,
        typer.Option(help="First learning rate.", show_default="adam 0.003, sgd 10"),
    ] = None,
    decay: Annotated[
        float, typer.Option(help="Learning rate factor after an epoch without progress.")
    ] = 0.25,
    clip: Annotated[float, typer.Option(help="Largest gradient norm.")] = 0.5,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Passes over the training part.",
            show_default="word 10, char 6; no limit with --max-steps",
        ),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Updates, at most.", show_default=False)
    ] = None,
    min_count: Annotated[
        int | None,
        typer.Option(min=1, help="Rarer tokens become <unk>.", show_default="word 2, char 1"),
    ] = None,
    max_vocab: Annotated[
        int | None, typer.Option(min=2, help="Largest vocabulary.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and dropout.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the checkpoint. Left out: nothing is saved.", show_default=False
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint in --out, exactly.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", show_default="torch's choice")
    ] = None,
    layer: Annotated[
        LayerChoice,
        typer.Option(help="Our layers, torch's, or both in turn from the same start."),
    ] = LayerChoice.ours,
    backend: Annotated[
        str | None, typer.Option(help="Backend of our layers.", show_default="automatic")
    ] = None,
) -> None:
    """Trains a small LSTM or GRU language model on a text.

    Without any argument it takes about a minute on two CPU cores. Ctrl-C (or SIGTERM) ends it after
    the current update and saves, if --out is given; the same command with --resume then goes on as
    if nothing had happened.
    """
    options: dict[str, Any] = {
        key: value.value if isinstance(value, Enum) else value
        for key, value in context.params.items()
    }
    explicit = {
        key: options[key]
        for key in options
        if getattr(context.get_parameter_source(key), "name", "") in ("COMMANDLINE", "ENVIRONMENT")
    }
    console = Console()
    with _one_line_errors(), _thread_count(threads), lm.stop_on_signals() as stop:
        if resume:
            trainers = _resume(text, out, options, explicit, stop)
        else:
            trainers = _start(text, out, options, stop)
        if out is None:
            console.print("No --out: nothing will be saved.", style="dim")
        _introduce(trainers, console)
        reports = {name: _Report() for name in trainers}
        _train(trainers, reports, console)
        if stop.is_set():
            _say_interrupted(trainers, out, text, console)
            raise typer.Exit(128 + (stop.signal_number or 0))
        _summarise(trainers, reports, console)
        if out is not None:
            console.print(f"Saved in {out}", soft_wrap=True, highlight=False)


def _fail(message: str, code: int = 2) -> NoReturn:
    typer.echo("error: " + " ".join(message.split()), err=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """What the user can mend is said in one line: exit code 2 for what was asked, 1 for what
    happened on the way."""
    try:
        yield
    except (lm.CheckpointWriteError, lm.DivergenceError) as error:
        _fail(str(error), 1)
    except (lm.CorpusError, lm.CheckpointError, BackendError) as error:
        _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        # torch has no exception of its own for a CPU allocation that fails.
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(
            error
        ):
            _fail("not enough memory: try a smaller --hidden, --batch, --bptt or --max-vocab", 1)
        raise


@contextlib.contextmanager
def _thread_count(threads: int | None) -> Iterator[None]:
    former = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def _with_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """Fills in the values that depend on another option."""
    word = options["unit"] == "word"
    defaults = {
        "emb": 200 if word else 64,
        "dropout": 0.3 if word else 0.1,
        "tied": word,
        "bptt": 35 if word else 100,
        "batch": 20 if word else 32,
        "lr": 3e-3 if options["optimizer"] == "adam" else 10.0,
    }
    if options["max_steps"] is None:
        defaults["epochs"] = 10 if word else 6
    return options | {key: value for key, value in defaults.items() if options[key] is None}


def _kinds(layer: str) -> list[str]:
    return ["ours", "torch"] if layer == "both" else [layer]


def _folder(out: Path, kind: str, kinds: list[str]) -> Path:
    return out / kind if len(kinds) > 1 else out


def _has_checkpoint(folder: Path) -> bool:
    return (folder / lm.CHECKPOINT_NAME).exists()


def _start(
    text: Path | None, out: Path | None, options: dict[str, Any], stop: lm.StopRequest
) -> dict[str, lm.Trainer]:
    options = _with_defaults(options)
    kinds = _kinds(options["layer"])
    if out is not None and any(map(_has_checkpoint, (out, out / "ours", out / "torch"))):
        _fail(f"{out} holds a checkpoint already: add --resume to go on, or choose another --out")
    corpus = lm.load_corpus(
        text,
        unit=options["unit"],
        min_count=options["min_count"],
        max_size=options["max_vocab"],
    )
    chosen = {key: options[key] for key in _MODEL_OPTIONS}
    try:
        train_config = lm.TrainConfig(
            epochs=options["epochs"],
            max_steps=options["max_steps"],
            **{key: options[key] for key in _TRAIN_OPTIONS},
        )
        models = {}
        for kind in kinds:
            # In a comparison --backend speaks of our half only.
            own = {"backend": None} if kind == "torch" and len(kinds) > 1 else {}
            config = lm.ModelConfig(len(corpus.vocabulary), **(chosen | own | {"layer": kind}))
            models[kind] = lm.RNNLanguageModel(config, seed=options["seed"])
    except ValueError as error:
        _fail(str(error))
    if len(kinds) > 1:
        models["torch"].load_state_dict(models["ours"].state_dict())
    # What can be refused is refused before the folder is made: a text too short for the batch, a
    # backend that cannot run.
    lm.Trainer(models[kinds[0]], corpus, train_config)
    for model in models.values():
        _try_out(model)
    return {
        kind: lm.Trainer(
            model,
            corpus,
            train_config,
            out=None if out is None else _folder(out, kind, kinds),
            stop=stop,
        )
        for kind, model in models.items()
    }


def _try_out(model: lm.RNNLanguageModel) -> None:
    token = torch.zeros(1, 1, dtype=torch.int64)
    with torch.random.fork_rng(devices=[]):
        model.loss(token, token)[0].backward()
    model.zero_grad(set_to_none=True)


def _resume(
    text: Path | None,
    out: Path | None,
    options: dict[str, Any],
    explicit: dict[str, Any],
    stop: lm.StopRequest,
) -> dict[str, lm.Trainer]:
    if out is None:
        _fail("--resume needs --out, the folder of the checkpoint")
    if _has_checkpoint(out):
        kinds = [lm.load_checkpoint(out)["model_config"]["layer"]]
    elif _has_checkpoint(out / "ours") and _has_checkpoint(out / "torch"):
        kinds = ["ours", "torch"]
    else:
        _fail(f"no checkpoint in {out}")
    found = "both" if len(kinds) > 1 else kinds[0]
    if explicit.get("layer", found) != found:
        _fail(
            f"--layer {explicit['layer']} differs from the checkpoint in {out}, which has {found}"
        )
    payload = lm.load_checkpoint(_folder(out, kinds[0], kinds))
    saved = {key: payload["model_config"][key] for key in _MODEL_OPTIONS}
    saved |= {key: payload["train_config"][key] for key in _TRAIN_OPTIONS}
    saved["unit"] = payload["vocabulary"]["unit"]
    for key, value in saved.items():
        if key in explicit and explicit[key] != value:
            _fail(
                f"--{key} {explicit[key]} differs from the checkpoint in {out}, which has {value}; "
                "leave it out, or start a new training in another --out"
            )
    name = payload["corpus"]["name"]
    if text is None and name != lm.DEFAULT_CORPUS:
        _fail(f"the checkpoint in {out} was trained on {name}: give that text again")
    counted = "min_count" in explicit or "max_vocab" in explicit
    corpus = lm.load_corpus(
        text,
        unit=saved["unit"],
        min_count=options["min_count"],
        max_size=options["max_vocab"],
        vocabulary=None
        if counted
        else lm.Vocabulary(saved["unit"], payload["vocabulary"]["tokens"]),
    )
    return {
        kind: lm.Trainer.resume(
            _folder(out, kind, kinds),
            corpus,
            epochs=options["epochs"],
            max_steps=options["max_steps"],
            stop=stop,
        )
        for kind in kinds
    }


def _introduce(trainers: dict[str, lm.Trainer], console: Console) -> None:
    trainer = next(iter(trainers.values()))
    corpus, model = trainer.corpus, trainer.model.config
    vocabulary = corpus.vocabulary
    sizes = " + ".join(f"{len(part):,}" for part in (corpus.train, corpus.valid, corpus.test))
    unknown = ", ".join(f"{corpus.unknown_rate(part):.1%}" for part in ("train", "valid", "test"))
    variant = f" (reset {model.reset})" if model.cell == "gru" else ""
    for line in (
        f"text   {corpus.name}: {sizes} {vocabulary.unit} tokens for training, validation, test",
        f"vocab  {len(vocabulary):,} tokens; <unk> is {unknown} of the three parts",
        f"model  {model.layers} x {model.hidden} {model.cell.upper()}{variant}, "
        f"embedding {model.emb}, "
        f"{trainer.model.parameter_count():,} parameters, layers: {' and '.join(trainers)}",
        f"run    {trainer.total_steps:,} updates of "
        f"{trainer.config.batch} x {trainer.config.bptt} tokens, "
        f"{torch.get_num_threads()} threads",
    ):
        console.print(line, soft_wrap=True, highlight=False)
    if trainer.done:
        console.print("This training has ended; a larger --epochs or --max-steps takes it further.")
    elif trainer.step:
        console.print(f"resume after update {trainer.step:,}", highlight=False)
    console.print()


@dataclasses.dataclass
class _Report:
    """What one training has shown so far."""

    losses: list[float] = dataclasses.field(default_factory=list)
    speeds: list[float] = dataclasses.field(default_factory=list)
    # Since the last printed line.
    recent: list[lm.StepRecord] = dataclasses.field(default_factory=list)

    def add(self, record: lm.StepRecord) -> None:
        self.losses.append(record.loss)
        self.speeds.append(record.tokens / record.seconds)
        self.recent.append(record)

    @property
    def speed(self) -> float | None:
        """Median tokens/s: a few slow updates (the first, or a busy machine) do not move it."""
        return statistics.median(self.speeds) if self.speeds else None


def _train(trainers: dict[str, lm.Trainer], reports: dict[str, _Report], console: Console) -> None:
    total = max(trainer.total_steps for trainer in trainers.values())
    every = max(1, min(100, total // LINES_PER_RUN))
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("training", total=total)
        # Update by update in turn, so that whatever slows the machine down slows both alike.
        for records in zip_longest(*(trainer.records() for trainer in trainers.values())):
            for (name, trainer), record in zip(trainers.items(), records, strict=True):
                if record is None:
                    continue
                prefix = f"{name:<6}" if len(trainers) > 1 else ""
                if isinstance(record, lm.EpochRecord):
                    line = _epoch_line(record, trainer)
                else:
                    report = reports[name]
                    report.add(record)
                    progress.update(task, completed=record.step)
                    if record.step % every:
                        continue
                    line = _step_line(report.recent, trainer)
                    report.recent.clear()
                console.print(prefix + line, soft_wrap=True, highlight=False)


def _quality(loss: float, unit: str) -> str:
    if unit == "char":
        return f"{bits(loss):6.3f} bits/char"
    return f"ppl {perplexity(loss):8.1f}"


def _step_line(records: list[lm.StepRecord], trainer: lm.Trainer) -> str:
    tokens = sum(record.tokens for record in records)
    loss = sum(record.loss * record.tokens for record in records) / tokens
    speed = tokens / sum(record.seconds for record in records)
    norm = statistics.fmean(record.grad_norm for record in records)
    return (
        f"step {records[-1].step:>6}/{trainer.total_steps}  loss {loss:6.3f}  "
        f"{_quality(loss, trainer.corpus.vocabulary.unit)}  grad {norm:6.3f}  "
        f"lr {records[-1].lr:.2g}  {speed:,.0f} tokens/s"
    )


def _epoch_line(record: lm.EpochRecord, trainer: lm.Trainer) -> str:
    loss = record.valid.loss
    line = (
        f"epoch {record.epoch + 1:>5} ends      valid {loss:6.3f}  "
        f"{_quality(loss, trainer.corpus.vocabulary.unit)}"
    )
    return line if record.improved else f"{line}  no better: lr {record.lr:.2g}"


def _summarise(
    trainers: dict[str, lm.Trainer], reports: dict[str, _Report], console: Console
) -> None:
    first = next(iter(trainers.values()))
    corpus = first.corpus
    char = corpus.vocabulary.unit == "char"
    measure = bits if char else perplexity
    digits = 3 if char else 1
    label = "bits/char" if char else "ppl"
    table = Table(title=f"{corpus.name} after {first.step:,} updates")
    table.add_column("model")
    for heading in ("valid loss", f"valid {label}", f"test {label}", "tokens/s"):
        table.add_column(heading, justify="right")
    size = len(corpus.vocabulary)
    valid, test = (
        lm.unigram_loss(corpus.train, part, size) for part in (corpus.valid, corpus.test)
    )
    table.add_row(
        "unigram baseline",
        f"{valid:.4f}",
        f"{measure(valid):.{digits}f}",
        f"{measure(test):.{digits}f}",
        "",
    )
    losses = {}
    for name, trainer in trainers.items():
        valid, test = trainer.score("valid").loss, trainer.score("test").loss
        losses[name] = valid
        speed = reports[name].speed
        table.add_row(
            f"{trainer.model.config.cell.upper()}, {name}",
            f"{valid:.4f}",
            f"{measure(valid):.{digits}f}",
            f"{measure(test):.{digits}f}",
            "-" if speed is None else f"{speed:,.0f}",
        )
    console.print()
    console.print(table)
    if len(trainers) < 2:
        return
    ours, theirs = reports["ours"], reports["torch"]
    gaps = [abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=False)][:100]
    if ours.speed is not None and theirs.speed is not None and gaps:
        console.print(
            f"ours / torch: {ours.speed / theirs.speed:.2f}x tokens/s; training losses differ by "
            f"at most {max(gaps):.1e} in the first {len(gaps)} updates, validation losses by "
            f"{abs(losses['ours'] - losses['torch']):.1e}",
            soft_wrap=True,
            highlight=False,
        )


def _say_interrupted(
    trainers: dict[str, lm.Trainer], out: Path | None, text: Path | None, console: Console
) -> None:
    step = min(trainer.step for trainer in trainers.values())
    if out is None:
        message = f"Interrupted after update {step:,}. Nothing was saved, there is no --out."
    else:
        words = ["rnnlm-kernels", "train", *([] if text is None else [str(text)])]
        command = shlex.join([*words, "--out", str(out), "--resume"])
        message = f"Interrupted after update {step:,} and saved. To go on:\n  {command}"
    console.print(message, soft_wrap=True, highlight=False)
