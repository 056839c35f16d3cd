"""A recurrent layer in plain PyTorch: the equations of `rnnlm_kernels.reference` under autograd.

It goes through none of our operators or modules, so it can be their oracle: in float64 for the GRU
that torch lacks, and as the comparator in a dtype that torch's own layer fails in. It is also that
GRU's rival in the benchmark: what a user would write without us.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import reference
from .workload import Workload, layer_arguments


class PlainLayer(nn.Module):
    """Layers and directions of a workload's cell, with torch's parameter names and signature."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.workload = workload
        template = (nn.LSTM if workload.cell == "lstm" else nn.GRU)(
            **layer_arguments(workload), device="meta"
        )
        for name, weight in template.named_parameters():
            self.register_parameter(name, nn.Parameter(torch.empty(weight.shape)))

    def forward(
        self, inputs: Tensor | PackedSequence, state: Tensor | tuple[Tensor, ...]
    ) -> tuple[Tensor | PackedSequence, Tensor | tuple[Tensor, ...]]:
        """As :class:`torch.nn.LSTM` or :class:`torch.nn.GRU`; packed rows are sorted."""
        x = inputs if isinstance(inputs, Tensor) else inputs.data
        batch_sizes = None if isinstance(inputs, Tensor) else inputs.batch_sizes
        initial = state if isinstance(state, tuple) else (state,)
        finals: list[tuple[Tensor, ...]] = []
        for layer in range(self.workload.num_layers):
            outputs = []
            for direction in range(self.workload.num_directions):
                own = tuple(s[len(finals)] for s in initial)
                output, *final = self._scan(x, own, layer, direction, batch_sizes)
                outputs.append(output)
                finals.append(tuple(final))
            x = torch.cat(outputs, dim=-1)
        stacked = tuple(torch.stack(each) for each in zip(*finals, strict=True))
        result = x if batch_sizes is None else PackedSequence(x, batch_sizes)
        return result, (stacked if len(stacked) == 2 else stacked[0])

    def _scan(
        self,
        x: Tensor,
        state: tuple[Tensor, ...],
        layer: int,
        direction: int,
        batch_sizes: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Output and final states of one layer in one direction."""
        weights = dict(self.named_parameters())
        suffix = f"_l{layer}" + ("_reverse" if direction else "")
        w_ih, w_hh = weights[f"weight_ih{suffix}"], weights[f"weight_hh{suffix}"]
        b_ih, b_hh = weights.get(f"bias_ih{suffix}"), weights.get(f"bias_hh{suffix}")
        reverse = direction == 1
        if self.workload.cell == "lstm":
            h0, c0 = state
            w_hr = weights.get(f"weight_hr{suffix}")
            return reference.lstm(
                x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse=reverse
            )[:3]
        reset = "before" if self.workload.cell == "gru-before" else "after"
        return reference.gru(
            x, state[0], w_ih, w_hh, b_ih, b_hh, batch_sizes, reset=reset, reverse=reverse
        )
