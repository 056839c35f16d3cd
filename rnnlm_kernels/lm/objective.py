"""What training minimises: the language model's loss plus penalties and auxiliary tasks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .auxiliary import SynonymTask, WordEmbeddingTask, as_rows
from .config import TrainConfig
from .model import RNNLanguageModel, State
from .regularization import activation_penalty, temporal_penalty, weight_penalty

Tokens = Tensor | PackedSequence


class Objective(nn.Module):
    """One module around everything that is trained, so that it can be called as one.

    Args:
        model: the language model.
        config: weights of the penalties and tasks.
        counts: [V], how often each token stands in the training part.
        synonyms: int64 [P, 2], for the synonym task.

    Raises:
        ValueError: a penalty's pattern fits no parameter, or a task lacks its data.
    """

    def __init__(
        self,
        model: RNNLanguageModel,
        config: TrainConfig,
        counts: Tensor,
        synonyms: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.tasks = nn.ModuleDict()
        for kind, weight in (("skip-gram", config.skip_gram), ("cbow", config.cbow)):
            if weight:
                self.tasks[kind] = WordEmbeddingTask(
                    kind,  # type: ignore[arg-type]
                    counts,
                    model.config.emb,
                    context=config.context,
                    negatives=config.negatives,
                )
        if config.synonyms:
            if synonyms is None:
                raise ValueError("the synonym task needs pairs of synonyms")
            self.tasks["synonyms"] = SynonymTask(synonyms)
        self.tasks.to(next(model.parameters()).device)
        if config.label_smoothing and model.config.head != "linear":
            raise ValueError("label smoothing needs head='linear': it looks at every token")
        weight_penalty(model, config.l1, config.l2)

    @property
    def part_names(self) -> list[str]:
        """Names of the penalties and tasks that are switched on."""
        config = self.config
        penalties = {"ar": config.ar, "tar": config.tar, "weights": config.l1 or config.l2}
        return [name for name, on in penalties.items() if on] + list(self.tasks)

    def forward(
        self, tokens: Tokens, targets: Tokens, state: State | None, total: float
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], State]:
        """The objective of some rows of a batch.

        Args:
            tokens, targets, state: see :meth:`RNNLanguageModel.loss`; every target counts.
            total: predicted tokens of the whole batch, of which these rows may be a part.

        Returns:
            Their part of the objective; their summed loss (with label smoothing, if any); the parts
            of the objective by name, already weighted; and the state.
        """
        config = self.config
        encoded = self.model.encode(tokens, state)
        # The mean, not the sum: its gradient arrives as a 1, which the head need not multiply by.
        mean = self.model.nll(encoded, targets, "mean", config.label_smoothing)
        numbers = targets if isinstance(targets, Tensor) else targets.data
        share = numbers.numel() / total
        parts: dict[str, Tensor] = {}
        if config.ar:
            parts["ar"] = config.ar * activation_penalty(encoded.dropped.float())
        if config.tar:
            parts["tar"] = config.tar * temporal_penalty(encoded.raw.float(), encoded.batch_sizes)
        weights = weight_penalty(self.model, config.l1, config.l2)
        if weights is not None:
            parts["weights"] = weights
        embedding = self.model.embedding
        for name, weight in (("skip-gram", config.skip_gram), ("cbow", config.cbow)):
            if name in self.tasks:
                parts[name] = weight * self.tasks[name](embedding, as_rows(tokens))
        if "synonyms" in self.tasks:
            parts["synonyms"] = config.synonyms * self.tasks["synonyms"](embedding)
        parts = {name: share * part for name, part in parts.items()}
        objective = sum(parts.values(), start=mean if share == 1 else share * mean)
        return objective, mean.detach() * numbers.numel(), parts, encoded.state
