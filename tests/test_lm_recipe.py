"""What training is made of: penalties, learning rates, averaging, precision, resuming, tasks."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from rnnlm_kernels import lm
from rnnlm_kernels.lm.auxiliary import SynonymTask, WordEmbeddingTask
from rnnlm_kernels.lm.data import random_length
from rnnlm_kernels.lm.logs import CsvLog, TensorBoardLog, read_log, save_curve
from rnnlm_kernels.lm.optim import LearningRate
from rnnlm_kernels.lm.regularization import (
    activation_penalty,
    temporal_penalty,
    weight_penalty,
)

TEXT = "the cat sat on the mat; the dog ate the cat's hat.\n" * 40
# Data that is no part of the project: beside the checkout or in it, or absent.
WORDNETS = [Path(__file__).parents[up] / "shared/data/english-wordnet" for up in (1, 2)]
WORDNET = next(filter(Path.exists, WORDNETS), None)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def corpus() -> lm.Corpus:
    return lm.corpus_from_text(TEXT, unit="char", name="cats")


def _model(corpus: lm.Corpus, **options) -> lm.RNNLanguageModel:
    sizes = {"emb": 12, "hidden": 16, "layers": 1, "dropout": 0.0}
    return lm.RNNLanguageModel(lm.ModelConfig(len(corpus.vocabulary), **(sizes | options)), seed=3)


def _config(**options) -> lm.TrainConfig:
    return lm.TrainConfig(**({"batch": 4, "bptt": 20, "max_steps": 40} | options))


def _steps(trainer: lm.Trainer) -> list[lm.StepRecord]:
    return [record for record in trainer.records() if isinstance(record, lm.StepRecord)]


def _losses(trainer: lm.Trainer) -> list[tuple]:
    return [(r.loss, r.grad_norm, r.lr, *r.parts.values()) for r in _steps(trainer)]


# Penalties


def test_activation_penalty_and_its_gradient() -> None:
    x = torch.randn(5, 3, 4, requires_grad=True)
    penalty = activation_penalty(x)
    torch.testing.assert_close(penalty, (x**2).sum() / 60)
    (gradient,) = torch.autograd.grad(penalty, x)
    torch.testing.assert_close(gradient, x * 2 / 60)


def test_temporal_penalty_and_its_gradient() -> None:
    x = torch.randn(5, 3, 4, requires_grad=True)
    penalty = temporal_penalty(x)
    by_hand = sum(((x[t + 1] - x[t]) ** 2).sum() for t in range(4)) / 48
    torch.testing.assert_close(penalty, by_hand)
    (gradient,) = torch.autograd.grad(penalty, x)
    change = x.detach().diff(dim=0)
    zero = torch.zeros(1, 3, 4)
    expected = (torch.cat([zero, change]) - torch.cat([change, zero])) * 2 / 48
    torch.testing.assert_close(gradient, expected)
    assert float(temporal_penalty(x[:1]).detach()) == 0.0


def test_temporal_penalty_of_packed_rows_stays_within_rows() -> None:
    rows = [torch.randn(length, 4) for length in (6, 3, 1)]
    packed = pack_sequence(rows)
    by_hand = torch.cat([row.diff(dim=0) for row in rows]).square().mean()
    torch.testing.assert_close(temporal_penalty(packed.data, packed.batch_sizes), by_hand)


def test_weight_penalties_take_the_named_parameters(corpus) -> None:
    model = _model(corpus)
    got = weight_penalty(model, {"layers.*.weight_hh*": 0.5}, {"*": 0.1, "head.bias": 2.0})
    expected = 0.5 * model.layers[0].weight_hh_l0.abs().sum()
    expected = expected + 0.1 * sum(p.square().sum() for p in model.parameters())
    torch.testing.assert_close(got, expected + 2.0 * model.head.bias.square().sum())
    assert weight_penalty(model, {}, {}) is None
    with pytest.raises(ValueError, match="no parameter fits 'layer"):
        weight_penalty(model, {"layer.weights": 1.0}, {})


@pytest.mark.parametrize("l1", [True, False], ids=["l1", "l2"])
def test_weight_penalties_shrink_the_weights_they_name(corpus, l1: bool) -> None:
    # Head free, so that the embedding is one thing and the recurrent weights another.
    sizes = []
    for penalty in ({}, {"layers.*.weight_hh*": 0.02}):
        model = _model(corpus, tied=False)
        config = _config(**{"l1" if l1 else "l2": penalty}, max_steps=60, lr=0.01)
        lm.Trainer(model, corpus, config).run()
        sizes.append(float(model.layers[0].weight_hh_l0.detach().abs().mean()))
    assert sizes[1] < 0.6 * sizes[0]


def test_penalties_are_in_the_gradient_and_logged_apart(corpus) -> None:
    config = _config(
        ar=2.0, tar=1.0, l2={"*": 0.01}, max_steps=1, optimizer="sgd", lr=1.0, clip=None
    )
    model, twin = _model(corpus), _model(corpus)
    (record,) = _steps(lm.Trainer(model, corpus, config))
    inputs, targets = lm.StreamBatches(corpus.train, 4, 20)[0]
    encoded = twin.encode(inputs)
    nll = twin.nll(encoded, targets) / targets.numel()
    parts = {
        "ar": 2.0 * encoded.dropped.square().mean(),
        "tar": encoded.raw.diff(dim=0).square().mean(),
        "weights": 0.01 * sum(p.square().sum() for p in twin.parameters()),
    }
    (nll + sum(parts.values())).backward()
    assert record.loss == pytest.approx(float(nll.detach()), rel=1e-6)
    assert record.parts == pytest.approx({k: float(v.detach()) for k, v in parts.items()}, rel=1e-5)
    for new, old in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old.detach() - old.grad, rtol=1e-4, atol=1e-6)


def test_activity_is_measured_after_dropout_and_change_before(corpus) -> None:
    """As in the paper: AR on the dropped, TAR on the raw outputs."""
    model = _model(corpus, dropout=0.5, dropout_input=0.0)
    encoded = model.encode(corpus.train[:20, None])
    zeros = (encoded.dropped == 0).float().mean()
    assert 0.3 < float(zeros) < 0.7
    assert float((encoded.raw == 0).float().mean()) == 0.0


def test_label_smoothing_is_in_training_and_not_in_evaluation(corpus) -> None:
    plain, smooth = (
        lm.Trainer(_model(corpus, init=0.5), corpus, _config(max_steps=1, label_smoothing=value))
        for value in (0.0, 0.2)
    )
    inputs, targets = lm.StreamBatches(corpus.train, 4, 20)[0]
    logits, _ = _model(corpus, init=0.5)(inputs)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.2)
    assert _steps(smooth)[0].loss == pytest.approx(expected.item(), rel=1e-6)
    assert _steps(plain)[0].loss != pytest.approx(expected.item(), rel=1e-3)
    fresh = lm.Trainer(_model(corpus, init=0.5), corpus, _config(label_smoothing=0.2)).score(
        "valid"
    )
    assert fresh == lm.evaluate(_model(corpus, init=0.5), corpus.valid)


def test_clipping_by_value_bounds_every_element(corpus) -> None:
    model = _model(corpus)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    config = _config(optimizer="sgd", lr=1.0, clip=None, clip_value=1e-4, max_steps=1)
    (record,) = _steps(lm.Trainer(model, corpus, config))
    changes = torch.cat(
        [
            (new.detach() - old).flatten()
            for new, old in zip(model.parameters(), before, strict=True)
        ]
    ).abs()
    assert float(changes.max()) == pytest.approx(1e-4, rel=1e-3)
    assert float((changes > 0.99e-4).float().mean()) > 0.2
    assert record.grad_norm > 0.05  # of before


# Learning rates


def _rates(steps: int, total: int = 100, **options) -> list[float]:
    parameter = nn.Parameter(torch.zeros(1))
    config = _config(optimizer="sgd", lr=2.0, **options)
    optimizer = torch.optim.SGD([parameter], lr=config.lr)
    rate = LearningRate(config, optimizer, total)
    seen = []
    for step in range(steps):
        seen.append(rate.base * rate.warm(step))
        optimizer.step()
        rate.after_update()
    return seen


def test_cosine_falls_to_its_end_and_stays() -> None:
    rates = _rates(130, schedule="cosine", min_lr=0.5)
    for step, rate in enumerate(rates):
        done = min(1.0, step / 100)
        assert rate == pytest.approx(0.5 + 0.75 * (1 + math.cos(math.pi * done)))


def test_warm_up_rises_in_equal_steps_and_multiplies_the_schedule() -> None:
    assert _rates(6, schedule="constant", warmup=4) == pytest.approx([0.5, 1, 1.5, 2, 2, 2])
    warm = _rates(60, schedule="cosine", warmup=10)
    cold = _rates(60, schedule="cosine")
    assert warm[4] == pytest.approx(cold[4] * 0.5)
    assert warm[10:] == cold[10:]


def test_step_decays_after_every_epoch_from_the_given_one(corpus) -> None:
    config = _config(schedule="step", decay=0.5, decay_after=2, max_steps=None, epochs=5, batch=40)
    rates: dict[int, set[float]] = {}
    for record in _steps(lm.Trainer(_model(corpus), corpus, config)):
        rates.setdefault(record.epoch, set()).add(record.lr)
    assert rates == {0: {3e-3}, 1: {3e-3}, 2: {1.5e-3}, 3: {7.5e-4}, 4: {3.75e-4}}


def test_plateau_waits_for_its_patience(corpus) -> None:
    config = _config(
        schedule="plateau", decay=0.5, plateau_patience=1, optimizer="sgd", lr=300.0, clip=100.0,
        epochs=8, max_steps=None, batch=40,
    )  # fmt: skip
    evaluations = [
        record
        for record in lm.Trainer(_model(corpus), corpus, config).records()
        if isinstance(record, lm.EpochRecord)
    ]
    best, bad, rate = math.inf, 0, 300.0
    for record in evaluations:
        bad = 0 if record.valid.loss < best else bad + 1
        best = min(best, record.valid.loss)
        if bad > 1:
            rate, bad = rate * 0.5, 0
        assert record.lr == rate
    assert rate < 300.0


def test_random_windows_scale_the_rate_with_their_length(corpus) -> None:
    config = _config(random_bptt=True, schedule="constant", optimizer="sgd", lr=1.0, max_steps=12)
    position = 0
    for record in _steps(lm.Trainer(_model(corpus), corpus, config)):
        length = random_length(20, config.seed, record.epoch, position)
        assert record.lr == pytest.approx(length / 20)
        assert record.tokens in (4 * length, 4 * (458 - position))
        position = 0 if record.tokens < 4 * length else position + length


@pytest.mark.parametrize("random_bptt", [False, True], ids=["fixed", "random"])
def test_every_token_of_an_epoch_is_read_once(corpus, random_bptt: bool) -> None:
    config = _config(random_bptt=random_bptt, epochs=2, max_steps=None)
    records = _steps(lm.Trainer(_model(corpus), corpus, config))
    per_epoch = (corpus.train.numel() - 1) // 4 * 4
    for epoch in (0, 1):
        assert sum(record.tokens for record in records if record.epoch == epoch) == per_epoch


def test_training_stops_early_without_progress(corpus) -> None:
    config = _config(
        optimizer="sgd", lr=300.0, clip=100.0, schedule="constant", patience=2, epochs=50,
        max_steps=None, batch=40,
    )  # fmt: skip
    seen = [
        record.improved
        for record in lm.Trainer(_model(corpus), corpus, config).records()
        if isinstance(record, lm.EpochRecord)
    ]
    assert seen[-2:] == [False, False]
    assert len(seen) < 50
    assert not any(pair == (False, False) for pair in pairwise(seen[:-1]))


def test_momentum_and_weight_decay_reach_the_optimiser(corpus) -> None:
    losses = {
        tuple(_losses(lm.Trainer(_model(corpus), corpus, _config(max_steps=6, **options)))[-1])
        for options in (
            {"optimizer": "sgd", "lr": 1.0},
            {"optimizer": "sgd", "lr": 1.0, "momentum": 0.9},
            {"optimizer": "sgd", "lr": 1.0, "weight_decay": 0.1},
            {"optimizer": "adam"},
            {"optimizer": "adam", "weight_decay": 0.1},
            {"optimizer": "adamw", "weight_decay": 0.1},
        )
    }
    assert len(losses) == 6


# Averaging


def test_averaged_weights_are_the_mean_since_the_trigger(corpus) -> None:
    # A rate so large that the validation loss soon jumps up.
    config = _config(
        optimizer="sgd", lr=100.0, clip=1.0, schedule="constant", average=1, eval_every=5,
        max_steps=60,
    )  # fmt: skip
    trainer = lm.Trainer(_model(corpus), corpus, config)
    sums, count, losses = None, 0, []
    for record in trainer.records():
        if isinstance(record, lm.StepRecord):
            if trainer.average is not None:
                now = [p.detach().clone() for p in trainer.model.parameters()]
                sums = now if sums is None else [a + b for a, b in zip(sums, now, strict=True)]
                count += 1
        else:
            losses.append((record.valid.loss, record.averaged))
    assert count > 5
    for mean, total in zip(trainer.best_model.parameters(), sums, strict=True):
        torch.testing.assert_close(mean.detach(), total / count, rtol=1e-4, atol=1e-5)
    assert trainer.best_model is not trainer.model
    assert trainer.best_model.head.weight is trainer.best_model.embedding.weight
    # The trigger is the paper's, and what is evaluated afterwards is the mean.
    plain = [loss for loss, averaged in losses if not averaged]
    assert plain[-1] > min(plain[:-2])
    assert all(plain[k] <= min(plain[: k - 1]) for k in range(2, len(plain) - 1))
    assert losses[-1][1]
    assert lm.evaluate(trainer.best_model, corpus.valid).loss == losses[-1][0]
    assert lm.evaluate(trainer.model, corpus.valid).loss != losses[-1][0]


def test_saved_model_is_the_averaged_one(corpus, tmp_path) -> None:
    config = _config(
        optimizer="sgd", lr=100.0, clip=1.0, schedule="constant", average=0, eval_every=3,
        max_steps=40,
    )  # fmt: skip
    trainer = lm.Trainer(_model(corpus), corpus, config, out=tmp_path)
    trainer.run()
    assert trainer.average is not None
    loaded, _ = lm.load_model(tmp_path, "last")
    for one, other in zip(loaded.parameters(), trainer.best_model.parameters(), strict=True):
        assert torch.equal(one, other)


# Accumulation and precision


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("batching", ["stream", "sentences"])
def test_accumulated_parts_make_the_same_updates(corpus, parts: int, batching: str) -> None:
    runs = []
    for accumulate in (1, parts):
        model = _model(corpus, attention=5, init=0.3)
        options = {"ar": 1.0, "l2": {"*": 0.01}, "batching": batching}
        config = _config(accumulate=accumulate, optimizer="sgd", lr=1.0, max_steps=12, **options)
        runs.append(torch.tensor(_losses(lm.Trainer(model, corpus, config))))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-4, atol=1e-5)


def test_accumulation_reads_less_at_once(corpus) -> None:
    model = _model(corpus)
    shapes = set()
    model.layers[0].register_forward_pre_hook(lambda _, args: shapes.add(args[0].shape[1]))
    config = _config(accumulate=2, max_steps=3)
    _steps(lm.Trainer(model, corpus, config))
    assert 2 in shapes
    assert 4 not in shapes


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_with_float32_weights(corpus, precision: str) -> None:
    model = _model(corpus)
    dtypes = set()
    model.layers[0].register_forward_hook(lambda _, args, out: dtypes.add(out[0].dtype))
    config = _config(precision=precision, lr=0.02, max_steps=60)
    losses = [record.loss for record in _steps(lm.Trainer(model, corpus, config))]
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert half in dtypes
    assert model.layers[0].weight_hh_l0.dtype == torch.float32
    assert losses[-1] < 0.7 * losses[0]
    exact = _losses(lm.Trainer(_model(corpus), corpus, _config(lr=0.02, max_steps=60)))
    assert losses[0] == pytest.approx(exact[0][0], rel=0.02)
    assert losses != [each[0] for each in exact]


def test_an_overflow_leaves_the_update_out_and_scales_less(corpus) -> None:
    model = _model(corpus)
    trainer = lm.Trainer(model, corpus, _config(precision="fp16", max_steps=3, lr=0.1))
    scale = trainer._scaler.get_scale()
    kept = model.layers[0].weight_hh_l0.detach().clone()
    hook = model.layers[0].weight_hh_l0.register_hook(lambda g: torch.full_like(g, math.inf))
    records = trainer.records()
    assert math.isinf(next(records).grad_norm)
    assert torch.equal(model.layers[0].weight_hh_l0, kept)
    assert trainer._scaler.get_scale() < scale
    hook.remove()
    next(records)
    assert not torch.equal(model.layers[0].weight_hh_l0, kept)


# Resuming


RESUMED = [
    pytest.param(
        {"random_bptt": True, "optimizer": "sgd", "lr": 3.0}, {"locked": True}, id="random-bptt"
    ),
    pytest.param({"schedule": "cosine", "warmup": 9, "eval_every": 4}, {}, id="cosine-warmup"),
    pytest.param({"schedule": "step", "optimizer": "adamw"}, {}, id="step-adamw"),
    pytest.param(
        {
            "schedule": "constant",
            "optimizer": "sgd",
            "lr": 100.0,
            "clip": 1.0,
            "average": 0,
            "eval_every": 3,
            "random_bptt": True,
        },
        {"weight_drop": 0.3, "locked": True, "dropout_embedding": 0.1},
        id="nt-asgd",
    ),
    pytest.param({"batching": "sentences"}, {}, id="sentences"),
    pytest.param({"accumulate": 3, "ar": 1.0, "tar": 1.0}, {"attention": 30}, id="attention"),
    pytest.param({"precision": "fp16", "eval_every": 3}, {}, id="fp16"),
    pytest.param({"skip_gram": 0.3, "cbow": 0.3, "synonyms": 0.2}, {"tied": False}, id="tasks"),
    pytest.param(
        {"momentum": 0.9, "optimizer": "sgd", "lr": 1.0, "plateau_patience": 1, "eval_every": 3},
        {"head": "adaptive", "cutoffs": (4, 9)},
        id="momentum-adaptive",
    ),
]


@pytest.mark.parametrize(("training", "model"), RESUMED)
@pytest.mark.parametrize("stop_at", [7, 24], ids="stop-at-{}".format)
def test_resumed_training_is_bit_identical(
    corpus, tmp_path, training: dict, model: dict, stop_at: int
) -> None:
    config = _config(max_steps=30, **training)
    model = {"dropout": 0.2} | model
    synonyms = torch.tensor([[1, 2], [3, 4]]) if "synonyms" in training else None
    whole = lm.Trainer(_model(corpus, **model), corpus, config, synonyms=synonyms)
    expected = list(whole.records())

    stop = threading.Event()
    first = lm.Trainer(
        _model(corpus, **model), corpus, config, out=tmp_path, stop=stop, synonyms=synonyms
    )
    seen = []
    for record in first.records():
        seen.append(record)
        if record.step == stop_at and isinstance(record, lm.StepRecord):
            stop.set()
    second = lm.Trainer.resume(tmp_path, corpus)
    seen += list(second.records())
    assert [_timeless(record) for record in seen] == [_timeless(record) for record in expected]
    for name, value in whole.best_model.state_dict().items():
        assert torch.equal(value, second.best_model.state_dict()[name]), name
    if "average" in training:
        assert second.average is not None


def _timeless(record) -> dict:
    return dataclasses.asdict(record) | {"seconds": None}


# Sentences


def test_sentences_start_from_zero_and_are_learnt(corpus) -> None:
    config = _config(batching="sentences", lr=0.02, clip=1.0, max_steps=150)
    trainer = lm.Trainer(_model(corpus, hidden=48), corpus, config)
    assert trainer.windows == 9  # 36 lines
    assert trainer.run().loss < 0.3
    assert trainer._state is None


def test_sentences_need_line_ends() -> None:
    endless = lm.corpus_from_text("abc " * 200, unit="char")
    with pytest.raises(lm.CorpusError, match="no line ends"):
        lm.Trainer(_model(endless), endless, _config(batching="sentences"))


# Auxiliary tasks


def test_skip_gram_is_that_of_the_definition() -> None:
    torch.manual_seed(0)
    task = WordEmbeddingTask("skip-gram", torch.ones(9), 4, context=2, negatives=3)
    nn.init.normal_(task.output.weight)
    embedding, tokens = nn.Embedding(9, 4), torch.randint(9, (6, 2))
    torch.manual_seed(5)
    got = task(embedding, tokens)
    torch.manual_seed(5)
    noise = torch.multinomial(task.noise, 36, replacement=True).view(6, 2, 3)
    total = 0.0
    for t in range(6):
        for b in range(2):
            centre = embedding.weight[tokens[t, b]]
            near = [s for s in range(t - 2, t + 3) if s != t and 0 <= s < 6]
            scores = torch.stack([task.output.weight[tokens[s, b]] @ centre for s in near])
            far = task.output.weight[noise[t, b]] @ centre
            total = total - F.logsigmoid(scores).mean() - F.logsigmoid(-far).sum()
    torch.testing.assert_close(got, total / 12)


@pytest.mark.parametrize("kind", ["skip-gram", "cbow"])
def test_word_vectors_learn_who_stands_near_whom(kind: str) -> None:
    # Numbers below 10 only ever stand near each other, and so do the others.
    torch.manual_seed(0)
    low, high = torch.randint(0, 10, (60, 20)), torch.randint(10, 20, (60, 20))
    tokens = torch.cat([low, torch.full((3, 20), -1), high])
    tokens = torch.where(torch.arange(20) % 2 == 0, tokens, tokens.flip(0))
    embedding = nn.Embedding(20, 8)
    task = WordEmbeddingTask(kind, torch.ones(20), 8, context=3)
    optimizer = torch.optim.Adam([*embedding.parameters(), *task.parameters()], lr=0.05)
    first = task(embedding, tokens).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = task(embedding, tokens)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.9 * first
    unit = F.normalize(embedding.weight, dim=1)
    similarity = unit @ unit.T
    near = (similarity[:10, :10].sum() - 10) / 90
    assert near.item() > similarity[:10, 10:].mean().item() + 0.2


def test_random_words_are_drawn_by_frequency_to_three_quarters() -> None:
    task = WordEmbeddingTask("cbow", torch.tensor([16.0, 81.0, 0.0]), 2)
    torch.testing.assert_close(task.noise[:2] / task.noise[0], torch.tensor([1.0, 27 / 8]).double())


def test_positions_after_a_row_do_not_count() -> None:
    torch.manual_seed(0)
    task = WordEmbeddingTask("cbow", torch.ones(9), 4, context=2)
    nn.init.normal_(task.output.weight)
    embedding, tokens = nn.Embedding(9, 4), torch.randint(9, (5, 1))
    padded = torch.cat([tokens, torch.full((4, 1), -1)])
    expected = torch.zeros(())
    real = []
    for t in range(5):
        near = [s for s in range(t - 2, t + 3) if s != t and 0 <= s < 5]
        real.append(embedding.weight[tokens[near, 0]].mean(0))
    torch.manual_seed(1)
    got = task(embedding, padded)
    torch.manual_seed(1)
    noise = torch.multinomial(task.noise, 9 * 5, replacement=True).view(9, 1, 5)
    for t in range(5):
        expected = expected - F.logsigmoid(real[t] @ task.output.weight[tokens[t, 0]])
        expected = expected - F.logsigmoid(-(task.output.weight[noise[t, 0]] @ real[t])).sum()
    torch.testing.assert_close(got, expected / 5)


def test_synonyms_come_nearer_and_are_recalled() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(60, 16)
    pairs = torch.arange(20).view(10, 2)
    task = SynonymTask(pairs, batch=32)
    before = lm.synonym_recall(embedding.weight, pairs, k=3)
    optimizer = torch.optim.Adam(embedding.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        task(embedding).backward()
        optimizer.step()
    assert lm.synonym_recall(embedding.weight, pairs, k=3) > before + 0.5


def test_recall_counts_neighbours_from_either_side() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    assert lm.synonym_recall(weight, torch.tensor([[0, 1]]), k=1) == 1.0
    # 2 is the third of 3, and 3 the last of 2.
    assert lm.synonym_recall(weight, torch.tensor([[0, 1], [2, 3]]), k=1) == 0.75
    assert lm.synonym_recall(weight, torch.tensor([[0, 3]]), k=1) == 0.0
    assert lm.synonym_recall(weight, torch.tensor([[0, 3]]), k=99) == 1.0


def test_synonym_files_are_read(tmp_path) -> None:
    tokenizer = lm.Vocabulary("word", ["<unk>", "big", "large", "great", "small"])
    path = tmp_path / "synonyms.tsv"
    path.write_text("# words\nbig\tadj\tlarge, great,huge\n\nlarge\tbig\nabsent\tsmall\n")
    assert lm.load_synonyms(path, tokenizer).tolist() == [[1, 2], [1, 3]]
    path.write_text("big large\n")
    with pytest.raises(lm.CorpusError, match="line 1: no tab"):
        lm.load_synonyms(path, tokenizer)
    path.write_text("absent\tsmall\n")
    with pytest.raises(lm.CorpusError, match="no pair of synonyms"):
        lm.load_synonyms(path, tokenizer)


@pytest.mark.skipif(WORDNET is None, reason="the synonyms of Open English WordNet are absent")
def test_wordnet_synonyms_are_read() -> None:
    words = ["<unk>", "ace", "crack", "first-rate", "super", "hat", "top"]
    tokenizer = lm.Vocabulary("word", words)
    assert WORDNET is not None
    pairs = lm.load_synonyms(WORDNET / "synonyms_single_word.tsv", tokenizer)
    found = {tuple(tokenizer.token(number) for number in pair) for pair in pairs.tolist()}
    assert ("ace", "super") in found
    assert ("ace", "crack") in found
    assert not any("hat" in pair for pair in found)


@pytest.mark.parametrize("task", ["skip_gram", "cbow", "synonyms"])
def test_tasks_train_the_language_models_embedding(corpus, task: str) -> None:
    trained = []
    for weight in (0.0, 1.0):
        model = _model(corpus)
        # The other vectors of skip-gram and CBOW are zero at the first update.
        config = _config(max_steps=2, **{task: weight})
        trainer = lm.Trainer(model, corpus, config, synonyms=torch.tensor([[1, 2]]))
        record = _steps(trainer)[-1]
        trained.append(model.embedding.weight.detach().clone())
        assert set(record.parts) == ({task.replace("_", "-")} if weight else set())
        assert list(record.parts) == trainer.parts
    assert not torch.equal(*trained)


def test_the_synonym_task_needs_pairs(corpus) -> None:
    with pytest.raises(ValueError, match="needs pairs"):
        lm.Trainer(_model(corpus), corpus, _config(synonyms=0.1))


# Logs


def test_csv_log_has_every_record_and_a_resumed_run_none_twice(corpus, tmp_path) -> None:
    path = tmp_path / "metrics.csv"
    config = _config(max_steps=12, eval_every=5, ar=1.0)
    trainer = lm.Trainer(_model(corpus), corpus, config)
    log = CsvLog(path, trainer.parts)
    records = list(trainer.records())
    for record in records:
        log.add(record)
    log.close()
    rows = read_log(path)
    assert [int(row["step"]) for row in rows] == [record.step for record in records]
    assert [float(row["loss"]) for row in rows if row["loss"]] == [
        record.loss for record in records if isinstance(record, lm.StepRecord)
    ]
    assert all(row["ar"] for row in rows if row["loss"])
    assert sum(bool(row["valid_loss"]) for row in rows) == 3
    again = CsvLog(path, trainer.parts, step=7)
    again.add(records[-1])
    again.close()
    assert [int(row["step"]) for row in read_log(path)] == [1, 2, 3, 4, 5, 5, 6, 7, 12]


def test_curve_is_drawn(corpus, tmp_path) -> None:
    log = CsvLog(tmp_path / "metrics.csv")
    for record in lm.Trainer(_model(corpus), corpus, _config(max_steps=5)).records():
        log.add(record)
    log.close()
    save_curve(log.path, tmp_path / "curve.png", "cats")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_events_hold_the_losses(corpus, tmp_path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    log = TensorBoardLog(tmp_path)
    records = list(lm.Trainer(_model(corpus), corpus, _config(max_steps=5)).records())
    for record in records:
        log.add(record)
    log.close()
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    values = [event.value for event in events.Scalars("train/loss")]
    assert values == pytest.approx([record.loss for record in records[:5]], rel=1e-6)
    assert len(events.Scalars("valid/loss")) == 1
