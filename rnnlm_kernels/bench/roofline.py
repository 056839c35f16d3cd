"""How fast a layer could be on this CPU, by rates that are measured in the same run.

Two things a layer cannot beat. *Products*: its floating-point operations at the rate of one
``torch.mm`` of as many, ``[N, I + R] x [I + R, g*H]``, as if no step had to wait for another (N
counts the valid rows of all steps). *Weights*: each step reads the recurrent weights once more,
from the level of the memory that holds them, at the rate at which the same threads read as many
bytes again and again, each thread its share.

The larger of the two is the roof, and a layer's roofline fraction is the roof over the layer's
time. More than 1 means that part of the weights stayed in a nearer cache from step to step, which
reading in the same order every time prevents. What lies between a layer and its roof is all that is
no product: activations, waiting for threads, products of few rows that cannot reach the rate of one
of many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .measure import Step
from .workload import Workload, flops, row_lengths

PRODUCT, WEIGHTS = "products", "weights"
_READ_BYTES = 2**23  # in one timed call, so that the call itself is no matter
_STEPS = {PRODUCT: "roof: products", WEIGHTS: "roof: weights"}  # no contender has such a name


def weight_bytes(workload: Workload) -> int:
    """Bytes that one step of one layer and direction reads: recurrent weights and projection."""
    gates = 4 if workload.cell == "lstm" else 3
    width = workload.proj_size or workload.hidden_size
    elements = gates * workload.hidden_size * width + workload.proj_size * workload.hidden_size
    return elements * workload.torch_dtype.itemsize


def passes(workload: Workload) -> int:
    """How often a step's recurrent weights are read: backward, they carry the gradient back."""
    return 2 if workload.mode == "training" else 1


class Roof:
    """The roof of a workload with torch's current number of threads.

    ``steps`` is what has to be timed, beside the contenders; :meth:`least_us` makes the roof of
    the samples.
    """

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        gates = 4 if workload.cell == "lstm" else 3
        width = workload.proj_size or workload.hidden_size
        rows = int(row_lengths(workload).sum())
        inner, outer = workload.input_size + width, gates * workload.hidden_size
        self._product_flops = 2 * rows * inner * outer
        left = torch.randn(rows, inner).to(workload.torch_dtype)
        right = torch.randn(inner, outer).to(workload.torch_dtype)
        product = torch.empty(rows, outer, dtype=workload.torch_dtype)

        threads = torch.get_num_threads()
        share = max(1, weight_bytes(workload) // (4 * threads))
        again = max(1, _READ_BYTES // (4 * threads * share))
        # A sum over all but the first dimension gives every thread its own part of the buffer.
        parts = torch.zeros(threads, 1, share).expand(threads, again, share)
        sums = torch.empty(threads)
        self._read_bytes = 4 * parts.numel()
        self.steps: Mapping[str, Step] = {
            _STEPS[PRODUCT]: lambda: _quietly(torch.mm, left, right, out=product),
            _STEPS[WEIGHTS]: lambda: _quietly(torch.sum, parts, (1, 2), out=sums),
        }

    def least_us(self, samples: Mapping[str, Sequence[float]]) -> tuple[float, str]:
        """The roof in microseconds, and which of the two it is.

        It is made of the fastest samples: what disturbs them lowers no roof.

        Args:
            samples: seconds per call, by the names of ``steps``.
        """
        workload = self._workload
        fastest = {which: 1e6 * min(samples[name]) for which, name in _STEPS.items()}
        reads = workload.seq_len * workload.num_layers * workload.num_directions * passes(workload)
        least = {
            PRODUCT: fastest[PRODUCT] * flops(workload) / self._product_flops,
            WEIGHTS: fastest[WEIGHTS] * reads * weight_bytes(workload) / self._read_bytes,
        }
        bound = max(least, key=least.__getitem__)
        return least[bound], bound


def _quietly(function: object, *arguments: object, **options: object) -> None:
    with torch.no_grad():
        function(*arguments, **options)  # type: ignore[operator]
