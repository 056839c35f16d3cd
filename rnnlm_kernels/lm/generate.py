"""Continuing texts: one token after the other, with the state carried from step to step.

A step costs one call per recurrent layer on a single time step, however long the text already is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .evaluate import evaluation_mode
from .model import RNNLanguageModel, State, join_rows, select_rows
from .tokenizers import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits: below 1 likely tokens become likelier, above 1 less so.
        top_k: only the so many likeliest tokens; 0: all.
        top_p: only the likeliest tokens that together reach this probability, always at least one
            (nucleus sampling, Holtzman et al. 2020); 1: all.
        greedy: always the likeliest token.
        unknown: allow ``<unk>``.
        seed: seed of the draws; the same prompts then give the same texts.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    unknown: bool = False
    seed: int = 1

    def __post_init__(self) -> None:
        if not (self.temperature > 0.0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}; greedy is its limit"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits at the temperature, with everything outside top-k and top-p at minus infinity.

    Args:
        logits: [B, V].
        sampling: temperature, top-k, then top-p of what is left.

    Returns:
        float32 [B, V].

    Example:
        >>> kept = filter_logits(torch.tensor([[1.0, 3.0, 2.0]]), Sampling(top_k=2))
        >>> kept.isfinite().tolist()
        [[False, True, True]]
    """
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        # By rank and not by value: of equal logits at the border no more than top_k remain.
        top = logits.topk(sampling.top_k, dim=-1)
        logits = torch.full_like(logits, -math.inf).scatter(-1, top.indices, top.values)
    if sampling.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        # What lies before a token decides: so the token that crosses the border is in.
        outside = p.cumsum(-1) - p >= sampling.top_p
        logits = torch.empty_like(logits).scatter(
            -1, order, ordered.masked_fill(outside, -math.inf)
        )
    return logits


