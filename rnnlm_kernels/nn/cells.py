"""``LSTMCell`` and ``GRUCell``: one step through the same operators as the layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..options import Problem, RecurrenceOptions
from .rnn import checked_backend, checked_reset, described, refuse_scripting

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Cell(torch.nn.RNNCellBase):
    """What both cells share: the checks of input and state, and the weights."""

    backend: str | None = None
    _kind: str  # the name in error messages, also of a subclass

    __prepare_scriptable__ = refuse_scripting

    def problems(self) -> list[Problem]:
        """The one problem dispatch has to solve for this cell."""
        reset = getattr(self, "reset", None)
        return [
            Problem(
                cell="lstm" if reset is None else "gru",
                input_size=self.input_size,
                hidden_size=self.hidden_size,
                dtype=self.weight_ih.dtype,
                device=self.weight_ih.device.type,
                seq_len=1,
                training=self.training,
                options=RecurrenceOptions(reset=reset or "after"),
            )
        ]

    def _weights(self) -> list[functional.LayerWeights]:
        # As in the layers: a quick look first, getattr for what took a parameter's place.
        get = self._parameters.get
        w_ih, w_hh, b_ih, b_hh = map(get, _NAMES)
        if w_ih is None or w_hh is None or b_ih is None or b_hh is None:
            w_ih, w_hh, b_ih, b_hh = (getattr(self, name) for name in _NAMES)
        return [(w_ih, w_hh, b_ih, b_hh, None)]

    def _checked_input(self, input: Any) -> Tensor:
        """The input as one step of a sequence, ``[1, B, I]``."""
        name = self._kind
        if not isinstance(input, Tensor):
            raise TypeError(f"{name}: input should be a Tensor, got {described(input)}")
        dims = input.dim()
        if dims not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {dims}D instead")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {input.size(-1)} "
                f"expected {self.input_size}"
            )
        return input.unsqueeze(0) if dims == 2 else input[None, None]

    def _checked_state(self, state: Tensor, input: Tensor, label: str) -> Tensor:
        """A state as ``[1, B, H]``, for an input of ``[B, I]`` or ``[I]``."""
        dims = input.dim()
        if state.dim() != dims:
            raise RuntimeError(
                f"{self._kind}: for a {dims}-D input, {label} should also be {dims}-D "
                f"but got {state.dim()}-D"
            )
        if dims == 2 and input.size(0) != state.size(0):
            raise RuntimeError(
                f"Input batch size {input.size(0)} doesn't match {label} batch size {state.size(0)}"
            )
        if state.size(-1) != self.hidden_size:
            raise RuntimeError(
                f"{label} has inconsistent hidden_size: got {state.size(-1)}, "
                f"expected {self.hidden_size}"
            )
        return state.unsqueeze(0) if dims == 2 else state[None, None]

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.backend is None else f"{text}, backend={self.backend!r}"


class LSTMCell(_Cell):
    """A drop-in ``torch.nn.LSTMCell`` on the layers' operators.

    Args:
        input_size, hidden_size, bias, device, dtype: as for ``torch.nn.LSTMCell``.
        backend: as for :class:`rnnlm_kernels.LSTM`.

    Inputs:
        input: ``[B, input_size]`` or ``[input_size]``, the dtype and device of the weights.
        hx: ``(h, c)``, each ``[B, H]`` or ``[H]``, in the dtype and on the device of ``input``;
            None means zeros.

    Returns:
        The new ``(h, c)``.

    Raises:
        ValueError: wrong number of dimensions, or the dtype of ``input`` is not the weights'.
        RuntimeError: a size, a device, or the dtype of a state is wrong.
        TypeError: ``hx`` is not two tensors.

    Example:
        >>> import torch
        >>> cell = LSTMCell(8, 16)
        >>> h, c = cell(torch.randn(3, 8))
        >>> h, c = cell(torch.randn(3, 8), (h, c))
        >>> h.shape, c.shape
        (torch.Size([3, 16]), torch.Size([3, 16]))
    """

    _kind = "LSTMCell"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
        self.backend = checked_backend(backend)

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Tensor]:
        """Take one step; see the class for shapes."""
        x = self._checked_input(input)
        if hx is not None:
            if (
                not isinstance(hx, (tuple, list))
                or len(hx) != 2
                or not isinstance(hx[0], Tensor)
                or not isinstance(hx[1], Tensor)
            ):
                raise TypeError(
                    f"LSTMCell: hx should be (h_0, c_0), two tensors, got {described(hx)}"
                )
            for index, state in enumerate(hx):
                if state.dim() not in (1, 2):
                    raise ValueError(
                        f"LSTMCell: Expected hx[{index}] to be 1D or 2D, got {state.dim()}D instead"
                    )
            hx = (
                self._checked_state(hx[0], input, "hidden0"),
                self._checked_state(hx[1], input, "hidden1"),
            )
        _, h, c, _ = functional.lstm(x, hx, self._weights(), backend=self.backend)
        if input.dim() == 1:
            return h[0, 0], c[0, 0]
        return h.squeeze(0), c.squeeze(0)


class GRUCell(_Cell):
    """A drop-in ``torch.nn.GRUCell`` on the layers' operators, in both variants of the reset gate.

    Args:
        input_size, hidden_size, bias, device, dtype: as for ``torch.nn.GRUCell``.
        reset: as for :class:`rnnlm_kernels.GRU`.
        backend: as for :class:`rnnlm_kernels.LSTM`.

    Inputs:
        input: ``[B, input_size]`` or ``[input_size]``, the dtype and device of the weights.
        hx: ``[B, H]`` or ``[H]``, in the dtype and on the device of ``input``; None means zeros.

    Returns:
        The new ``h``.

    Raises:
        ValueError: wrong number of dimensions, or the dtype of ``input`` is not the weights'.
        RuntimeError: a size, a device, or the dtype of ``hx`` is wrong.
        TypeError: ``hx`` is not a tensor.

    Example:
        >>> import torch
        >>> cell = GRUCell(8, 16)
        >>> h = cell(torch.randn(3, 8))
        >>> cell(torch.randn(3, 8), h).shape
        torch.Size([3, 16])
    """

    _kind = "GRUCell"
    reset: str = "after"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        reset: str = "after",
        backend: str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)
        self.reset = checked_reset(reset)
        self.backend = checked_backend(backend)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step; see the class for shapes."""
        x = self._checked_input(input)
        if hx is not None:
            if not isinstance(hx, Tensor):
                raise TypeError(f"GRUCell: hx should be one tensor, h_0, got {described(hx)}")
            if hx.dim() not in (1, 2):
                raise ValueError(
                    f"GRUCell: Expected hidden to be 1D or 2D, got {hx.dim()}D instead"
                )
            hx = self._checked_state(hx, input, "hidden0")
        _, h = functional.gru(x, hx, self._weights(), reset=self.reset, backend=self.backend)
        return h[0, 0] if input.dim() == 1 else h.squeeze(0)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.reset == "after" else f"{text}, reset={self.reset!r}"
