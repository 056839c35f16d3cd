"""A torch module and ours with the same weights, and how to compare what they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import rnnlm_kernels.nn

LAYERS = ("LSTM", "GRU")
CELLS = ("LSTMCell", "GRUCell")

# The constructor arguments that change what a layer computes, by a readable id.
LAYER_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"bias": False},
    "two-layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "batch-first": {"batch_first": True},
    "three-layers-bidirectional-no-bias-batch-first": {
        "num_layers": 3,
        "bidirectional": True,
        "bias": False,
        "batch_first": True,
    },
}
PROJECTIONS: dict[str, dict[str, Any]] = {
    "projection": {"proj_size": 2},
    "projection-two-layers-bidirectional": {
        "proj_size": 3,
        "num_layers": 2,
        "bidirectional": True,
    },
    "projection-no-bias": {"proj_size": 2, "bias": False},
}
INPUT_SIZE, HIDDEN_SIZE = 3, 5


def layer_cases() -> list[Any]:
    """Every layer with every option set it has, as pytest parameters ``kind, options``."""
    import pytest

    cases = [(kind, name, LAYER_OPTIONS[name]) for kind in LAYERS for name in LAYER_OPTIONS]
    cases += [("LSTM", name, options) for name, options in PROJECTIONS.items()]
    return [pytest.param(kind, options, id=f"{kind}-{name}") for kind, name, options in cases]


def pair(
    kind: str,
    *args: Any,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torch's module and ours, constructed alike, with the same weights."""
    torch.manual_seed(seed)
    args = args or (INPUT_SIZE, HIDDEN_SIZE)
    theirs = getattr(torch.nn, kind)(*args, dtype=dtype, **options)
    ours = getattr(rnnlm_kernels.nn, kind)(*args, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def states(layer: torch.nn.Module, batch: int | None, dtype: torch.dtype = torch.float64) -> Any:
    """Random initial states of the shape a layer or a cell wants; ``batch`` None: unbatched."""
    rows = () if batch is None else (batch,)
    lead: tuple[int, ...] = ()
    width = layer.hidden_size
    if isinstance(layer, torch.nn.RNNBase):
        lead = (layer.num_layers * (2 if layer.bidirectional else 1),)
        width = layer.proj_size or width
    h = torch.randn(*lead, *rows, width, dtype=dtype)
    if "LSTM" not in type(layer).__name__:
        return h
    return h, torch.randn(*lead, *rows, layer.hidden_size, dtype=dtype)


def flat(result: Any) -> list[Tensor]:
    """All tensors of nested outputs, states, or arguments; those of a PackedSequence first."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, (tuple, list)):
        return [tensor for part in result for tensor in flat(part)]
    return []


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Same structure, shapes, dtypes, and numbers."""
    ours, theirs = flat(actual), flat(expected)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def refusal(call: Callable[[], Any]) -> tuple[type[BaseException], str] | None:
    """The exception a call ends in: its type and message; None when it returns."""
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


def raised(call: Callable[[], Any]) -> tuple[type[BaseException], str]:
    """The exception a call has to end in: its type and message."""
    found = refusal(call)
    assert found is not None, "no exception was raised"
    return found
