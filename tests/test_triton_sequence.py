"""The kernels that run a whole sequence in one program for each tile of rows, interpreted on a CPU:
results and gradients of every cell, and what the compiler makes of them."""

from __future__ import annotations

import functools
import platform
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from recurrence_cases import (
    CELLS,
    DTYPES,
    VARIANTS,
    Layer,
    assert_near_oracle,
    assert_same_bits,
    layer,
    results_and_gradients,
)
from torch import Tensor
from triton_compiled import TARGETS, compiled, needs_compiler
from triton_interpreted import interpreted, needs_triton

from rnnlm_kernels import check
from rnnlm_kernels.bench.workload import Workload
from rnnlm_kernels.triton.launch import Limits

sequence: Any = pytest.importorskip("rnnlm_kernels.triton.sequence")

pytestmark = needs_triton

# Room for the largest weights that a program takes.
LARGE = Limits(multiprocessors=4, shared_per_block=227 * 1024, warp_size=32)
TRITON_DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture
def ran() -> Iterator[list[str]]:
    """Kernels are interpreted, and all of them are those of this module's subject."""
    with interpreted("sequence", limits=LARGE) as families:
        yield families
    assert set(families) == {"sequence"}


# --- results --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cell", CELLS)
def test_results_and_gradients_are_near_the_oracle(
    cell: str, variant: str, dtype: str, ran: list[str]
) -> None:
    assert_near_oracle(layer(cell, **VARIANTS[variant]), DTYPES[dtype], backend="triton")


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        pytest.param({"H": 1, "B": 1, "T": 5}, "float32", id="one-unit"),
        pytest.param({"H": 7, "B": 5, "T": 2}, "bfloat16", id="H7"),
        pytest.param({"H": 16, "B": 16, "T": 3}, "float16", id="nothing-padded"),
        pytest.param({"H": 17, "B": 33, "T": 2}, "float32", id="three-programs"),
        pytest.param({"H": 64, "B": 9, "T": 3}, "float32", id="H64"),
        pytest.param({"H": 100, "B": 5, "T": 3}, "bfloat16", id="H100"),
        pytest.param({"H": 128, "B": 2, "T": 2}, "float16", id="H128"),
    ],
)
@pytest.mark.parametrize("cell", CELLS)
def test_any_hidden_size_and_batch(
    cell: str, sizes: dict[str, int], dtype: str, ran: list[str]
) -> None:
    scaled = 0.5 / max(1, sizes["H"] / 8) ** 0.5
    given = layer(cell, **sizes, scale=scaled, reverse=sizes["H"] % 2 == 0)
    assert_near_oracle(given, DTYPES[dtype], backend="triton")


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_errors_are_at_most_twice_those_of_torch(cell: str, dtype: str, ran: list[str]) -> None:
    workload = Workload(cell, 5, 5, 12, 33, dtype=dtype, mode="training", bidirectional=True)
    result = check.check_problem(workload, "triton")
    assert result.ok, str(result)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_programs_with_rows_of_many_lengths(cell: str, reverse: bool, ran: list[str]) -> None:
    """The second program stops where its longest row does, with the first still at work."""
    lengths = (6, 6, 5, *[4] * 12, 3, 3, 2, 1)
    given = layer(cell, H=7, lengths=lengths, reverse=reverse)
    assert_near_oracle(given, torch.float32, backend="triton")


