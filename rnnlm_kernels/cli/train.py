"""``rnnlm-kernels train``: fits a language model and says how well, and how fast, it learnt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import typer
from rich.console import Console

from rnnlm_kernels import lm
from rnnlm_kernels.lm.presets import MODEL_FIELDS, PRESETS, TRAIN_FIELDS, defaults

from .lm_session import chosen_device, fail, one_line_errors, thread_count
from .train_report import (
    Logs,
    Report,
    introduce,
    say_interrupted,
    show_training,
    summarise,
)

PresetName = Literal["tiny", "zaremba-medium", "awd-lstm", "char-lstm", "seed-gru"]
assert set(get_args(PresetName)) == set(PRESETS)
Unit = Literal["word", "char", "byte", "bpe"]
Cell = Literal["lstm", "gru"]
Reset = Literal["after", "before"]
Head = Literal["linear", "adaptive"]
Layer = Literal["ours", "torch", "both"]
Memory = Literal["fast", "low"]
Optimizer = Literal["adam", "adamw", "sgd"]
Schedule = Literal["plateau", "step", "cosine", "constant"]
Precision = Literal["float32", "bf16", "fp16"]
Batching = Literal["stream", "sentences"]

# Options whose value belongs to a training from its first update to its last, by their place in a
# checkpoint.
_MODEL_OPTIONS = MODEL_FIELDS
_TRAIN_OPTIONS = tuple(
    name for name in TRAIN_FIELDS if name not in ("epochs", "max_steps", "betas", "synonyms")
)


def _numbers(text: str | None) -> Any:
    """``"400"`` or ``"1150,1150,400"``."""
    if text is None:
        return None
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 1:
        raise typer.BadParameter(f"expected a positive number, or several with commas: {text!r}")
    return numbers[0] if len(numbers) == 1 else numbers


def _patterns(texts: Sequence[str] | None) -> Any:
    """``["layers.*.weight_hh*=1e-5"]``."""
    found = {}
    for text in texts or ():
        pattern, _, number = text.rpartition("=")
        try:
            found[pattern or "*"] = float(number)
        except ValueError:
            raise typer.BadParameter(f"expected PATTERN=NUMBER or NUMBER, got {text!r}") from None
    return found


TEXT, MODEL, DROPOUT, OPTIM, PENALTY, TASK, RUN = (
    "Text", "Model", "Dropout", "Optimisation", "Penalties", "Auxiliary tasks", "Run",
)  # fmt: skip


def _option(help: str, panel: str, default: str = "", callback: Callable | None = None,
            **more: Any) -> Any:  # fmt: skip
    return typer.Option(
        help=help,
        rich_help_panel=panel,
        show_default=default or False,
        callback=callback,
        **more,
    )


def train(
    ctx: typer.Context,
    text: Annotated[
        list[Path] | None,
        typer.Argument(
            help="UTF-8 text files, read one after the other. "
            "Left out: the English help texts that come with Python.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        PresetName | None,
        _option(
            "A model and training of the literature; other options take precedence. "
            + " ".join(f"[bold]{name}[/bold]: {each.about}." for name, each in PRESETS.items()),
            RUN,
        ),
    ] = None,
    valid: Annotated[
        Path | None, _option("Validation text.", TEXT, "a twentieth of the text, before the test")
    ] = None,
    test: Annotated[
        Path | None, _option("Test text.", TEXT, "the last twentieth of the text")
    ] = None,
    unit: Annotated[Unit | None, _option("What one token is.", TEXT, "word")] = None,
    tokenizer: Annotated[
        Path | None, _option("A tokenizer.json of Hugging Face's tokenizers to use.", TEXT)
    ] = None,
    min_count: Annotated[
        int | None, _option("Rarer tokens become <unk>.", TEXT, "word 2, char 1", min=1)
    ] = None,
    max_vocab: Annotated[
        int | None, _option("Largest vocabulary.", TEXT, "all; bpe 8000", min=2)
    ] = None,
    cell: Annotated[Cell | None, _option("Kind of recurrent layer.", MODEL, "lstm")] = None,
    reset: Annotated[
        Reset | None,
        _option("Where a GRU resets: after the recurrent product or before it.", MODEL, "after"),
    ] = None,
    emb: Annotated[
        int | None, _option("Width of the embedding.", MODEL, "word 200, char 64", min=1)
    ] = None,
    hidden: Annotated[
        str | None,
        _option(
            "Width of the recurrent layers: one number, or one per layer (1150,1150,400).",
            MODEL,
            "200",
            callback=_numbers,
        ),
    ] = None,
    layers: Annotated[int | None, _option("Number of recurrent layers.", MODEL, "1", min=1)] = None,
    tied: Annotated[
        bool | None,
        typer.Option(
            "--tied/--untied",
            help="Use the embedding matrix in the head too.",
            rich_help_panel=MODEL,
            show_default="word tied, char untied",
        ),
    ] = None,
    head: Annotated[
        Head | None,
        _option("Softmax over all tokens, or an adaptive one.", MODEL, "linear"),
    ] = None,
    cutoffs: Annotated[
        str | None,
        _option(
            "Where the groups of the adaptive softmax end, e.g. 2000,10000.",
            MODEL,
            callback=_numbers,
        ),
    ] = None,
    attention: Annotated[
        int | None,
        _option(
            "Positions attended to between the layers and the head; 0: none.", MODEL, "0", min=0
        ),
    ] = None,
    attention_heads: Annotated[
        int | None, _option("Heads of the attention.", MODEL, "1", min=1)
    ] = None,
    init: Annotated[
        float | None, _option("All first values uniform within plus and minus this.", MODEL)
    ] = None,
    dropout: Annotated[
        float | None, _option("Dropout probability.", DROPOUT, "word 0.3, char 0.1")
    ] = None,
    dropout_input: Annotated[
        float | None, _option("... of the embedded tokens.", DROPOUT, "--dropout")
    ] = None,
    dropout_hidden: Annotated[
        float | None, _option("... between two layers.", DROPOUT, "--dropout")
    ] = None,
    dropout_embedding: Annotated[
        float | None, _option("Probability of dropping a word everywhere.", DROPOUT, "0")
    ] = None,
    weight_drop: Annotated[
        float | None, _option("Probability of dropping a recurrent weight.", DROPOUT, "0")
    ] = None,
    locked: Annotated[
        bool | None,
        typer.Option(
            "--locked/--unlocked",
            help="One mask for all steps of a window.",
            rich_help_panel=DROPOUT,
            show_default="not locked",
        ),
    ] = None,
    batching: Annotated[
        Batching | None,
        _option("Windows of the whole text, or whole lines each from zero.", OPTIM, "stream"),
    ] = None,
    bptt: Annotated[
        int | None,
        _option("Tokens that gradients flow back.", OPTIM, "word 35, char 100", min=1),
    ] = None,
    random_bptt: Annotated[
        bool | None,
        typer.Option(
            "--random-bptt/--fixed-bptt",
            help="Windows of random lengths around --bptt.",
            rich_help_panel=OPTIM,
            show_default="fixed lengths",
        ),
    ] = None,
    batch: Annotated[
        int | None, _option("Rows read side by side.", OPTIM, "word 20, char 32", min=1)
    ] = None,
    accumulate: Annotated[
        int | None,
        _option("Compute a batch in so many parts, for less memory.", OPTIM, "1", min=1),
    ] = None,
    optimizer: Annotated[Optimizer | None, _option("Rule of the updates.", OPTIM, "adam")] = None,
    lr: Annotated[
        float | None, _option("First learning rate.", OPTIM, "adam 0.003, sgd 10")
    ] = None,
    momentum: Annotated[float | None, _option("Of SGD.", OPTIM, "0")] = None,
    weight_decay: Annotated[float | None, _option("Of the optimiser.", OPTIM, "0")] = None,
    schedule: Annotated[
        Schedule | None,
        _option(
            "When the rate falls: without progress, every epoch, like a cosine, or never.",
            OPTIM,
            "plateau",
        ),
    ] = None,
    decay: Annotated[
        float | None,
        _option("Factor on the rate, of plateau and step.", OPTIM, "0.25"),
    ] = None,
    plateau_patience: Annotated[
        int | None, _option("Evaluations without progress that plateau lets pass.", OPTIM, "0")
    ] = None,
    decay_after: Annotated[
        int | None, _option("Epochs before the first decay of step.", OPTIM, "1", min=1)
    ] = None,
    min_lr: Annotated[float | None, _option("Last rate of cosine.", OPTIM, "0")] = None,
    warmup: Annotated[
        int | None, _option("Updates in which the rate rises.", OPTIM, "0", min=0)
    ] = None,
    average: Annotated[
        int | None,
        _option(
            "NT-ASGD: use the mean of the weights once the validation loss is worse than the best "
            "of all but the last so many.",
            OPTIM,
            min=0,
        ),
    ] = None,
    clip: Annotated[
        float | None, _option("Largest gradient norm; 0: no limit.", OPTIM, "0.5")
    ] = None,
    clip_value: Annotated[
        float | None, _option("Largest element of the gradient; 0: no limit.", OPTIM, "no limit")
    ] = None,
    precision: Annotated[
        Precision | None,
        _option("Autocast to half precision.", OPTIM, "float32"),
    ] = None,
    label_smoothing: Annotated[
        float | None, _option("Probability spread over all tokens.", PENALTY, "0")
    ] = None,
    ar: Annotated[
        float | None, _option("Weight of the squared last outputs.", PENALTY, "0")
    ] = None,
    tar: Annotated[
        float | None, _option("Weight of their squared change in time.", PENALTY, "0")
    ] = None,
    l1: Annotated[
        list[str] | None,
        _option(
            "Weight of absolute values of parameters: NUMBER, or PATTERN=NUMBER such as "
            "'layers.*.weight_hh*=1e-6'; can be repeated.",
            PENALTY,
            callback=_patterns,
        ),
    ] = None,
    l2: Annotated[
        list[str] | None,
        _option("The same for squares.", PENALTY, callback=_patterns),
    ] = None,
    skip_gram: Annotated[
        float | None, _option("Weight of skip-gram on the embedding.", TASK, "0")
    ] = None,
    cbow: Annotated[float | None, _option("Weight of CBOW on the embedding.", TASK, "0")] = None,
    context: Annotated[
        int | None, _option("Words on either side for these two.", TASK, "5", min=1)
    ] = None,
    negatives: Annotated[
        int | None, _option("Random words per word for these two.", TASK, "5", min=1)
    ] = None,
    synonyms: Annotated[
        Path | None,
        _option("Lines of a word, a tab, and its synonyms with commas, to pull together.", TASK),
    ] = None,
    synonym_weight: Annotated[
        float, _option("Weight of the synonyms.", TASK, "0.1 with --synonyms")
    ] = 0.1,
    epochs: Annotated[
        int | None,
        _option(
            "Passes over the training part.",
            RUN,
            "word 10, char 6; no limit with --max-steps",
            min=1,
        ),
    ] = None,
    max_steps: Annotated[int | None, _option("Updates, at most.", RUN, min=1)] = None,
    eval_every: Annotated[
        int | None,
        _option("Updates between evaluations, besides the ends of epochs.", RUN, min=1),
    ] = None,
    patience: Annotated[
        int | None, _option("Stop after so many evaluations without progress.", RUN, min=1)
    ] = None,
    eval_batch: Annotated[
        int | None, _option("Rows side by side in evaluation.", RUN, "10", min=1)
    ] = None,
    save_every: Annotated[
        int | None, _option("Updates between checkpoints.", RUN, "500", min=1)
    ] = None,
    seed: Annotated[int | None, _option("Seed of everything random.", RUN, "1", min=0)] = None,
    out: Annotated[
        Path | None,
        _option("Folder for checkpoints, log and curve. Left out: nothing is saved.", RUN),
    ] = None,
    resume: Annotated[bool, _option("Go on from the checkpoint in --out, exactly.", RUN)] = False,
    tensorboard: Annotated[
        bool, _option("Write TensorBoard events to --out as well.", RUN)
    ] = False,
    device: Annotated[str | None, _option("cpu, cuda, ...", RUN, "a GPU if there is one")] = None,
    threads: Annotated[int | None, _option("CPU threads.", RUN, "torch's choice", min=1)] = None,
    layer: Annotated[
        Layer,
        _option("Our layers, torch's, or both in turn from the same start.", RUN, "ours"),
    ] = "ours",
    backend: Annotated[str | None, _option("Backend of our layers.", RUN, "automatic")] = None,
    memory: Annotated[
        Memory | None,
        _option("Whether our layers keep the gates for backward or rebuild them.", RUN, "fast"),
    ] = None,
) -> None:
    """Trains an LSTM or GRU language model on a text.

    Without any argument it takes about a minute on two CPU cores. Ctrl-C (or SIGTERM) ends it after
    the current update and saves, if --out is given; the same command with --resume then goes on as
    if nothing had happened. Under torchrun several processes share the rows of a batch.
    """
    options: dict[str, Any] = dict(ctx.params)
    explicit = {
        key: options[key]
        for key in options
        if getattr(ctx.get_parameter_source(key), "name", "") in ("COMMANDLINE", "ENVIRONMENT")
    }
    for name in ("clip", "clip_value"):
        if explicit.get(name) == 0.0:
            explicit[name] = None
    with (
        one_line_errors(),
        thread_count(threads),
        lm.stop_on_signals() as stop,
        lm.process_group() as own_device,
    ):
        world = lm.this_process().world
        options["device"] = own_device if world > 1 else _device(device)
        console = Console(quiet=lm.this_process().rank > 0)
        begin = _resume if resume else _start
        trainers = begin(options, explicit, stop)
        if out is None:
            console.print("No --out: nothing will be saved.", style="dim")
        introduce(trainers, console)
        reports = {name: Report() for name in trainers}
        logs = {name: Logs(trainer, tensorboard) for name, trainer in trainers.items()}
        try:
            show_training(trainers, reports, logs, console)
        finally:
            for log in logs.values():
                log.close()
        if stop.is_set():
            say_interrupted(trainers, out, _again(options), console)
            raise typer.Exit(128 + (stop.signal_number or 0))
        summarise(trainers, reports, console)
        if out is not None:
            console.print(f"Saved in {out}", soft_wrap=True, highlight=False)


def _device(name: str | None) -> torch.device:
    try:
        return chosen_device(name)
    except ValueError as error:
        fail(str(error))


def _again(options: dict[str, Any]) -> list[str]:
    """The arguments that a resumed training needs again."""
    words = [str(path) for path in options["text"] or ()]
    for name in ("valid", "test"):
        if options[name] is not None:
            words += [f"--{name}", str(options[name])]
    return words


def _values(explicit: dict[str, Any]) -> dict[str, Any]:
    """Every value of model, training and tokens: what was given, the preset's, the default."""
    preset = PRESETS[explicit["preset"]].values() if "preset" in explicit else {}
    unit = explicit.get("unit", preset.get("unit", "word"))
    if "tokenizer" in explicit:
        unit = "bpe"
    values = {"unit": unit, **defaults(unit), **preset, **explicit}
    values["lr"] = values.get("lr") or (10.0 if values.get("optimizer") == "sgd" else 3e-3)
    # One width per layer says how many layers there are.
    if "hidden" in explicit and "layers" not in explicit:
        if isinstance(explicit["hidden"], tuple):
            values["layers"] = len(explicit["hidden"])
    elif "layers" in explicit and isinstance(values.get("hidden"), tuple):
        fail("--layers: this preset has one width per layer; give --hidden instead")
    if "max_steps" in explicit and "epochs" not in explicit:
        values["epochs"] = None
    if isinstance(values.get("cutoffs"), int):
        values["cutoffs"] = (values["cutoffs"],)
    values["synonyms"] = explicit.get("synonym_weight", 0.1) if "synonyms" in explicit else 0.0
    return values


