"""Which tier a CUDA call takes and in what shape: pure functions of problem and device, so that no
GPU is needed to know what one would do (csrc/launch/plan.cpp)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recurrence_cases import NATIVE

from rnnlm_kernels.backends.cuda import TIERS
from rnnlm_kernels.build import native

pytestmark = [
    pytest.mark.sanitize,
    pytest.mark.skipif(not NATIVE, reason="the native module was not built"),
]

CELLS = {"lstm": 0, "gru": 1, "gru-before": 2}
DTYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
KB = 1024


def device(capability: int, sms: int, shared_kb: int, cooperative: bool = True) -> dict[str, Any]:
    return {
        "compute_capability": capability,
        "sms": sms,
        "shared_per_block": shared_kb * KB,
        "cooperative": cooperative,
    }


DEVICES = {
    "h100": device(90, 132, 227),
    "a100": device(80, 108, 163),
    "rtx-4090": device(89, 128, 99),
    "rtx-5090": device(120, 170, 99),
    "h100-shared-through-mps": device(90, 20, 227),
    "h100-without-cooperative-launches": device(90, 132, 227, cooperative=False),
}
PERSISTENT = ("block", "cluster", "grid")


def plan(
    cell: str = "lstm",
    T: int = 512,
    B: int = 16,
    H: int = 1024,
    *,
    backward: bool = False,
    dtype: str = "bfloat16",
    proj: int = 0,
    on: dict[str, Any] = DEVICES["h100"],
    tier: str = "auto",
) -> dict[str, Any]:
    return native.cuda_plan(
        *(CELLS[cell], backward, DTYPES[dtype], T, B, H, proj, T * B, False, False),
        *(on, TIERS.index(tier)),
    )


# --- which tier ---------------------------------------------------------------------------------

# device: [(B, H, tier of an LSTM's forward pass)]
EXPECTED = {
    "h100": [
        (1, 64, "block"),
        (16, 128, "cluster"),
        (16, 256, "grid"),
        (16, 1024, "grid"),
        (1, 2048, "grid"),
        (64, 2048, "stepwise"),  # the exchange costs more than reading the weights again
        (16, 2304, "stepwise"),  # does not fit
        (16, 1150, "stepwise"),  # no whole vectors
    ],
    "a100": [(16, 64, "block"), (16, 128, "grid"), (16, 1024, "grid"), (16, 2048, "stepwise")],
    "rtx-4090": [(16, 64, "block"), (16, 1024, "grid"), (16, 2048, "stepwise")],
    "rtx-5090": [(16, 64, "block"), (16, 128, "cluster"), (16, 2048, "stepwise")],
    "h100-shared-through-mps": [(16, 64, "block"), (16, 256, "grid"), (16, 1024, "stepwise")],
    "h100-without-cooperative-launches": [(16, 256, "cluster"), (16, 1024, "stepwise")],
}


@pytest.mark.parametrize(
    ("name", "batch", "hidden", "tier"),
    [
        pytest.param(name, *case, id=f"{name}-B{case[0]}-H{case[1]}")
        for name, cases in EXPECTED.items()
        for case in cases
    ],
)
def test_expected_tiers(name: str, batch: int, hidden: int, tier: str) -> None:
    assert plan(B=batch, H=hidden, on=DEVICES[name])["tier"] == tier


OBSTACLES = {
    "float32": ({"dtype": "float32"}, PERSISTENT, "bfloat16 and float16"),
    "float64": ({"dtype": "float64"}, PERSISTENT, "bfloat16 and float16"),
    "projection": ({"proj": 64}, PERSISTENT, "projection"),
    "odd-hidden": ({"H": 100}, PERSISTENT, "multiple of 8"),
    "wide": ({"H": 2056}, ("grid",), "above 2048"),
    "too-wide-for-a-cluster": ({"H": 520}, ("block", "cluster"), "above what it holds"),
    "few-sms": ({"on": DEVICES["h100-shared-through-mps"]}, ("grid",), "SMs than"),
    "little-shared-memory": ({"H": 2048, "on": DEVICES["rtx-4090"]}, ("grid",), "shared memory"),
    "no-cooperative-launch": (
        {"on": DEVICES["h100-without-cooperative-launches"]},
        ("grid",),
        "cooperative",
    ),
    "no-clusters": ({"H": 64, "on": DEVICES["a100"]}, ("cluster",), "compute capability 9.0"),
    "failed-before": (
        {"on": {**DEVICES["h100"], "off": {"grid": "a launch waited too long"}}},
        ("grid",),
        "failed on this device",
    ),
}


@pytest.mark.parametrize(("problem", "tiers", "words"), OBSTACLES.values(), ids=OBSTACLES)
def test_a_tier_that_cannot_says_why_and_another_takes_its_place(problem, tiers, words) -> None:
    found = plan(**problem)
    assert found["tier"] not in tiers
    for tier in tiers:
        forecast = found["forecasts"][tier]
        assert not forecast["able"]
        assert words in forecast["obstacle"]
        assert plan(**problem, tier=tier)["tier"] is None


@pytest.mark.parametrize("tier", TIERS[1:])
def test_a_wanted_tier_is_taken_where_it_can_run(tier: str) -> None:
    found = plan(H=64, tier=tier)
    assert found["tier"] == tier
    assert found["shape"].startswith(tier)


def test_few_steps_do_not_pay_for_loading_weights() -> None:
    assert plan(T=1)["tier"] == "stepwise"
    assert plan(T=2000)["tier"] == "grid"


def test_sizes_below_one_are_refused() -> None:
    for sizes in ({"T": 0}, {"B": 0}, {"H": 0}):
        with pytest.raises(ValueError, match="should be 1 or more"):
            plan(**sizes)


# --- what holds for every plan ------------------------------------------------------------------

sizes = st.one_of(st.integers(1, 300), st.integers(1, 40).map(lambda n: 64 * n))
problems = st.fixed_dictionaries(
    {
        "cell": st.sampled_from(list(CELLS)),
        "backward": st.booleans(),
        "dtype": st.sampled_from(list(DTYPES)),
        "T": st.integers(1, 5000),
        "B": sizes,
        "H": sizes,
    }
)
devices = st.builds(
    device,
    st.sampled_from([80, 86, 89, 90, 100, 120]),
    st.integers(1, 200),
    st.sampled_from([48, 99, 163, 227]),
    st.booleans(),
)


def shapes(problem: dict[str, Any], on: dict[str, Any]) -> dict[str, dict[str, int]]:
    """The shape of each persistent tier that could run a problem."""
    found = {tier: plan(**problem, on=on, tier=tier) for tier in PERSISTENT}
    return {tier: one[tier] for tier, one in found.items() if one["tier"] is not None}


@given(problems, devices)
def test_every_row_is_computed_once_and_the_device_can_hold_what_waits(problem, on) -> None:
    batch, hidden = problem["B"], problem["H"]
    for tier, shape in shapes(problem, on).items():
        ctas, rows = shape["ctas"], shape["rows"]
        parts = shape["groups" if tier == "grid" else "clusters"]
        assert rows % 8 == 0
        assert (parts - 1) * rows < batch <= parts * rows
        if tier == "grid":
            assert on["cooperative"]
            assert ctas * parts <= on["sms"]
            assert 16 * (ctas - 1) < hidden <= 16 * ctas
            assert hidden <= 256 * shape["fragments"]
        else:
            assert ctas <= (1 if tier == "block" else 16)
            assert ctas <= on["sms"]
            assert tier == "block" or on["compute_capability"] >= 90


@given(problems, devices)
def test_the_choice_is_the_best_forecast_with_a_margin_for_what_cannot_fail(problem, on) -> None:
    found = plan(**problem, on=on)
    us = {
        tier: one["us_per_call"] + problem["T"] * one["us_per_step"]
        for tier, one in found["forecasts"].items()
        if one["able"]
    }
    persistent = {tier: value for tier, value in us.items() if tier != "stepwise"}
    best = min(persistent, key=persistent.__getitem__, default="stepwise")
    expected = best if us[best] < 0.8 * us["stepwise"] else "stepwise"
    assert found["tier"] == expected


@given(problems, devices)
def test_more_steps_never_make_a_step_dearer(problem, on) -> None:
    """Whatever has to be paid once a call matters less and less: from stepwise to a persistent tier
    there is no way back."""
    chosen = [plan(**{**problem, "T": T}, on=on) for T in (1, 4, 16, 64, 256, 4096)]
    costs = [one["forecasts"][one["tier"]]["us_per_step"] for one in chosen]
    assert all(later <= earlier for earlier, later in itertools.pairwise(costs))
    names = [one["tier"] for one in chosen]
    assert names == sorted(names, key=lambda name: name != "stepwise")


@given(problems, devices, st.integers(1, 100))
def test_more_rows_never_make_a_step_cheaper(problem, on, more: int) -> None:
    few = plan(**problem, on=on)["forecasts"]
    many = plan(**{**problem, "B": problem["B"] + more}, on=on)["forecasts"]
    for tier in TIERS[1:]:
        if few[tier]["able"] and many[tier]["able"]:
            assert many[tier]["us_per_step"] >= 0.999 * few[tier]["us_per_step"]


@given(problems, devices)
def test_the_choice_is_the_same_for_both_16_bit_dtypes(problem, on) -> None:
    one, other = (plan(**{**problem, "dtype": d}, on=on) for d in ("bfloat16", "float16"))
    assert one == other


# --- how long -----------------------------------------------------------------------------------

# Microseconds of an LSTM's forward step (bfloat16, H100) if one exchange, one product and one round
# of gates were all: the physics, derived for the best of all placements, not for these kernels.
FLOORS = {
    128: {1: 0.45, 16: 0.45, 32: 0.45},
    256: {1: 0.56, 16: 0.56, 32: 0.56},
    512: {1: 0.65, 16: 0.67, 32: 0.71},
    768: {1: 0.70, 16: 0.73, 32: 0.88},
    1024: {1: 0.75, 16: 0.82, 32: 1.10},
    1536: {1: 0.88, 16: 1.21, 32: 2.10},
    2048: {1: 1.31, 16: 2.20},
}


@pytest.mark.parametrize(
    ("hidden", "batch", "floor"),
    [(H, B, us) for H, row in FLOORS.items() for B, us in row.items()],
)
def test_forecasts_are_near_the_floors(hidden: int, batch: int, floor: float) -> None:
    found = plan(B=batch, H=hidden)
    assert found["tier"] in PERSISTENT
    us = found["forecasts"][found["tier"]]["us_per_step"]
    assert 0.95 * floor < us < 1.5 * floor
