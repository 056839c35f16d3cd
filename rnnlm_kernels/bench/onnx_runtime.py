"""ONNX Runtime's LSTM and GRU as a rival of ours in float32 inference on a CPU.

A workload becomes an ONNX model of one LSTM or GRU node per layer, with the weights inside, as an
exporter would write it. ONNX wants the gates of an LSTM in the order i, o, f, c and those of a GRU
in the order z, r, h, where torch has i, f, g, o and r, z, n; the rows of weights and biases are
moved accordingly. Its GRU knows both resets: ``linear_before_reset`` is torch's, ours with
``reset="after"``.

The session gets as many threads as torch has and is else as it comes. What it reads and writes is
bound once, so that no copy and no allocation is charged to it.

Needs the packages ``onnx`` and ``onnxruntime``, which the extra ``rivals`` brings.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import operator
from typing import Any

import torch
from torch import Tensor, nn

from .workload import Setup, Workload

PACKAGES = ("onnx", "onnxruntime")
OPSET = 14  # the first whose LSTM and GRU are those of today but for the types they allow
IR_VERSION = 8  # read by every ONNX Runtime that knows this opset
# Where torch's gates stand, in the order in which ONNX wants them.
GATE_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "gru-before": (1, 0, 2)}


def missing_packages() -> list[str]:
    """Which of the packages that this rival needs are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def versions() -> dict[str, str]:
    """Versions of the packages, for the record of a run; empty where they are missing."""
    return {} if missing_packages() else {n: importlib.metadata.version(n) for n in PACKAGES}


def refusal(workload: Workload) -> str:
    """Why ONNX Runtime does not run a workload; empty when it does."""
    if missing := missing_packages():
        return f"{' and '.join(missing)} not installed; pip install 'rnnlm-kernels[rivals]'"
    for refused, reason in (
        (workload.mode != "inference", "ONNX Runtime is compared in inference only"),
        (workload.dtype != "float32", f"its layers have no {workload.dtype} on a CPU"),
        (workload.device != "cpu", "it is compared on a CPU only"),
        (workload.lengths == "packed", "its layers take padded rows only"),
        (workload.proj_size > 0, "its LSTM has no projection"),
    ):
        if refused:
            return reason
    return ""


def reorder_gates(weight: Tensor, cell: str) -> Tensor:
    """Rows ``[g*H, ...]`` of one of torch's weights or biases in the order of ONNX's gates.

    Example:
        >>> reorder_gates(torch.arange(8), "lstm")  # two units each of i, f, g, o
        tensor([0, 1, 6, 7, 2, 3, 4, 5])
    """
    order = GATE_ORDER[cell]
    gates = weight.chunk(len(order))
    return torch.cat([gates[gate] for gate in order])


def layer_weights(inputs: Setup, layer: int) -> dict[str, Tensor]:
    """What ONNX calls W ``[D, g*H, I]``, R ``[D, g*H, H]`` and, with biases, B ``[D, 2*g*H]``.

    D counts the directions; in B the biases of the input's product stand before those of the
    state's.
    """
    workload = inputs.workload
    suffixes = [f"_l{layer}{way}" for way in ("", "_reverse")[: workload.num_directions]]

    def stacked(*names: str) -> Tensor:
        return torch.stack(
            [
                torch.cat([reorder_gates(inputs.weights[n + s], workload.cell) for n in names])
                for s in suffixes
            ]
        )

    found = {"W": stacked("weight_ih"), "R": stacked("weight_hh")}
    if workload.bias:
        found["B"] = stacked("bias_ih", "bias_hh")
    return found


