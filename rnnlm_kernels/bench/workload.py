"""What is run: a `Workload` is one line of the benchmark, `setup` makes its tensors.

Speed, memory and correctness are all measured on the same `Setup`, so that the number in a table
and the check behind it speak of the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from ..options import Problem, RecurrenceOptions

CELLS = ("lstm", "gru", "gru-before")
MODES = ("inference", "forward", "training")
LENGTHS = ("dense", "packed")
# Rows of all steps, up to which a problem is "short": packing weights and calls say more there than
# products do.
_FEW_ROWS = 16
RUNNERS = ("eager", "graph")
# What a user chooses. TF32 is float32 whose products a GPU may round to 11 bits on their way into
# its tensor cores; on a CPU it is float32.
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SHORT_DTYPES = {
    "float32": "f32",
    "tf32": "tf32",
    "float64": "f64",
    "bfloat16": "bf16",
    "float16": "f16",
}


@dataclass(frozen=True)
class Workload:
    """A recurrent layer, its input and what is done with it.

    Args:
        cell: ``"lstm"``, ``"gru"`` (torch's, reset after) or ``"gru-before"`` (Cho et al.).
        seq_len, batch, input_size, hidden_size: T, B, I, H.
        num_layers, bidirectional, proj_size, bias: as in :class:`torch.nn.LSTM`.
        dtype: a key of ``DTYPES``; ``"float32"`` forbids TF32, which ``"tf32"`` allows.
        device: a torch device.
        lengths: ``"dense"`` or ``"packed"`` (random lengths from T/2 to T, longest first).
        mode: ``"inference"`` (forward under ``no_grad``), ``"forward"`` (forward that records for
            backward) or ``"training"`` (forward and backward, with gradients of x and weights).
        seed: of weights, inputs and lengths.
        runner: ``"eager"``, or ``"graph"``: replayed from a CUDA graph.

    Raises:
        ValueError: a size is not positive or a name is unknown.
    """

    cell: str
    seq_len: int
    batch: int
    input_size: int
    hidden_size: int
    num_layers: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    lengths: str = "dense"
    mode: str = "inference"
    bidirectional: bool = False
    proj_size: int = 0
    bias: bool = True
    seed: int = 0
    runner: str = "eager"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("cell", CELLS),
            ("dtype", tuple(DTYPES)),
            ("lengths", LENGTHS),
            ("mode", MODES),
            ("runner", RUNNERS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} should be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for name in ("seq_len", "batch", "input_size", "hidden_size", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} should be at least 1, got {getattr(self, name)}")
        if not 0 <= self.proj_size < self.hidden_size:
            raise ValueError(
                f"proj_size should be in [0, hidden_size), got {self.proj_size} with "
                f"hidden_size {self.hidden_size}"
            )
        if self.proj_size and self.cell != "lstm":
            raise ValueError(f"proj_size is an LSTM option, got cell {self.cell!r}")
        if self.runner == "graph" and not self.on_cuda:
            raise ValueError(f"runner 'graph' needs a CUDA device, got {self.device!r}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def on_cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def kind(self) -> str:
        """What is averaged together: ``"graph"``, ``"latency"`` (a single step of a single row),
        ``"short"`` (a few steps of few rows), ``"dense"`` or ``"packed"``."""
        if self.runner == "graph":
            return "graph"
        if self.lengths == "dense" and self.seq_len * self.batch <= _FEW_ROWS:
            return "short" if self.seq_len * self.batch > 1 else "latency"
        return self.lengths

    @property
    def cudnn_is_persistent(self) -> bool:
        """Whether torch lets cuDNN keep an LSTM's weights on the chip of a large recent GPU.

        The conditions of ``use_persist_common_heuristics`` and ``use_persist_device_heuristics`` in
        PyTorch's ``aten/src/ATen/native/cudnn/RNN.cpp``.
        """
        return (
            self.on_cuda
            and self.cell == "lstm"
            and self.dtype == "float16"
            and self.lengths == "dense"
            and self.num_layers == self.num_directions == 1
            and not self.proj_size
            and self.hidden_size <= 1024
            and self.hidden_size % 128 == self.input_size % 128 == 0
            and self.batch % 8 == 0
            and self.batch <= 128
        )

    @property
    def shape(self) -> str:
        return f"{self.seq_len},{self.batch},{self.input_size},{self.hidden_size}"

    @property
    def label(self) -> str:
        """Everything but the mode, as short as a table wants it."""
        extras = [
            f"x{self.num_layers}" if self.num_layers > 1 else "",
            "bidir" if self.bidirectional else "",
            f"proj {self.proj_size}" if self.proj_size else "",
            "" if self.bias else "no bias",
            "packed" if self.lengths == "packed" else "",
            "graph" if self.runner == "graph" else "",
        ]
        words = [self.cell, SHORT_DTYPES[self.dtype], self.shape, *extras]
        return " ".join(word for word in words if word)

    def problem(self) -> Problem:
        """The first layer as dispatch sees it."""
        reset = "before" if self.cell == "gru-before" else "after"
        return Problem(
            cell="lstm" if self.cell == "lstm" else "gru",
            input_size=self.input_size,
            hidden_size=self.hidden_size,
            dtype=self.torch_dtype,
            device=self.device,
            seq_len=self.seq_len,
            batch=self.batch,
            proj_size=self.proj_size,
            training=self.mode != "inference",
            options=RecurrenceOptions(reset=reset, packed=self.lengths == "packed"),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Workload:
        """The inverse of :meth:`to_dict`; fields that a newer version added are ignored."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in known})

    def with_mode(self, mode: str) -> Workload:
        return replace(self, mode=mode)


def layer_arguments(workload: Workload) -> dict[str, Any]:
    """Constructor arguments common to torch's layer and ours."""
    arguments: dict[str, Any] = {
        "input_size": workload.input_size,
        "hidden_size": workload.hidden_size,
        "num_layers": workload.num_layers,
        "bias": workload.bias,
        "bidirectional": workload.bidirectional,
    }
    if workload.cell == "lstm":
        arguments["proj_size"] = workload.proj_size
    return arguments


def row_lengths(workload: Workload) -> Tensor:
    """Valid steps of every row, longest first, int64 ``[B]``; the longest is always T."""
    steps = workload.seq_len
    if workload.lengths == "dense":
        return torch.full((workload.batch,), steps)
    generator = torch.Generator().manual_seed(workload.seed)
    lengths = torch.randint((steps + 1) // 2, steps + 1, (workload.batch,), generator=generator)
    lengths[0] = steps
    return lengths.sort(descending=True).values


def flops(workload: Workload) -> int:
    """Floating-point operations of the matrix products, the usual measure of an RNN's work.

    One direction of one layer costs ``2 N g H (I + R)`` forward, where N counts the valid (step,
    row) pairs (T*B when dense), g is 4 gates (LSTM) or 3 (GRU) and R is the width of h (H, or
    ``proj_size``, which adds ``2 N H R``). Training counts three times that: every product has one
    more for the gradient of its input and one for the gradient of its weight.
    """
    valid = int(row_lengths(workload).sum())
    gates = 4 if workload.cell == "lstm" else 3
    hidden = workload.hidden_size
    width = workload.proj_size or hidden
    total = 0
    for layer in range(workload.num_layers):
        inputs = workload.input_size if layer == 0 else width * workload.num_directions
        products = gates * hidden * (inputs + width)
        products += hidden * width if workload.proj_size else 0
        total += 2 * valid * products * workload.num_directions
    return 3 * total if workload.mode == "training" else total


@dataclass(frozen=True)
class Setup:
    """The tensors of a workload, in its dtype and on its device.

    ``x`` is ``[T, B, I]``, or ``[N, I]`` together with ``batch_sizes`` when packed. ``state`` is
    ``(h0,)`` or ``(h0, c0)``; ``cotangents`` holds a gradient for ``output`` and each final state.
    """

    workload: Workload
    weights: dict[str, Tensor]
    x: Tensor
    batch_sizes: Tensor | None
    state: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]

    def to(self, dtype: torch.dtype) -> Setup:
        """The same numbers in another dtype: how the oracle gets its inputs."""
        return replace(
            self,
            weights={name: weight.to(dtype) for name, weight in self.weights.items()},
            x=self.x.to(dtype),
            state=tuple(s.to(dtype) for s in self.state),
            cotangents=tuple(g.to(dtype) for g in self.cotangents),
        )

    def load(self, layer: nn.Module) -> nn.Module:
        """Give a layer these weights, dtype and device."""
        layer = layer.to(device=self.x.device, dtype=self.x.dtype)
        layer.load_state_dict(self.weights)
        return layer.train(self.workload.mode != "inference")

    def call(
        self, layer: nn.Module, x: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run a layer as a user would; returns ``output`` (its data when packed) and states."""
        inputs = x if self.batch_sizes is None else PackedSequence(x, self.batch_sizes)
        output, final = layer(inputs, state if len(state) == 2 else state[0])
        data = output if isinstance(output, Tensor) else output.data
        return data, (final if isinstance(final, tuple) else (final,))


@contextmanager
def precision(workload: Workload) -> Iterator[None]:
    """Set torch's switches for TF32 as a workload wants them, where they matter."""
    if not workload.on_cuda or workload.torch_dtype != torch.float32:
        yield
        return
    switches: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = workload.dtype == "tf32"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def setup(workload: Workload) -> Setup:
    """Make the tensors of a workload; equal workloads give equal bits on every CPU.

    On GPUs they are drawn there, as it would take a CPU long; equal bits on every GPU of a kind.
    """
    dtype, device = workload.torch_dtype, torch.device(workload.device)
    drawn_on = device if workload.on_cuda else torch.device("cpu")
    generator = torch.Generator(drawn_on).manual_seed(workload.seed)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, device=drawn_on)
        return drawn.to(device=device, dtype=dtype)

    # On the meta device a layer costs nothing and still knows its parameters' names and shapes.
    template = (nn.LSTM if workload.cell == "lstm" else nn.GRU)(
        **layer_arguments(workload), device="meta"
    )
    bound = workload.hidden_size**-0.5  # torch's own initialisation
    weights = {
        name: ((2 * torch.rand(weight.shape, generator=generator, device=drawn_on) - 1) * bound).to(
            device=device, dtype=dtype
        )
        for name, weight in template.named_parameters()
    }
    x = normal(workload.seq_len, workload.batch, workload.input_size)
    batch_sizes = None
    if workload.lengths == "packed":
        packed = pack_padded_sequence(x, row_lengths(workload))
        x, batch_sizes = packed.data, packed.batch_sizes

    stacked = workload.num_layers * workload.num_directions
    width = workload.proj_size or workload.hidden_size
    state_shapes = [(stacked, workload.batch, width)]
    if workload.cell == "lstm":
        state_shapes.append((stacked, workload.batch, workload.hidden_size))
    output_shape = (*x.shape[:-1], width * workload.num_directions)
    return Setup(
        workload=workload,
        weights=weights,
        x=x,
        batch_sizes=batch_sizes,
        state=tuple(normal(*shape) * 0.5 for shape in state_shapes),
        cotangents=tuple(normal(*shape) for shape in (output_shape, *state_shapes)),
    )


@dataclass(frozen=True)
class Trial:
    """A contender's layer on a setup, ready to be timed.

    ``forward`` returns the output, ``step`` does all that one sample of the mode does.
    """

    layer: nn.Module
    forward: Callable[[], Tensor]
    step: Callable[[], None]


def trial(layer: nn.Module, inputs: Setup) -> Trial:
    """Bind a loaded layer to a setup's tensors for the workload's mode.

    The initial state is passed in and does not require a gradient, as in truncated
    backpropagation; x does, as if a layer lay below. Only ``output`` carries a loss. Gradients are
    dropped after every step, so each step allocates them anew like a loop with ``zero_grad()``.
    """
    mode = inputs.workload.mode
    if mode == "inference":

        def infer() -> Tensor:
            with torch.no_grad():
                return inputs.call(layer, inputs.x, inputs.state)[0]

        def inference_step() -> None:
            infer()

        return Trial(layer, infer, inference_step)

    x = inputs.x.detach().clone().requires_grad_()
    cotangent = inputs.cotangents[0]
    leaves = [x, *layer.parameters()]

    def forward() -> Tensor:
        return inputs.call(layer, x, inputs.state)[0]

    def forward_step() -> None:
        forward()

    def training_step() -> None:
        forward().backward(cotangent)
        for leaf in leaves:
            leaf.grad = None

    return Trial(layer, forward, training_step if mode == "training" else forward_step)


def captured(ready: Trial) -> Trial:
    """The same trial with its step replayed from a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # what is set up once must not become part of the graph
            ready.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ready.step()
    return replace(ready, step=graph.replay)