@pytest.mark.parametrize("chunk", [2, 4, 8])
@pytest.mark.parametrize("cell", CELLS)
def test_steps_are_counted_in_any_number_of_blocks(
    cell: str, chunk: int, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = sequence.count_steps
    monkeypatch.setattr(sequence, "count_steps", lambda *args: count(*args, CHUNK=chunk))
    given = layer(cell, I=1, H=1, lengths=(5, *[4] * 15, 3, 3))
    assert_near_oracle(given, torch.float32, backend="triton")


@pytest.mark.parametrize("cell", CELLS)
def test_a_row_has_the_same_bits_in_any_batch(cell: str, ran: list[str]) -> None:
    whole = layer(cell, T=3, B=18, H=7, dtype=torch.bfloat16)
    # The bits of a GEMM depend on its shape: let its result be b_ih.
    whole = whole.having(x=torch.zeros_like(whole.get("x")))
    rows = slice(5, 17)
    part = whole.having(
        x=whole.get("x")[:, rows],
        **{n: whole.get(n)[rows] for n in ("h0", "c0") if n in whole.names},
    )
    found, expected = part.call(backend="triton"), whole.call(backend="triton")
    assert torch.equal(found[0], expected[0][:, rows])
    assert torch.equal(found[1], expected[1][rows])


# --- numbers that are none ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x", "h0", "w_hh"])
@pytest.mark.parametrize("cell", CELLS)
def test_nan_reaches_what_depends_on_it_and_no_other_row(
    cell: str, name: str, ran: list[str]
) -> None:
    given = layer(cell, T=3, B=5, H=7, dtype=torch.float32)
    poisoned = given.get(name).clone()
    poisoned.select(-2, 2)[..., 1] = torch.nan  # row 2, also of the middle step of x
    if name == "x":
        poisoned[[0, 2], 2, 1] = given.get(name)[[0, 2], 2, 1]
    given = given.having(**{name: poisoned})
    found, expected = (
        results_and_gradients(given, run)
        for run in (lambda *t: given.call(*t, backend="triton"), given.refer)
    )
    for key, value in expected.items():
        assert torch.equal(found[key].isnan(), value.isnan()), key
    assert expected["output"].isnan().any()


@pytest.mark.parametrize("cell", CELLS)
def test_an_infinite_state_saturates_the_gates_and_does_not_become_nan(
    cell: str, ran: list[str]
) -> None:
    """The units that fill a block up must not multiply infinity by the zero of their weights."""
    given = layer(cell, T=3, B=2, H=7, dtype=torch.float32)
    h0 = torch.zeros_like(given.get("h0"))
    h0[0, 3] = torch.inf
    given = given.having(h0=h0)
    torch.testing.assert_close(
        given.call(backend="triton"), given.refer(), rtol=1e-5, atol=1e-5, equal_nan=True
    )
    assert given.refer()[0][:, 1].isfinite().all()


# --- what is asked of backward --------------------------------------------------------------------


def _gradients(given: Layer, outputs: tuple[int, ...], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Gradients of some tensors, of a loss of some of the results."""
    results = {}
    for key, run in (("triton", lambda *t: given.call(*t, backend="triton")), ("", given.refer)):
        leaves = given.map(lambda t: t.detach().clone())
        wanted = [leaves.get(name).requires_grad_() for name in names]
        found = run(*leaves.tensors)
        loss = sum((found[i].double() * (found[i].double() + 1)).sum() for i in outputs)
        results[key] = dict(zip(names, torch.autograd.grad(loss, wanted), strict=True))
    return results


@pytest.mark.parametrize(
    ("cell", "outputs"),
    [
        ("lstm", (0,)),
        ("lstm", (1,)),
        ("lstm", (2,)),
        ("lstm", (3,)),
        ("gru", (0,)),
        ("gru", (1,)),
        ("gru-before", (0,)),
        ("gru-before", (1,)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"result{value[0]}",
)
def test_gradients_of_one_result_alone(cell: str, outputs: tuple[int, ...], ran: list[str]) -> None:
    given = layer(cell, H=7, lengths=(3, 2, 2), dtype=torch.float32)
    found = _gradients(given, outputs, ("x", "h0", "w_hh"))
    torch.testing.assert_close(found["triton"], found[""], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_without_those_of_the_initial_state(cell: str, ran: list[str]) -> None:
    given = layer(cell, H=7, dtype=torch.float32)
    found = _gradients(given, (0, 1), ("x", "w_hh"))
    torch.testing.assert_close(found["triton"], found[""], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("families", [("sequence", "stepwise"), ("stepwise", "sequence")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cell", CELLS)
def test_backward_may_come_from_another_family_than_forward(
    cell: str, dtype: str, families: tuple[str, str]
) -> None:
    given = layer(cell, H=7, lengths=(4, 2, 2, 1), dtype=DTYPES[dtype]).leaves()

    def gradients(forward: str, backward: str) -> dict[str, Tensor]:
        with interpreted(forward, limits=LARGE) as ran:
            outputs = given.call(backend="triton")
        with interpreted(backward, limits=LARGE) as ran_back:
            found = torch.autograd.grad(
                outputs, given.present, [torch.ones_like(o) for o in outputs]
            )
        assert {*ran} == {forward}
        assert {*ran_back} == {backward}
        return dict(zip(map(str, range(len(found))), found, strict=True))

    found, expected = gradients(*families), gradients("sequence", "sequence")
    tolerance = 30 * torch.finfo(DTYPES[dtype]).eps
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_results_are_the_same_bits_every_time(ran: list[str]) -> None:
    given = layer("lstm", B=18, H=17, dtype=torch.float32)
    first, second = (
        results_and_gradients(given, lambda *t: given.call(*t, backend="triton")) for _ in "ab"
    )
    assert_same_bits(second, first)


# --- what fits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "hidden", "shared", "fits"),
    [
        ("float32", 64, 227, True),
        ("float32", 65, 227, False),
        ("bfloat16", 128, 227, True),
        ("bfloat16", 129, 227, False),
        ("float16", 64, 64, True),
        ("float16", 65, 64, False),
        ("float32", 1, 48, True),
    ],
)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_fits_where_registers_and_shared_memory_hold_the_weights(
    backward: bool, dtype: str, hidden: int, shared: int, fits: bool
) -> None:
    limits = Limits(132, shared * 1024, 32)
    ok, reason = sequence.fits("lstm", backward, DTYPES[dtype], None, hidden, limits)
    assert ok == fits
    assert ok or str(hidden) in reason or "shared memory" in reason


def test_a_step_beyond_32_bits_does_not_fit() -> None:
    ok, reason = sequence.fits("lstm", False, torch.bfloat16, 1 << 23, 64, LARGE)
    assert not ok
    assert "32 bits" in reason


@pytest.mark.parametrize("hidden", [17, 100])
def test_chosen_by_itself_exactly_where_it_fits(hidden: int) -> None:
    given = layer("lstm", T=1, B=1, H=hidden, scale=0.1, dtype=torch.float32)
    with interpreted("auto", limits=LARGE) as ran:
        given.call(backend="triton")
    assert ran[-1] == ("sequence" if hidden <= 64 else "stepwise")


def test_a_size_that_does_not_fit_raises_where_it_is_named() -> None:
    given = layer("lstm", T=1, B=1, H=200, dtype=torch.float32)
    with interpreted("sequence", limits=LARGE), pytest.raises(RuntimeError, match="64 units"):
        given.call(backend="triton")


# --- what the compiler makes of it ----------------------------------------------------------------

compiles = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="triton has no compiler here"
)

# Exact float32 products have no tensor cores to go through, and in forward of more than 32 units
# the factors of a thread are more than its registers.
_MOST_STACK_OF_EXACT = 400


def _problem(target: str, cell: str, dtype: str, hidden: int, tf32: bool) -> dict[str, Any]:
    sizes = {"cell": cell, "dtype": dtype, "hidden": hidden, "batch": 64}
    return {**sizes, "target": target, "kernel": "sequence", "tf32": tf32}


def _problems() -> Iterator[dict[str, Any]]:
    """The largest of each kind that fit a target, and for one target others as well."""
    for target, (_, limits) in TARGETS.items():
        for cell in CELLS:
            for dtype in ("float32", "bfloat16"):
                largest = max(
                    hidden
                    for hidden in (16, 32, 64, 128)
                    if sequence.fits(cell, True, DTYPES[dtype], 64, hidden, limits)[0]
                )
                tf32 = dtype == "float32" and target.startswith("sm")
                yield _problem(target, cell, dtype, largest, tf32)
    for cell in CELLS:
        yield _problem("sm_90", cell, "float32", 32, False)
        yield _problem("sm_90", cell, "float32", 64, False)
        yield _problem("sm_90", cell, "bfloat16", 16, False)


@functools.cache
def _kernels() -> list[dict[str, Any]]:
    """All of them at once: the processes that compile start once."""
    return compiled(*_problems())


@needs_compiler
@pytest.mark.slow
@compiles
@pytest.mark.parametrize("target", TARGETS)
def test_weights_and_gates_stay_in_registers(target: str) -> None:
    """Compiled for GPUs that are not here: nothing is spilled, shared memory is what fits() says,
    products go through tensor cores."""
    found = [kernel for kernel in _kernels() if kernel["target"] == target]
    assert len({(k["name"], k["cell"], k["dtype"], k["hidden"]) for k in found}) >= 12
    for kernel in found:
        dtype = DTYPES[kernel["dtype"]]
        tile = kernel["tile"]
        promised = sequence.shared_bytes(kernel["cell"], dtype, tile["ROWS"], tile["UNITS"])
        assert kernel["shared"] <= promised <= kernel["may_share"], kernel
        exact = kernel["dtype"] == "float32" and not kernel["tf32"]
        many = exact and kernel["hidden"] > 32 and "forward" in kernel["name"]
        assert kernel["stack"] <= (_MOST_STACK_OF_EXACT if many else 0), kernel
        products = [] if exact else ["mma.sync"]
        assert kernel["products"] == (["v_mfma"] if target == "gfx942" else products), kernel
