"""What ``rnnlm-kernels train`` shows and keeps of a training: lines, bar, table, logs."""

from __future__ import annotations

import dataclasses
import logging
import shlex
import statistics
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rnnlm_kernels import lm
from rnnlm_kernels.lm.evaluate import bits, perplexity
from rnnlm_kernels.lm.logs import CSV_NAME, CURVE_NAME, CsvLog, TensorBoardLog, save_curve
from rnnlm_kernels.lm.records import Record

LINES_PER_RUN = 20
log_of_library = logging.getLogger("rnnlm_kernels")


class Logs:
    """The files that a training writes besides its checkpoints; none without a folder.

    Args:
        trainer: of the training.
        tensorboard: write TensorBoard events too.
    """

    def __init__(self, trainer: lm.Trainer, tensorboard: bool) -> None:
        self._folder = trainer.out if lm.this_process().rank == 0 else None
        self._logs: list[CsvLog | TensorBoardLog] = []
        if self._folder is not None:
            self._logs.append(CsvLog(self._folder / CSV_NAME, trainer.parts, trainer.step))
            if tensorboard:
                self._logs.append(TensorBoardLog(self._folder / "tensorboard", trainer.step))

    def add(self, record: Record) -> None:
        """Keeps a record."""
        for log in self._logs:
            log.add(record)

    def close(self) -> None:
        """Closes the files and draws the curve, where matplotlib is."""
        for log in self._logs:
            log.close()
        if self._folder is not None:
            try:
                save_curve(self._folder / CSV_NAME, self._folder / CURVE_NAME, self._folder.name)
            except ModuleNotFoundError as error:
                log_of_library.info("no %s: %s", CURVE_NAME, error)


@dataclasses.dataclass
class Report:
    """What one training has shown so far."""

    losses: list[float] = dataclasses.field(default_factory=list)
    speeds: list[float] = dataclasses.field(default_factory=list)
    # Since the last printed line.
    recent: list[lm.StepRecord] = dataclasses.field(default_factory=list)

    def add(self, record: lm.StepRecord) -> None:
        """Takes an update in."""
        self.losses.append(record.loss)
        self.speeds.append(record.tokens / record.seconds)
        self.recent.append(record)

    @property
    def speed(self) -> float | None:
        """Median tokens/s: a few slow updates (the first, or a busy machine) do not move it."""
        return statistics.median(self.speeds) if self.speeds else None


def introduce(trainers: dict[str, lm.Trainer], console: Console) -> None:
    """Says what will be trained on what."""
    trainer = next(iter(trainers.values()))
    corpus, model = trainer.corpus, trainer.model.config
    vocabulary = corpus.vocabulary
    sizes = " + ".join(f"{len(part):,}" for part in (corpus.train, corpus.valid, corpus.test))
    unknown = ""
    if vocabulary.unk is not None:
        rates = (corpus.unknown_rate(part) for part in ("train", "valid", "test"))
        unknown = f"; <unk> is {', '.join(f'{rate:.1%}' for rate in rates)} of the three parts"
    variant = f" (reset {model.reset})" if model.cell == "gru" else ""
    widths = sorted(set(model.widths))
    shape = (
        f"{model.layers} x {widths[0]}" if len(widths) == 1 else "-".join(map(str, model.widths))
    )
    extras = f", attention over {model.attention}" if model.attention else ""
    processes = lm.this_process().world
    several = f", {processes} processes" if processes > 1 else ""
    for line in (
        f"text   {corpus.name}: {sizes} {vocabulary.unit} tokens for training, validation, test",
        f"vocab  {len(vocabulary):,} tokens{unknown}",
        f"model  {shape} {model.cell.upper()}{variant}, embedding {model.emb}{extras}, "
        f"{trainer.model.parameter_count():,} parameters, layers: {' and '.join(trainers)}",
        f"run    {trainer.total_steps:,} updates of {_batch(trainer)}, "
        f"{torch.get_num_threads()} threads{several}",
    ):
        console.print(line, soft_wrap=True, highlight=False)
    if trainer.done:
        console.print("This training has ended; a larger --epochs or --max-steps takes it further.")
    elif trainer.step:
        console.print(f"resume after update {trainer.step:,}", highlight=False)
    console.print()


