"""The Triton backend: kernels in Python, compiled for the GPU at hand when they are first needed.

For GPUs that the CUDA build does not reach: another maker's, a newer architecture, a machine
without nvcc. Three families of kernels (docs/triton.md): ``stepwise`` runs anything with one or two
launches a step; ``sequence`` keeps the weights of a small layer on chip through all its steps;
``persistent`` spreads the weights of a larger one over all multiprocessors, is experimental and
runs only where ``RNNLM_TRITON_KERNEL`` (``auto``, ``stepwise``, ``sequence``, ``persistent``) names
it. A tuned table (:mod:`..tuning`) may name the family and the tile that were the fastest.

Triton is imported when the first problem on a GPU is planned, never before.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import environment, tuning
from ..options import BUILT_OPTIONS, Plan, Problem, RecurrenceOptions
from ..triton import tiles
from ..triton.launch import Limits, Run
from ..triton.tiles import Tile
from .cuda import MIN_CAPABILITY, _allow_tf32, _offsets

# Forward keeps the activated gates (16-bit dtypes: their pre-activations) for backward.
SAVES_GATES = True
# Forward gets the projected gates: on a GPU that is one more launch, and no pass over memory that
# it would not make anyway.
PROJECTS_INPUT = False

ENVIRONMENT = "RNNLM_TRITON_KERNEL"
KERNELS = ("auto", "stepwise", "sequence", "persistent")

# What ROCm's torch calls its GPUs as well.
DEVICE_TYPE = "cuda"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_from_environment = environment.reader(ENVIRONMENT)


# --- what there is to run on ----------------------------------------------------------------------


def _obstacle() -> str:
    """Why this process has nothing for us to run on, or ""."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return ""


def _capability(index: int) -> int:
    """Of an NVIDIA GPU, times ten; 0 for others."""
    if torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def _limits(index: int) -> Limits:
    properties = torch.cuda.get_device_properties(index)
    # Where torch does not say: what every GPU of the kind has.
    least = (99 if torch.version.hip is None else 64) * 1024
    return Limits(
        properties.multi_processor_count,
        getattr(properties, "shared_memory_per_block_optin", 0) or least,
        getattr(properties, "warp_size", 32),
    )


def current_device() -> int:
    """The index of the GPU that tensors of ``DEVICE_TYPE`` are put on."""
    return torch.cuda.current_device()


def _index(problem: Problem) -> int:
    index = torch.device(problem.device).index
    return current_device() if index is None else index


