"""A recurrent language model: trained, evaluated and made to write, from Python or with
``rnnlm-kernels train``, ``eval``, ``score`` and ``generate``.

The package stands on the public layers only (:class:`rnnlm_kernels.LSTM`,
:class:`rnnlm_kernels.GRU`), so it is also an example of their use. ``docs/training.md`` explains
what is computed and how the figures are counted, ``docs/language-model.md`` everything else.
"""

from .auxiliary import load_synonyms, synonym_recall
from .cache import CacheConfig
from .checkpoint import (
    CHECKPOINT_NAME,
    CheckpointError,
    CheckpointWriteError,
    has_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from .config import TrainConfig
from .data import (
    DEFAULT_CORPUS,
    Corpus,
    CorpusError,
    SentenceBatches,
    StreamBatches,
    corpus_from_text,
    load_corpus,
    unigram_loss,
)
from .evaluate import (
    Score,
    evaluate,
    evaluate_dynamically,
    evaluate_sentences,
    token_losses,
)
from .generate import Generator, Sampling, predict
from .gradient_flow import GradientFlow, gradient_flow
from .interrupt import StopRequest, stop_on_signals
from .model import ModelConfig, RNNLanguageModel
from .parallel import process_group, this_process
from .records import EpochRecord, EvalRecord, StepRecord
from .tokenizers import BpeTokenizer, ByteTokenizer, Tokenizer, Vocabulary, tokenizer_from_json
from .trainer import DivergenceError, Trainer, load_model

__all__ = [
    "CHECKPOINT_NAME",
    "DEFAULT_CORPUS",
    "BpeTokenizer",
    "ByteTokenizer",
    "CacheConfig",
    "CheckpointError",
    "CheckpointWriteError",
    "Corpus",
    "CorpusError",
    "DivergenceError",
    "EpochRecord",
    "EvalRecord",
    "Generator",
    "GradientFlow",
    "ModelConfig",
    "RNNLanguageModel",
    "Sampling",
    "Score",
    "SentenceBatches",
    "StepRecord",
    "StopRequest",
    "StreamBatches",
    "Tokenizer",
    "TrainConfig",
    "Trainer",
    "Vocabulary",
    "corpus_from_text",
    "evaluate",
    "evaluate_dynamically",
    "evaluate_sentences",
    "gradient_flow",
    "has_checkpoint",
    "load_checkpoint",
    "load_corpus",
    "load_model",
    "load_synonyms",
    "predict",
    "process_group",
    "save_checkpoint",
    "stop_on_signals",
    "synonym_recall",
    "this_process",
    "token_losses",
    "tokenizer_from_json",
    "unigram_loss",
]