def _batch(trainer: lm.Trainer) -> str:
    config = trainer.config
    if config.batching == "sentences":
        return f"{config.batch} sentences"
    return f"{config.batch} x {'about ' if config.random_bptt else ''}{config.bptt} tokens"


def show_training(
    trainers: dict[str, lm.Trainer],
    reports: dict[str, Report],
    logs: dict[str, Logs],
    console: Console,
) -> None:
    """Trains all, update by update in turn, so that what slows the machine down slows all alike."""
    total = max(trainer.total_steps for trainer in trainers.values())
    every = max(1, min(100, total // LINES_PER_RUN))
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}"),
        TextColumn("ends in"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("training", total=total, now="")
        for records in zip_longest(*(trainer.records() for trainer in trainers.values())):
            for (name, trainer), record in zip(trainers.items(), records, strict=True):
                if record is None:
                    continue
                logs[name].add(record)
                prefix = f"{name:<6}" if len(trainers) > 1 else ""
                if isinstance(record, lm.EvalRecord):
                    line = _eval_line(record, trainer)
                else:
                    report = reports[name]
                    report.add(record)
                    progress.update(task, completed=record.step, now=_now(record))
                    if record.step % every:
                        continue
                    line = _step_line(report.recent, trainer)
                    report.recent.clear()
                console.print(prefix + line, soft_wrap=True, highlight=False)


def _now(record: lm.StepRecord) -> str:
    return (
        f"loss {record.loss:.3f}  grad {record.grad_norm:.2f}  lr {record.lr:.2g}  "
        f"{record.tokens / record.seconds:,.0f} tokens/s"
    )


def _in_bits(trainer: lm.Trainer) -> bool:
    return trainer.corpus.vocabulary.unit in ("char", "byte")


def _quality(loss: float, trainer: lm.Trainer) -> str:
    if _in_bits(trainer):
        return f"{bits(loss):6.3f} bits/{trainer.corpus.vocabulary.unit}"
    return f"ppl {perplexity(loss):8.1f}"


def _step_line(records: Sequence[lm.StepRecord], trainer: lm.Trainer) -> str:
    tokens = sum(record.tokens for record in records)
    loss = sum(record.loss * record.tokens for record in records) / tokens
    speed = tokens / sum(record.seconds for record in records)
    norm = statistics.fmean(record.grad_norm for record in records)
    parts = "".join(
        f"  {name} {statistics.fmean(record.parts[name] for record in records):.3g}"
        for name in records[-1].parts
    )
    return (
        f"step {records[-1].step:>6}/{trainer.total_steps}  loss {loss:6.3f}  "
        f"{_quality(loss, trainer)}  grad {norm:6.3f}  "
        f"lr {records[-1].lr:.2g}  {speed:,.0f} tokens/s{parts}"
    )


def _eval_line(record: lm.EvalRecord, trainer: lm.Trainer) -> str:
    loss = record.valid.loss
    place = f"step  {record.step:>6}"
    if isinstance(record, lm.EpochRecord):
        place = f"epoch {record.epoch + 1:>5} ends"
    line = f"{place:<16} valid {loss:6.3f}  {_quality(loss, trainer)}"
    if record.averaged:
        line += "  (mean of the weights)"
    return line if record.improved else f"{line}  no better: lr {record.lr:.2g}"


def summarise(
    trainers: dict[str, lm.Trainer], reports: dict[str, Report], console: Console
) -> None:
    """The table at the end, and the comparison of two trainings."""
    first = next(iter(trainers.values()))
    corpus = first.corpus
    measure = bits if _in_bits(first) else perplexity
    digits = 3 if _in_bits(first) else 1
    label = f"bits/{corpus.vocabulary.unit}" if _in_bits(first) else "ppl"
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


def say_interrupted(
    trainers: dict[str, lm.Trainer], out: Path | None, texts: Sequence[str], console: Console
) -> None:
    """Says what was saved and how to go on."""
    step = min(trainer.step for trainer in trainers.values())
    if out is None:
        message = f"Interrupted after update {step:,}. Nothing was saved, there is no --out."
    else:
        words = ["rnnlm-kernels", "train", *texts]
        command = shlex.join([*words, "--out", str(out), "--resume"])
        message = f"Interrupted after update {step:,} and saved. To go on:\n  {command}"
    console.print(message, soft_wrap=True, highlight=False)
