"""``memory="low"``: no gates are kept between forward and backward, which rebuilds them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from cuda_emulated import emulated, needs_emulator
from nn_pairs import LAYERS, assert_same, flat, pair, states
from recurrence_cases import (
    CELLS,
    DTYPES,
    Layer,
    assert_near_oracle,
    assert_same_bits,
    layer,
    layer_cases,
    results_and_gradients,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from triton_interpreted import interpreted, needs_triton

import rnnlm_kernels
from rnnlm_kernels import ops
from rnnlm_kernels.ops import rebuild
from rnnlm_kernels.reference import state_dtype

every_cell = pytest.mark.parametrize("cell", CELLS)
every_case = pytest.mark.parametrize(("cell", "options"), layer_cases())
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
every_kind = pytest.mark.parametrize("kind", LAYERS)


def low(given: Layer) -> Callable[..., tuple[Tensor, ...]]:
    """``given`` on the C++ kernels under the policy."""
    return lambda *tensors: given.call(*tensors, backend="cpu", memory="low")


def both(kind: str, *args: Any, **options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Two layers with the same weights, ``memory="fast"`` and ``"low"``."""
    own = {"reset": options.pop("reset", "after")} if kind == "GRU" else {}
    _, fast = pair(kind, *args, **options)
    for name, value in own.items():
        setattr(fast, name, value)
    frugal = copy.deepcopy(fast)
    frugal.memory = "low"
    return fast, frugal


# --- gradients ----------------------------------------------------------------------------------


@every_dtype
@every_case
def test_gradients_are_as_near_to_float64_as_those_of_the_fast_policy_must_be(
    cell: str, options: dict, dtype: torch.dtype
) -> None:
    assert_near_oracle(layer(cell, I=6, H=13, **{"T": 9, "B": 4, **options}), dtype, memory="low")


@pytest.mark.parametrize("H", [1, 7, 130])
@every_dtype
@every_cell
def test_any_hidden_size(cell: str, dtype: torch.dtype, H: int) -> None:
    scale = min(0.5, 2 / H**0.5)  # gates that do not saturate
    for lengths in (None, (5, 3, 3, 1)):
        given = layer(cell, T=5, B=3, I=7, H=H, lengths=lengths, scale=scale)
        assert_near_oracle(given, dtype, memory="low")


@pytest.mark.parametrize("missing", ["b_ih", "b_hh"])
@every_cell
def test_one_bias_alone(cell: str, missing: str) -> None:
    given = layer(cell, T=4, B=3, I=5, H=6).having(**{missing: None})
    assert_near_oracle(given, torch.float64, memory="low")


@every_cell
def test_saturated_gates_keep_their_gradients_in_16_bits(cell: str) -> None:
    """1 - sigmoid(a) is far below bfloat16's resolution near 1: activated gates would lose it."""
    given = layer(cell, T=4, B=3, I=5, H=6)
    bias = given.get("b_hh")
    assert bias is not None
    for lift in (6.0, -6.0):
        assert_near_oracle(given.having(b_hh=bias + lift), torch.bfloat16, memory="low")


@every_case
def test_results_have_the_bits_of_the_fast_policy_with_and_without_gradients(
    cell: str, options: dict
) -> None:
    given = layer(cell, H=19, **options, dtype=torch.float32).leaves()
    fast = given.call(backend="cpu")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = low(given)()
        assert all(out.requires_grad == grad for out in found)
        assert all(torch.equal(mine, other) for mine, other in zip(found, fast, strict=True))


@every_case
def test_backward_is_deterministic(cell: str, options: dict) -> None:
    given = layer(cell, I=4, H=19, **{"T": 7, "B": 5, **options}, dtype=torch.float32)
    first, second = (results_and_gradients(given, low(given)) for _ in range(2))
    assert_same_bits(second, first)


@every_cell
def test_an_empty_batch_has_empty_and_zero_gradients(cell: str) -> None:
    given = layer(cell, B=0).leaves()
    outputs = low(given)()
    found = torch.autograd.grad([out.sum() for out in outputs], given.present)
    for tensor, grad in zip(given.present, found, strict=True):
        assert grad.shape == tensor.shape
        assert not grad.any()


