"""From texts to batches."""

from ..tokenizers import EOS, UNK, Unit, Vocabulary, tokenize
from .corpus import Corpus, corpus_from_text, load_corpus, unigram_loss
from .sentences import SentenceBatches, sentence_spans
from .stream import IGNORE_INDEX, StreamBatches, random_length
from .text import DEFAULT_CORPUS, CorpusError, TextSource, default_text, read_text

__all__ = [
    "DEFAULT_CORPUS",
    "EOS",
    "IGNORE_INDEX",
    "UNK",
    "Corpus",
    "CorpusError",
    "SentenceBatches",
    "StreamBatches",
    "TextSource",
    "Unit",
    "Vocabulary",
    "corpus_from_text",
    "default_text",
    "load_corpus",
    "random_length",
    "read_text",
    "sentence_spans",
    "tokenize",
    "unigram_loss",
]