def to_model(inputs: Setup) -> bytes:
    """The workload as a serialised ONNX model.

    Inputs ``x`` [T, B, I] and per layer ``h0_<l>`` (and ``c0_<l>``) [D, B, H]; outputs ``output``
    ([T, 1, B, H] of one direction, [T, B, 2, H] of two) and per layer ``h_n_<l>`` (and
    ``c_n_<l>``).
    """
    from onnx import TensorProto, helper, numpy_helper

    workload = inputs.workload
    directions, hidden = workload.num_directions, workload.hidden_size
    kinds = ("h", "c") if workload.cell == "lstm" else ("h",)
    attributes: dict[str, Any] = {
        "hidden_size": hidden,
        "direction": "bidirectional" if directions == 2 else "forward",
    }
    if workload.cell != "lstm":
        attributes["linear_before_reset"] = int(workload.cell == "gru")

    def value(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    nodes, constants = [], []
    x = "x"
    for layer in range(workload.num_layers):
        weights = layer_weights(inputs, layer)
        constants += [
            numpy_helper.from_array(weight.numpy(), f"{name}_{layer}")
            for name, weight in weights.items()
        ]
        last = layer == workload.num_layers - 1
        # Of one direction the node's result [T, 1, B, H] is torch's output as it lies in memory.
        raw = "output" if last and directions == 1 else f"y_{layer}"
        nodes.append(
            helper.make_node(
                "LSTM" if workload.cell == "lstm" else "GRU",
                [
                    x,
                    *(f"{name}_{layer}" for name in ("W", "R")),
                    f"B_{layer}" if workload.bias else "",
                    "",  # every row has all steps
                    *(f"{kind}0_{layer}" for kind in kinds),
                ],
                [raw, *(f"{kind}_n_{layer}" for kind in kinds)],
                **attributes,
            )
        )
        if directions == 2:
            swapped = "output" if last else f"swapped_{layer}"
            nodes.append(helper.make_node("Transpose", [raw], [swapped], perm=(0, 2, 1, 3)))
            raw = swapped
        if not last:
            x = f"x_{layer + 1}"
            nodes.append(helper.make_node("Reshape", [raw, "wide"], [x]))
    if workload.num_layers > 1:
        wide = torch.tensor([workload.seq_len, workload.batch, directions * hidden])
        constants.append(numpy_helper.from_array(wide.numpy(), "wide"))
    state = (directions, workload.batch, hidden)
    each = [(kind, layer) for layer in range(workload.num_layers) for kind in kinds]
    graph = helper.make_graph(
        nodes,
        workload.label,
        [
            value("x", workload.seq_len, workload.batch, workload.input_size),
            *(value(f"{kind}0_{layer}", *state) for kind, layer in each),
        ],
        [
            value("output", *_output_shape(workload)),
            *(value(f"{kind}_n_{layer}", *state) for kind, layer in each),
        ],
        constants,
    )
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
    return bytes(model.SerializeToString())


def _output_shape(workload: Workload) -> tuple[int, int, int, int]:
    if workload.num_directions == 2:
        return workload.seq_len, workload.batch, 2, workload.hidden_size
    return workload.seq_len, 1, workload.batch, workload.hidden_size


class OnnxLayer(nn.Module):
    """A setup's layer in an ONNX Runtime session of as many threads as torch has now.

    Called like torch's layer. Results of calls with the same tensors lie in the same memory.
    """

    def __init__(self, inputs: Setup) -> None:
        import onnxruntime

        super().__init__()
        self.workload = inputs.workload
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            to_model(inputs), options, providers=["CPUExecutionProvider"]
        )
        self._binding: Any = None
        self._bound: tuple[Tensor, ...] = ()
        self._inputs: tuple[Tensor, ...] = ()
        self._results: tuple[Tensor, ...] = ()

    def forward(
        self, x: Tensor, state: Tensor | tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
        given = (x, *state) if isinstance(state, tuple) else (x, state)
        same = len(given) == len(self._bound) and all(map(operator.is_, given, self._bound))
        if not (same and all(tensor.is_contiguous() for tensor in given)):
            self._bind(given)
        self._session.run_with_iobinding(self._binding)
        output, *final = self._results
        return output, (tuple(final) if len(final) == 2 else final[0])

    def _bind(self, given: tuple[Tensor, ...]) -> None:
        """Tell the session where its inputs lie and where its results go."""
        workload = self.workload
        x, *initial = (tensor.detach().contiguous() for tensor in given)
        output = torch.empty(_output_shape(workload))
        final = [torch.empty_like(tensor) for tensor in initial]
        binding = self._session.io_binding()
        binding.bind_input(*_buffer("x", x))
        binding.bind_output(*_buffer("output", output))
        for kind, before, after in zip(("h", "c"), initial, final, strict=False):
            # A layer's states are a slice of torch's [L*D, B, H], which is memory of its own.
            parts = (t.split(workload.num_directions) for t in (before, after))
            for layer, (start, end) in enumerate(zip(*parts, strict=True)):
                binding.bind_input(*_buffer(f"{kind}0_{layer}", start))
                binding.bind_output(*_buffer(f"{kind}_n_{layer}", end))
        width = workload.num_directions * workload.hidden_size
        self._binding, self._bound = binding, given
        self._inputs = (x, *initial)  # the binding holds addresses only
        self._results = (output.view(workload.seq_len, workload.batch, width), *final)


def _buffer(name: str, tensor: Tensor) -> tuple[str, str, int, type, tuple[int, ...], int]:
    """A tensor as ``bind_input`` and ``bind_output`` want it."""
    import numpy

    return name, "cpu", 0, numpy.float32, tuple(tensor.shape), tensor.data_ptr()