def _on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, and on the stream that is current there."""
    return torch.cuda.device(tensor.get_device())


@functools.cache
def _family(name: str) -> ModuleType:
    """The kernels of a family. This is where triton is imported."""
    return importlib.import_module(f"rnnlm_kernels.triton.{name}")


def available() -> tuple[bool, str]:
    if obstacle := _obstacle():
        return False, obstacle
    return True, "Triton kernels"


def supports(problem: Problem) -> tuple[bool, str]:
    missing = problem.options.unsupported(BUILT_OPTIONS)
    if missing:
        return False, f"options not built: {', '.join(missing)}"
    if problem.device_type != DEVICE_TYPE:
        return False, f"tensors are on {problem.device_type}"
    if problem.dtype not in _DTYPES:
        return False, f"no kernel for {problem.dtype}"
    ok, reason = available()
    if not ok:
        return False, reason
    capability = _capability(_index(problem))
    if 0 < capability < MIN_CAPABILITY:
        found, least = (f"{c // 10}.{c % 10}" for c in (capability, MIN_CAPABILITY))
        return False, f"the device has compute capability {found}, and {least} is needed"
    return True, "Triton kernels cover every size of this cell and dtype"


# --- which kernels --------------------------------------------------------------------------------


def _cell(name: str, options: RecurrenceOptions) -> str:
    return "gru-before" if name == "gru" and options.reset == "before" else name


class _Way(NamedTuple):
    """How a pass of a layer runs: by which family, in which tile (None: the default), and why."""

    family: str
    tile: Tile | None
    reason: str

    @property
    def name(self) -> str:
        """What tables of measurements call it; :func:`_named` is the inverse."""
        return self.family if self.tile is None else f"{self.family} {self.tile.name}"


def _named(name: str, reason: str) -> _Way | None:
    family, _, tile = name.partition(" ")
    found = tiles.named(tile)
    if family not in KERNELS[1:] or (tile and (found is None or family != "stepwise")):
        return None
    return _Way(family, found, reason)


def _asked() -> str:
    """What RNNLM_TRITON_KERNEL says."""
    name = _from_environment() or "auto"
    if name not in KERNELS:
        raise ValueError(f"{ENVIRONMENT}={name!r} is not a kernel; expected one of {list(KERNELS)}")
    return name


def _fits(family: str, case: tuning.Case, dtype: torch.dtype, limits: Limits) -> tuple[bool, str]:
    """Whether a family can run a pass, and why (not)."""
    if family == "stepwise":
        return True, "it runs everything"
    if case.proj:
        return False, "a projection is a second product in every step"
    fits: tuple[bool, str] = _family(family).fits(
        case.cell, case.backward, dtype, case.batch or None, case.hidden, limits
    )
    return fits


def _choose(case: tuning.Case, dtype: torch.dtype, index: int) -> _Way:
    """How a pass runs: as `forced`, the environment, a table or the rule says, in this order.

    Sizes of the case that are not known are 0.

    Raises:
        ValueError: RNNLM_TRITON_KERNEL is no family.
        RuntimeError: the family that it names, or that was forced, cannot run this.
    """
    limits, asked = _limits(index), _asked()
    forced = _forced[case.backward]
    if forced is None and asked != "auto":
        forced = _Way(asked, None, f"by {ENVIRONMENT}={asked}")
    if forced is not None:
        fits, reason = _fits(forced.family, case, dtype, limits)
        if not fits:
            raise RuntimeError(f"{forced.name!r} cannot run this {case.cell} layer: {reason}")
        return forced
    if case.steps and case.batch and tuning.sources("triton", index, identity):
        table = tuning.lookup("triton", index, case, identity)
        tuned = None if table is None else _named(table.choice, f"by {table}")
        if tuned is not None and _fits(tuned.family, case, dtype, limits)[0]:
            return tuned
    fits, reason = _fits("sequence", case, dtype, limits)
    if fits:
        return _Way("sequence", None, reason)
    return _Way("stepwise", None, f"not sequence: {reason}")


def _case(problem: Problem, backward: bool) -> tuning.Case:
    return tuning.Case(
        _cell(problem.cell, problem.options),
        backward,
        tuning.dtype_name(problem.dtype, _tf32(problem.dtype)),
        problem.hidden_size,
        problem.proj_size,
        problem.options.packed,
        problem.seq_len or 0,
        problem.batch or 0,
    )


def _words(way: _Way, case: tuning.Case, dtype: torch.dtype, limits: Limits) -> str:
    """A way for people."""
    if way.tile is not None:
        return f"{way.family}, {way.tile}"
    if not case.batch:
        return f"{way.family}, the tile depends on B"
    sizes = (case.cell, case.backward, dtype, case.batch, case.hidden)
    return f"{way.family}, {_family(way.family).describe(*sizes, limits)}"


def plan(problem: Problem) -> Plan:
    index = _index(problem)
    shapes, reasons = [], []
    for backward in (False, True)[: 1 + problem.training]:
        case, direction = _case(problem, backward), ("forward", "backward")[backward]
        way = _choose(case, problem.dtype, index)
        shapes.append(f"{direction}: {_words(way, case, problem.dtype, _limits(index))}")
        reasons.append(f"{direction}: {way.reason}")
    return Plan("triton", f"fused {problem.cell}", "; ".join(shapes), "; ".join(reasons))


# --- for measuring (see rnnlm_kernels.backends) ---------------------------------------------------

# What `forced` has put in charge, forward and backward. Of the process, for autograd runs backward
# in a thread of its own.
_forced: list[_Way | None] = [None, None]


def devices() -> range:
    """Indices of the GPUs there are."""
    return range(torch.cuda.device_count() if available()[0] else 0)


def identity(index: int) -> dict[str, str]:
    """What a tuned table must have been measured on to hold for a device."""
    folder = Path(tiles.__file__).parent
    return {
        **tuning.gpu_identity(index),
        "triton": str(_family("stepwise").triton.__version__),
        "kernels": tuning.fingerprint(folder, folder.glob("*.py")),
    }


def candidates(problem: Problem, backward: bool) -> dict[str, str]:
    """The ways to run a pass of a problem with T and B, what is chosen without a table first.

    Not ``persistent``: that is for those who ask for it.
    """
    index, case, dtype = _index(problem), _case(problem, backward), problem.dtype
    limits = _limits(index)
    sizes = (case.cell, backward, dtype, case.batch, case.hidden)
    ways = [_Way("stepwise", tile, "") for tile in tiles.alternatives(*sizes, limits)]
    if _fits("sequence", case, dtype, limits)[0]:
        ways.insert(0, _Way("sequence", None, ""))
    return {way.name: _words(way, case, dtype, limits) for way in ways}


@contextmanager
def forced(backward: bool, candidate: str) -> Iterator[None]:
    """Inside the block that pass of every layer runs in this way, or raises RuntimeError."""
    before = _forced[backward]
    way = _named(candidate, "forced")
    if way is None:
        raise ValueError(f"{candidate!r} is not a way of the backend triton")
    _forced[backward] = way
    try:
        yield
    finally:
        _forced[backward] = before


# --- the calls ------------------------------------------------------------------------------------


def _tf32(dtype: torch.dtype) -> bool:
    # AMD's matrix cores multiply float32 as it is.
    return torch.version.hip is None and _allow_tf32(dtype)


def _prepare(
    cell: str,
    backward: bool,
    output: Tensor,
    batch: int,
    hidden: int,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    options: RecurrenceOptions,
) -> tuple[str, Run]:
    """The family that a call gets, and what it is told."""
    index, dtype, packed = output.get_device(), output.dtype, batch_sizes is not None
    tf32 = _tf32(dtype)
    case = tuning.Case(
        cell,
        backward,
        tuning.dtype_name(dtype, tf32),
        hidden,
        0 if w_hr is None else len(w_hr),
        packed,
        len(output if batch_sizes is None else batch_sizes),
        batch,
    )
    way = _choose(case, dtype, index)
    offsets = None
    if batch_sizes is not None and way.family != "stepwise":
        offsets = _offsets(batch_sizes, output)
        if offsets is None:  # A CUDA graph is being captured: only the host knows the lengths.
            if _asked() != "auto":
                raise RuntimeError(f"{way.reason}: it cannot be captured with packed input")
            way = _Way("stepwise", None, "")
    precision = "tf32" if tf32 else "ieee"
    return way.family, Run(
        options.reverse, precision, _limits(index), batch_sizes, offsets, way.tile
    )


def lstm_forward(
    x: Tensor,
    w_ih: Tensor,
    b_ih: Tensor | None,
    gates_x: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    batch_sizes: Tensor | None,
    options: RecurrenceOptions,
    output: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    cells: Tensor | None,
    saved: Tensor | None,
) -> None:
    """Fill output, h_n, c_n and, where wanted, cells and saved."""
    batch, hidden = c0.shape[-2:]
    with _on_device_of(output):
        name, run = _prepare("lstm", False, output, batch, hidden, w_hr, batch_sizes, options)
        projection = (w_hr,) if name == "stepwise" else ()
        _family(name).lstm_forward(
            run, gates_x, w_hh, b_hh, *projection, h0, c0, output, h_n, c_n, cells, saved
        )


def lstm_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    w_hh: Tensor,
    w_hr: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    output: Tensor,
    cells: Tensor,
    saved: Tensor,
    batch_sizes: Tensor | None,
    options: RecurrenceOptions,
    dgates: Tensor,
    dh0: Tensor | None,
    dc0: Tensor | None,
    dproj: Tensor | None,
    unprojected: Tensor | None,
) -> None:
    """Fill dgates, dh0 and dc0 (both or neither) and, with a projection, dproj and unprojected."""
    batch, hidden = c0.shape[-2:]
    grads = (grad_output, grad_h_n, grad_c_n, grad_cells)
    with _on_device_of(output):
        name, run = _prepare("lstm", True, output, batch, hidden, w_hr, batch_sizes, options)
        if name == "stepwise":
            _family(name).lstm_backward(
                *(run, *grads, w_hh, w_hr, c0, cells, saved),
                *(dgates, dh0, dc0, dproj, unprojected),
            )
        else:
            _family(name).lstm_backward(run, *grads, w_hh, c0, cells, saved, dgates, dh0, dc0)


def gru_forward(
    x: Tensor,
    w_ih: Tensor,
    b_ih: Tensor | None,
    gates_x: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    h0: Tensor,
    batch_sizes: Tensor | None,
    options: RecurrenceOptions,
    output: Tensor,
    h_n: Tensor,
    saved: Tensor | None,
) -> None:
    """Fill output, h_n and, where wanted, saved."""
    batch, hidden = h0.shape[-2:]
    cell = _cell("gru", options)
    with _on_device_of(output):
        name, run = _prepare(cell, False, output, batch, hidden, None, batch_sizes, options)
        _family(name).gru_forward(run, cell, gates_x, w_hh, b_hh, h0, output, h_n, saved)


def gru_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    w_hh: Tensor,
    h0: Tensor,
    output: Tensor,
    saved: Tensor,
    batch_sizes: Tensor | None,
    options: RecurrenceOptions,
    dgates: Tensor,
    candidate: Tensor,
    dh0: Tensor | None,
) -> None:
    """Fill dgates, dh0 and candidate (see csrc/core/params.h)."""
    batch, hidden = h0.shape[-2:]
    cell = _cell("gru", options)
    grads = (grad_output, grad_h_n)
    with _on_device_of(output):
        name, run = _prepare(cell, True, output, batch, hidden, None, batch_sizes, options)
        _family(name).gru_backward(
            run, cell, *grads, w_hh, h0, output, saved, dgates, candidate, dh0
        )


# --- what stands beside the layers of a language model --------------------------------------------


def _supports_beside(dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    if device.type != DEVICE_TYPE:
        return False, f"tensors are on {device.type}"
    if dtype not in _DTYPES:
        return False, f"no kernel for {dtype}"
    if obstacle := _obstacle():
        return False, obstacle
    return True, "a Triton kernel"


def supports_cross_entropy(dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    """Whether the head's kernel runs on such logits, and why (not)."""
    return _supports_beside(dtype, device)


