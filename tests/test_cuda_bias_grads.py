"""Gradients of biases that the CUDA backend's backward adds up itself, in the persistent kernels or
in csrc/kernels/bias_grad.cuh, run by the emulator: the sums of the gradients they are said to be,
added up before they are rounded where that can be, the same bits in every run, and nobody else's
business.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from cuda_emulated import Emulated, emulated, needs_emulator
from recurrence_cases import CELLS, Layer, assert_same_bits, cotangents, layer
from torch import Tensor

from rnnlm_kernels.backends import cuda

pytestmark = needs_emulator

# The emulated device on which a tier runs up to 24 hidden units in several groups of rows.
TIERS: dict[str, dict[str, Any]] = {
    "stepwise": {},
    "block": {},
    "cluster": {"sms": 4},
    "grid": {"sms": 4},
    "auto": {},
}
PERSISTENT = ("block", "cluster", "grid")
# Precisions by name: dtype, and whether products may be rounded to TF32.
PRECISIONS = {
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "float64": (torch.float64, False),
}
# Batches of odd sizes, which leave a part of a tile and of a group empty; enough for two groups.
LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {"T": 3, "B": 27},
    "packed-reverse": {"lengths": (4, 4, 3) + (2,) * 8 + (1,) * 16, "reverse": True},
}
BIASES = ("b_ih", "b_hh")

every_cell = pytest.mark.parametrize("cell", CELLS)
every_tier = pytest.mark.parametrize("tier", ["stepwise", *PERSISTENT])
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
two_precisions = pytest.mark.parametrize("precision", ["bfloat16", "float32"])


@dataclass
class Watched:
    """What the backend's backward was given to write."""

    device: Emulated
    dgates: Tensor = field(init=False)  # [N, G * H]
    candidate: Tensor | None = None  # [N, H]
    db: Tensor | None = None
    rooms: list[tuple[Tensor, int]] = field(default_factory=list)
    groups: int = 1  # that a persistent kernel ran the batch rows in

    def watching(self, function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            function(*arguments)
            given = inspect.signature(function).bind(*arguments).arguments
            self.dgates, self.db = given["dgates"].flatten(0, -2), given.get("db")
            if "candidate" in given:
                self.candidate = given["candidate"].flatten(0, -2)

        return call

    def empty(self, nbytes: int, like: Tensor) -> Tensor:
        """Workspace with a fence behind it."""
        room = torch.full((256 + nbytes + 512,), 0x5A, dtype=torch.uint8)
        start = -room.data_ptr() % 256
        self.rooms.append((room, start + nbytes))
        return room[start : start + nbytes]


@contextmanager
def watched(tier: str, **device: Any) -> Iterator[Watched]:
    with emulated(tier, **{**TIERS[tier], **device}) as on:
        watch = Watched(on)
        functions = {
            name: watch.watching(getattr(cuda, name)) for name in ("lstm_backward", "gru_backward")
        }
        with mock.patch.multiple(cuda, **functions, _empty=watch.empty):
            yield watch
        for room, end in watch.rooms:
            assert (room[end:] == 0x5A).all(), "written behind the workspace"


def gradients(
    given: Layer, tier: str, wanted: tuple[str, ...] = (), **device: Any
) -> tuple[dict[str, Tensor], Watched]:
    """Gradients of the tensors ``wanted`` (all) by name, and what the backend wrote."""
    leaves = given.map(lambda t: t.detach().clone())
    present = [n for n, t in zip(given.names, given.tensors, strict=True) if t is not None]
    names = wanted or tuple(present)
    tensors = [leaves.get(name).requires_grad_() for name in names]
    with watched(tier, **device) as watch:
        outputs = leaves.call(backend="cuda")
        found = torch.autograd.grad(outputs, tensors, cotangents(outputs))
        assert set(watch.device.ran) == {tier}
        if tier in PERSISTENT:
            log = watch.device.native.emulator_log()
            (kernel,) = (one for one in log if "backward kernel" in one["name"])
            along_x, along_y, _ = kernel["grid"]
            watch.groups = along_y if tier == "grid" else along_x // kernel["cluster"]
    return dict(zip(names, found, strict=True)), watch


def assert_sums(watch: Watched, cell: str, unrounded: bool = False) -> None:
    """db is the sum of what the kernels wrote, column by column. ``unrounded``: of what they were
    about to write, before it was rounded to 16 bits."""
    written = watch.dgates
    if cell == "gru":
        written = torch.cat([written, watch.candidate], 1)
    assert watch.db.dtype == written.dtype
    assert watch.db.shape == written.shape[1:]
    values = written.double()
    exact, size = values.sum(0), values.abs().sum(0)
    rounding = torch.finfo(written.dtype).eps / 2
    arithmetic = min(rounding, torch.finfo(torch.float32).eps / 2)
    limit = len(values) * arithmetic * size + rounding * exact.abs() + 1e-300
    if unrounded and rounding > arithmetic:
        # Roundings of the terms are as good as random: four times their standard deviation.
        limit += 2 * rounding * values.norm(dim=0)
    if written.dtype == torch.float16:
        limit += len(values) * 2**-24
    error = (watch.db.double() - exact).abs()
    assert (error <= limit).all(), (error / limit).max()
    # What makes that a test: most elements would be missed.
    assert (values.abs() > limit).double().mean() > 0.5


def cases() -> list[Any]:
    return [
        pytest.param(tier, precision, id=f"{tier}-{precision}")
        for tier in ("stepwise", *PERSISTENT)
        for precision in PRECISIONS
        if tier == "stepwise" or precision != "float64"
    ]


@pytest.mark.parametrize(("tier", "precision"), cases())
@every_layout
@every_cell
def test_db_is_the_sum_of_the_gradients_of_all_rows_and_steps(
    cell: str, layout: dict[str, Any], tier: str, precision: str
) -> None:
    dtype, tf32 = PRECISIONS[precision]
    given = layer(cell, H=24, **layout).to(dtype)
    found, watch = gradients(given, tier, allow_tf32=tf32)
    assert_sums(watch, cell, unrounded=tier != "stepwise")
    assert watch.groups > 1 or tier == "stepwise"
    hidden = given.get("h0").size(-1)
    gates = watch.db[: watch.dgates.size(1)]
    torch.testing.assert_close(found["b_ih"], gates, rtol=0, atol=0)
    if cell == "gru":
        gates = torch.cat([gates[: 2 * hidden], watch.db[3 * hidden :]])
    torch.testing.assert_close(found["b_hh"], gates, rtol=0, atol=0)


# T, B, H: rows for one chunk of the first stage and for several, not all full; columns for one CTA
# and for several; and rows that begin anywhere.
SIZES = {
    "one-row": (1, 1, 5),
    "fewer-rows-than-warps": (1, 5, 24),
    "one-chunk": (2, 31, 5),
    "many-chunks": (5, 91, 7),
    "many-columns": (3, 23, 43),
}


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@every_cell
def test_stepwise_sums_are_right_for_any_number_of_rows_and_columns(
    cell: str, size: tuple[int, int, int], precision: str
) -> None:
    T, B, H = size
    given = layer(cell, T, B, 2, H).to(PRECISIONS[precision][0])
    assert_sums(gradients(given, "stepwise", BIASES)[1], cell)


def test_a_projection_changes_nothing_about_it() -> None:
    given = layer("lstm", 3, 23, 2, 13, proj=5).to(torch.bfloat16)
    assert_sums(gradients(given, "stepwise", BIASES)[1], "lstm")


def input_is_gates(cell: str, steps: int, batch: int, hidden: int, dtype: torch.dtype) -> Layer:
    """A layer without recurrent weights whose pre-activations are its input, exactly; each row is
    there twice, and nearly so."""
    given = layer(cell, steps, batch // 2, 1, hidden)
    generator = torch.Generator().manual_seed(3)
    gates = given.get("w_ih").size(0)
    x = torch.randn(steps, batch // 2, gates, generator=generator, dtype=torch.float64)
    twice = {name: torch.cat([given.get(name)] * 2) for name in ("h0", "c0") if name in given.names}
    return given.having(
        x=torch.cat([x, 1.02 * x], 1),
        w_ih=torch.eye(gates, dtype=torch.float64),
        w_hh=torch.zeros(gates, hidden, dtype=torch.float64),
        b_ih=torch.zeros(gates, dtype=torch.float64),
        b_hh=torch.zeros(gates, dtype=torch.float64),
        **twice,
    ).to(dtype)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("tier", PERSISTENT)
@every_cell
def test_persistent_tiers_add_up_what_nothing_has_rounded(
    cell: str, tier: str, precision: str
) -> None:
    """Where gradients of two rows nearly cancel, the roundings of each are what is left: the sum of
    the rounded ones is off, and db is the float64 oracle's but for one rounding."""
    hidden, batch = 24, 18
    given = input_is_gates(cell, 3, batch, hidden, PRECISIONS[precision][0])
    exact = given.to(torch.float64).leaves()
    of_oracle = exact.refer()[:1]
    half = cotangents([of_oracle[0][:, : batch // 2]])[0].to(given.get("x").dtype)
    grads = torch.cat([half, -half], 1)
    oracle = torch.autograd.grad(of_oracle, [exact.get(b) for b in BIASES], grads.double())
    leaves = given.leaves()
    with watched(tier) as watch:
        outputs = leaves.call(backend="cuda")[:1]
        found = torch.autograd.grad(outputs, [leaves.get(b) for b in BIASES], grads)
    size, rounded = watch.dgates.double().abs().sum(0), watch.dgates.double().sum(0)
    # A GRU keeps its own h for backward in the dtype, and the gradients of r and z depend on it.
    columns = slice(None) if cell == "lstm" else slice(2 * hidden, None)

    def excess(sums: Tensor, exact: Tensor) -> Tensor:
        """How far off, beyond a rounding of the sum and what float32 arithmetic explains."""
        slack = 1e-5 * size + torch.finfo(given.get("x").dtype).eps / 2 * exact.abs() + 2**-24
        return ((sums.double() - exact).abs() / slack)[columns]

    assert excess(found[0], oracle[0]).max() <= 1
    assert excess(found[1], oracle[1]).max() <= 1
    assert (excess(rounded, oracle[0]) > 2).double().mean() > 0.25


@two_precisions
@every_tier
@every_cell
def test_the_same_bits_whatever_the_schedule(cell: str, tier: str, precision: str) -> None:
    given = layer(cell, H=24, **LAYOUTS["packed-reverse"]).to(PRECISIONS[precision][0])
    first, again = (gradients(given, tier, BIASES, seed=seed)[0] for seed in (1, 2))
    assert_same_bits(again, first)


@two_precisions
@every_tier
@every_cell
def test_not_wanted_it_is_not_there_and_nothing_else_differs(
    cell: str, tier: str, precision: str
) -> None:
    given = layer(cell, H=24, **LAYOUTS["packed-reverse"]).to(PRECISIONS[precision][0])
    everything, with_db = gradients(given, tier)
    others = tuple(name for name in everything if name not in BIASES)
    found, without = gradients(given, tier, others)
    assert with_db.db is not None
    assert without.db is None
    assert_same_bits(found, {name: everything[name] for name in others})
    assert torch.equal(without.dgates, with_db.dgates)
    if cell != "lstm":
        assert torch.equal(without.candidate, with_db.candidate)


@pytest.mark.parametrize("wanted", BIASES)
@every_cell
def test_one_bias_alone_gets_its_gradient(cell: str, wanted: str) -> None:
    given = layer(cell, H=24).to(torch.bfloat16)
    both, alone = (gradients(given, "grid", names)[0] for names in (BIASES, (wanted,)))
    assert torch.equal(alone[wanted], both[wanted])


@every_cell
def test_gradients_of_two_biases_share_no_memory(cell: str) -> None:
    found, _ = gradients(layer(cell, H=24).to(torch.bfloat16), "grid", BIASES)
    before = found["b_hh"].clone()
    found["b_ih"].zero_()
    assert torch.equal(found["b_hh"], before)


@pytest.mark.parametrize("tier", ["cluster", "grid"])
@every_cell
def test_a_launch_that_gave_up_leaves_nan(cell: str, tier: str) -> None:
    given = layer(cell, T=3, B=9, H=24).to(torch.bfloat16).leaves()
    with watched(tier, wait_polls=2000) as watch:
        outputs = given.call(backend="cuda")
        watch.device.native.emulator_configure(drop=20)
        torch.autograd.grad(outputs, given.present, cotangents(outputs))
        assert f"failed in the {tier} tier" in watch.device.native.cuda_take_failure(0)
    assert watch.db.isnan().all()


@every_cell
def test_steps_that_take_the_place_of_a_refused_launch_bring_it_too(cell: str) -> None:
    given = layer(cell, T=16, B=8, H=136, scale=0.15).to(torch.bfloat16).leaves()
    with watched("auto", sms=9, compute_capability=80) as watch:
        with mock.patch.dict(os.environ, {cuda.ENVIRONMENT: "stepwise"}):
            outputs = given.call(backend="cuda")
        watch.device.native.emulator_configure(sms=4)
        torch.autograd.grad(outputs, given.present, cotangents(outputs))
        assert watch.device.native.cuda_device_limits(0)["off"].keys() == {"grid"}
        assert watch.device.ran == ["stepwise", "stepwise"]
    assert_sums(watch, cell)
