"""Modules that take the place of ``torch.nn.LSTM``, ``GRU``, ``LSTMCell``, and ``GRUCell``."""

from .cells import GRUCell, LSTMCell
from .replace import Report, Skipped, Swap, replace, restore
from .rnn import GRU, LSTM

__all__ = [
    "GRU",
    "LSTM",
    "GRUCell",
    "LSTMCell",
    "Report",
    "Skipped",
    "Swap",
    "replace",
    "restore",
]