def supports_embedding_dropout(dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    """Whether the kernel runs on such a weight, and why (not)."""
    return _supports_beside(dtype, device)


def cross_entropy(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    class_weight_sum: float,
    ignore_index: int,
    label_smoothing: float,
    upstream: Tensor | None,
    gradient: bool,
    losses: Tensor,
    bias_grad: Tensor | None,
) -> None:
    """Fill losses, turn logits into their gradient, add to bias_grad (see csrc/core/params.h)."""
    with _on_device_of(logits):
        _family("linear_cross_entropy").cross_entropy(
            *(logits, bias, target, class_weight, class_weight_sum, ignore_index),
            *(label_smoothing, upstream, gradient, losses, bias_grad),
        )


def embedding_dropout(
    weight: Tensor, tokens: Tensor, row_scale: Tensor | None, mask: Tensor | None, output: Tensor
) -> None:
    """Fill output [..., B, E], not empty, with weight[tokens] * row_scale[tokens] * mask."""
    with _on_device_of(output):
        _family("embedding_dropout").forward(weight, tokens, row_scale, mask, output)


def embedding_dropout_backward(
    grad: Tensor,
    tokens: Tensor,
    words: int,
    row_scale: Tensor | None,
    mask: Tensor | None,
    scaled: Tensor,
    known: Tensor,
) -> None:
    """Fill scaled with grad * mask * row_scale[tokens] and known with tokens that are words.

    Where a token is none, scaled is 0. Neither is empty; ``words`` is their number.
    """
    with _on_device_of(scaled):
        _family("embedding_dropout").backward(grad, tokens, words, row_scale, mask, scaled, known)