class Generator:
    """A model and its tokenizer, reading and writing.

    Args:
        model: any device; it is used in evaluation mode, and its training mode is put back.
        tokenizer: of the model.

    Raises:
        ValueError: the tokenizer is not the model's.

    Example:
        >>> from .model import ModelConfig
        >>> from .tokenizers import ByteTokenizer
        >>> model = RNNLanguageModel(ModelConfig(vocab_size=256, emb=4, hidden=8), seed=0)
        >>> generator = Generator(model, ByteTokenizer())
        >>> [len(text) >= 3 for text in generator.generate(["abc", "x"], length=5)]
        [True, True]
    """

    def __init__(self, model: RNNLanguageModel, tokenizer: Tokenizer) -> None:
        if model.config.vocab_size != len(tokenizer):
            raise ValueError(
                f"the model has vocab_size={model.config.vocab_size}, the tokenizer has "
                f"{len(tokenizer)} tokens"
            )
        self.model = model
        self.tokenizer = tokenizer

    def encode(self, prompt: str) -> Tensor:
        """Numbers of a prompt: int64 [N], N >= 1. An empty prompt is the end of a line before."""
        numbers = self.tokenizer.encode(prompt)
        if not len(numbers):
            numbers = torch.tensor([self.tokenizer.eos or 0])
        return numbers

    def start(self, prompts: Sequence[str]) -> tuple[Tensor, State]:
        """Reads prompts of any lengths.

        Returns:
            Logits of the token after each prompt, [B, V], and the state.
        """
        device = next(self.model.parameters()).device
        logits, states = [], []
        with evaluation_mode(self.model):
            for prompt in prompts:
                encoded = self.model.encode(self.encode(prompt).to(device)[:, None])
                logits.append(self.model.head(encoded.features[-1]))
                states.append(encoded.state)
        return torch.cat(logits), join_rows(states)

    def step(self, numbers: Tensor, state: State) -> tuple[Tensor, State]:
        """Reads one more token of every row.

        Args:
            numbers: int64 [B].
            state: as returned by :meth:`start` or :meth:`step`.

        Returns:
            Logits of the token after it, [B, V], and the state.
        """
        with evaluation_mode(self.model):
            logits, state = self.model(numbers[None], state)
        return logits[0], state

    def predict(self, prefix: str) -> Tensor:
        """Probabilities of the token after ``prefix``: float32 [V], of sum 1."""
        logits, _ = self.start([prefix])
        return logits[0].float().softmax(-1)

    def tokens(
        self,
        prompts: Sequence[str],
        length: int,
        sampling: Sampling = Sampling(),
        *,
        stop_at_eos: bool = False,
    ) -> Iterator[list[int | None]]:
        """Chooses token after token for several prompts at once.

        Args:
            prompts: texts to go on from.
            length: at most so many tokens.
            sampling: how to choose.
            stop_at_eos: end a text after the token that ends a line.

        Yields:
            One number per prompt and step, None for a text that has ended.

        Raises:
            ValueError: the model's logits are not numbers.
        """
        logits, state = self.start(prompts)
        # On the CPU, so that the draws do not depend on the device.
        draw = torch.Generator().manual_seed(sampling.seed)
        running = [True] * len(prompts)
        for _ in range(length):
            chosen = self._choose(logits, sampling, draw)
            numbers = chosen.tolist()
            yield [number if on else None for number, on in zip(numbers, running, strict=True)]
            if stop_at_eos:
                running = [
                    on and number != self.tokenizer.eos
                    for on, number in zip(running, numbers, strict=True)
                ]
                if not any(running):
                    return
            logits, state = self.step(chosen, state)

    def _choose(self, logits: Tensor, sampling: Sampling, draw: torch.Generator) -> Tensor:
        if self.tokenizer.unk is not None and not sampling.unknown:
            logits = logits.clone()
            logits[:, self.tokenizer.unk] = -math.inf
        if bool(logits.isnan().any()):
            raise ValueError("the model's logits are not numbers; was its training diverging?")
        if sampling.greedy:
            return logits.argmax(-1)
        p = filter_logits(logits, sampling).softmax(-1)
        return torch.multinomial(p.cpu(), 1, generator=draw)[:, 0].to(logits.device)

    def generate(
        self,
        prompts: Sequence[str],
        length: int,
        sampling: Sampling = Sampling(),
        *,
        stop_at_eos: bool = False,
    ) -> list[str]:
        """Continues several prompts at once; see :meth:`tokens` for the arguments.

        Returns:
            Prompt and continuation of each.
        """
        numbers = [self.encode(prompt).tolist() if prompt else [] for prompt in prompts]
        for step in self.tokens(prompts, length, sampling, stop_at_eos=stop_at_eos):
            for text, number in zip(numbers, step, strict=True):
                if number is not None:
                    text.append(number)
        return [self.tokenizer.decode(text) for text in numbers]

    def stream(
        self,
        prompt: str,
        length: int,
        sampling: Sampling = Sampling(),
        *,
        stop_at_eos: bool = False,
    ) -> Iterator[str]:
        """Continues one prompt and gives the text piece by piece, as it comes.

        The pieces joined are what :meth:`generate` returns. The first is the prompt. A character
        whose bytes are not yet complete waits for the rest of them.
        """
        numbers = self.encode(prompt).tolist() if prompt else []
        written = self.tokenizer.decode(numbers)
        yield written
        text = written
        for step in self.tokens([prompt], length, sampling, stop_at_eos=stop_at_eos):
            numbers += [number for number in step if number is not None]
            text = self.tokenizer.decode(numbers)
            ready = text.rstrip("\ufffd")
            if ready.startswith(written) and len(ready) > len(written):
                yield ready[len(written) :]
                written = ready
        if len(text) > len(written):
            yield text[len(written) :]

    def beam_search(
        self,
        prompt: str,
        length: int,
        width: int = 5,
        *,
        stop_at_eos: bool = False,
        length_power: float = 0.0,
        unknown: bool = False,
    ) -> list[tuple[str, float]]:
        """The likeliest continuations that a search with ``width`` hypotheses finds.

        Args:
            prompt: text to go on from.
            length: at most so many tokens.
            width: hypotheses kept at every step; 1 is the greedy choice.
            stop_at_eos: a hypothesis ends with the token that ends a line.
            length_power: hypotheses of different lengths are compared by log-probability divided by
                length to this power; 0 favours short ones.
            unknown: allow ``<unk>``.

        Returns:
            Up to ``width`` pairs of text (with the prompt) and log-probability of the continuation
            in nats, the best first.

        Raises:
            ValueError: ``width`` or ``length`` below 1.
        """
        if width < 1 or length < 1:
            raise ValueError(f"width and length must be at least 1, got {width} and {length}")
        first = self.encode(prompt).tolist() if prompt else []
        logits, state = self.start([prompt])
        beams: list[list[int]] = [[]]
        scores = torch.zeros(1, device=logits.device)
        ended: list[tuple[list[int], float]] = []
        for _ in range(length):
            log_p = logits.float().log_softmax(-1)
            if self.tokenizer.unk is not None and not unknown:
                log_p[:, self.tokenizer.unk] = -math.inf
            total = (scores[:, None] + log_p).flatten()
            # One more for every beam, since so many candidates may end here.
            best = total.topk(min(2 * width, len(total)))
            size = log_p.shape[-1]
            kept: list[tuple[list[int], float, int]] = []
            for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                row, number = divmod(index, size)
                if score == -math.inf:
                    continue
                if stop_at_eos and number == self.tokenizer.eos:
                    ended.append(([*beams[row], number], score))
                elif len(kept) < width:
                    kept.append(([*beams[row], number], score, row))
            if not kept:
                beams = []
                break
            beams = [numbers for numbers, _, _ in kept]
            scores = torch.tensor([score for _, score, _ in kept], device=logits.device)
            rows = torch.tensor([row for _, _, row in kept], device=logits.device)
            newest = torch.tensor([numbers[-1] for numbers in beams], device=logits.device)
            logits, state = self.step(newest, select_rows(state, rows))
            if len(ended) >= width and length_power == 0.0:
                # A longer hypothesis can only become less likely.
                worst = sorted(score for _, score in ended)[-width]
                if worst >= float(scores.max()):
                    beams = []
                    break
        found = ended + list(zip(beams, scores.tolist(), strict=False))
        found.sort(key=lambda pair: -pair[1] / len(pair[0]) ** length_power)
        return [(self.tokenizer.decode(first + numbers), score) for numbers, score in found[:width]]


def predict(model: RNNLanguageModel, tokenizer: Tokenizer, prefix: str) -> Tensor:
    """Probabilities of the token after ``prefix``: float32 [V], of sum 1."""
    return Generator(model, tokenizer).predict(prefix)
