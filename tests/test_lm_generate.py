"""Generation: choosing tokens, carried state, beams, streams."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rnnlm_kernels import lm
from rnnlm_kernels.lm.generate import filter_logits

TEXT = "the cat sat on the mat; the dog ate the cat's hat.\n" * 30


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    torch.manual_seed(0)


def _generator(unit: str = "char", **options) -> lm.Generator:
    corpus = lm.corpus_from_text(TEXT, unit=unit, max_size=270 if unit == "bpe" else None)
    config = {"emb": 8, "hidden": 12, "layers": 2, "init": 0.5} | options
    model = lm.RNNLanguageModel(lm.ModelConfig(len(corpus.vocabulary), **config), seed=5)
    return lm.Generator(model, corpus.vocabulary)


VARIANTS = pytest.mark.parametrize(
    "options",
    [
        pytest.param({"cell": "lstm"}, id="lstm"),
        pytest.param({"cell": "gru"}, id="gru"),
        pytest.param({"cell": "gru", "reset": "before"}, id="gru-before"),
        pytest.param({"attention": 4, "attention_heads": 2}, id="attention"),
        pytest.param({"head": "adaptive", "cutoffs": (4, 9)}, id="adaptive"),
    ],
)


@VARIANTS
def test_stepping_gives_the_logits_of_the_whole_text(options: dict) -> None:
    generator = _generator(**options)
    tokens = generator.encode("the cat sat on")
    generator.model.eval()
    with torch.no_grad():
        whole, _ = generator.model(tokens[:, None])
    logits, state = generator.start(["the"])
    torch.testing.assert_close(logits, whole[2])
    for position in range(3, len(tokens)):
        logits, state = generator.step(tokens[position : position + 1], state)
        torch.testing.assert_close(logits, whole[position], rtol=1e-4, atol=1e-5)


@VARIANTS
def test_prompts_side_by_side_are_continued_as_alone(options: dict) -> None:
    generator = _generator(**options)
    prompts = ["the cat", "a", "", "the dog ate the cat's hat.\nthe"]
    greedy = lm.Sampling(greedy=True)
    together = generator.generate(prompts, 12, greedy)
    assert together == [generator.generate([prompt], 12, greedy)[0] for prompt in prompts]


def test_a_token_costs_one_call_per_layer() -> None:
    generator = _generator()
    calls: list[torch.Size] = []
    for layer in generator.model.layers:
        layer.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape))
    _, state = generator.start(["the cat sat on the mat"])
    calls.clear()
    generator.step(torch.tensor([1]), state)
    assert calls == [(1, 1, 8), (1, 1, 12)]


def test_predict_is_a_distribution_and_the_softmax_of_the_logits() -> None:
    generator = _generator()
    p = lm.predict(generator.model, generator.tokenizer, "the c")
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-5)
    logits, _ = generator.start(["the c"])
    torch.testing.assert_close(p, logits[0].softmax(-1))


def test_seeds_repeat_a_text_and_change_it() -> None:
    generator = _generator()
    one, other, third = (
        generator.generate(["the "], 40, lm.Sampling(seed=seed)) for seed in (1, 1, 2)
    )
    assert one == other
    assert one != third


def test_generation_leaves_mode_and_global_random_state() -> None:
    generator = _generator(dropout=0.5)
    generator.model.train()
    before = torch.get_rng_state()
    one = generator.generate(["the "], 20)
    assert generator.model.training
    assert torch.equal(torch.get_rng_state(), before)
    # Dropout is off: with it the texts would differ.
    assert one == generator.generate(["the "], 20)


@given(
    logits=st.lists(st.floats(-5, 5), min_size=2, max_size=12),
    k=st.integers(0, 14),
    p=st.floats(0.01, 1.0),
)
def test_filters_keep_the_likeliest(logits: list[float], k: int, p: float) -> None:
    row = torch.tensor([logits])
    kept = filter_logits(row, lm.Sampling(top_k=k, top_p=p))[0].isfinite()
    count = int(kept.sum())
    assert 1 <= count <= (k or len(logits))
    if count < len(logits):
        assert float(row[0][kept].min()) >= float(row[0][~kept].max())
    probability = row[0].double()
    if k and k < len(logits):
        top = probability.topk(k)
        probability = torch.full_like(probability, -math.inf).scatter(0, top.indices, top.values)
    q = probability.softmax(0)
    # As few as reach p: all kept reach it, without the least of them they do not.
    assert float(q[kept].sum()) >= p - 1e-5
    if count > 1:
        assert float(q[kept].sum() - q[kept].min()) < p + 1e-5


def test_of_equal_logits_no_more_than_k_remain() -> None:
    kept = filter_logits(torch.zeros(1, 9), lm.Sampling(top_k=3))
    assert int(kept.isfinite().sum()) == 3


def test_draws_have_the_probabilities_of_the_temperature() -> None:
    generator = _generator()
    logits, _ = generator.start(["the cat"] * 4000)
    draw = torch.Generator().manual_seed(0)
    for temperature in (0.5, 2.0):
        sampling = lm.Sampling(temperature=temperature, unknown=True)
        chosen = generator._choose(logits, sampling, draw)
        seen = torch.bincount(chosen, minlength=logits.shape[1]) / len(chosen)
        expected = (logits[0] / temperature).softmax(-1)
        assert float((seen - expected).abs().max()) < 0.03


def test_a_low_temperature_is_greedy() -> None:
    generator = _generator()
    cold = generator.generate(["the "], 30, lm.Sampling(temperature=1e-4))
    assert cold == generator.generate(["the "], 30, lm.Sampling(greedy=True))
    assert cold == generator.generate(["the "], 30, lm.Sampling(top_k=1))


def test_unknown_is_written_only_when_allowed() -> None:
    generator = _generator("word")
    with torch.no_grad():
        generator.model.head.bias[0] = 50.0
    unk = generator.tokenizer.unk
    for allowed in (False, True):
        numbers = [step[0] for step in generator.tokens(["the"], 20, lm.Sampling(unknown=allowed))]
        assert (unk in numbers) == allowed


def test_texts_stop_at_their_line_ends() -> None:
    generator = _generator()
    eos = generator.tokenizer.eos
    with torch.no_grad():
        generator.model.head.bias[eos] = 2.0
    texts = generator.generate(["the cat"] * 20, 60, lm.Sampling(seed=3), stop_at_eos=True)
    lengths = Counter(len(text) for text in texts)
    assert len(lengths) > 3
    for text in texts:
        assert text.count("\n") == 1
        assert text.endswith("\n")
    free = generator.generate(["the cat"], 60, lm.Sampling(seed=3))
    assert len(free[0]) == len("the cat") + 60


@pytest.mark.parametrize("unit", ["char", "word", "byte", "bpe"])
def test_pieces_joined_are_the_text(unit: str) -> None:
    generator = _generator(unit)
    sampling = lm.Sampling(seed=4)
    pieces = list(generator.stream("the cat", 60, sampling))
    assert "".join(pieces) == generator.generate(["the cat"], 60, sampling)[0]
    assert len(pieces) > 5


def test_no_piece_holds_half_a_character() -> None:
    model = lm.RNNLanguageModel(lm.ModelConfig(256, emb=4, hidden=4), seed=0)
    generator = lm.Generator(model, lm.ByteTokenizer())
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.fill_(-50.0)
        model.head.bias[0xC3] = 50.0  # always the first byte of a character, never the second
    pieces = list(generator.stream("é", 3, lm.Sampling(greedy=True)))
    assert pieces == ["é", "\ufffd\ufffd\ufffd"]


def _all_continuations(generator: lm.Generator, prompt: str, length: int) -> dict[str, float]:
    """Log-probability of every continuation of so many tokens, by brute force."""
    size = len(generator.tokenizer)
    start = generator.encode(prompt)
    found = {}
    for numbers in itertools.product(range(1, size), repeat=length):
        tokens = torch.cat([start, torch.tensor(numbers)])
        losses = lm.token_losses(generator.model, tokens)
        found[prompt + generator.tokenizer.decode(numbers)] = -float(losses[-length:].sum())
    return found


def test_a_wide_beam_finds_the_likeliest_text() -> None:
    tokenizer = lm.Vocabulary("char", ["<unk>", "a", "b", "c", "\n"])
    model = lm.RNNLanguageModel(lm.ModelConfig(5, emb=4, hidden=6, init=1.0), seed=2)
    generator = lm.Generator(model, tokenizer)
    every = _all_continuations(generator, "ab", 4)
    best = sorted(every, key=every.get, reverse=True)
    found = generator.beam_search("ab", 4, width=64)
    assert [text for text, _ in found[:10]] == best[:10]
    for text, log_p in found[:10]:
        assert log_p == pytest.approx(every[text], abs=1e-4)


def test_a_beam_of_one_is_greedy() -> None:
    generator = _generator()
    ((text, _),) = generator.beam_search("the", 20, width=1)
    assert text == generator.generate(["the"], 20, lm.Sampling(greedy=True))[0]


def test_beams_end_with_the_line_and_length_power_favours_long_ones() -> None:
    generator = _generator()
    eos = generator.tokenizer.eos
    with torch.no_grad():
        generator.model.head.bias[eos] = 0.5
    short = generator.beam_search("the", 12, width=4, stop_at_eos=True)
    for text, _ in short:
        assert "\n" not in text[:-1]
    assert any(text.endswith("\n") for text, _ in short)
    long = generator.beam_search("the", 12, width=4, stop_at_eos=True, length_power=1.0)
    assert len(long[0][0]) > len(short[0][0])


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 2}],
    ids=str,
)
def test_impossible_sampling_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        lm.Sampling(**options)


def test_a_ruined_model_is_named() -> None:
    generator = _generator()
    with torch.no_grad():
        generator.model.head.bias[2] = math.nan
    with pytest.raises(ValueError, match="not numbers"):
        generator.generate(["the"], 3)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="the tokenizer has 256 tokens"):
        lm.Generator(_generator().model, lm.ByteTokenizer())
