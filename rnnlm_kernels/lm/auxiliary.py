"""Tasks beside language modelling that train the same embedding.

* Word embeddings: skip-gram or CBOW with negative sampling (Mikolov et al. 2013) on the windows
  that the language model reads anyway.
* Synonyms: words listed as synonyms move together, away from random words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from .data.text import CorpusError, TextSource
from .tokenizers import Tokenizer

PAD = -1


def as_rows(tokens: Tensor | PackedSequence) -> Tensor:
    """Tokens [T, B]; packed sequences are padded with -1."""
    if isinstance(tokens, PackedSequence):
        return pad_packed_sequence(tokens, padding_value=PAD)[0]
    return tokens


class WordEmbeddingTask(nn.Module):
    """Predicts which words stand near each other.

    Skip-gram: a word's vector tells each of the words around it from random ones. CBOW: the mean
    vector of the words around tells the word in the middle from random ones. The vectors are the
    language model's embedding; those of the words to be told are this module's own and are not
    needed after training. Random words are drawn by their frequency to the power 3/4.

    Args:
        kind: ``"skip-gram"`` or ``"cbow"``.
        counts: [V], how often each token stands in the training part.
        width: of the embedding.
        context: words on either side.
        negatives: random words per position.

    Source: Mikolov et al. 2013, https://arxiv.org/abs/1310.4546.

    Example:
        >>> task = WordEmbeddingTask("cbow", torch.ones(10), width=4)
        >>> task(nn.Embedding(10, 4), torch.arange(10)[:, None]).item() > 0
        True
    """

    def __init__(
        self,
        kind: Literal["skip-gram", "cbow"],
        counts: Tensor,
        width: int,
        *,
        context: int = 5,
        negatives: int = 5,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.context = context
        self.negatives = negatives
        self.output = nn.Embedding(len(counts), width)
        nn.init.zeros_(self.output.weight)
        self.noise: Tensor
        self.register_buffer("noise", counts.double().clamp(min=1e-3).pow(0.75), persistent=False)

    def forward(self, embedding: nn.Embedding, tokens: Tensor) -> Tensor:
        """Mean loss per word and its context.

        Args:
            embedding: of the language model.
            tokens: int64 [T, B]; -1 where a row has ended.
        """
        real = tokens != PAD
        safe = tokens.clamp(min=0)
        vectors = embedding(safe)  # [T, B, E]
        outputs = self.output(safe)
        neighbours = self._neighbours(vectors if self.kind == "cbow" else outputs, real)
        count = neighbours[1].sum(0)  # [T, B]
        drawn = torch.multinomial(self.noise, tokens.numel() * self.negatives, replacement=True)
        noise = self.output(drawn.view(*tokens.shape, self.negatives))  # [T, B, N, E]
        if self.kind == "cbow":
            mean = (neighbours[0] * neighbours[1][..., None]).sum(0)
            mean = mean / count.clamp(min=1)[..., None]
            near = F.logsigmoid((mean * outputs).sum(-1))
            far = F.logsigmoid(-(noise @ mean[..., None])[..., 0]).sum(-1)
        else:
            mean = vectors
            each = F.logsigmoid((neighbours[0] * vectors).sum(-1))  # [2C, T, B]
            near = (each * neighbours[1]).sum(0) / count.clamp(min=1)
            far = F.logsigmoid(-(noise @ mean[..., None])[..., 0]).sum(-1)
        counted = real & (count > 0)
        return -((near + far) * counted).sum() / counted.sum().clamp(min=1)

    def _neighbours(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """What stands at every distance: [2C, T, B, E], and whether anything does: [2C, T, B]."""
        steps = real.shape[0]
        x = F.pad(x, (0, 0, 0, 0, self.context, self.context))
        there = F.pad(real, (0, 0, self.context, self.context))
        shifts = [d for d in range(2 * self.context + 1) if d != self.context]
        values = torch.stack([x[d : d + steps] for d in shifts])
        exists = torch.stack([there[d : d + steps] for d in shifts]) & real
        return values, exists


class SynonymTask(nn.Module):
    """Pulls the vectors of synonyms together: a margin between a synonym and a random word.

    The loss of a pair (a, b) with a random word n is ``max(0, margin - cos(a, b) + cos(a, n))``,
    averaged over ``batch`` random pairs, each in a random direction.

    Args:
        pairs: int64 [P, 2] token numbers.
        batch: pairs per update.
        margin: by how much a synonym's cosine should be larger.
    """

    def __init__(self, pairs: Tensor, *, batch: int = 256, margin: float = 0.5) -> None:
        super().__init__()
        self.pairs: Tensor
        self.register_buffer("pairs", pairs, persistent=False)
        self.batch = batch
        self.margin = margin

    def forward(self, embedding: nn.Embedding) -> Tensor:
        """The mean loss of some pairs."""
        device = self.pairs.device
        chosen = self.pairs[torch.randint(len(self.pairs), (self.batch,), device=device)]
        flip = torch.rand(self.batch, 1, device=device) < 0.5
        chosen = torch.where(flip, chosen.flip(1), chosen)
        random = torch.randint(embedding.num_embeddings, (self.batch,), device=device)
        a, b, n = embedding(chosen[:, 0]), embedding(chosen[:, 1]), embedding(random)
        return (self.margin - F.cosine_similarity(a, b) + F.cosine_similarity(a, n)).relu().mean()


def load_synonyms(path: str | Path, tokenizer: Tokenizer) -> Tensor:
    """Reads synonym pairs of which both words are single known tokens.

    Args:
        path: UTF-8 lines of columns parted by tabs: a word in the first column and its synonyms,
            parted by commas, in the last. Columns between are ignored; empty lines and those
            beginning with ``#`` are, too.
        tokenizer: the tokens.

    Returns:
        int64 [P, 2], every pair once, the smaller number first.

    Raises:
        CorpusError: the file cannot be read, a line has no tab, or no pair is known.
    """
    pairs: set[tuple[int, int]] = set()
    known: dict[str, int | None] = {}

    def number(word: str) -> int | None:
        if word not in known:
            numbers = tokenizer.encode(word).tolist()
            single = len(numbers) == 1 and numbers[0] != tokenizer.unk
            known[word] = numbers[0] if single else None
        return known[word]

    for index, line in enumerate(TextSource([path]), start=1):
        columns = line.strip("\n").split("\t")
        if not line.strip() or line.startswith("#"):
            continue
        if len(columns) < 2:
            raise CorpusError(f"{path}, line {index}: no tab between a word and its synonyms")
        first = number(columns[0].strip())
        if first is None:
            continue
        for synonym in columns[-1].split(","):
            second = number(synonym.strip())
            if second is not None and second != first:
                pairs.add((min(first, second), max(first, second)))
    if not pairs:
        raise CorpusError(f"no pair of synonyms in {path} is made of two known tokens")
    return torch.tensor(sorted(pairs))


@torch.no_grad()
def synonym_recall(weight: Tensor, pairs: Tensor, k: int = 10) -> float:
    """Share of pairs of which one word is among the ``k`` nearest (by cosine) of the other.

    Every pair counts twice, once from either word.

    Args:
        weight: [V, E], an embedding.
        pairs: int64 [P, 2].
        k: neighbours looked at.
    """
    unit = F.normalize(weight.float(), dim=1)
    both = torch.cat([pairs, pairs.flip(1)])
    found = 0
    for part in both.split(1024):
        similarity = unit[part[:, 0]] @ unit.T
        similarity.scatter_(1, part[:, :1], -2.0)  # a word is no neighbour of itself
        nearest = similarity.topk(min(k, len(unit) - 1), dim=1).indices
        found += int((nearest == part[:, 1:]).any(1).sum())
    return found / len(both)
