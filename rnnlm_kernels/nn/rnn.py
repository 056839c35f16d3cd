"""``LSTM`` and ``GRU``: torch's modules in all but their forward pass.

Both inherit from :class:`torch.nn.RNNBase`, so constructor checks, parameters, initialisation,
``state_dict``, and pickling are torch's own code. They do not inherit from ``torch.nn.LSTM`` and
``torch.nn.GRU``, which ``torch.compile`` refuses to trace by type.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import functional
from ..dispatch import requested
from ..functional import LayerWeights
from ..options import RESETS, Problem, RecurrenceOptions, checked_memory

NO_PROJECTION = "proj_size argument is only supported for LSTM, not RNN or GRU"


def refuse_scripting(module: torch.nn.Module) -> None:
    """What ``torch.jit.script`` calls first, here to say what to do instead."""
    name = type(module).__name__
    raise RuntimeError(
        f"torch.jit.script cannot compile rnnlm_kernels.{name}. Use torch.export or "
        "torch.jit.trace, or script torch's own layer: rnnlm_kernels.restore(model) brings back "
        "those that replace() swapped."
    )


class _Layers(torch.nn.RNNBase):
    """What LSTM and GRU share: finding the weights and checking the input."""

    # On the class, so that objects swapped in by ``replace`` or pickled earlier have it too.
    backend: str | None = None
    memory: str = "fast"

    __prepare_scriptable__ = refuse_scripting

    # RNNBase writes assigned weights through to a list that its forward reads. Ours looks every
    # weight up by name instead, so nothing needs to be kept in step with the attributes.
    __setattr__ = torch.nn.Module.__setattr__  # type: ignore[assignment]

    @property
    def _flat_weights(self) -> list[Any]:
        """The weights as they are now; RNNBase and its users read this list."""
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Any]) -> None:
        """RNNBase assigns what it has just read from the attributes."""

    def flatten_parameters(self) -> None:
        """Do nothing: the kernels need no joint weight buffer. Kept for programs that call it."""

    def problems(self) -> list[Problem]:
        """The problems dispatch has to solve for this module, one per layer and direction."""
        weight = self._flat_weights[0]
        directions = 2 if self.bidirectional else 1
        width = self.proj_size or self.hidden_size
        return [
            Problem(
                cell=self.mode.lower(),
                input_size=self.input_size if layer == 0 else width * directions,
                hidden_size=self.hidden_size,
                dtype=weight.dtype,
                device=weight.device.type,
                proj_size=self.proj_size,
                training=self.training,
                options=RecurrenceOptions(
                    reset=getattr(self, "reset", "after"),
                    reverse=direction == 1,
                    return_cells=getattr(self, "return_cells", False)
                    and layer == self.num_layers - 1,
                ),
            )
            for layer in range(self.num_layers)
            for direction in range(directions)
        ]

    def _weights(self) -> list[LayerWeights]:
        """Every layer's weights, looked up anew.

        So an assigned tensor, a parametrization, ``functional_call``, or a sharded parameter is
        seen by the very next call.
        """
        parameters = self._parameters
        found: list[Any] = []
        for names in self._all_weights:
            layer: list[Any] = []
            for name in names:
                # Ten times quicker than getattr, which is only needed for what was put in the
                # place of a parameter.
                weight = parameters.get(name)
                layer.append(getattr(self, name) if weight is None else weight)
            if not self.bias:
                layer[2:2] = (None, None)
            if not self.proj_size:
                layer.append(None)
            found.append(tuple(layer))
        return found

    def _rows(
        self,
        input: Tensor | PackedSequence,
        hx: Any,
        index: Tensor | PackedSequence | None,
    ) -> tuple[Tensor, int, int, Tensor | None, Tensor | None, Tensor | None]:
        """The input with a batch dimension, its batch size, and how it came.

        That is the number of dimensions of a dense input (0 for a packed one), and the batch sizes
        and both permutations of a packed one. With an index all this is the index's.
        """
        if index is not None:
            self._check_table(input)
            input = _with_feature(self.mode, index)
        batch_sizes = sorted_indices = unsorted_indices = None
        dims = 0
        if isinstance(input, PackedSequence):
            x, batch_sizes, sorted_indices, unsorted_indices, batch = self._unpack(input, hx)
        elif isinstance(input, Tensor):
            x, dims = input, input.dim()
            if dims == 3:
                batch = x.shape[0 if self.batch_first else 1]
            elif dims == 2:
                x, batch = x.unsqueeze(1), 1
            else:
                raise ValueError(f"{self.mode}: Expected input to be 2D or 3D, got {dims}D instead")
        else:
            raise TypeError(not_an_input(self.mode, input))
        if index is not None:
            x = x.squeeze(-1)
        elif x.shape[-1] != self.input_size:
            self.check_input(x, batch_sizes)
        return x, batch, dims, batch_sizes, sorted_indices, unsorted_indices

    def _check_table(self, input: Any) -> None:
        """What an input is with an index."""
        if isinstance(input, Tensor) and input.dim() == 2 and input.shape[1] == self.input_size:
            return
        raise RuntimeError(
            f"{self.mode}: with an index, input should be a tensor of its rows, "
            f"[U, {self.input_size}], got {described(input)}"
        )

    def _unpack(
        self, input: PackedSequence, hx: Any
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]:
        """The parts of a packed input and its batch size."""
        # By name: torch 2.6 can trace these, but not unpacking them.
        data, batch_sizes = input.data, input.batch_sizes
        sorted_indices, unsorted_indices = input.sorted_indices, input.unsorted_indices
        if data.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
        if batch_sizes.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        # A compiled graph would break where it reads a tensor's value, so it trusts these shapes.
        if sorted_indices is not None and torch.compiler.is_compiling():
            batch = sorted_indices.size(0)
        elif hx is not None and torch.compiler.is_compiling():
            batch = (hx[0] if isinstance(hx, (tuple, list)) else hx).size(1)
        else:
            batch = int(batch_sizes[0])
        return data, batch_sizes, sorted_indices, unsorted_indices, batch

    def _zeros(self, x: Tensor, batch: int, width: int) -> Tensor:
        """Initial states ``[L*D, batch, width]`` over one allocation for all layers."""
        count = self.num_layers * (2 if self.bidirectional else 1)
        return x.new_zeros((1, batch, width)).expand(count, -1, -1)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.memory != "fast":
            text += f", memory={self.memory!r}"
        return text if self.backend is None else f"{text}, backend={self.backend!r}"


class LSTM(_Layers):
    r"""A drop-in ``torch.nn.LSTM`` on fused kernels.

    .. math::
        i, f, o &= \sigma(W_{ix} x_t + b_{ix} + W_{ih} h_{t-1} + b_{ih}), \ldots \\
        g &= \tanh(W_{gx} x_t + b_{gx} + W_{gh} h_{t-1} + b_{gh}) \\
        c_t &= f \odot c_{t-1} + i \odot g \qquad
        h_t = o \odot \tanh(c_t), \quad\text{projected}\quad h_t = W_{hr}(o \odot \tanh(c_t))

    Parameters, their names, order, and initialisation are those of ``torch.nn.LSTM``; state dicts
    are exchanged in both directions.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device, dtype: as for ``torch.nn.LSTM``.
        backend: who computes: a name, ``"auto"``, or None for ``RNNLM_BACKEND`` and then the best.
        memory: ``"fast"`` keeps the gates of every step for backward, 4H values; ``"low"`` keeps
            only h and c, and backward first rebuilds the gates. See docs/training.md.
        return_cells: also return the last layer's cell state of every step.

    Inputs:
        input: ``[T, B, input_size]`` (``[B, T, input_size]`` with ``batch_first``), unbatched
            ``[T, input_size]``, or a ``PackedSequence``; the dtype and device of the weights.
        index: integers ``[T, B]`` (``[B, T]``, ``[T]``, or a ``PackedSequence`` of them), where
            ``input`` is a table of different rows ``[U, input_size]``: as if the input were
            ``input[index]``, but the first layer projects every row only once.
        hx: ``(h_0, c_0)``, ``[L*D, B, R]`` and ``[L*D, B, H]`` (unbatched without B), in the
            dtype and on the device of ``input``; None means zeros. L is the number of layers, D
            the number of directions, R is ``proj_size``, or H without projection.

    Returns:
        ``output, (h_n, c_n)``, and with ``return_cells`` a third ``cells``. ``output`` is
        ``[T, B, D*R]`` and ``cells`` ``[T, B, D*H]``, in the layout of ``input``. Under autocast
        all have the autocast dtype.

    Raises:
        ValueError, TypeError: a constructor argument, the number of dimensions, or the dtype of
            ``input`` is wrong.
        RuntimeError: a size, a device, or the dtype of a state is wrong.

    Source: Hochreiter & Schmidhuber, 1997; projection: Sak et al., 2014,
    https://arxiv.org/abs/1402.1128.

    Example:
        >>> import torch
        >>> layer = LSTM(8, 16, num_layers=2, return_cells=True)
        >>> output, (h_n, c_n), cells = layer(torch.randn(5, 3, 8))
        >>> output.shape, h_n.shape, torch.equal(cells[-1], c_n[-1])
        (torch.Size([5, 3, 16]), torch.Size([2, 3, 16]), True)
    """

    return_cells: bool = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
        memory: Literal["fast", "low"] = "fast",
        return_cells: bool = False,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self.backend = checked_backend(backend)
        self.memory = checked_memory(memory)
        self.return_cells = return_cells

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        index: Tensor | PackedSequence | None = None,
    ) -> tuple[Any, ...]:
        """Run the layers over a sequence; see the class for shapes."""
        x, batch, dims, batch_sizes, sorted_indices, unsorted_indices = self._rows(input, hx, index)
        positions = None
        if isinstance(input, Tensor) and index is not None:
            x, positions = input, x
        if hx is not None:
            hx = self._checked_states(hx, batch, dims)
            if sorted_indices is not None:
                hx = self.permute_hidden(hx, sorted_indices)
        elif batch_sizes is not None:
            width = self.proj_size or self.hidden_size
            hx = (self._zeros(x, batch, width), self._zeros(x, batch, self.hidden_size))

        output, h_n, c_n, cells = functional.lstm(
            x,
            hx,
            self._weights(),
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first and dims == 3,
            # Not read in vain: a compiled dynamic graph would carry it as a symbol.
            dropout=self.dropout if self.num_layers > 1 else 0.0,
            training=self.training,
            batch_sizes=batch_sizes,
            index=positions,
            proj_size=self.proj_size,
            return_cells=self.return_cells,
            memory=self.memory,
            backend=self.backend,
        )

        result: Any = output
        if batch_sizes is not None:
            result = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            if unsorted_indices is not None:
                h_n, c_n = self.permute_hidden((h_n, c_n), unsorted_indices)
        elif dims == 2:
            result, h_n, c_n = output.squeeze(1), h_n.squeeze(1), c_n.squeeze(1)
        if cells is None:
            return result, (h_n, c_n)
        if batch_sizes is not None:
            steps = PackedSequence(cells, batch_sizes, sorted_indices, unsorted_indices)
            return result, (h_n, c_n), steps
        return result, (h_n, c_n), cells.squeeze(1) if dims == 2 else cells

    def _checked_states(self, hx: Any, batch: int, dims: int) -> tuple[Tensor, Tensor]:
        """``(h_0, c_0)`` with their batch dimension, refused with torch's words where it has any.

        Checked in the caller's row order, before any permutation could hide a wrong batch size.
        """
        if (
            not isinstance(hx, (tuple, list))
            or len(hx) != 2
            or not isinstance(hx[0], Tensor)
            or not isinstance(hx[1], Tensor)
        ):
            raise TypeError(f"LSTM: hx should be (h_0, c_0), two tensors, got {described(hx)}")
        h0, c0 = hx
        if dims and (h0.dim() != dims or c0.dim() != dims):
            kind = "batched 3-D" if dims == 3 else "unbatched 2-D"
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {dims}-D but got "
                f"({h0.dim()}-D, {c0.dim()}-D) tensors"
            )
        if dims == 2:
            h0, c0 = h0.unsqueeze(1), c0.unsqueeze(1)
        count = self.num_layers * (2 if self.bidirectional else 1)
        expected = (count, batch, self.proj_size or self.hidden_size)
        if h0.size() != expected:
            self.check_hidden_size(h0, expected, "Expected hidden[0] size {}, got {}")
        expected = (count, batch, self.hidden_size)
        if c0.size() != expected:
            self.check_hidden_size(c0, expected, "Expected hidden[1] size {}, got {}")
        return h0, c0

    # The methods of torch.nn.LSTM that differ from RNNBase's, for programs that call them.

    def get_expected_cell_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        """Shape of ``c_0`` for a batched or packed input."""
        count, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        return count, batch, self.hidden_size

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        """Raise for an input or states that do not fit, as ``torch.nn.LSTM`` does."""
        self.check_input(input, batch_sizes)
        expected = self.get_expected_hidden_size(input, batch_sizes)
        self.check_hidden_size(hidden[0], expected, "Expected hidden[0] size {}, got {}")
        expected = self.get_expected_cell_size(input, batch_sizes)
        self.check_hidden_size(hidden[1], expected, "Expected hidden[1] size {}, got {}")

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        """Reorder the batch rows of both states."""
        if permutation is None:
            return hx
        return hx[0].index_select(1, permutation), hx[1].index_select(1, permutation)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return f"{text}, return_cells=True" if self.return_cells else text


class GRU(_Layers):
    r"""A drop-in ``torch.nn.GRU`` on fused kernels, in both variants of the reset gate.

    .. math::
        r, z &= \sigma(W_{rx} x_t + b_{rx} + W_{rh} h_{t-1} + b_{rh}), \ldots \\
        n &= \tanh(W_{nx} x_t + b_{nx} + r \odot (W_{nh} h_{t-1} + b_{nh}))
             \quad\text{(reset="after")} \\
        n &= \tanh(W_{nx} x_t + b_{nx} + W_{nh} (r \odot h_{t-1}) + b_{nh})
             \quad\text{(reset="before")} \\
        h_t &= (1 - z) \odot n + z \odot h_{t-1}

    Parameters, their names, order, and initialisation are those of ``torch.nn.GRU``; state dicts
    are exchanged in both directions.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device,
            dtype: as for ``torch.nn.GRU``.
        proj_size: not an option of a GRU. It keeps its place because it is the eighth positional
            argument of ``torch.nn.GRU``, which accepts a value there and then cannot run.
        reset: ``"after"`` (PyTorch, cuDNN) or ``"before"`` (Cho et al., 2014).
        backend: who computes: a name, ``"auto"``, or None for ``RNNLM_BACKEND`` and then the best.
        memory: ``"fast"`` keeps the gates of every step for backward, 4H values (3H with
            ``reset="before"``); ``"low"`` keeps only h, and backward first rebuilds the gates.

    Inputs:
        input: ``[T, B, input_size]`` (``[B, T, input_size]`` with ``batch_first``), unbatched
            ``[T, input_size]``, or a ``PackedSequence``; the dtype and device of the weights.
        index: integers ``[T, B]`` (``[B, T]``, ``[T]``, or a ``PackedSequence`` of them), where
            ``input`` is a table of different rows ``[U, input_size]``: as if the input were
            ``input[index]``, but the first layer projects every row only once.
        hx: ``[L*D, B, H]`` (unbatched without B), in the dtype and on the device of ``input``;
            None means zeros. L is the number of layers, D the number of directions.

    Returns:
        ``output, h_n``: ``[T, B, D*H]`` in the layout of ``input``, and ``[L*D, B, H]``. Under
        autocast both have the autocast dtype.

    Raises:
        ValueError, TypeError: a constructor argument, the number of dimensions, or the dtype of
            ``input`` is wrong.
        RuntimeError: a size, a device, or the dtype of ``hx`` is wrong.

    Source: Cho et al., 2014, https://arxiv.org/abs/1406.1078.

    Example:
        >>> import torch
        >>> layer = GRU(8, 16, bidirectional=True, reset="before")
        >>> output, h_n = layer(torch.randn(5, 3, 8))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 32]), torch.Size([2, 3, 16]))
    """

    reset: str = "after"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        reset: str = "after",
        backend: str | None = None,
        memory: Literal["fast", "low"] = "fast",
    ) -> None:
        if proj_size is not None:
            raise ValueError(NO_PROJECTION)
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self.reset = checked_reset(reset)
        self.backend = checked_backend(backend)
        self.memory = checked_memory(memory)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        index: Tensor | PackedSequence | None = None,
    ) -> tuple[Any, Any]:
        """Run the layers over a sequence; see the class for shapes."""
        x, batch, dims, batch_sizes, sorted_indices, unsorted_indices = self._rows(input, hx, index)
        positions = None
        if isinstance(input, Tensor) and index is not None:
            x, positions = input, x
        if hx is not None:
            hx = self._checked_state(hx, batch, dims)
            if sorted_indices is not None:
                hx = hx.index_select(1, sorted_indices)
        elif batch_sizes is not None:
            hx = self._zeros(x, batch, self.hidden_size)

        output, h_n = functional.gru(
            x,
            hx,
            self._weights(),
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first and dims == 3,
            # Not read in vain: a compiled dynamic graph would carry it as a symbol.
            dropout=self.dropout if self.num_layers > 1 else 0.0,
            training=self.training,
            batch_sizes=batch_sizes,
            index=positions,
            reset=self.reset,
            memory=self.memory,
            backend=self.backend,
        )

        if batch_sizes is not None:
            packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            return packed, self.permute_hidden(h_n, unsorted_indices)
        if dims == 2:
            return output.squeeze(1), h_n.squeeze(1)
        return output, h_n

    def _checked_state(self, hx: Any, batch: int, dims: int) -> Tensor:
        """``h_0`` with its batch dimension, refused with torch's words where it has any."""
        if not isinstance(hx, Tensor):
            raise TypeError(f"GRU: hx should be one tensor, h_0, got {described(hx)}")
        if dims and hx.dim() != dims:
            kind = "batched 3-D" if dims == 3 else "unbatched 2-D"
            raise RuntimeError(
                f"For {kind} input, hx should also be {dims}-D but got {hx.dim()}-D tensor"
            )
        if dims == 2:
            hx = hx.unsqueeze(1)
        expected = (self.num_layers * (2 if self.bidirectional else 1), batch, self.hidden_size)
        if hx.size() != expected:
            self.check_hidden_size(hx, expected)
        return hx

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.reset == "after" else f"{text}, reset={self.reset!r}"


