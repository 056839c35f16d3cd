"""Which tile a kernel runs in: the defaults, their reasons, and the one place that chooses.

:func:`choose` is asked for every launch loop and nothing else decides. The defaults are derived
from the sizes of memories and of tensor core instructions, not yet from measurements on GPUs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Limits:
    """What a plan may know of a device.

    Args:
        multiprocessors: SMs, or compute units on AMD.
        shared_per_block: bytes of shared memory that one program may have.
        warp_size: 32, or 64 on AMD's data center GPUs.
    """

    multiprocessors: int
    shared_per_block: int
    warp_size: int


@dataclass(frozen=True)
class Tile:
    """The share of one program.

    Args:
        rows: batch rows.
        units: hidden units, each with all its gates.
        depth: terms of the recurrent product that are in shared memory at a time.
        warps, stages: of the program; ``num_warps`` and ``num_stages`` of a launch.
    """

    rows: int
    units: int
    depth: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """What tables of measurements call it; :func:`named` is the inverse.

        Example:
            >>> Tile(16, 32, 64, warps=4, stages=3).name
            '16x32x64-w4-s3'
        """
        return f"{self.rows}x{self.units}x{self.depth}-w{self.warps}-s{self.stages}"

    def __str__(self) -> str:
        return f"{self.rows} rows x {self.units} units, depth {self.depth}, {self.warps} warps"


def named(name: str) -> Tile | None:
    """The tile with this name, None where it is none.

    Example:
        >>> named("16x32x64-w4-s3") == Tile(16, 32, 64, warps=4, stages=3)
        True
    """
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)-w(\d+)-s(\d+)", name)
    return None if found is None else Tile(*map(int, found.groups()))


def choose(
    kernel: str,
    cell: str,
    backward: bool,
    dtype: torch.dtype,
    batch: int,
    hidden: int,
    limits: Limits,
) -> Tile:
    """The tile of a kernel ("stepwise", "sequence", "persistent") for a layer on a device."""
    return _default(kernel, cell, backward, dtype, batch, hidden, limits)


@functools.lru_cache(maxsize=4096)
def _default(kernel: str, *problem: Any) -> Tile:
    return DEFAULTS[kernel](*problem)


# --- the defaults ---------------------------------------------------------------------------------

# The smallest block that tl.dot multiplies in every version of Triton.
_LEAST = 16
# Bytes of a row of a factor that are loaded at a time: a line of the L2 cache.
_LINE = 128
_MOST_STAGES = 4


def _power_of_2(n: int) -> int:
    """The smallest power of 2 that is not below n and that tl.dot multiplies."""
    return max(_LEAST, 1 << (n - 1).bit_length())


def stepwise(
    cell: str, backward: bool, dtype: torch.dtype, batch: int, hidden: int, limits: Limits
) -> Tile:
    """A launch a step.

    * rows: a step reads every weight once for each tile of rows, so as many as there are, up to 64,
      where a tensor core instruction of four warps is full.
    * units: a step of few rows is bound by how many multiprocessors fetch weights from the L2
      cache at once, so as many as leave a program for three of four of them, 16 to 64. All gates of
      a unit are in one program: forward, 64 units of 4 gates would fill the registers of 8 warps.
    * depth: a cache line of each row of h and of the weights.
    * warps: 4; 8 where sums and factors would not fit the registers of 4.
    * stages: as many blocks on their way from memory as fit, up to 4.
    """
    rows = min(64, _power_of_2(batch))
    row_tiles = -(-batch // rows)
    units = min(_most_units(backward), _power_of_2(hidden))
    while units > _LEAST and 4 * row_tiles * -(-hidden // units) < 3 * limits.multiprocessors:
        units //= 2
    return _stepwise_tile(rows, units, cell, backward, dtype, hidden, limits)


def _most_units(backward: bool) -> int:
    return 64 if backward else 32


def _stepwise_tile(
    rows: int,
    units: int,
    cell: str,
    backward: bool,
    dtype: torch.dtype,
    hidden: int,
    limits: Limits,
) -> Tile:
    gates = 1 if backward else 4 if cell == "lstm" else 3 if cell == "gru" else 2
    depth = min(_LINE // dtype.itemsize, _power_of_2(hidden))
    # Backward holds as much for the gates as for the product.
    warps = 8 if rows * units * gates > 64 * (32 if backward else 64) else 4
    stage = (rows + gates * units) * depth * dtype.itemsize
    stages = max(1, min(_MOST_STAGES, limits.shared_per_block // stage))
    return Tile(rows, units, depth, warps, stages)


def alternatives(
    cell: str, backward: bool, dtype: torch.dtype, batch: int, hidden: int, limits: Limits
) -> list[Tile]:
    """Tiles for a launch a step that are worth a measurement, the default one first."""
    default = stepwise(cell, backward, dtype, batch, hidden, limits)
    sizes = [
        (rows, units)
        for rows in (default.rows, default.rows // 2)
        for units in (16, 32, 64)
        if rows >= _LEAST and units <= min(_most_units(backward), _power_of_2(hidden))
    ]
    tiles = [_stepwise_tile(*size, cell, backward, dtype, hidden, limits) for size in sizes]
    return [default, *(tile for tile in tiles if tile != default)]


def sequence(
    cell: str, backward: bool, dtype: torch.dtype, batch: int, hidden: int, limits: Limits
) -> Tile:
    """All steps in one launch.

    * rows: the fewest that tl.dot takes. Programs do not meet, so more of them are quicker, and
      the gates of a step take as long as a thread has units.
    * units, depth: all there are.
    * warps: one for every 8 columns of a gate, which is what a tensor core instruction makes (16
      where a warp has 64 lanes), and at most 8, so that a thread has 255 registers for weights.
    """
    units = _power_of_2(hidden)
    warps = min(8, 4 * units // limits.warp_size)
    return Tile(_LEAST, units, units, warps, 1)


def persistent(
    cell: str, backward: bool, dtype: torch.dtype, batch: int, hidden: int, limits: Limits
) -> Tile:
    """One launch whose programs share the weights.

    * rows: the fewest that tl.dot takes; groups of rows share nothing, so more of them are quicker.
    * units: 16, with four blocks of columns 8 for each of 8 warps. Fewer would leave warps without
      columns, more would leave multiprocessors without a program.
    * depth: h has to be there as a whole.
    """
    return Tile(_LEAST, 16, _power_of_2(hidden), 8, 1)


DEFAULTS: dict[str, Callable[..., Tile]] = {
    "stepwise": stepwise,
    "sequence": sequence,
    "persistent": persistent,
}