@every_cell
def test_tensors_that_are_not_contiguous(cell: str) -> None:
    given = layer(cell, T=5, B=3, I=4, H=6)
    expected = results_and_gradients(given, given.refer)

    def strided(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        apart = [None if t is None else torch.stack([t, t], -1)[..., 0] for t in tensors]
        assert not apart[0].is_contiguous()
        return low(given)(*apart)

    found = results_and_gradients(given, strided)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


# --- every backend --------------------------------------------------------------------------------


def rebuilt(given: Layer, output: Tensor) -> Tensor:
    """What backward makes of the tensors of a layer and the h of every step."""
    names = ("x", "h0", "w_ih", "w_hh", "b_ih", "b_hh")
    x, h0, *weights = (given.get(name) for name in names)
    if given.cell == "lstm":
        rest = (given.batch_sizes, given.reverse, output)
        return rebuild.lstm_saved(x, h0, *weights, *rest)
    rest = (given.batch_sizes, given.options["reset"], given.reverse, output)
    return rebuild.gru_saved(x, h0, *weights, *rest)


def saved_by_forward(given: Layer, backend: str) -> tuple[Tensor, Tensor]:
    """``output`` and ``saved`` of a forward pass that saves."""
    if given.cell == "lstm":
        args = (*given.tensors, given.batch_sizes, given.reverse, True, True, backend)
        outputs = ops.lstm_layer.forward(*args)
    else:
        reset = given.options["reset"]
        args = (*given.tensors, given.batch_sizes, reset, given.reverse, True, backend)
        outputs = ops.gru_layer.forward(*args)
    return outputs[0], outputs[-1]


def assert_rebuilds(given: Layer, dtype: torch.dtype, backend: str) -> None:
    """Value by value what the backend saves itself, up to roundings."""
    given = given.to(dtype)
    output, saved = saved_by_forward(given, backend)
    found = rebuilt(given, output)
    assert found.shape == saved.shape
    assert found.dtype == saved.dtype
    tolerance = 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, saved, rtol=tolerance, atol=tolerance)


@every_dtype
@every_case
def test_the_rebuilt_gates_are_what_the_cpu_kernels_save(
    cell: str, options: dict, dtype: torch.dtype
) -> None:
    assert_rebuilds(layer(cell, I=3, H=11, **{"T": 6, "B": 4, **options}), dtype, "cpu")


class Backend:
    """A backend for GPUs on the CPU: how to run it, and what its calls are recorded in."""

    def __init__(self, name: str, run: Callable[[], AbstractContextManager[Any]]) -> None:
        self.name = name
        self.run = run


GPU_BACKENDS = [
    *(
        pytest.param(
            Backend("cuda", lambda tier=tier: emulated(tier)),
            id=f"cuda-{tier}",
            marks=needs_emulator,
        )
        for tier in ("stepwise", "block", "cluster", "grid")
    ),
    *(
        pytest.param(
            Backend("triton", lambda kernel=kernel: interpreted(kernel)),
            id=f"triton-{kernel}",
            marks=needs_triton,
        )
        for kernel in ("stepwise", "sequence")
    ),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"lengths": (3, 3, 1), "reverse": True}], ids=str)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@every_cell
def test_the_kernels_of_gpus_find_what_they_save(
    cell: str, backend: Backend, options: dict, dtype: str
) -> None:
    given = layer(cell, T=3, B=3, I=4, H=16, **options)
    with backend.run():
        assert_rebuilds(given, DTYPES[dtype], backend.name)
        assert_near_oracle(given, DTYPES[dtype], backend.name, memory="low")


@pytest.mark.parametrize("backend", GPU_BACKENDS[:1])
@every_cell
def test_backward_does_not_run_the_recurrence_again(cell: str, backend: Backend) -> None:
    given = layer(cell, H=8, dtype=torch.float32).leaves()
    with backend.run() as device:
        outputs = given.call(backend=backend.name, memory="low")
        torch.autograd.grad(outputs[0].sum(), given.present)
        assert len(device.ran) == 2


# --- modules --------------------------------------------------------------------------------------

MODULES: dict[str, dict[str, Any]] = {
    "two-layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "two-layers-bidirectional-batch-first": {
        "num_layers": 2,
        "bidirectional": True,
        "batch_first": True,
    },
}
MODULE_CASES = [
    pytest.param(kind, options, id=f"{kind}-{name}")
    for kind in LAYERS
    for name, options in MODULES.items()
] + [
    pytest.param("LSTM", {"proj_size": 3, **MODULES["two-layers"]}, id="LSTM-projection"),
    pytest.param("GRU", {"reset": "before", "num_layers": 2}, id="GRU-reset-before"),
]


def gradients(module: torch.nn.Module, x: Any, hx: Any) -> list[Tensor]:
    outputs = flat(module(x, hx))
    return list(torch.autograd.grad(sum(o.sin().sum() for o in outputs), module.parameters()))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(("kind", "options"), MODULE_CASES)