def checked_backend(backend: str | None) -> str | None:
    """The constructor argument ``backend``, refused when no backend has that name."""
    if backend is not None:
        requested(backend)
    return backend


def checked_reset(reset: str) -> str:
    """The constructor argument ``reset``, refused when it names no variant."""
    if reset not in RESETS:
        raise ValueError(f"reset should be one of {RESETS}, got {reset!r}")
    return reset


def _with_feature(layer: str, index: Any) -> Tensor | PackedSequence:
    """An index with one feature, so that it has the dimensions of an input."""
    packed = isinstance(index, PackedSequence)
    numbers = index.data if packed else index
    if not isinstance(numbers, Tensor) or numbers.dtype not in (torch.int64, torch.int32):
        got = numbers.dtype if isinstance(numbers, Tensor) else described(index)
        raise TypeError(f"{layer}: index should hold int64 or int32 numbers, got {got}")
    if numbers.dim() not in ((1,) if packed else (1, 2)):
        expected = "1-D when packed" if packed else "1-D or 2-D"
        raise RuntimeError(f"{layer}: index should be {expected}, got {numbers.dim()}-D")
    numbers = numbers.unsqueeze(-1)
    return index._replace(data=numbers) if packed else numbers


def described(value: Any) -> str:
    """What an argument of a wrong type is, for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    name = type(value).__name__
    if isinstance(value, (tuple, list)):
        return f"{name} of ({', '.join(type(v).__name__ for v in value)})"
    return name


def not_an_input(layer: str, input: Any) -> str:
    """The message for an input that is neither a tensor nor packed."""
    return f"{layer}: input should be a Tensor or a PackedSequence, got {described(input)}"
