"""The kernels whose programs meet once a step, interpreted on a CPU: one program, several that run
at once in a thread each, several of which one never comes; and what the compiler makes of them."""

from __future__ import annotations

import functools
import inspect
import math
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from recurrence_cases import DTYPES, VARIANTS, assert_near_oracle, layer
from triton_compiled import TARGETS, compiled, needs_compiler
from triton_interpreted import interpreted, interpreter, needs_triton

from rnnlm_kernels import check
from rnnlm_kernels.bench.workload import Workload
from rnnlm_kernels.triton.launch import Limits

persistent: Any = pytest.importorskip("rnnlm_kernels.triton.persistent")

pytestmark = needs_triton

LARGE = Limits(multiprocessors=132, shared_per_block=227 * 1024, warp_size=32)
CELLS = ("lstm", "gru")


class _AtOnce:
    """What a launch runs for each program, so that it starts a thread; the last one waits for all.

    ``here.place`` is the place in the grid of the program that runs in a thread.
    """

    def __init__(self, run_program: Any, here: Any) -> None:
        functools.update_wrapper(self, run_program)
        self.__signature__ = inspect.signature(run_program)
        self.here, self.threads, self.errors = here, [], []

    @property
    def __globals__(self) -> dict[str, Any]:
        return self.__wrapped__.__globals__

    def __call__(self, **arguments: Any) -> None:
        thread = threading.Thread(target=self._run, args=(self.here.place, arguments), daemon=True)
        self.threads.append(thread)
        if len(self.threads) == math.prod(interpreter.interpreter_builder.grid_dim):
            for each in self.threads:
                each.start()
            for each in self.threads:
                each.join(timeout=60)
            assert not any(each.is_alive() for each in self.threads), "a program hangs"
            for error in self.errors:
                raise error

    def _run(self, place: Any, arguments: dict[str, Any]) -> None:
        self.here.place = place
        try:
            with np.errstate(all="ignore"):
                self.__wrapped__(**arguments)
        except Exception as error:
            self.errors.append(error)


@contextmanager
def at_once() -> Iterator[None]:
    """The programs of a launch run at once, where the interpreter runs one after the other."""
    here = threading.local()
    place = property(
        lambda builder: here.place, lambda builder, value: setattr(here, "place", value)
    )
    start = interpreter.GridExecutor.__init__

    def started(executor: Any, run_program: Any, *rest: Any) -> None:
        start(executor, run_program, *rest)
        executor.fn = _AtOnce(run_program, here)

    builder = type(interpreter.interpreter_builder)
    with (
        mock.patch.object(interpreter.GridExecutor, "__init__", started),
        mock.patch.object(builder, "grid_idx", place, create=True),
    ):
        yield


@pytest.fixture
def ran() -> Iterator[list[str]]:
    """Kernels are interpreted, with threads for their programs, and are those of this module."""
    with interpreted("persistent", limits=LARGE) as families, at_once():
        yield families
    assert set(families) == {"persistent"}


# --- results --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cell", CELLS)
def test_one_program(cell: str, variant: str, dtype: str) -> None:
    with interpreted("persistent", limits=LARGE) as ran:
        assert_near_oracle(layer(cell, **VARIANTS[variant]), DTYPES[dtype], backend="triton")
    assert set(ran) == {"persistent"}


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        pytest.param({"H": 17, "B": 5, "T": 4}, "float32", id="second-program-of-one-unit"),
        pytest.param({"H": 33, "B": 1, "T": 5}, "bfloat16", id="three-programs"),
        pytest.param({"H": 64, "B": 9, "T": 3}, "float16", id="four-programs"),
        pytest.param({"H": 17, "B": 17, "T": 3}, "float32", id="two-groups"),
        pytest.param({"H": 33, "lengths": (4, 3, 3, 1)}, "float32", id="packed"),
        pytest.param(
            {"H": 20, "lengths": (5, 4, *[3] * 15, 2, 1), "reverse": True},
            "bfloat16",
            id="packed-reverse-two-groups",
        ),
    ],
)
@pytest.mark.parametrize("cell", CELLS)
def test_programs_that_meet(cell: str, sizes: dict[str, Any], dtype: str, ran: list[str]) -> None:
    assert_near_oracle(layer(cell, scale=0.3, **sizes), DTYPES[dtype], backend="triton")


@pytest.mark.parametrize("cell", CELLS)
def test_errors_are_at_most_twice_those_of_torch(cell: str, ran: list[str]) -> None:
    workload = Workload(cell, 4, 5, 12, 33, dtype="bfloat16", mode="training")
    result = check.check_problem(workload, "triton")
    assert result.ok, str(result)


@pytest.mark.parametrize("cell", CELLS)
def test_nan_passes_between_programs_and_nobody_waits_for_it(cell: str, ran: list[str]) -> None:
    given = layer(cell, T=3, B=3, H=20, dtype=torch.float32)
    x = given.get("x").clone()
    x[1, 2] = torch.nan
    given = given.having(x=x)
    for found, expected in zip(given.call(backend="triton"), given.refer(), strict=True):
        assert torch.equal(found.isnan(), expected.isnan())


