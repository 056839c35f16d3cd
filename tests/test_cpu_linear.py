"""The CPU's products outside the recurrence: a head's logits, and the gradients of a layer.

The oracle is float64 arithmetic on the same tensors. A sum of n products may be off by so many
roundings of the sum of their magnitudes as chains of fused multiply-adds make at worst.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from recurrence_cases import (
    CELLS,
    DTYPES,
    ISAS,
    assert_near_oracle,
    assert_same_bits,
    layer,
    poisoned,
    run_under_isa,
)
from torch import Tensor

from rnnlm_kernels.backends import cpu
from rnnlm_kernels.ops.linear_cross_entropy import linear_cross_entropy
from rnnlm_kernels.ops.products import previous_hidden
from rnnlm_kernels.options import RecurrenceOptions

_C = pytest.importorskip("rnnlm_kernels._C")

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
NAMES = ("dx", "dw_ih", "dw_hh", "dw_hr", "db_ih", "db_hh")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclass
class Sum:
    """What a gradient should be, and the sum of the magnitudes of what it is a sum of."""

    exact: Tensor
    magnitude: Tensor

    @staticmethod
    def of(a: Tensor, b: Tensor) -> Sum:
        a, b = a.double(), b.double()
        return Sum(a @ b, a.abs() @ b.abs())

    def assert_near(self, found: Tensor, name: str) -> None:
        arithmetic = torch.float64 if found.dtype == torch.float64 else torch.float32
        # Rounded once to its dtype; chains round 200 times or so, and errors of either sign cancel.
        limit = torch.finfo(found.dtype).eps * self.exact.abs()
        limit = limit + 24 * torch.finfo(arithmetic).eps * self.magnitude
        if found.dtype in (torch.float16, torch.bfloat16):
            limit = limit + torch.finfo(found.dtype).smallest_normal
        error = (found.double() - self.exact).abs()
        assert bool((error <= limit).all()), f"{name}: {(error / limit).max():.3g} times the limit"


@dataclass
class Problem:
    """Tensors that backward of a layer leaves behind, of random numbers."""

    cell: str
    given: dict[str, Tensor | None]
    batch_sizes: Tensor | None
    reverse: bool

    def run(self, wanted: Sequence[str] = NAMES) -> dict[str, Tensor]:
        x, h0, output, w_ih = (self.get(n) for n in ("x", "h0", "output", "w_ih"))
        rows, width = len(w_ih), h0.shape[-1]
        shapes = {
            "dx": x.shape,
            "dw_ih": w_ih.shape,
            "dw_hh": (rows, width),
            "dw_hr": (width, rows // 4),
            "db_ih": (rows,),
            "db_hh": (rows,),
        }
        found = {
            name: poisoned(*shape, like=x)
            for name, shape in shapes.items()
            if name in wanted and (name != "dw_hr" or self.given["dproj"] is not None)
        }
        options = RecurrenceOptions(
            "before" if self.cell == "gru-before" else "after", self.reverse
        )
        cpu.layer_gradients(
            *(self.given[n] for n in ("dgates", "candidate", "dproj", "unprojected")),
            *(x, h0, output, w_ih, self.batch_sizes, options),
            *(found.get(name) for name in NAMES),
        )
        return found

    def get(self, name: str) -> Tensor:
        tensor = self.given[name]
        assert tensor is not None
        return tensor

    def expected(self) -> dict[str, Sum]:
        rows, h0 = self.get("dgates").flatten(0, -2), self.get("h0")
        x, H = (
            self.get("x").flatten(0, -2),
            len(self.get("w_ih")) // (4 if self.cell == "lstm" else 3),
        )
        previous = torch.empty(len(rows), h0.shape[-1], dtype=h0.dtype)
        for part, h in previous_hidden(self.get("output"), h0, self.batch_sizes, self.reverse):
            previous[part] = h
        one = torch.ones(1, len(rows))
        found = {"dx": Sum.of(rows, self.get("w_ih")), "dw_ih": Sum.of(rows.t(), x)}
        found["db_ih"] = Sum.of(one, rows)
        if self.cell == "lstm":
            found["dw_hh"], found["db_hh"] = Sum.of(rows.t(), previous), found["db_ih"]
            if self.given["dproj"] is not None:
                found["dw_hr"] = Sum.of(
                    self.get("dproj").flatten(0, -2).t(), self.get("unprojected").flatten(0, -2)
                )
        else:
            candidate = self.get("candidate").flatten(0, -2)
            alike, n = rows[:, : 2 * H], rows[:, 2 * H :]
            after = self.cell == "gru"
            parts = [Sum.of(alike.t(), previous)]
            parts += [Sum.of(candidate.t(), previous) if after else Sum.of(n.t(), candidate)]
            found["dw_hh"] = Sum(
                torch.cat([p.exact for p in parts]), torch.cat([p.magnitude for p in parts])
            )
            found["db_hh"] = Sum.of(one, torch.cat([alike, candidate if after else n], 1))
        for name in ("db_ih", "db_hh"):
            found[name] = Sum(found[name].exact[0], found[name].magnitude[0])
        return found


def problem(
    cell: str,
    T: int = 1,
    B: int = 1,
    I: int = 1,  # noqa: E741
    H: int = 1,
    *,
    proj: int = 0,
    lengths: Sequence[int] | None = None,
    reverse: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    like = layer(cell, T, B, I, H, lengths=lengths, reverse=reverse, proj=proj)
    x, h0 = like.get("x"), like.get("h0")
    generator = torch.Generator().manual_seed(T * 1000 + B * 100 + H)

    def random(width: int) -> Tensor:
        return torch.randn(*x.shape[:-1], width, generator=generator).to(dtype)

    lstm = cell == "lstm"
    given = {
        "x": x.to(dtype),
        "h0": h0.to(dtype),
        "output": random(proj or H),
        "w_ih": like.get("w_ih").to(dtype),
        "dgates": random((4 if lstm else 3) * H),
        "candidate": None if lstm else random(H),
        "dproj": random(proj) if proj else None,
        "unprojected": random(H) if proj else None,
    }
    return Problem(cell, given, like.batch_sizes, reverse)


# [T, B, I, H]: one row, less than a vector, several blocks of units with a rest, rows that end just
# before and after a chunk of 1,024, three chunks; few and many rows for the product with W_ih.
SIZES = (
    *((1, 1, 1, 1), (1, 1, 130, 7), (3, 1, 2, 33), (1, 5, 65, 17), (2, 3, 7, 100)),
    *((8, 128, 3, 5), (25, 41, 20, 33), (9, 60, 300, 7), (16, 130, 1, 17), (4, 130, 130, 130)),
)
LENGTHS = (*[40] * 20, 39, 20, *[13] * 20, 2, 1)  # 1,122 rows


def check_gradients(dtypes: Sequence[torch.dtype] = tuple(DTYPES.values())) -> None:
    for dtype in dtypes:
        for cell in CELLS:
            for size in SIZES:
                check(problem(cell, *size, dtype=dtype, reverse=size[0] % 2 == 0))
            for reverse in (False, True):
                check(problem(cell, I=5, H=21, lengths=LENGTHS, reverse=reverse, dtype=dtype))
        for size in ((1, 1, 3, 2), (9, 115, 3, 70)):
            check(problem("lstm", *size, proj=1 if size[1] == 1 else 33, dtype=dtype))


def check(given: Problem) -> None:
    found = given.run()
    for name, expected in given.expected().items():
        gradient = found[name].flatten(0, -2) if name == "dx" else found[name]
        expected.assert_near(gradient, f"{given.cell} {name}")


@every_dtype
def test_every_gradient_is_near_the_oracle(dtype: torch.dtype) -> None:
    check_gradients([dtype])


@pytest.mark.parametrize("isa", ISAS)
def test_by_every_instruction_set(isa: str) -> None:
    run_under_isa(isa, "import test_cpu_linear as t; t.check_gradients(); t.check_head()")


@every_dtype
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_wanted_does_not_depend_on_what_else_is(cell: str, dtype: torch.dtype) -> None:
    given = problem(cell, 9, 115, 37, 20, dtype=dtype, proj=11 if cell == "lstm" else 0)
    everything = given.run()
    for wanted in (*[[name] for name in everything], *pairwise(everything)):
        found = given.run(wanted)
        assert found.keys() == set(wanted)
        assert_same_bits(found, {name: everything[name] for name in wanted})


@every_dtype
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("size", [(9, 115, 37, 40), (2, 3, 300, 130), (5, 1, 7, 100)])
def test_the_bits_do_not_depend_on_the_threads(
    cell: str, dtype: torch.dtype, size: tuple[int, ...]
) -> None:
    given = problem(cell, *size, dtype=dtype)
    torch.set_num_threads(1)
    expected = given.run()
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert_same_bits(given.run(), expected)


@every_dtype
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("own", [True, False])
def test_a_layer_is_near_the_oracle_whoever_multiplies(
    cell: str, dtype: torch.dtype, own: bool
) -> None:
    with mock.patch.object(cpu, "multiplies", return_value=own):
        assert_near_oracle(layer(cell, 6, 5, 3, 33, scale=0.3), dtype)
        assert_near_oracle(layer(cell, lengths=(12, 9, 9, 1), H=19, reverse=True), dtype)
        assert_near_oracle(layer(cell, 3, 2, 4, 7, bias=False), dtype)
        if cell == "lstm":
            assert_near_oracle(layer(cell, 5, 3, H=35, proj=18, scale=0.2), dtype)


@pytest.mark.parametrize("cell", CELLS)
def test_strides_of_what_a_caller_gives_do_not_matter(cell: str) -> None:
    given = layer(cell, 6, 5, 3, 33, dtype=torch.float32)
    strided = given.map(lambda t: t.repeat_interleave(2, -1)[..., ::2])
    with mock.patch.object(cpu, "multiplies", return_value=True):
        found, expected = (
            torch.autograd.grad(
                [o.sum() for o in leaves.call(*leaves.tensors, backend="cpu")], leaves.present
            )
            for leaves in (strided.leaves(), given.leaves())
        )
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


# --- the head -------------------------------------------------------------------------------------

# [N, I, V]: rows that are read unpacked, few, many; columns or rows for each thread.
HEADS = (
    *((1, 1, 1), (3, 5, 7), (4, 130, 100), (37, 20, 101), (160, 300, 77), (520, 70, 33)),
    (13, 70, 1500),  # gradients of x in pieces
)


def check_head(dtypes: Sequence[torch.dtype] = tuple(DTYPES.values())) -> None:
    for dtype in dtypes:
        for N, I, V in HEADS:  # noqa: E741
            generator = torch.Generator().manual_seed(N)
            x, w, grad = (
                torch.randn(*shape, generator=generator).to(dtype)
                for shape in ((N, I), (V, I), (N, V))
            )
            out, dx, dw = (poisoned(*t.shape, like=t) for t in (grad, x, w))
            cpu.linear(x, w, out)
            Sum.of(x, w.t()).assert_near(out, f"logits of {N, I, V}")
            cpu.linear_gradients(grad, x, w, dx, dw, scale=0.25)
            Sum.of(grad, 0.25 * w.double()).assert_near(dx, f"dx of {N, I, V}")
            Sum.of(grad.t(), 0.25 * x.double()).assert_near(dw, f"dw of {N, I, V}")
            more = w.clone()
            cpu.linear_gradients(grad, x, w, None, more, scale=2.0, accumulates=True)
            sums = Sum.of(grad.t(), 2 * x.double())
            both = Sum(sums.exact + w.double(), sums.magnitude + w.double().abs())
            both.assert_near(more, f"dw of {N, I, V}, added")


@every_dtype
def test_the_heads_products_are_near_the_oracle(dtype: torch.dtype) -> None:
    check_head([dtype])


@every_dtype
def test_the_heads_bits_do_not_depend_on_the_threads(dtype: torch.dtype) -> None:
    x, w, grad = (torch.randn(*shape).to(dtype) for shape in ((160, 70), (300, 70), (160, 300)))

    def run() -> dict[str, Tensor]:
        found = {"out": poisoned(160, 300, like=x), "dx": poisoned(160, 70, like=x)}
        found["dw"] = poisoned(300, 70, like=x)
        cpu.linear(x, w, found["out"])
        cpu.linear_gradients(grad, x, w, found["dx"], found["dw"])
        return found

    torch.set_num_threads(1)
    expected = run()
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert_same_bits(run(), expected)


@every_dtype
def test_the_loss_is_the_same_whoever_multiplies(dtype: torch.dtype) -> None:
    """To rounding: the gradients too, of several chunks, whose sum is scaled."""
    x, w = torch.randn(300, 40).to(dtype), torch.randn(500, 40).to(dtype) * 0.3
    target = torch.randint(500, (300,))

    def run(own: bool) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (x, w)]
        with mock.patch.object(cpu, "multiplies", return_value=own):
            loss = linear_cross_entropy(*leaves, target, chunk_size=64)
        return [loss.detach(), *torch.autograd.grad(3 * loss, leaves)]

    for found, expected in zip(run(True), run(False), strict=True):
        scale = float(expected.abs().max())
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found, expected, rtol=8 * eps, atol=8 * eps * scale)


def test_what_pays_is_asked_of_the_cpu_and_of_onednn() -> None:
    supported: Callable[[str], Any] = lambda name: getattr(  # noqa: E731
        torch.ops.mkldnn, f"_is_mkldnn_{name}_supported"
    )()
    much = 10**9
    for pays in (True, False):
        with mock.patch.object(cpu, "native") as native:
            native.cpu_products_pay.return_value = pays
            assert cpu.multiplies(torch.float32, much) == pays
            assert cpu.multiplies(torch.float64, much) == pays
            assert cpu.multiplies(torch.bfloat16, much) == (pays or not supported("bf16"))
            assert cpu.multiplies(torch.float16, much) == (pays or not supported("fp16"))
            assert cpu.multiplies(torch.float32, 1000)
