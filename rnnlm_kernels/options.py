"""What is asked of a backend (`Problem`, `RecurrenceOptions`), what dispatch answers (`Plan`)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch

CELLS = ("lstm", "gru")
RESETS = ("after", "before")
# What a layer keeps for backward: all that makes it fastest, or no gates, which it then rebuilds.
# The operators' business: a backend is asked to save or not, and gets what it saves.
MEMORY_POLICIES = ("fast", "low")


def checked_memory(memory: str) -> str:
    """The argument ``memory``, refused when it names no policy."""
    if memory not in MEMORY_POLICIES:
        raise ValueError(f"memory should be one of {MEMORY_POLICIES}, got {memory!r}")
    return memory


@dataclass(frozen=True)
class RecurrenceOptions:
    """How a recurrence runs, apart from its sizes. Every backend receives one of these.

    Args:
        reset: GRU only. ``"after"`` applies the reset gate to ``W_hn h + b_hn`` (PyTorch, cuDNN),
            ``"before"`` applies it to ``h`` (Cho et al., 2014).
        reverse: run from each row's last step to step 0.
        packed: the input is the ``data`` of a :class:`~torch.nn.utils.rnn.PackedSequence`.
        return_cells: LSTM only. Hand out the cell state of every step.
        zoneout_h, zoneout_c: probability that a unit keeps its previous h or c.
        weight_drop: probability that a recurrent weight is dropped for the whole sequence.
        layer_norm: normalise the gate pre-activations.
        resets: per-step flags that zero the state before the step.
        lengths: a row's number of valid steps, without packing.

    The options after ``return_cells`` are part of the contract but no backend runs them yet;
    :meth:`unsupported` names them, so that every backend refuses them with the same words.
    """

    reset: str = "after"
    reverse: bool = False
    packed: bool = False
    return_cells: bool = False
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    weight_drop: float = 0.0
    layer_norm: bool = False
    resets: bool = False
    lengths: bool = False

    def __post_init__(self) -> None:
        if self.reset not in RESETS:
            raise ValueError(f"reset should be one of {RESETS}, got {self.reset!r}")

    def unsupported(self, built: frozenset[str]) -> list[str]:
        """Names of the options that differ from their default and are not in ``built``."""
        return [
            f.name
            for f in fields(self)
            if f.name not in built and getattr(self, f.name) != f.default
        ]


# What every backend of this version runs.
BUILT_OPTIONS = frozenset({"reset", "reverse", "packed", "return_cells"})


@dataclass(frozen=True)
class Problem:
    """One layer in one direction: all that dispatch may base a choice on.

    Args:
        cell: ``"lstm"`` or ``"gru"``.
        input_size, hidden_size: features of x and h.
        dtype, device: of every tensor of the problem; ``device`` is a device type or a device.
        seq_len, batch: number of steps and rows, ``None`` when not known (dynamic shapes).
        proj_size: width of the projected h (LSTM), 0 for none.
        training: whether a backward pass will follow.
        options: see :class:`RecurrenceOptions`.
    """

    cell: str
    input_size: int
    hidden_size: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seq_len: int | None = None
    batch: int | None = None
    proj_size: int = 0
    training: bool = False
    options: RecurrenceOptions = field(default_factory=RecurrenceOptions)

    def __post_init__(self) -> None:
        if self.cell not in CELLS:
            raise ValueError(f"cell should be one of {CELLS}, got {self.cell!r}")

    @property
    def num_gates(self) -> int:
        return 4 if self.cell == "lstm" else 3

    @property
    def device_type(self) -> str:
        return torch.device(self.device).type

    def __str__(self) -> str:
        name = self.cell if self.cell == "lstm" else f"gru(reset={self.options.reset})"
        sizes = f"T={self.seq_len or 'any'} B={self.batch or 'any'} I={self.input_size}"
        proj = f" proj={self.proj_size}" if self.proj_size else ""
        mode = "training" if self.training else "inference"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{name} {sizes} H={self.hidden_size}{proj} {dtype} {self.device} {mode}"


@dataclass(frozen=True)
class Plan:
    """The answer to a :class:`Problem`: who computes it, how, and why."""

    backend: str
    kernel: str
    tile: str
    reason: str

    def __str__(self) -> str:
        tile = f" [{self.tile}]" if self.tile else ""
        return f"{self.backend}: {self.kernel}{tile} ({self.reason})"
