"""A small recurrent language model, trained from Python or with ``rnnlm-kernels train``.

The package stands on the public layers only (:class:`rnnlm_kernels.LSTM`,
:class:`rnnlm_kernels.GRU`), so it is also an example of their use. ``docs/training.md`` explains
what is computed and how the figures are counted.
"""

from .checkpoint import (
    CHECKPOINT_NAME,
    CheckpointError,
    CheckpointWriteError,
    load_checkpoint,
    save_checkpoint,
)
from .data import (
    DEFAULT_CORPUS,
    Corpus,
    CorpusError,
    StreamBatches,
    Vocabulary,
    corpus_from_text,
    load_corpus,
    unigram_loss,
)
from .evaluate import Score, evaluate
from .interrupt import StopRequest, stop_on_signals
from .model import ModelConfig, RNNLanguageModel
from .trainer import DivergenceError, EpochRecord, StepRecord, TrainConfig, Trainer, load_model

__all__ = [
    "CHECKPOINT_NAME",
    "DEFAULT_CORPUS",
    "CheckpointError",
    "CheckpointWriteError",
    "Corpus",
    "CorpusError",
    "DivergenceError",
    "EpochRecord",
    "ModelConfig",
    "RNNLanguageModel",
    "Score",
    "StepRecord",
    "StopRequest",
    "StreamBatches",
    "TrainConfig",
    "Trainer",
    "Vocabulary",
    "corpus_from_text",
    "evaluate",
    "load_checkpoint",
    "load_corpus",
    "load_model",
    "save_checkpoint",
    "stop_on_signals",
    "unigram_loss",
]
