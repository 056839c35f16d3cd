"""The model: dropout of every kind, attention, heads, cache, packed sentences."""

from __future__ import annotations

import ast
import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import rnnlm_kernels
from rnnlm_kernels import lm
from rnnlm_kernels.lm.attention import WindowedAttention
from rnnlm_kernels.lm.cache import ContinuousCache
from rnnlm_kernels.lm.dropout import (
    LockedDropout,
    call_with_dropped_weights,
    embed_with_dropped_rows,
)
from rnnlm_kernels.lm.heads import AdaptiveHead, LinearHead, TiedAdaptiveHead, rows_at_once
from rnnlm_kernels.ops import linear_cross_entropy as operator

V = 23


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    torch.manual_seed(0)


def _model(**options) -> lm.RNNLanguageModel:
    sizes = {"emb": 8, "hidden": 12, "layers": 2, "dropout": 0.0}
    return lm.RNNLanguageModel(lm.ModelConfig(V, **(sizes | options)), seed=3)


def _tokens(steps: int, batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(V, (steps, batch), generator=torch.Generator().manual_seed(seed))


# Repeated tokens


@pytest.fixture
def _sought(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that repeat are sought, however little there is to gain."""
    monkeypatch.setattr("rnnlm_kernels.lm.model._LITTLE_WORK", 1)
    monkeypatch.setattr("rnnlm_kernels.lm.model._WORK_OF_A_GATE", 1)


def _projected_rows(model: lm.RNNLanguageModel) -> list[int]:
    """Collects the rows that the first layer projects in every call of a model."""
    counts: list[int] = []

    def count(layer: nn.Module, args: tuple, options: dict) -> None:
        given = args[0] if isinstance(args[0], torch.Tensor) else args[0].data
        counts.append(given.shape[:-1].numel())
        assert ("index" in options) == (given.dim() == 2 and isinstance(args[0], torch.Tensor))

    model.layers[0].register_forward_pre_hook(count, with_kwargs=True)
    return counts


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cell": "gru", "reset": "before", "layers": 1},
        {"weight_drop": 0.5, "dropout_embedding": 0.3, "dropout_hidden": 0.4},
    ],
    ids=["lstm", "gru-before", "dropout"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_tokens_are_projected_once(
    options: dict, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(**options).double()
    tokens: Any = _tokens(20, 3)
    if packed:
        tokens = pack_sequence([tokens[:n, 0] for n in (9, 20, 4)], enforce_sorted=False)
    numbers = tokens.data if packed else tokens
    monkeypatch.setattr("rnnlm_kernels.lm.model._WORK_OF_A_GATE", 1)
    found = []
    for little, rows in ((10**9, numbers.numel()), (1, numbers.unique().numel())):
        monkeypatch.setattr("rnnlm_kernels.lm.model._LITTLE_WORK", little)
        counts = _projected_rows(model)
        torch.manual_seed(5)
        loss, state = model.loss(tokens, tokens)
        assert counts[-1] == rows
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append((loss, state, gradients))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.usefixtures("_sought")
def test_positions_that_dropout_makes_differ_are_projected_by_themselves() -> None:
    model, tokens = _model(dropout_input=0.5), _tokens(20, 3)
    counts = _projected_rows(model)
    model(tokens)
    model.eval()(tokens)
    assert counts == [tokens.numel(), tokens.unique().numel()]


@pytest.mark.usefixtures("_sought")
def test_little_memory_is_not_spent_on_gates_of_all_positions() -> None:
    model, tokens = _model(memory="low"), _tokens(20, 3)
    counts = _projected_rows(model)
    model(tokens)
    with torch.no_grad():
        model(tokens)
    assert counts == [tokens.numel(), tokens.unique().numel()]


@pytest.mark.usefixtures("_sought")
def test_different_tokens_are_not_looked_up() -> None:
    model, tokens = _model(), torch.arange(V).view(V, 1)
    counts = _projected_rows(model)
    model(tokens)
    assert counts == [V]


@pytest.mark.usefixtures("_sought")
def test_a_model_that_is_compiled_does_not_look_at_tokens() -> None:
    model, tokens = _model(), _tokens(20, 3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens)[0], model(tokens)[0])


# Dropout


def test_locked_mask_is_the_same_at_every_step_and_differs_between_rows() -> None:
    x = torch.ones(50, 4, 200)
    y = LockedDropout(0.4)(x)
    assert bool((y == y[0]).all())
    assert not torch.equal(y[0, 0], y[0, 1])
    assert sorted(y.unique().tolist()) == pytest.approx([0.0, 1 / 0.6])
    assert float((y == 0).float().mean()) == pytest.approx(0.4, abs=0.05)


def test_locked_mask_of_packed_rows_is_the_same_at_every_step() -> None:
    rows = torch.tensor([0, 1, 2, 0, 1, 0])
    y = LockedDropout(0.5)(torch.ones(6, 100), rows)
    assert torch.equal(y[0], y[3])
    assert torch.equal(y[0], y[5])
    assert torch.equal(y[1], y[4])
    assert not torch.equal(y[0], y[1])


def test_masks_change_from_call_to_call_and_end_in_evaluation() -> None:
    dropout, x = LockedDropout(0.5), torch.ones(3, 2, 50)
    assert not torch.equal(dropout(x), dropout(x))
    assert torch.equal(dropout.eval()(x), x)


def test_dropped_words_are_zero_wherever_they_stand() -> None:
    embedding = nn.Embedding(V, 6)
    tokens = _tokens(60, 5)
    vectors = embed_with_dropped_rows(embedding, tokens, 0.3)
    dropped = {int(n) for n in tokens[(vectors == 0).all(-1)]}
    assert 0 < len(dropped) < V
    for number in range(V):
        here = vectors[tokens == number]
        expected = 0.0 if number in dropped else embedding.weight[number] / 0.7
        torch.testing.assert_close(here, torch.zeros_like(here) + expected)
    embedding.eval()
    assert torch.equal(embed_with_dropped_rows(embedding, tokens, 0.3), embedding(tokens))


LAYERS = pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: rnnlm_kernels.LSTM(5, 7), id="our-lstm"),
        pytest.param(lambda: rnnlm_kernels.GRU(5, 7), id="our-gru"),
        pytest.param(lambda: rnnlm_kernels.GRU(5, 7, reset="before"), id="our-gru-before"),
        pytest.param(lambda: nn.LSTM(5, 7), id="torch-lstm"),
        pytest.param(lambda: nn.GRU(5, 7), id="torch-gru"),
    ],
)


@LAYERS
def test_weight_drop_uses_masked_recurrent_weights_and_keeps_the_layer(make) -> None:
    layer, x = make(), torch.randn(6, 3, 5)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    torch.manual_seed(1)
    y, _ = call_with_dropped_weights(layer, 0.4, x)
    torch.manual_seed(1)
    mask = nn.functional.dropout(torch.ones_like(layer.weight_hh_l0), 0.4)
    by_hand = copy.deepcopy(layer)
    with torch.no_grad():
        by_hand.weight_hh_l0.mul_(mask)
    torch.testing.assert_close(y, by_hand(x)[0])
    # The gradient reaches the very parameter, through the mask.
    y.sum().backward()
    by_hand(x)[0].sum().backward()
    torch.testing.assert_close(layer.weight_hh_l0.grad, by_hand.weight_hh_l0.grad * mask)
    torch.testing.assert_close(layer.weight_ih_l0.grad, by_hand.weight_ih_l0.grad)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


@LAYERS
def test_weight_drop_survives_cycles_copies_and_saving(make) -> None:
    """salesforce/awd-lstm-lm on today's torch: the second pass in training raises, deepcopy fails,
    the state_dict has another name."""
    layer, x = make(), torch.randn(6, 3, 5)
    plain = layer(x)[0]
    for _ in range(3):
        layer.train()
        assert not torch.equal(call_with_dropped_weights(layer, 0.5, x)[0], plain)
        layer.eval()
        assert torch.equal(call_with_dropped_weights(layer, 0.5, x)[0], plain)
    copied = copy.deepcopy(layer.train())
    call_with_dropped_weights(copied, 0.5, x)
    names = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    assert list(copied.state_dict()) == names
    assert [name for name, _ in copied.named_parameters()] == names
    fresh = (nn.LSTM if "LSTM" in type(layer).__name__ else nn.GRU)(5, 7)
    fresh.load_state_dict(copied.state_dict())


def test_evaluation_is_exact_however_much_is_dropped_in_training() -> None:
    plain = _model()
    dropping = _model(
        dropout=0.5, dropout_input=0.3, dropout_hidden=0.2, dropout_embedding=0.2,
        weight_drop=0.6, locked=True,
    )  # fmt: skip
    dropping.load_state_dict(plain.state_dict())
    tokens = _tokens(9, 4)
    assert not torch.equal(dropping(tokens)[0], plain(tokens)[0])
    assert torch.equal(dropping.eval()(tokens)[0], plain(tokens)[0])


@pytest.mark.parametrize(
    "place", ["dropout", "dropout_input", "dropout_hidden", "dropout_embedding", "weight_drop"]
)
def test_every_dropout_does_something_on_its_own(place: str) -> None:
    others = {"dropout_input": 0.0, "dropout_hidden": 0.0}
    model = _model(locked=True, **(others | {place: 0.5}))
    tokens = _tokens(9, 4)
    one, other = model(tokens)[0], model(tokens)[0]
    assert not torch.equal(one, other)
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])


def test_layers_may_have_widths_of_their_own() -> None:
    model = _model(hidden=(16, 10, 8), layers=3)
    assert model.config.layers == 3
    assert [layer.hidden_size for layer in model.layers] == [16, 10, 8]
    assert isinstance(model.projection, nn.Identity)  # the last width is the embedding's
    assert model(_tokens(4, 2))[0].shape == (4, 2, V)
    with pytest.raises(ValueError, match="hidden names 2 widths, layers is 3"):
        _model(hidden=(4, 4), layers=3)


def test_first_values_lie_within_init() -> None:
    model = _model(init=0.05)
    largest = max(float(parameter.detach().abs().max()) for parameter in model.parameters())
    assert 0.04 < largest <= 0.05


# Attention


def test_attention_starts_as_the_identity() -> None:
    x = torch.randn(6, 2, 8)
    assert torch.equal(WindowedAttention(8, 3)(x)[0], x)


def _trained_attention(window: int, heads: int = 2) -> WindowedAttention:
    torch.manual_seed(0)
    attention = WindowedAttention(8, window, heads)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attention


def test_attention_is_that_of_the_definition() -> None:
    attention, x = _trained_attention(3, heads=1), torch.randn(7, 2, 8)
    y, _ = attention(x)
    q = attention.query(x)
    k, v = attention.key_value(x).chunk(2, -1)
    for t in range(7):
        window = range(max(0, t - 2), t + 1)
        scores = torch.stack(
            [
                (q[t] * k[s]).sum(-1) / math.sqrt(8) + attention.distance_bias[0, t - s]
                for s in window
            ]
        )
        weights = scores.softmax(0)
        mixed = sum(w[:, None] * v[s] for w, s in zip(weights, window, strict=True))
        torch.testing.assert_close(y[t], x[t] + attention.out(mixed))


@pytest.mark.parametrize("cut", [1, 2, 5, 9])
def test_attention_in_pieces_is_attention_at_once(cut: int) -> None:
    attention, x = _trained_attention(4), torch.randn(10, 3, 8)
    whole, _ = attention(x)
    memory, pieces = None, []
    for piece in x.split(cut):
        y, memory = attention(piece, memory)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces), whole)
    assert memory[0].shape == (3, 3, 8)


def test_attention_sees_the_window_and_nothing_later() -> None:
    attention, x = _trained_attention(3), torch.randn(8, 1, 8)
    y, _ = attention(x)
    changed = x.clone()
    changed[4] += 1.0
    differs = (attention(changed)[0] != y).any(-1)[:, 0]
    assert differs.tolist() == [False] * 4 + [True] * 3 + [False]


def test_order_counts_through_the_distance() -> None:
    attention = _trained_attention(4)
    with torch.no_grad():
        attention.query.weight.zero_()
        attention.query.bias.zero_()  # what the positions hold no longer matters
    x = torch.randn(4, 1, 8)
    swapped = x[[1, 0, 2, 3]]
    assert not torch.allclose(attention(x)[0][3], attention(swapped)[0][3])
    with torch.no_grad():
        attention.distance_bias.zero_()
    torch.testing.assert_close(attention(x)[0][3], attention(swapped)[0][3])


@pytest.mark.parametrize("options", [{"window": 0}, {"window": 3, "heads": 3}], ids=str)
def test_impossible_attention_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=r"window|heads"):
        WindowedAttention(8, **options)


# Heads


WIDTH = 32  # torch's adaptive softmax divides it by 4 and 16
HEADS = [
    pytest.param(lambda: LinearHead(WIDTH, V), id="linear"),
    pytest.param(lambda: AdaptiveHead(WIDTH, V, [5, 11]), id="adaptive"),
    pytest.param(lambda: TiedAdaptiveHead(WIDTH, V, [5, 11]), id="tied-adaptive"),
]


@pytest.mark.parametrize("make", HEADS)
def test_loss_is_that_of_the_logits_and_skips_what_does_not_count(make) -> None:
    torch.manual_seed(0)
    head = make()
    features = torch.randn(40, WIDTH, requires_grad=True)
    targets = torch.randint(V, (40,))
    targets[::7] = -100
    each = head.nll(features, targets, "none")
    log_p = head(features).log_softmax(-1)
    expected = -log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    expected = torch.where(targets >= 0, expected, 0.0)
    torch.testing.assert_close(each, expected)
    torch.testing.assert_close(head.nll(features, targets), expected.sum())
    mean = expected.sum() / (targets >= 0).sum()
    torch.testing.assert_close(head.nll(features, targets, "mean"), mean)
    (by_loss,) = torch.autograd.grad(each.sum(), features, retain_graph=True)
    (by_logits,) = torch.autograd.grad(expected.sum(), features)
    torch.testing.assert_close(by_loss, by_logits)


@pytest.mark.parametrize(
    ("rows", "vocab_size", "expected"),
    [
        pytest.param(700, 10_000, 350, id="equal-shares"),
        pytest.param(480, 10_000, 480, id="at-once"),
        pytest.param(256, 10_000, None, id="few-rows"),
        pytest.param(700, 33_000, None, id="large-vocabulary"),
        pytest.param(3500, 65, None, id="small-vocabulary"),
        pytest.param(0, 10_000, None, id="no-rows"),
    ],
)
def test_training_computes_more_logits_at_once_than_the_loss_by_itself(
    rows: int, vocab_size: int, expected: int | None
) -> None:
    assert rows_at_once(rows, vocab_size, torch.device("cpu")) == expected
    assert rows_at_once(rows, vocab_size, torch.device("cuda")) is None


@pytest.mark.parametrize("make", HEADS[1:])
def test_adaptive_probabilities_sum_to_one(make) -> None:
    p = make()(torch.randn(5, WIDTH)).exp()
    assert p.shape == (5, V)
    torch.testing.assert_close(p.sum(-1), torch.ones(5))


def test_tied_adaptive_head_is_the_product_of_group_and_token() -> None:
    torch.manual_seed(0)
    head, x = TiedAdaptiveHead(WIDTH, V, [5, 11]), torch.randn(3, WIDTH)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    first = torch.cat(
        [x @ head.weight[:5].T + head.bias[:5], x @ head.group_weight.T + head.group_bias], 1
    ).softmax(1)
    second = (x @ head.weight[11:].T + head.bias[11:]).softmax(1)
    torch.testing.assert_close(head(x)[:, 11:].exp(), first[:, 6:] * second)


def test_tied_adaptive_head_uses_the_embedding() -> None:
    model = _model(head="adaptive", cutoffs=(5, 11))
    assert model.head.weight is model.embedding.weight
    assert isinstance(_model(head="adaptive", cutoffs=(5,), tied=False).head, AdaptiveHead)


@pytest.mark.parametrize("cutoffs", [(), (5, 5), (9, 4), (0, 3), (V,)], ids=str)
def test_impossible_cutoffs_are_refused(cutoffs: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cutoffs"):
        _model(head="adaptive", cutoffs=cutoffs)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_in_chunks_has_the_gradients_of_all_logits(monkeypatch, smoothing: float) -> None:
    model = lm.RNNLanguageModel(lm.ModelConfig(V, emb=8, hidden=8, dropout=0.0), seed=0)
    tokens, targets = torch.randint(V, (40, 2)), torch.randint(V, (40, 2))
    targets[::5] = -100
    monkeypatch.setattr(operator, "chunk_rows", lambda *sizes: 7)
    results = []
    for plain_up_to in (0, 80 * V):
        monkeypatch.setattr(operator, "PLAIN_LOGITS", plain_up_to)
        loss = model.nll(model.encode(tokens, None), targets, label_smoothing=smoothing)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append((loss.detach(), gradients))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_label_smoothing_spreads_the_target() -> None:
    head, x, target = LinearHead(WIDTH, V), torch.randn(4, WIDTH), torch.tensor([1, 2, -100, 3])
    log_p = head(x).log_softmax(-1)
    spread = torch.full((4, V), 0.1 / V).scatter_add(
        1, target.clamp(min=0)[:, None], torch.full((4, 1), 0.9)
    )
    expected = -(spread * log_p).sum(-1)[target >= 0].sum()
    torch.testing.assert_close(head.nll(x, target, label_smoothing=0.1), expected)
    with pytest.raises(ValueError, match="label smoothing"):
        AdaptiveHead(WIDTH, V, [5]).nll(x, target, label_smoothing=0.1)


# Packed sentences


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="lstm"),
        pytest.param({"cell": "gru", "reset": "before"}, id="gru-before"),
        pytest.param({"attention": 3, "init": 0.5}, id="attention"),
        pytest.param({"head": "adaptive", "cutoffs": (5, 11)}, id="adaptive"),
    ],
)
def test_packed_sentences_are_each_alone(options: dict) -> None:
    model = _model(**options)
    rows = [_tokens(length + 1, 1, seed=length)[:, 0] for length in (7, 4, 4, 1)]
    inputs = pack_sequence([row[:-1] for row in rows])
    targets = pack_sequence([row[1:] for row in rows])
    together, _ = model.loss(inputs, targets)
    alone = sum(model.loss(row[:-1, None], row[1:, None])[0] for row in rows)
    torch.testing.assert_close(together, alone)
    names = [name for name, _ in model.named_parameters()]
    ours = torch.autograd.grad(together, list(model.parameters()))
    theirs = torch.autograd.grad(alone, list(model.parameters()))
    for name, one, other in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


def test_sentence_scores_are_the_sum_over_sentences() -> None:
    model = _model()
    tokens = torch.tensor([3, 4, 5, 0, 6, 0, 7, 8, 0, 9])
    score = lm.evaluate_sentences(model, tokens, eos=0, batch=2)
    total = sum(
        float(lm.token_losses(model, torch.tensor([0, *words, 0])).sum())
        for words in ([3, 4, 5], [6], [7, 8])
    )
    assert score.tokens == 9
    assert score.total == pytest.approx(total, rel=1e-5)


# Evaluation


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_token_losses_add_up_to_the_score(chunk: int) -> None:
    model, tokens = _model(dropout=0.5), _tokens(60, 1)[:, 0]
    losses = lm.token_losses(model, tokens, chunk=chunk)
    assert losses.shape == (59,)
    assert float(losses.sum()) == pytest.approx(lm.evaluate(model, tokens, batch=1).total, rel=1e-5)


def test_cache_is_that_of_the_definition() -> None:
    torch.manual_seed(0)
    config = lm.CacheConfig(window=4, flatness=0.7, share=0.3)
    features, targets = torch.randn(12, 1, 5), _tokens(12, 1) % 4
    model_nll = torch.rand(12, 1) + 0.5
    got = ContinuousCache(config).nll(features, targets, model_nll)
    for t in range(12):
        seen = range(max(0, t - 4), t)
        p = float(model_nll[t, 0].neg().exp())
        if seen:
            weights = torch.stack(
                [torch.exp(0.7 * (features[t, 0] @ features[i, 0])) for i in seen]
            )
            same = torch.tensor([bool(targets[i, 0] == targets[t, 0]) for i in seen])
            p = 0.7 * p + 0.3 * float(weights[same].sum() / weights.sum())
        assert float(got[t, 0]) == pytest.approx(-math.log(p), rel=1e-4)


@pytest.mark.parametrize("bptt", [1, 5, 60])
def test_cache_does_not_depend_on_the_windows(bptt: int) -> None:
    model, tokens = _model(), _tokens(80, 1)[:, 0]
    cache = lm.CacheConfig(window=20, flatness=2.0, share=0.2)
    score = lm.evaluate(model, tokens, batch=3, bptt=bptt, cache=cache)
    whole = lm.evaluate(model, tokens, batch=3, bptt=1000, cache=cache)
    assert score.total == pytest.approx(whole.total, rel=1e-5)
    assert score.tokens == 79


def test_cache_helps_where_words_come_again_and_none_changes_nothing() -> None:
    model = _model()
    tokens = torch.tensor([1, 5, 9, 2]).repeat(40)
    plain = lm.evaluate(model, tokens, batch=2)
    cached = lm.evaluate(model, tokens, batch=2, cache=lm.CacheConfig(50, 5.0, 0.5))
    assert cached.loss < 0.7 * plain.loss
    nothing = lm.evaluate(model, tokens, batch=2, cache=lm.CacheConfig(50, 5.0, 0.0))
    assert nothing.total == pytest.approx(plain.total, rel=1e-5)


@pytest.mark.parametrize(
    "options", [{"window": 0}, {"share": 1.0}, {"flatness": math.inf}], ids=str
)
def test_impossible_caches_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        lm.CacheConfig(**options)


def test_dynamic_evaluation_without_a_rate_is_evaluation() -> None:
    model, tokens = _model(dropout=0.5), _tokens(70, 1)[:, 0]
    score = lm.evaluate_dynamically(model, tokens, lr=0.0)
    plain = lm.evaluate(model, tokens, batch=1)
    assert score.tokens == plain.tokens == 69
    assert score.total == pytest.approx(plain.total, rel=1e-5)


def test_dynamic_evaluation_learns_from_the_past_only_and_leaves_the_model() -> None:
    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = torch.tensor([1, 5, 9, 2]).repeat(60)
    plain = lm.evaluate(model, tokens, batch=1)
    dynamic = lm.evaluate_dynamically(model, tokens, lr=2.0)
    assert dynamic.loss < 0.8 * plain.loss
    # Pulled all the way back after every step it has learnt nothing.
    back = lm.evaluate_dynamically(model, tokens, lr=2.0, decay=1.0)
    assert back.total == pytest.approx(plain.total, rel=1e-5)
    # One window only: nothing was learnt before the last token was predicted.
    once = lm.evaluate_dynamically(model, tokens, lr=2.0, bptt=1000)
    assert once.total == pytest.approx(plain.total, rel=1e-5)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    with pytest.raises(ValueError, match="decay"):
        lm.evaluate_dynamically(model, tokens, lr=1.0, decay=2.0)


# Gradients through time


def test_gradient_flow_is_the_derivative_of_the_last_loss() -> None:
    model = _model(layers=1, tied=False, init=0.6).double()
    tokens, targets = _tokens(8, 2), torch.tensor([1, 2])
    flow = lm.gradient_flow(model, tokens, targets)
    assert flow.norms.shape == (1, 8)
    # By hand: cut the text after step t and start again from a state that needs a gradient.
    for t in (0, 3, 6):
        _, (state,) = model.encode(tokens[: t + 1]).features, model.encode(tokens[: t + 1]).state
        h = state[0].detach().requires_grad_()
        encoded = model.encode(tokens[t + 1 :], [(h, state[1].detach())])
        loss = model.head.nll(encoded.features[-1], targets)
        (through_h,) = torch.autograd.grad(loss, h)
        assert float(flow.norms[0, t]) == pytest.approx(float(through_h.norm()), rel=1e-4)


def test_gradients_vanish_with_small_recurrent_weights_and_reach_far_with_large_ones(
    tmp_path,
) -> None:
    reached = []
    for scale in (0.05, 4.0):
        model = _model(layers=1, cell="gru")
        with torch.no_grad():
            model.layers[0].weight_hh_l0.normal_(std=scale / math.sqrt(12))
            # Closed update gates pass nothing on unchanged.
            model.layers[0].bias_ih_l0[12:24] = -4.0
        flow = lm.gradient_flow(model, _tokens(40, 4), torch.tensor([1, 2, 3, 4]))
        reached += flow.reach()
    assert reached[0] < 10 < reached[1]
    flow.save_plot(tmp_path / "flow.png")
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")


def test_the_language_model_stands_on_public_names_only() -> None:
    """docs/architecture.md: lm/ uses the public API only."""
    for path in Path(lm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            depth = len(path.relative_to(Path(lm.__file__).parent).parts)
            if isinstance(node, ast.ImportFrom):
                assert node.level <= depth, f"{path.name}, line {node.lineno}"
                assert not (node.module or "").startswith("rnnlm_kernels"), path.name
            elif isinstance(node, ast.Import):
                ours = [each.name for each in node.names if each.name.startswith("rnnlm_kernels")]
                assert ours in ([], ["rnnlm_kernels"]), path.name
