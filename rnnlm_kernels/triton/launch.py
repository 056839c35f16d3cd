"""What a call hands to the kernels beside its tensors. Knows torch but not triton."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .tiles import Limits, Tile


@dataclass(frozen=True)
class Run:
    """One call of a layer, apart from its tensors.

    Args:
        reverse: run from each row's last step to step 0.
        precision: ``input_precision`` of ``tl.dot``: ``"ieee"``, or ``"tf32"`` where torch allows
            it to its own RNNs.
        limits: of the device of the tensors.
        batch_sizes: rows of each packed step, int64 ``[T]`` on the CPU; None for dense input.
        offsets: first row of each packed step and the end of the last, int64 ``[T + 1]`` on the
            device; None for dense input and for kernels that do without.
        tile: of the stepwise kernels, where a table of measurements names one.
    """

    reverse: bool
    precision: str
    limits: Limits
    batch_sizes: Tensor | None
    offsets: Tensor | None
    tile: Tile | None = None


__all__ = ["Limits", "Run"]