def _kinds(layer: str) -> list[str]:
    return ["ours", "torch"] if layer == "both" else [layer]


def _folder(out: Path, kind: str, kinds: list[str]) -> Path:
    return out / kind if len(kinds) > 1 else out


def _start(
    options: dict[str, Any], explicit: dict[str, Any], stop: lm.StopRequest
) -> dict[str, lm.Trainer]:
    values = _values(explicit)
    out = options["out"]
    kinds = _kinds(options["layer"])
    if out is not None and any(map(lm.has_checkpoint, (out, out / "ours", out / "torch"))):
        fail(f"{out} holds a checkpoint already: add --resume to go on, or choose another --out")
    vocabulary = None
    if options["tokenizer"] is not None:
        try:
            vocabulary = lm.BpeTokenizer.load(options["tokenizer"])
        except ValueError as error:
            fail(str(error))
    corpus = lm.load_corpus(
        options["text"] or None,
        unit=values["unit"],
        valid=options["valid"],
        test=options["test"],
        min_count=options["min_count"],
        max_size=options["max_vocab"],
        vocabulary=vocabulary,
    )
    synonyms = None
    if options["synonyms"] is not None:
        synonyms = lm.load_synonyms(options["synonyms"], corpus.vocabulary)
    try:
        train_config = lm.TrainConfig(**{k: values[k] for k in TRAIN_FIELDS if k in values})
        models = {}
        chosen = {key: values[key] for key in MODEL_FIELDS if key in values}
        for kind in kinds:
            # In a comparison --backend and --memory speak of our half only.
            compared = kind == "torch" and len(kinds) > 1
            own = {"backend": None, "memory": "fast"} if compared else {}
            config = lm.ModelConfig(len(corpus.vocabulary), **(chosen | own | {"layer": kind}))
            models[kind] = lm.RNNLanguageModel(config, seed=train_config.seed)
            models[kind].to(options["device"])
        if len(kinds) > 1:
            models["torch"].load_state_dict(models["ours"].state_dict())
        # What can be refused is refused before the folder is made: a text too short for the batch,
        # a backend that cannot run.
        lm.Trainer(models[kinds[0]], corpus, train_config, synonyms=synonyms)
    except lm.CorpusError:
        raise
    except ValueError as error:
        fail(str(error))
    for model in models.values():
        _try_out(model)
    return {
        kind: lm.Trainer(
            model,
            corpus,
            train_config,
            out=None if out is None else _folder(out, kind, kinds),
            stop=stop,
            synonyms=synonyms,
        )
        for kind, model in models.items()
    }


