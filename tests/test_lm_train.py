"""Model, evaluation, training loop and checkpoints of the language model."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rnnlm_kernels import lm
from rnnlm_kernels.lm import trainer as trainer_module
from rnnlm_kernels.lm.model import detach_state
from rnnlm_kernels.lm.optim import make_optimizer

TEXT = "the cat sat on the mat; the dog ate the cat's hat.\n" * 40
DOCS = Path(__file__).parents[1] / "docs" / "training.md"

LAYERS = pytest.mark.parametrize("layer", ["ours", "torch"])
CELLS = pytest.mark.parametrize(
    "cell",
    [
        pytest.param({"cell": "lstm"}, id="lstm"),
        pytest.param({"cell": "gru"}, id="gru"),
        pytest.param({"cell": "gru", "reset": "before"}, id="gru-before"),
    ],
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # These models are so small that a second thread only waits.
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


@pytest.fixture(scope="module")
def corpus() -> lm.Corpus:
    return lm.corpus_from_text(TEXT, unit="char", name="cats")


def _model(corpus: lm.Corpus, **options) -> lm.RNNLanguageModel:
    sizes = {"emb": 12, "hidden": 16, "layers": 2, "dropout": 0.2}
    return lm.RNNLanguageModel(lm.ModelConfig(len(corpus.vocabulary), **(sizes | options)), seed=3)


def _config(**options) -> lm.TrainConfig:
    return lm.TrainConfig(**({"batch": 4, "bptt": 20, "max_steps": 40, "save_every": 7} | options))


def _losses(trainer: lm.Trainer) -> list[tuple[float, float, float]]:
    steps = [record for record in trainer.records() if isinstance(record, lm.StepRecord)]
    return [(record.loss, record.grad_norm, record.lr) for record in steps]


def _checkpoint_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@LAYERS
@CELLS
def test_model_shapes_and_carried_state(corpus, layer: str, cell: dict) -> None:
    if layer == "torch" and cell.get("reset") == "before":
        with pytest.raises(ValueError, match=r"torch\.nn\.GRU has no reset='before'"):
            _model(corpus, layer=layer, **cell)
        return
    model = _model(corpus, layer=layer, **cell).eval()
    tokens = corpus.train[:36].view(2, 18).T
    logits, state = model(tokens)
    assert logits.shape == (18, 2, len(corpus.vocabulary))
    first, middle = model(tokens[:7])
    second, last = model(tokens[7:], middle)
    torch.testing.assert_close(torch.cat([first, second]), logits)
    for one, other in zip(last, state, strict=True):
        torch.testing.assert_close(one, other)


def test_both_kinds_of_layer_share_names_and_first_values(corpus) -> None:
    ours, theirs = _model(corpus, layer="ours"), _model(corpus, layer="torch")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_our_layers_train_like_those_of_torch(corpus, cell: str) -> None:
    ours, theirs = (
        _losses(lm.Trainer(_model(corpus, layer=layer, cell=cell), corpus, _config()))
        for layer in ("ours", "torch")
    )
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-4)


def test_tied_head_is_the_embedding(corpus) -> None:
    tied, free = _model(corpus, tied=True), _model(corpus, tied=False)
    assert tied.head.weight is tied.embedding.weight
    assert free.head.weight is not free.embedding.weight
    size = len(corpus.vocabulary)
    # Tied: a map from 16 to 12 wide instead of a second matrix over the vocabulary.
    assert tied.parameter_count() - free.parameter_count() == (16 * 12 + 12) - 16 * size
    with torch.no_grad():
        tied.embedding.weight.zero_()
        logits, _ = tied(corpus.train[:5, None])
    assert torch.equal(logits, torch.zeros_like(logits))


def test_seeded_model_leaves_the_global_random_state(corpus) -> None:
    before = torch.get_rng_state()
    one, other = _model(corpus), _model(corpus)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.embedding.weight, other.embedding.weight)


def test_detached_state_has_the_values_and_no_history(corpus) -> None:
    _, state = _model(corpus)(corpus.train[:5, None])
    for (h, c), (h_cut, c_cut) in zip(state, detach_state(state), strict=True):
        assert torch.equal(h, h_cut)
        assert torch.equal(c, c_cut)
        assert h.requires_grad
        assert not h_cut.requires_grad
        assert not c_cut.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "hidden"),
        ({"dropout": 1.0}, "dropout"),
        ({"cell": "rnn"}, "cell"),
        ({"layer": "theirs"}, "layer"),
        ({"cell": "lstm", "reset": "before"}, "reset"),
        ({"layer": "torch", "backend": "cpu"}, "backend"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_impossible_models_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lm.ModelConfig(10, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": None}, "needs an end"),
        ({"batch": 0}, "batch"),
        ({"lr": math.nan}, "lr"),
        ({"clip": 0.0}, "clip"),
        ({"decay": 0.0}, "decay"),
        ({"optimizer": "lbfgs"}, "optimizer"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_impossible_trainings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(**options)


@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_perplexity_of_a_uniform_model_is_the_vocabulary_size(corpus, batch: int) -> None:
    model = _model(corpus)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    score = lm.evaluate(model, corpus.valid, batch=batch, bptt=7)
    assert score.tokens == corpus.valid.numel() - 1
    assert score.perplexity == pytest.approx(len(corpus.vocabulary), rel=1e-5)
    assert score.bits == pytest.approx(math.log2(len(corpus.vocabulary)), rel=1e-5)


def test_evaluation_is_the_sum_over_the_whole_text_at_once(corpus) -> None:
    model = _model(corpus).train()
    score = lm.evaluate(model, corpus.valid, batch=1, bptt=9)
    assert model.training
    with torch.no_grad():
        logits, _ = model.eval()(corpus.valid[:-1, None])
    log_p = logits[:, 0].log_softmax(-1).gather(1, corpus.valid[1:, None])
    assert score.total == pytest.approx(-float(log_p.sum()), rel=1e-5)


@LAYERS
def test_a_tiny_text_is_learnt_by_heart(corpus, layer: str) -> None:
    model = _model(corpus, layer=layer, layers=1, hidden=48, dropout=0.0)
    # One row in evaluation: ten short ones would mostly measure ten cold starts.
    config = _config(lr=0.02, clip=1.0, max_steps=200, eval_batch=1)
    score = lm.Trainer(model, corpus, config).run()
    baseline = lm.unigram_loss(corpus.train, corpus.valid, len(corpus.vocabulary))
    assert baseline > 2.3
    assert score.loss < 0.25


def test_sgd_learns_too(corpus) -> None:
    model = _model(corpus, layers=1, hidden=32, dropout=0.0)
    trainer = lm.Trainer(model, corpus, _config(optimizer="sgd", lr=5.0, max_steps=200))
    assert trainer.run().loss < 0.8 * lm.unigram_loss(
        corpus.train, corpus.valid, len(corpus.vocabulary)
    )


def test_clipping_bounds_the_update_and_reports_the_norm_before_it(corpus) -> None:
    model = _model(corpus)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    config = _config(optimizer="sgd", lr=1.0, clip=1e-3, max_steps=1)
    record = next(lm.Trainer(model, corpus, config).records())
    squared = sum(
        float((new.detach() - old).double().square().sum())
        for new, old in zip(model.parameters(), before, strict=True)
    )
    assert record.grad_norm > 0.05
    assert math.sqrt(squared) == pytest.approx(1e-3, rel=1e-2)


def test_a_clip_that_nothing_reaches_changes_no_bit(corpus) -> None:
    weights, norms = [], []
    for clip in (None, 1e6):
        trainer = lm.Trainer(model := _model(corpus), corpus, _config(clip=clip, max_steps=3))
        records = [r for r in trainer.records() if isinstance(r, lm.StepRecord)]
        norms.append([record.grad_norm for record in records])
        weights.append([p.detach() for p in model.parameters()])
    assert norms[0] == norms[1]
    assert all(map(torch.equal, *weights))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_fused_updates_are_those_of_torchs_separate_operations(corpus, optimizer: str) -> None:
    config = _config(optimizer=optimizer, weight_decay=0.01)
    parameters = list(_model(corpus).parameters())
    ours = make_optimizer(config, parameters)
    assert ours.param_groups[0]["fused"]
    plain = copy.deepcopy(parameters)
    theirs = type(ours)(plain, lr=config.lr, weight_decay=config.weight_decay, fused=False)
    for _ in range(3):
        for parameter, other in zip(parameters, plain, strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.grad = parameter.grad.clone()
        ours.step()
        theirs.step()
    for parameter, other in zip(parameters, plain, strict=True):
        torch.testing.assert_close(parameter, other)


def test_records_count_every_token_of_an_epoch(corpus) -> None:
    trainer = lm.Trainer(_model(corpus), corpus, _config(max_steps=None, epochs=2))
    records = list(trainer.records())
    steps = [record for record in records if isinstance(record, lm.StepRecord)]
    epochs = [record for record in records if isinstance(record, lm.EpochRecord)]
    per_epoch = (corpus.train.numel() - 1) // 4 * 4
    assert [record.step for record in steps] == list(range(1, trainer.total_steps + 1))
    assert sum(record.tokens for record in steps) == 2 * per_epoch
    assert [record.epoch for record in epochs] == [0, 1]
    assert records[-1] is epochs[-1]
    assert epochs[0].valid.tokens == corpus.valid.numel() - 1


def test_learning_rate_falls_when_validation_does_not_improve(corpus) -> None:
    # A learning rate so large that the loss jumps up and down.
    config = _config(optimizer="sgd", lr=300.0, clip=100.0, epochs=4, max_steps=None, decay=0.5)
    records = list(lm.Trainer(_model(corpus), corpus, config).records())
    epochs = [record for record in records if isinstance(record, lm.EpochRecord)]
    best, rate = math.inf, 300.0
    for record in epochs:
        assert record.improved == (record.valid.loss < best)
        rate *= 1.0 if record.improved else 0.5
        assert record.lr == rate
        best = min(best, record.valid.loss)
    assert not all(record.improved for record in epochs)


def test_hidden_state_is_carried_to_the_next_window(corpus) -> None:
    trainer = lm.Trainer(_model(corpus, dropout=0.0), corpus, _config(max_steps=2))
    records = trainer.records()
    next(records)
    batches = lm.StreamBatches(corpus.train, 4, 20)
    (inputs, targets), (state, cold) = batches[1], (trainer._state, None)
    expected, without = (
        float(trainer.model.loss(inputs, targets, each)[0].detach()) / targets.numel()
        for each in (state, cold)
    )
    loss = next(records).loss
    assert loss == pytest.approx(expected, rel=1e-6)
    assert loss != pytest.approx(without, rel=1e-6)


def test_dropout_is_independent_of_what_the_caller_draws(corpus) -> None:
    quiet = _losses(lm.Trainer(_model(corpus), corpus, _config(max_steps=5)))
    noisy = []
    for record in lm.Trainer(_model(corpus), corpus, _config(max_steps=5)).records():
        torch.manual_seed(0)
        if isinstance(record, lm.StepRecord):
            noisy.append((record.loss, record.grad_norm, record.lr))
    assert noisy == quiet
    other = _losses(lm.Trainer(_model(corpus), corpus, _config(max_steps=5, seed=9)))
    assert other != quiet


@pytest.mark.parametrize(
    ("options", "optimizer"),
    [
        pytest.param({"cell": "lstm"}, "adam", id="lstm-adam"),
        pytest.param({"cell": "lstm"}, "sgd", id="lstm-sgd"),
        pytest.param({"cell": "gru"}, "adam", id="gru-adam"),
        pytest.param({"cell": "gru", "reset": "before"}, "adam", id="gru-before-adam"),
        pytest.param({"cell": "lstm", "layer": "torch"}, "adam", id="torch-lstm-adam"),
    ],
)
# Windows of 23 in an epoch: within the first, at its end before it is closed, and in the second.
@pytest.mark.parametrize("stop_at", [5, 23, 30], ids="stop-at-{}".format)
def test_resumed_training_is_bit_identical(
    corpus, tmp_path, options: dict, optimizer: str, stop_at: int
) -> None:
    config = _config(optimizer=optimizer, lr=0.05, max_steps=35)

    whole = lm.Trainer(_model(corpus, **options), corpus, config)
    assert whole.windows == 23
    expected = _losses(whole)

    stop = threading.Event()
    first = lm.Trainer(_model(corpus, **options), corpus, config, out=tmp_path, stop=stop)
    seen = []
    for record in first.records():
        if isinstance(record, lm.StepRecord):
            seen.append((record.loss, record.grad_norm, record.lr))
            if record.step == stop_at:
                stop.set()
    assert len(seen) == stop_at
    torch.rand(3)  # what happens in between must not matter
    second = lm.Trainer.resume(tmp_path, corpus)
    assert second.step == stop_at
    assert seen + _losses(second) == expected
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_resumed_training_can_be_given_a_later_end(corpus, tmp_path) -> None:
    expected = _losses(lm.Trainer(_model(corpus), corpus, _config(max_steps=50)))
    first = lm.Trainer(_model(corpus), corpus, _config(max_steps=23), out=tmp_path)
    seen = _losses(first)
    assert lm.Trainer.resume(tmp_path, corpus).done
    assert seen + _losses(lm.Trainer.resume(tmp_path, corpus, max_steps=50)) == expected


def test_loaded_model_scores_like_the_trained_one(corpus, tmp_path) -> None:
    trainer = lm.Trainer(_model(corpus), corpus, _config(max_steps=5), out=tmp_path)
    score = trainer.run()
    assert _checkpoint_files(tmp_path) == [lm.CHECKPOINT_NAME, "step-00000005"]
    model, vocabulary = lm.load_model(tmp_path)
    assert not model.training
    assert vocabulary == corpus.vocabulary
    assert lm.evaluate(model, corpus.valid) == score
    assert lm.load_model(tmp_path / "step-00000005")[1] == vocabulary


def test_a_second_training_does_not_overwrite_the_first(corpus, tmp_path) -> None:
    lm.Trainer(_model(corpus), corpus, _config(max_steps=1), out=tmp_path).run()
    before = (tmp_path / lm.CHECKPOINT_NAME).read_bytes()
    with pytest.raises(lm.CheckpointError, match="exists already"):
        lm.Trainer(_model(corpus), corpus, _config(max_steps=1), out=tmp_path)
    assert (tmp_path / lm.CHECKPOINT_NAME).read_bytes() == before


def test_checkpoint_of_another_text_or_vocabulary_is_refused(corpus, tmp_path) -> None:
    lm.Trainer(_model(corpus), corpus, _config(max_steps=1), out=tmp_path).run()
    other = lm.corpus_from_text(TEXT + "x", unit="char", name="dogs")
    with pytest.raises(lm.CheckpointError, match=r"another text: cats .* not dogs"):
        lm.Trainer.resume(tmp_path, other)
    smaller = lm.corpus_from_text(TEXT, unit="char", max_size=5)
    with pytest.raises(lm.CheckpointError, match=r"another vocabulary \(char, \d+ tokens\)"):
        lm.Trainer.resume(tmp_path, smaller)
    with pytest.raises(lm.CheckpointError, match="another vocabulary"):
        lm.Trainer.resume(tmp_path, lm.corpus_from_text(TEXT, unit="word"))


def test_checkpoint_with_other_weights_is_refused(corpus, tmp_path) -> None:
    trainer = lm.Trainer(_model(corpus), corpus, _config(max_steps=1), out=tmp_path)
    trainer.run()
    payload = trainer._payload()
    payload["model_config"] = payload["model_config"] | {"hidden": 17}
    lm.save_checkpoint(payload, tmp_path)
    with pytest.raises(lm.CheckpointError, match="does not fit"):
        lm.Trainer.resume(tmp_path, corpus)


def test_model_of_another_vocabulary_is_refused(corpus) -> None:
    model = lm.RNNLanguageModel(lm.ModelConfig(5, emb=4, hidden=4))
    with pytest.raises(ValueError, match="vocab_size=5"):
        lm.Trainer(model, corpus, _config())


def test_text_too_short_for_the_batch_is_refused(corpus) -> None:
    with pytest.raises(lm.CorpusError, match="cannot fill 5000 rows"):
        lm.Trainer(_model(corpus), corpus, _config(batch=5000))


def test_loss_that_is_not_finite_stops_before_the_update(corpus, tmp_path) -> None:
    trainer = lm.Trainer(_model(corpus), corpus, _config(max_steps=9), out=tmp_path)
    records = trainer.records()
    for _ in range(7):  # the last of them is saved when the next is asked for
        next(records)
    next(records)
    with torch.no_grad():
        trainer.model.head.bias[0] = math.nan
    kept = trainer.model.layers[0].weight_hh_l0.detach().clone()
    with pytest.raises(lm.DivergenceError, match=r"update 9: loss nan.*learning rate"):
        next(records)
    assert torch.equal(trainer.model.layers[0].weight_hh_l0, kept)
    assert lm.load_checkpoint(tmp_path)["step"] == 7


def test_records_are_logged_nowhere(corpus, tmp_path, capsys) -> None:
    lm.Trainer(_model(corpus), corpus, _config(max_steps=25), out=tmp_path).run()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_config_survives_the_checkpoint(corpus, tmp_path) -> None:
    model = _model(corpus, cell="gru", reset="before", tied=False)
    config = _config(max_steps=1, seed=8, clip=0.75)
    lm.Trainer(model, corpus, config, out=tmp_path).run()
    resumed = lm.Trainer.resume(tmp_path, corpus)
    assert resumed.config == config
    assert resumed.model.config == model.config
    assert dataclasses.asdict(resumed.model.config)["reset"] == "before"


def test_public_names_exist() -> None:
    assert all(hasattr(lm, name) for name in lm.__all__)
    assert trainer_module.Trainer is lm.Trainer


@pytest.mark.parametrize(
    "code",
    re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL),
    ids=lambda code: code.splitlines()[0].strip("# ").replace(" ", "-"),
)
def test_documentation_runs(code: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(DOCS), "exec"), {})
