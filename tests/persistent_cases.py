"""Random problems for the persistent CUDA kernels, whose layers are a multiple of 8 wide."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from recurrence_cases import CELLS, Layer, layer


@st.composite
def problems(draw: st.DrawFn, most_rows: int = 40) -> Layer:
    """Any cell and direction, dense or packed, with biases or without."""
    options: dict[str, Any] = {"reverse": draw(st.booleans()), "bias": draw(st.booleans())}
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=most_rows))
        options["lengths"] = tuple(sorted(lengths, reverse=True))
    hidden = 8 * draw(st.integers(1, 6))
    steps, batch = draw(st.integers(1, 5)), draw(st.integers(1, most_rows))
    cell = draw(st.sampled_from(CELLS))
    return layer(cell, steps, batch, 3, hidden, seed=draw(st.integers(0, 99)), **options)


def grid_ctas(problem: Layer) -> int:
    """CTAs of a group of the grid tier: each has 16 units."""
    return -(-problem.get("h0").size(-1) // 16)
