"""Models and trainings of the literature, by name.

A preset is a set of values for :class:`ModelConfig`, :class:`TrainConfig` and the tokens, in the
words of ``rnnlm-kernels train``; whatever is given besides takes precedence.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from .config import TrainConfig
from .model import ModelConfig


@dataclass(frozen=True)
class Preset:
    """A named set of values.

    Attributes:
        about: one line for a person.
        unit: what one token is.
        model: values of :class:`ModelConfig`.
        train: values of :class:`TrainConfig`.
    """

    about: str
    unit: str
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """All values by name."""
        return {"unit": self.unit, **self.model, **self.train}


PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        "one small LSTM over words, about a minute on a small text",
        "word",
        {"emb": 64, "hidden": 64, "dropout": 0.2},
        {"batch": 20, "bptt": 35, "lr": 5e-3, "epochs": 5},
    ),
    "zaremba-medium": Preset(
        "2 x 650 LSTM with dropout, 39 epochs (Zaremba et al. 2014)",
        "word",
        {"emb": 650, "hidden": 650, "layers": 2, "dropout": 0.5, "tied": False, "init": 0.05},
        # There the loss is summed over the 35 steps of a window; here it is a mean. So the rate is
        # 35 times theirs (1.0), and the clipped norm a 35th of theirs (5).
        {
            "batch": 20,
            "bptt": 35,
            "optimizer": "sgd",
            "lr": 35.0,
            "clip": 5.0 / 35.0,
            "schedule": "step",
            "decay": 1.0 / 1.2,
            "decay_after": 6,
            "epochs": 39,
        },
    ),
    "awd-lstm": Preset(
        "3-layer AWD-LSTM with NT-ASGD, up to 500 epochs (Merity et al. 2018)",
        "word",
        {
            "emb": 400,
            "hidden": (1150, 1150, 400),
            "layers": 3,
            "tied": True,
            "locked": True,
            "dropout": 0.4,
            "dropout_input": 0.4,
            "dropout_hidden": 0.25,
            "dropout_embedding": 0.1,
            "weight_drop": 0.5,
        },
        {
            "batch": 20,
            "bptt": 70,
            "random_bptt": True,
            "optimizer": "sgd",
            "lr": 30.0,
            "weight_decay": 1.2e-6,
            "schedule": "constant",
            "average": 5,
            "clip": 0.25,
            "ar": 2.0,
            "tar": 1.0,
            "epochs": 500,
        },
    ),
    "char-lstm": Preset(
        "2 x 512 LSTM over characters, cosine schedule",
        "char",
        {"emb": 64, "hidden": 512, "layers": 2, "dropout": 0.25, "tied": False},
        {
            "batch": 32,
            "bptt": 128,
            "lr": 2e-3,
            "schedule": "cosine",
            "warmup": 100,
            "clip": 1.0,
            "epochs": 20,
        },
    ),
    "seed-gru": Preset(
        "GRU that resets before the recurrent product, over characters (Cho et al. 2014)",
        "char",
        {
            "cell": "gru",
            "reset": "before",
            "emb": 64,
            "hidden": 256,
            "layers": 2,
            "dropout": 0.1,
            "tied": False,
        },
        {"batch": 32, "bptt": 100, "lr": 3e-3, "epochs": 10},
    ),
}

MODEL_FIELDS = tuple(f.name for f in fields(ModelConfig) if f.name not in ("vocab_size", "layer"))
TRAIN_FIELDS = tuple(f.name for f in fields(TrainConfig))


def defaults(unit: str) -> dict[str, Any]:
    """What a training is without a preset, by what one token is."""
    if unit in ("word", "bpe"):
        return {"emb": 200, "dropout": 0.3, "tied": True, "bptt": 35, "batch": 20, "epochs": 10}
    return {"emb": 64, "dropout": 0.1, "tied": False, "bptt": 100, "batch": 32, "epochs": 6}