def test_gradients_of_modules_equal_those_of_the_fast_policy(
    kind: str, options: dict, packed: bool
) -> None:
    fast, frugal = both(kind, **options)
    rows = [torch.randn(length, 3, dtype=torch.float64) for length in (2, 5, 4)]
    x: Any = pack_sequence(rows, enforce_sorted=False) if packed else torch.randn(3, 3, 3).double()
    hx = states(fast, 3)
    found, expected = gradients(frugal, x, hx), gradients(fast, x, hx)
    assert_same(found, expected, tolerance=1e-12)


@every_kind
def test_under_autocast(kind: str) -> None:
    found = []
    for module in both(kind, dtype=torch.float32, num_layers=2):
        x = torch.linspace(-1, 1, 4 * 3 * 3).view(4, 3, 3)
        with torch.autocast("cpu", torch.bfloat16):
            output = module(x)[0]
        assert output.dtype == torch.bfloat16
        found.append(torch.autograd.grad(output.float().sum(), list(module.parameters())))
    for mine, other in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=0.05, atol=0.05)


@every_kind
def test_under_a_checkpoint(kind: str) -> None:
    _, frugal = both(kind, num_layers=2)
    x = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)
    output, _ = torch.utils.checkpoint.checkpoint(frugal, x, use_reentrant=False)
    found = torch.autograd.grad(output.sum(), [x, *frugal.parameters()])
    expected = torch.autograd.grad(frugal(x)[0].sum(), [x, *frugal.parameters()])
    assert_same(found, expected, tolerance=1e-12)


@every_case
def test_second_derivatives(cell: str, options: dict) -> None:
    given = layer(cell, I=2, H=3, **{**options, **({"proj": 2} if "proj" in options else {})})
    given = given.leaves()
    assert torch.autograd.gradgradcheck(given.of_present(low(given)), given.present)


@every_kind
def test_many_upstream_gradients_at_once(kind: str) -> None:
    _, frugal = both(kind)
    output = frugal(torch.randn(4, 3, 3, dtype=torch.float64))[0]
    upstream, weights = torch.randn(2, *output.shape).double(), list(frugal.parameters())
    together = torch.autograd.grad(
        output, weights, upstream, is_grads_batched=True, retain_graph=True
    )
    for index, grad in enumerate(upstream):
        alone = torch.autograd.grad(output, weights, grad, retain_graph=True)
        assert_same([many[index] for many in together], alone)


@every_kind
def test_function_transforms_ignore_the_policy(kind: str) -> None:
    fast, frugal = both(kind)
    x = torch.randn(4, 3, 3, dtype=torch.float64)

    def loss(module: torch.nn.Module) -> Callable[[Any], Tensor]:
        return lambda w: torch.func.functional_call(module, w, (x,))[0].pow(2).sum()

    weights = {name: p.detach() for name, p in fast.named_parameters()}
    found, expected = (torch.func.grad(loss(module))(weights) for module in (frugal, fast))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@every_kind
def test_compiled_as_one_graph_it_equals_eager_and_saves_no_gates(kind: str) -> None:
    torch._dynamo.reset()
    _, frugal = both(kind, num_layers=2, bidirectional=True)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(frugal, fullgraph=True, backend=counter)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        output = compiled(x)[0]
    widths = {tensor.shape[-1] for tensor in kept if tensor.dim() == 3 and tensor.shape[0] == 4}
    assert widths <= {3, 5, 10}  # x, h or c, both directions; gates would be 20 wide
    found = torch.autograd.grad(output.sin().sum(), list(frugal.parameters()))
    expected = torch.autograd.grad(frugal(x)[0].sin().sum(), list(frugal.parameters()))
    assert_same(found, expected, tolerance=1e-12)
    assert counter.frame_count == 1
    torch._dynamo.reset()


# --- memory ---------------------------------------------------------------------------------------


def bytes_kept(module: torch.nn.Module, x: Any, hx: Any) -> int:
    """Bytes that autograd keeps for backward, each once, apart from weights and inputs."""
    given = [*module.parameters(), *flat(x), *flat(hx)]
    if not isinstance(x, Tensor):
        given.append(x.batch_sizes)
    own = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = module(x, hx)
    assert any(out.requires_grad for out in flat(results))
    return sum(kept.values())


KEPT: dict[str, tuple[str, dict[str, Any], int]] = {
    # kind, options, values a step that the fast policy keeps in gates, of H each
    "LSTM": ("LSTM", {}, 4),
    "LSTM-projection": ("LSTM", {"proj_size": 3}, 4),
    "GRU": ("GRU", {}, 4),
    "GRU-reset-before": ("GRU", {"reset": "before"}, 3),
}


