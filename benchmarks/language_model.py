"""Trains language models side by side: which regularisation helps, and how fast a whole update is.

    python benchmarks/language_model.py recipes book.txt --steps 4000 --out runs/recipes
    python benchmarks/language_model.py recipes book.txt --steps 4000 --synonyms synonyms.tsv
    python benchmarks/language_model.py speed --size medium

``recipes`` trains the same layers with the same data, seed and number of updates: without
regularisation, with plain dropout, with AWD-LSTM's kinds of it, and that with attention and (with a
synonym file) with the synonym task; then evaluates each, the best weights on the test part, once
more with a continuous cache. Every tenth synonym pair is kept from training. Every run is kept in a
folder of its own and resumed where it was interrupted.

``speed`` trains a model of this package and the same model made of torch.nn.LSTM, torch.nn.Linear
and cross_entropy from the same weights, and compares tokens per second, losses, and peak memory;
with ``--dropout`` on the input, between the layers and on the output of both, each by its own. A
third contender does what neither can do without: the matrix products alone, each whole by torch,
and clipping and SGD. Each runs in a process of its own, as in life: in one process, what one of
them frees decides whether malloc has memory at hand for the next. They take turns, several times.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from rnnlm_kernels import lm
from rnnlm_kernels.bench.machine import commit, describe

# The kinds of AWD-LSTM (Merity et al. 2018), at rates for layers a fifth as wide as theirs and a
# hundredth of their updates.
AWD = {
    "locked": True,
    "dropout": 0.3,
    "dropout_input": 0.2,
    "dropout_hidden": 0.2,
    "dropout_embedding": 0.05,
    "weight_drop": 0.2,
}
AWD_TRAINING = {"ar": 1.0, "tar": 0.5, "weight_decay": 1.2e-6, "random_bptt": True}
CACHE = lm.CacheConfig(window=500, flatness=0.6, share=0.1)
SIZES = {"small": 200, "medium": 650, "char": 512}
WARM_UP = 10  # updates after which pages are counted


def recipes(arguments: argparse.Namespace) -> None:
    """Trains every recipe for equally many updates and prints a table."""
    corpus = lm.load_corpus(
        arguments.text,
        unit=arguments.unit,
        min_count=arguments.min_count if arguments.unit == "word" else None,
    )
    base = {"emb": arguments.emb, "hidden": arguments.hidden, "layers": arguments.layers}
    plans = {
        "none": ({"dropout": 0.0}, {}),
        "dropout": ({"dropout": 0.3}, {}),
        "awd": (AWD, AWD_TRAINING),
        "awd + attention": (AWD | {"attention": 70}, AWD_TRAINING),
    }
    pairs: dict[str, torch.Tensor] = {}
    if arguments.synonyms is not None:
        listed = lm.load_synonyms(arguments.synonyms, corpus.vocabulary)
        listed = listed[torch.randperm(len(listed), generator=torch.Generator().manual_seed(0))]
        kept = len(listed) // 10
        pairs = {"trained": listed[kept:], "kept": listed[:kept]}
        plans["awd + synonyms"] = (AWD, AWD_TRAINING | {"synonyms": 0.1})
    plans = {name: plans[name] for name in arguments.only or plans}
    rows = []
    for name, (model_options, options) in plans.items():
        config = lm.TrainConfig(
            lr=arguments.lr,
            schedule="cosine",
            warmup=100,
            max_steps=arguments.steps,
            eval_every=max(1, arguments.steps // 20),
            precision=arguments.precision,
            **options,
        )
        model_config = lm.ModelConfig(len(corpus.vocabulary), **(base | model_options))
        folder = arguments.out / name.replace(" ", "")
        trainer = _trainer(corpus, model_config, config, folder, pairs.get("trained"))
        for record in trainer.records():
            if isinstance(record, lm.EvalRecord):
                print(f"{name:<16} update {record.step:>6}  valid {record.valid.loss:.4f}")
        model, _ = lm.load_model(folder)
        rows.append(_scores(name, model, corpus, pairs))
        print(json.dumps(rows[-1]))
    result = {
        "machine": describe(),
        "text": corpus.name,
        "vocabulary": len(corpus.vocabulary),
        "arguments": {
            key: value.name if isinstance(value, Path) else value
            for key, value in vars(arguments).items()
            if key != "run"
        },
        "rows": rows,
    }
    (arguments.out / "recipes.json").write_text(json.dumps(result, indent=1) + "\n")
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(_cell(row[column]) for column in columns) + " |")


def _trainer(
    corpus: lm.Corpus,
    model_config: lm.ModelConfig,
    config: lm.TrainConfig,
    folder: Path,
    pairs: torch.Tensor | None,
) -> lm.Trainer:
    if lm.has_checkpoint(folder):
        return lm.Trainer.resume(folder, corpus)
    model = lm.RNNLanguageModel(model_config, seed=config.seed)
    return lm.Trainer(model, corpus, config, out=folder, synonyms=pairs)


def _scores(
    name: str, model: lm.RNNLanguageModel, corpus: lm.Corpus, pairs: dict[str, torch.Tensor]
) -> dict[str, object]:
    row: dict[str, object] = {
        "recipe": name,
        "parameters": model.parameter_count(),
        "valid ppl": lm.evaluate(model, corpus.valid).perplexity,
        "test ppl": lm.evaluate(model, corpus.test).perplexity,
        "test ppl with cache": lm.evaluate(model, corpus.test, cache=CACHE).perplexity,
    }
    for part, listed in pairs.items():
        row[f"synonym recall@10, {part} pairs"] = lm.synonym_recall(model.embedding.weight, listed)
    return row


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if value < 1 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


class TorchModel(nn.Module):
    """What a user of torch writes: nn.Embedding, nn.LSTM, nn.Linear, cross_entropy."""

    def __init__(self, size: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, width)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(width, width, num_layers=2, dropout=dropout)
        self.head = nn.Linear(width, size)

    def forward(self, tokens, targets, state):
        """Mean loss and the state."""
        hidden, state = self.lstm(self.dropout(self.embedding(tokens)), state)
        logits = self.head(self.dropout(hidden))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), state

    def take(self, ours: lm.RNNLanguageModel) -> None:
        """Takes over the weights of our model."""
        with torch.no_grad():
            self.embedding.weight.copy_(ours.embedding.weight)
            self.head.load_state_dict(ours.head.state_dict())
            for index, layer in enumerate(ours.layers):
                for name, value in layer.named_parameters():
                    getattr(self.lstm, name.replace("_l0", f"_l{index}")).copy_(value)


class Contender:
    """One of the two models in training."""

    def __init__(self, kind: str, vocabulary: int, width: int, dropout: float = 0.0) -> None:
        config = lm.ModelConfig(
            vocabulary, emb=width, hidden=width, layers=2, dropout=dropout, tied=False
        )
        ours = lm.RNNLanguageModel(config, seed=1)
        self.model: nn.Module = ours
        if kind == "torch":
            self.model = TorchModel(vocabulary, width, dropout)
            self.model.take(ours)
        self.kind = kind
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.state = None
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def update(self, tokens: torch.Tensor, targets: torch.Tensor) -> None:
        """One update on a window; the state is carried."""
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        if self.kind == "ours":
            loss, state = self.model.loss(tokens, targets, self.state, reduction="mean")
            self.state = [(h.detach(), c.detach()) for h, c in state]
        else:
            loss, (h, c) = self.model(tokens, targets, self.state)
            self.state = h.detach(), c.detach()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.25)
        self.optimizer.step()
        self.losses.append(float(loss.detach()))
        self.seconds.append(time.perf_counter() - start)


class Limit:
    """What an update cannot do without: its products as single GEMMs, clipping, and SGD."""

    def __init__(self, vocabulary: int, width: int, tokens: int) -> None:
        torch.manual_seed(2)
        # Of both layers the input's and the recurrent product; the head.
        shapes = [(4 * width, width)] * 4 + [(vocabulary, width)]
        self.products = [
            (
                torch.randn(tokens, inputs),
                torch.randn(outputs, inputs),
                torch.randn(tokens, outputs),
            )
            for outputs, inputs in shapes
        ]
        embedding = torch.zeros(vocabulary, width)
        self.parameters = [
            nn.Parameter(torch.zeros(shape)) for shape in [*shapes, tuple(embedding.shape)]
        ]
        for parameter in self.parameters:
            parameter.grad = torch.ones_like(parameter)
        self.optimizer = torch.optim.SGD(self.parameters, lr=1.0)
        self.seconds: dict[str, list[float]] = {"products": [], "clipping and SGD": []}

    def update(self) -> None:
        """The products of one update, forward and backward; then the optimiser."""
        start = time.perf_counter()
        for x, weight, gradient in self.products:
            torch.mm(x, weight.t())
            torch.mm(gradient, weight)
            torch.mm(gradient.t(), x)
        products = time.perf_counter()
        nn.utils.clip_grad_norm_(self.parameters, 0.25)
        self.optimizer.step()
        end = time.perf_counter()
        self.seconds["products"].append(products - start)
        self.seconds["clipping and SGD"].append(end - products)


def _windows(arguments: argparse.Namespace) -> list[tuple[torch.Tensor, torch.Tensor]]:
    # Frequencies like those of words.
    draw = torch.Generator().manual_seed(0)
    frequency = 1.0 / torch.arange(1, arguments.vocabulary + 1)
    count = arguments.batch * arguments.bptt * arguments.steps + 1
    tokens = torch.multinomial(frequency, count, replacement=True, generator=draw)
    return list(lm.StreamBatches(tokens, arguments.batch, arguments.bptt))


def speed(arguments: argparse.Namespace) -> None:
    """Compares whole updates."""
    if arguments.steps <= WARM_UP:
        raise SystemExit(f"--steps should be more than {WARM_UP}, got {arguments.steps}")
    torch.set_num_threads(arguments.threads)
    if arguments.only:
        print(json.dumps(_updates(arguments)))
        return
    runs: dict[str, list[dict]] = {"ours": [], "torch": [], "limit": []}
    for turn in range(arguments.turns):
        for kind in reversed(runs) if turn % 2 else runs:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", kind]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs[kind].append(json.loads(done.stdout))
            print(f"turn {turn + 1} of {arguments.turns}: {kind}", file=sys.stderr)
    ms = {
        kind: {
            part: 1e3 * statistics.median(s for run in turns for s in run["seconds"][part])
            for part in turns[0]["seconds"]
        }
        for kind, turns in runs.items()
    }
    losses = {kind: runs[kind][0]["losses"] for kind in ("ours", "torch")}
    if arguments.dropout:  # masks differ
        mean = {kind: round(statistics.fmean(each), 4) for kind, each in losses.items()}
        compared, close = {"mean loss": mean}, abs(mean["ours"] / mean["torch"] - 1.0) < 0.01
    else:
        pairs = zip(losses["ours"][:100], losses["torch"][:100], strict=True)
        largest = max(abs(a - b) for a, b in pairs)
        compared, close = {"largest difference of the losses": largest}, largest < 1e-4
    if not close:
        raise SystemExit(f"the two models do not learn the same: {compared}")
    tokens = arguments.batch * arguments.bptt
    ours, theirs = ms["ours"]["update"], ms["torch"]["update"]
    result = {
        "machine": describe(),
        "commit": commit(),
        "size": f"2 x {SIZES[arguments.size]}, vocabulary {arguments.vocabulary:,}, "
        f"{arguments.batch} x {arguments.bptt} tokens, {arguments.threads} threads"
        + (f", dropout {arguments.dropout}" if arguments.dropout else ""),
        "updates": f"{arguments.turns} x {arguments.steps}",
        **compared,
        "ms of an update": {
            kind: {part: round(value, 1) for part, value in parts.items()}
            for kind, parts in ms.items()
        },
        "ms of an update, median of each turn": {
            kind: [
                round(1e3 * statistics.median(run["seconds"]["update"]), 1) for run in runs[kind]
            ]
            for kind in ("ours", "torch")
        },
        "pages mapped in an update, mean of each turn": {
            kind: [run["pages"] for run in runs[kind]] for kind in ("ours", "torch")
        },
        "tokens/s": {kind: round(1e3 * tokens / ms[kind]["update"]) for kind in ("ours", "torch")},
        "MiB above the model": {kind: runs[kind][0]["MiB"] for kind in ("ours", "torch")},
        "torch / ours": round(theirs / ours, 3),
        "torch / limit": round(theirs / sum(ms["limit"].values()), 3),
    }
    print(json.dumps(result, indent=1))


def _updates(arguments: argparse.Namespace) -> dict:
    """The updates of one contender: seconds, losses, and the most memory they took."""
    width = SIZES[arguments.size]
    if arguments.only == "limit":
        limit = Limit(arguments.vocabulary, width, arguments.batch * arguments.bptt)
        for _ in range(arguments.steps):
            limit.update()
        return {"seconds": limit.seconds}
    contender = Contender(arguments.only, arguments.vocabulary, width, arguments.dropout)
    windows = _windows(arguments)
    before = _peak_memory(forget=True)
    for index, window in enumerate(windows):
        if index == WARM_UP:
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        contender.update(*window)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return {
        "seconds": {"update": contender.seconds},
        "losses": contender.losses,
        "pages": round(faults / (len(windows) - WARM_UP)),
        "MiB": round((_peak_memory() - before) / 2**20, 1),
    }


def _peak_memory(*, forget: bool = False) -> int:
    """Most bytes resident so far, or since a call with ``forget``; of Linux only."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) * 1024


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    each = commands.add_parser("recipes", help=recipes.__doc__)
    each.add_argument("text", type=Path)
    each.add_argument("--unit", default="word", choices=["word", "char", "byte", "bpe"])
    each.add_argument("--min-count", type=int, default=5)
    each.add_argument("--only", nargs="+", metavar="RECIPE")
    each.add_argument("--emb", type=int, default=200)
    each.add_argument("--hidden", type=int, default=200)
    each.add_argument("--layers", type=int, default=2)
    each.add_argument("--lr", type=float, default=3e-3)
    each.add_argument("--steps", type=int, default=4000)
    each.add_argument("--precision", default="float32", choices=["float32", "bf16", "fp16"])
    each.add_argument("--synonyms", type=Path)
    each.add_argument("--out", type=Path, default=Path("runs/recipes"))
    each.set_defaults(run=recipes)
    each = commands.add_parser("speed", help=speed.__doc__)
    each.add_argument("--size", default="small", choices=list(SIZES))
    each.add_argument("--vocabulary", type=int, default=10_000)
    each.add_argument("--batch", type=int, default=20)
    each.add_argument("--bptt", type=int, default=35)
    each.add_argument("--steps", type=int, default=100, help="updates of a turn, more than 10")
    each.add_argument("--dropout", type=float, default=0.0, help="on input, between, on output")
    each.add_argument("--threads", type=int, default=2)
    each.add_argument("--turns", type=int, default=3, help="how often each contender runs")
    each.add_argument("--only", choices=["ours", "torch", "limit"], help=argparse.SUPPRESS)
    each.set_defaults(run=speed)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