# --- programs that do not meet --------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_a_wait_in_vain_ends_and_all_that_follows_is_nan(
    cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs run one after the other here, so the first waits for one that is not there."""
    looks = []
    meet = persistent.meet

    def counted(counter: Any, expected: Any, polls: int) -> Any:
        looks.append(polls)
        return meet(counter, expected, polls)

    monkeypatch.setattr(persistent, "POLLS", 3)
    monkeypatch.setattr(persistent, "meet", counted)
    given = layer(cell, T=4, B=2, H=17, dtype=torch.float32)
    with interpreted("persistent", limits=LARGE):
        results = given.call(backend="triton")
    assert looks == [3] * 6  # two programs, three times each
    output, states = results[0], results[1 : len(results) - (cell == "lstm")]
    torch.testing.assert_close(output[0], given.refer()[0][0])
    assert output[1:].isnan().all()
    for state in states:
        assert state.isnan().all()


def test_a_group_that_gives_up_leaves_the_other_group_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meet = persistent.meet

    def absent(counter: Any, expected: Any, polls: int) -> Any:
        """Program 1 of the second group never says that it is there."""
        program, group, _ = interpreter.interpreter_builder.grid_idx
        if group == 0:
            return meet(counter, expected, polls)
        return meet(counter, expected, 20) if program == 0 else False

    monkeypatch.setattr(persistent, "meet", absent)
    given = layer("gru", T=3, B=20, H=17, dtype=torch.float32)
    with interpreted("persistent", limits=LARGE), at_once():
        output, h_n = given.call(backend="triton")
    torch.testing.assert_close(h_n[:16], given.refer()[1][:16])
    assert h_n[16:].isnan().all()
    assert output[1:, 16:].isnan().all()


@pytest.mark.parametrize("late", [0, 1, 2])
def test_programs_wait_for_one_that_is_late(
    late: int, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    meet = persistent.meet

    def delayed(counter: Any, expected: Any, polls: int) -> Any:
        if interpreter.interpreter_builder.grid_idx[0] == late:
            time.sleep(0.02)
        return meet(counter, expected, polls)

    monkeypatch.setattr(persistent, "meet", delayed)
    given = layer("lstm", T=4, B=2, H=40, dtype=torch.float32, scale=0.3)
    found, expected = given.call(backend="triton"), given.refer()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_without_meeting_a_program_reads_what_is_not_there_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(persistent, "meet", lambda counter, expected, polls: True)
    given = layer("gru", T=3, B=2, H=17, dtype=torch.float32)
    with interpreted("persistent", limits=LARGE):
        output = given.call(backend="triton")[0]
    assert output[1:, :, :16].isnan().all()


# --- what fits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "sizes", "reason"),
    [
        ("lstm", {}, ""),
        ("gru", {"hidden": 1024, "batch": 32}, ""),
        ("gru-before", {}, "twice a step"),
        ("lstm", {"hidden": 1025}, "at most 1024 units"),
        ("lstm", {"dtype": torch.float32, "hidden": 513}, "at most 512 units"),
        ("lstm", {"hidden": 1024, "batch": 33}, "192 programs .* 132 multiprocessors"),
        ("lstm", {"limits": Limits(132, 64 * 1024, 32)}, "KB of shared memory"),
        ("lstm", {"limits": Limits(304, 227 * 1024, 64)}, "NVIDIA"),
    ],
)
def test_fits_where_all_programs_run_at_once(cell: str, sizes: dict[str, Any], reason: str) -> None:
    asked = {"dtype": torch.bfloat16, "batch": 16, "hidden": 512, "limits": LARGE, **sizes}
    ok, found = persistent.fits(cell, False, **asked)
    assert ok == (not reason)
    if reason:
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(found)


def test_never_chosen_by_itself() -> None:
    given = layer("lstm", T=1, B=1, H=150, scale=0.1, dtype=torch.float32)
    with interpreted("auto", limits=LARGE) as ran:
        given.call(backend="triton")
    assert "persistent" not in ran
    assert persistent.fits("lstm", False, torch.float32, 1, 150, LARGE)[0]


# --- what the compiler makes of it ----------------------------------------------------------------

compiles = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="triton has no compiler here"
)


def _problems() -> Iterator[dict[str, Any]]:
    """The largest of each kind that fit a target."""
    for target, (_, limits) in TARGETS.items():
        if not target.startswith("sm"):
            continue
        for cell in CELLS:
            for dtype, tf32 in (("bfloat16", False), ("float32", True), ("float32", False)):
                hidden = max(
                    hidden
                    for hidden in (256, 512, 1024)
                    if persistent.fits(cell, False, DTYPES[dtype], 16, hidden, limits)[0]
                )
                sizes = {"cell": cell, "dtype": dtype, "hidden": hidden, "batch": 16, "tf32": tf32}
                yield {**sizes, "target": target, "kernel": "persistent", "backward": False}


@needs_compiler
@pytest.mark.slow
@compiles
def test_weights_and_gates_stay_in_registers() -> None:
    """Compiled for GPUs that are not here: nothing is spilled, shared memory is what fits() says,
    products go through tensor cores."""
    problems = list(_problems())
    found = compiled(*problems)
    assert len(found) == len(problems)
    for kernel in found:
        tile = persistent.tiles.Tile(
            *(kernel["tile"][name] for name in ("ROWS", "UNITS", "DEPTH")), 8, 1
        )
        promised = persistent.shared_bytes(DTYPES[kernel["dtype"]], tile)
        assert kernel["shared"] <= promised <= kernel["may_share"], kernel
        assert kernel["stack"] == kernel["local"] == 0, kernel
        exact = kernel["dtype"] == "float32" and not kernel["tf32"]
        assert kernel["products"] == ([] if exact else ["mma.sync"]), kernel