@pytest.mark.parametrize("lengths", [None, (6, 3, 3, 1)], ids=["dense", "packed"])
@every_dtype
@pytest.mark.parametrize("name", KEPT)
def test_exactly_h_and_c_are_kept(
    name: str, dtype: torch.dtype, lengths: Sequence[int] | None
) -> None:
    """Per layer and step: h, of an LSTM c (float32 at least), and only with "fast" the gates."""
    kind, options, gates = KEPT[name]
    H, layers = 17, 2
    fast, frugal = both(kind, 5, H, num_layers=layers, dtype=dtype, **options)
    if lengths is None:
        x: Any = torch.randn(6, 4, 5, dtype=dtype)
        rows = 6 * 4
    else:
        x = pack_sequence([torch.randn(length, 5, dtype=dtype) for length in lengths])
        rows = sum(lengths)
    hx = states(fast, 4, dtype)
    h = (options.get("proj_size") or H) * dtype.itemsize
    c = H * state_dtype(dtype).itemsize if kind == "LSTM" else 0
    assert bytes_kept(frugal, x, hx) == layers * rows * (h + c)
    assert bytes_kept(fast, x, hx) == layers * rows * (h + c + gates * H * dtype.itemsize)


class Allocations(TorchDispatchMode):
    """Bytes of every storage that operations inside the block return, each once."""

    def __init__(self, *known: Tensor | None) -> None:
        super().__init__()
        self._alive = [t for t in known if t is not None]  # an address is not used again
        self._known = {t.untyped_storage().data_ptr() for t in self._alive}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in flat(result):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._known:
                self._known.add(storage.data_ptr())
                self._alive.append(tensor)
                self.bytes += storage.nbytes()
        return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_case
def test_rebuilding_allocates_the_gates_and_little_else(
    cell: str, options: dict, dtype: str
) -> None:
    """At most twice the size of h, where the gradients of the gates will need three times it."""
    given = layer(cell, H=16, **{"T": 9, "B": 8, **options}, dtype=DTYPES[dtype])
    output, _ = saved_by_forward(given, "cpu")
    with Allocations(*given.tensors, output) as allocations:
        saved = rebuilt(given, output)
    bias = 2 * saved.shape[-1] * saved.itemsize
    assert allocations.bytes <= saved.nbytes + 2 * saved[..., :16].numel() * saved.itemsize + bias
    if given.batch_sizes is None and (cell == "lstm" or (cell == "gru" and dtype == "float32")):
        assert allocations.bytes <= saved.nbytes + bias


# --- the option -----------------------------------------------------------------------------------


@every_kind
def test_an_unknown_policy_is_refused_by_name(kind: str) -> None:
    message = r"memory should be one of .*'fast'.*'low'.*got 'tiny'"
    with pytest.raises(ValueError, match=message):
        getattr(rnnlm_kernels, kind)(3, 4, memory="tiny")
    with pytest.raises(ValueError, match=message):
        rnnlm_kernels.replace(torch.nn.Linear(2, 2), memory="tiny")
    module = getattr(rnnlm_kernels, kind)(3, 4)
    module.memory = "tiny"
    with pytest.raises(ValueError, match=message):
        module(torch.zeros(2, 1, 3))


@every_kind
def test_copies_keep_the_policy_and_repr_shows_it(kind: str) -> None:
    module = getattr(rnnlm_kernels, kind)(3, 4, backend="cpu", memory="low")
    assert repr(module) == f"{kind}(3, 4, memory='low', backend='cpu')"
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.memory == "low"
    other = getattr(rnnlm_kernels, kind)(3, 4)
    assert other.memory == "fast"
    other.load_state_dict(module.state_dict())
    assert other.memory == "fast"  # how to compute is no part of what was learnt


@every_kind
def test_a_module_pickled_without_the_option_runs(kind: str) -> None:
    module = getattr(rnnlm_kernels, kind)(3, 4)
    del module.__dict__["memory"]
    twin = pickle.loads(pickle.dumps(module))
    assert twin.memory == "fast"
    assert twin(torch.zeros(2, 1, 3))[0].requires_grad


def test_replace_gives_it_to_layers_and_restore_takes_it_away() -> None:
    model = torch.nn.ModuleList([getattr(torch.nn, kind)(3, 4) for kind in (*LAYERS, "GRUCell")])
    report = rnnlm_kernels.replace(model, memory="low")
    assert [getattr(module, "memory", None) for module in model] == ["low", "low", None]
    assert "memory='low'" in str(report)
    rnnlm_kernels.restore(model)
    assert not any("memory" in module.__dict__ for module in model)
