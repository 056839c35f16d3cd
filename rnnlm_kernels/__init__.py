"""Fused LSTM and GRU layers for PyTorch: same numbers, same ``state_dict``, fewer microseconds.

>>> import torch, rnnlm_kernels
>>> layer = rnnlm_kernels.LSTM(8, 16)
>>> output, (h_n, c_n) = layer(torch.randn(5, 2, 8))
>>> output.shape
torch.Size([5, 2, 16])
"""

from . import ops
from ._version import __version__
from .build import build_info
from .dispatch import BackendError, explain
from .dropouts import dropout, embedding_dropout
from .losses import LinearCrossEntropyLoss, linear_cross_entropy
from .nn import GRU, LSTM, GRUCell, LSTMCell, replace, restore
from .options import Plan, Problem, RecurrenceOptions

__all__ = [
    "GRU",
    "LSTM",
    "BackendError",
    "GRUCell",
    "LSTMCell",
    "LinearCrossEntropyLoss",
    "Plan",
    "Problem",
    "RecurrenceOptions",
    "__version__",
    "build_info",
    "dropout",
    "embedding_dropout",
    "explain",
    "linear_cross_entropy",
    "ops",
    "replace",
    "restore",
]