def _try_out(model: lm.RNNLanguageModel) -> None:
    token = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    with torch.random.fork_rng(devices=[]):
        model.loss(token, token)[0].backward()
    model.zero_grad(set_to_none=True)


def _resume(
    options: dict[str, Any], explicit: dict[str, Any], stop: lm.StopRequest
) -> dict[str, lm.Trainer]:
    out = options["out"]
    if out is None:
        fail("--resume needs --out, the folder of the checkpoint")
    if lm.has_checkpoint(out):
        kinds = [lm.load_checkpoint(out)["model_config"]["layer"]]
    elif lm.has_checkpoint(out / "ours") and lm.has_checkpoint(out / "torch"):
        kinds = ["ours", "torch"]
    else:
        fail(f"no checkpoint in {out}")
    found = "both" if len(kinds) > 1 else kinds[0]
    if explicit.get("layer", found) != found:
        fail(f"--layer {explicit['layer']} differs from the checkpoint in {out}, which has {found}")
    payload = lm.load_checkpoint(_folder(out, kinds[0], kinds))
    vocabulary = _saved_tokenizer(payload, out)
    _refuse_differences(payload, vocabulary, explicit, out)
    name = payload["corpus"]["name"]
    if not options["text"] and name != lm.DEFAULT_CORPUS:
        fail(f"the checkpoint in {out} was trained on {name}: give that text again")
    counted = "min_count" in explicit or "max_vocab" in explicit
    corpus = lm.load_corpus(
        options["text"] or None,
        unit=vocabulary.unit,
        valid=options["valid"],
        test=options["test"],
        min_count=options["min_count"],
        max_size=options["max_vocab"],
        vocabulary=None if counted else vocabulary,
    )
    return {
        kind: lm.Trainer.resume(
            _folder(out, kind, kinds),
            corpus,
            epochs=options["epochs"],
            max_steps=options["max_steps"],
            device=options["device"],
            stop=stop,
        )
        for kind in kinds
    }


def _saved_tokenizer(payload: dict[str, Any], out: Path) -> lm.Tokenizer:
    try:
        return lm.tokenizer_from_json(payload["tokenizer"])
    except (KeyError, TypeError, ValueError) as error:
        raise lm.CheckpointError(f"{out} does not fit this release: {error}") from error


def _refuse_differences(
    payload: dict[str, Any], vocabulary: lm.Tokenizer, explicit: dict[str, Any], out: Path
) -> None:
    try:
        model = lm.ModelConfig(**payload["model_config"])
        training = lm.TrainConfig(**payload["train_config"])
    except (TypeError, ValueError) as error:
        raise lm.CheckpointError(f"{out} does not fit this release: {error}") from error
    saved = {key: getattr(model, key) for key in _MODEL_OPTIONS}
    saved |= {key: getattr(training, key) for key in _TRAIN_OPTIONS}
    saved["unit"] = vocabulary.unit
    for key, value in saved.items():
        given = explicit.get(key)
        if key == "cutoffs" and isinstance(given, int):
            given = (given,)
        if key in explicit and given != value:
            fail(
                f"--{key.replace('_', '-')} {given} differs from the checkpoint in {out}, which "
                f"has {value}; leave it out, or start a new training in another --out"
            )
