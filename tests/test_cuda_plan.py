"""Which tier a CUDA call takes and in what shape: pure functions of problem and device, so that no
GPU is needed to know what one would do (csrc/launch/plan.cpp)."""

from __future__ import annotations

import itertools
import math
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
    "b200": device(100, 148, 227),
    "h100-shared-through-mps": device(90, 20, 227),
    "h100-without-cooperative-launches": device(90, 132, 227, cooperative=False),
}
PERSISTENT = ("block", "cluster", "grid", "grid-pairs")


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
    concurrent: int = 1,
    tf32: bool = False,
) -> dict[str, Any]:
    return native.cuda_plan(
        *(CELLS[cell], backward, DTYPES[dtype], T, B, H, proj, T * B, False, tf32),
        *(on, TIERS.index(tier), concurrent),
    )


def directions(
    cell: str = "lstm",
    T: int = 512,
    B: int = 16,
    H: int = 1024,
    *,
    dtype: str = "bfloat16",
    on: dict[str, Any] = DEVICES["h100"],
    tier: str = "auto",
    trains: bool = False,
    replayed: bool = False,
) -> dict[str, Any]:
    return native.cuda_directions(
        *(CELLS[cell], DTYPES[dtype], T, B, H, 0, T * B, False, False),
        *(on, TIERS.index(tier), trains, replayed),
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
        (64, 512, "grid"),  # a pair's longer hop costs what it reads less
        (64, 1024, "grid-pairs"),
        (64, 2048, "grid-pairs"),  # where each CTA reads all rows: no faster than stepwise
        (16, 2304, "stepwise"),  # does not fit
        (16, 1150, "stepwise"),  # no whole vectors
    ],
    "a100": [(16, 64, "block"), (16, 128, "grid"), (16, 1024, "grid"), (16, 2048, "stepwise")],
    "rtx-4090": [(16, 64, "block"), (16, 1024, "grid"), (16, 2048, "stepwise")],
    "rtx-5090": [(16, 64, "block"), (16, 128, "cluster"), (16, 2048, "stepwise")],
    "b200": [(64, 1024, "grid")],
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


# [B, H, whether TF32 is allowed, whether the grid tier's forecast and that of stepwise say that
# float32 had better run in the grid tier, forward and backward].
FLOAT32 = [
    (1, 256, False, (True, True)),
    (8, 512, False, (True, True)),
    (8, 1024, False, (True, True)),  # two groups of 4 rows
    (64, 1024, False, (False, False)),  # as many multiply-adds on fewer SMs
    (16, 1024, True, (True, False)),
    (64, 1024, True, (True, False)),
    (1, 1024, True, (True, True)),
]


@pytest.mark.parametrize(
    ("batch", "hidden", "tf32", "pays"),
    [pytest.param(*c, id=f"B{c[0]}-H{c[1]}-{'tf32' if c[2] else 'exact'}") for c in FLOAT32],
)
def test_float32_runs_in_the_grid_tier_where_that_pays(
    batch: int, hidden: int, tf32: bool, pays: tuple[bool, bool]
) -> None:
    for backward in (False, True):
        found = plan(B=batch, H=hidden, dtype="float32", tf32=tf32, backward=backward)["forecasts"]
        assert found["grid"]["able"]
        us = {tier: found[tier]["us_per_step"] for tier in ("grid", "stepwise")}
        assert (us["grid"] < 0.8 * us["stepwise"]) == pays[backward], us


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("cell", CELLS)
def test_exact_float32_computes_only_the_rows_that_there_are(cell: str, backward: bool) -> None:
    """Tensor cores multiply 8 rows or none; plain multiply-adds cost what they are."""

    def us(batch: int, tf32: bool) -> float:
        problem = {"cell": cell, "B": batch, "H": 1024, "dtype": "float32", "backward": backward}
        return plan(**problem, tf32=tf32, tier="grid")["forecasts"]["grid"]["us_per_step"]

    assert us(1, True) == us(8, True)
    assert us(1, False) < 0.8 * us(8, False)
    # 132 SMs hold two groups of 64, each with a row: nothing to add but traffic.
    assert us(2, False) < 1.1 * us(1, False)


# tier and H of float32: CTAs of a cluster on an H100 for 8 rows or more where TF32 is forbidden and
# where it is allowed, and whether tensor cores compute it then.
CLUSTER_FLOAT32 = {
    ("block", 40): (1, 1, True),
    ("block", 64): (1, 1, True),
    ("cluster", 104): (4, 4, True),
    ("cluster", 136): (8, 8, True),
    ("cluster", 256): (8, 8, True),
    ("cluster", 264): (16, 16, False),  # tiles have no room
    ("cluster", 512): (16, 16, False),
}


@pytest.mark.parametrize(
    ("tier", "hidden", "expected"),
    [(*key, expected) for key, expected in CLUSTER_FLOAT32.items()],
    ids=[f"{tier}-H{hidden}" for tier, hidden in CLUSTER_FLOAT32],
)
@pytest.mark.parametrize("cell", CELLS)
def test_builds_of_float32(cell: str, tier: str, hidden: int, expected) -> None:
    exact, allowed = (
        plan(cell, H=hidden, dtype="float32", tf32=tf32, tier=tier)[tier] for tf32 in (False, True)
    )
    assert (exact["ctas"], allowed["ctas"], allowed["tf32"]) == expected
    assert not exact["tf32"]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("tier", "hidden"), [("block", 64), ("cluster", 128), ("cluster", 256)])
@pytest.mark.parametrize("cell", CELLS)
def test_clusters_of_exact_float32_compute_only_the_rows_that_there_are(
    cell: str, tier: str, hidden: int, backward: bool
) -> None:
    def us(batch: int, tf32: bool) -> float:
        problem = {"cell": cell, "B": batch, "H": hidden, "backward": backward}
        found = plan(**problem, dtype="float32", tf32=tf32, tier=tier)
        return found["forecasts"][tier]["us_per_step"]

    assert us(1, False) < 0.7 * us(8, False)
    assert us(8, False) == us(16, False)  # other rows have another cluster
    for batch in (1, 8):
        assert us(batch, True) <= us(batch, False)
    assert us(8, True) < us(8, False)


OBSTACLES = {
    "float32-beyond-a-cta": ({"dtype": "float32", "H": 72}, ("block",), "above what it holds"),
    "little-shared-memory-for-clusters-of-float32": (
        {"dtype": "float32", "H": 256, "on": DEVICES["rtx-5090"]},
        ("cluster",),
        "shared memory",
    ),
    "float64": ({"dtype": "float64"}, PERSISTENT, "bfloat16, float16 and float32"),
    "wide-float32": ({"dtype": "float32", "H": 1032}, ("grid",), "above 1024"),
    "wide-tf32": ({"dtype": "float32", "H": 1032, "tf32": True}, ("grid",), "above 1024"),
    "little-shared-memory-for-float32": (
        {"dtype": "float32", "on": DEVICES["a100"]},
        ("grid",),
        "shared memory",
    ),
    "projection": ({"proj": 64}, PERSISTENT, "projection"),
    "odd-hidden": ({"H": 100}, PERSISTENT, "multiple of 8"),
    "wide": ({"H": 2056}, ("grid", "grid-pairs"), "above 2048"),
    "pairs-of-float32": ({"dtype": "float32", "tf32": True}, ("grid-pairs",), "bfloat16 and"),
    "pairs-elsewhere": ({"B": 64, "on": DEVICES["b200"]}, ("grid-pairs",), "capability 9.0"),
    "pairs-of-many-rows": ({"H": 2048, "B": 512}, ("grid-pairs",), "shared memory"),
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
    return {tier: one[tier] for tier, one in found.items() if one["tier"] == tier}


@given(problems, devices)
def test_every_row_is_computed_once_and_the_device_can_hold_what_waits(problem, on) -> None:
    batch, hidden = problem["B"], problem["H"]
    for tier, shape in shapes(problem, on).items():
        ctas, rows = shape["ctas"], shape["rows"]
        parts = shape["groups" if tier.startswith("grid") else "clusters"]
        is_grid = tier in ("grid", "grid-pairs")
        is_exact = is_grid and problem["dtype"] == "float32"
        assert rows % (1 if is_exact else 8) == 0
        assert (parts - 1) * rows < batch <= parts * rows
        if is_grid:
            assert on["cooperative"]
            assert ctas * parts <= on["sms"]
            spare = 1 if tier == "grid" else 2
            assert ctas % spare == 0
            assert 16 * (ctas - spare) < hidden <= 16 * ctas
            width = 128 if problem["dtype"] == "float32" else 256
            assert hidden <= width * shape["fragments"]
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
    pairs = persistent.pop("grid-pairs", math.inf)
    best = min(persistent, key=persistent.__getitem__, default="stepwise")
    expected = best if us[best] < 0.8 * us["stepwise"] else "stepwise"
    # What is like it but simpler gets the same margin.
    share = 0.8 if expected in ("stepwise", "grid") else 1
    assert found["tier"] == ("grid-pairs" if pairs < share * us[expected] else expected)


@pytest.mark.parametrize("cell", CELLS)
def test_pairs_have_the_backward_pass_of_the_grid_tier(cell: str) -> None:
    found, grid = (plan(cell, backward=True, tier=tier) for tier in ("grid-pairs", "grid"))
    assert found == grid
    assert found["tier"] == "grid"
    assert "forward pass only" in found["forecasts"]["grid-pairs"]["obstacle"]


def test_a_forward_pass_that_fails_in_pairs_runs_without() -> None:
    assert plan(B=64)["tier"] == "grid-pairs"
    off = {**DEVICES["h100"], "off": {"grid-pairs": "it did not fit"}}
    assert plan(B=64, on=off)["tier"] == "grid"


# cell, B, H, the share that pairs need, at most, of a derived step of the other grid kernels.
PAIRS = [("lstm", 64, 1024, 0.8), ("lstm", 256, 1024, 0.75), ("gru", 64, 2048, 0.75)]


@pytest.mark.parametrize(
    ("cell", "batch", "hidden", "share"), PAIRS, ids=[f"{c}-B{b}-H{h}" for c, b, h, _ in PAIRS]
)
def test_pairs_pay_where_the_gather_is_what_takes_long(
    cell: str, batch: int, hidden: int, share: float
) -> None:
    forecasts = plan(cell, B=batch, H=hidden)["forecasts"]
    us = {tier: forecasts[tier]["us_per_step"] for tier in ("grid", "grid-pairs")}
    assert 0.5 * us["grid"] < us["grid-pairs"] < share * us["grid"]
    few = plan(cell, B=8, H=512)["forecasts"]
    assert few["grid-pairs"]["us_per_step"] > few["grid"]["us_per_step"]


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


# --- two directions ------------------------------------------------------------------------------

# device: [(B, H, dtype, whether the directions of an LSTM run side by side)]
SIDE_BY_SIDE = {
    "h100": [
        (16, 64, "bfloat16", True),
        (16, 128, "bfloat16", True),  # two clusters of 4 CTAs each
        (16, 1024, "bfloat16", True),  # 64 CTAs each of 132 SMs
        (128, 1024, "bfloat16", False),  # as fast with half of the SMs, and more to enqueue
        (16, 1536, "bfloat16", False),  # 96 CTAs: the grid tier has room for one
        (64, 2048, "bfloat16", False),  # 128 CTAs in pairs: half of the SMs would run it stepwise
        (64, 2304, "bfloat16", True),  # stepwise: one fills the gaps of the other
        (16, 512, "float64", True),
        (16, 1536, "float32", False),  # the weights of both are more than L2 keeps
    ],
    "a100": [(16, 512, "bfloat16", True), (16, 1024, "bfloat16", False)],
    "h100-shared-through-mps": [(16, 128, "bfloat16", True), (16, 320, "bfloat16", False)],
}


@pytest.mark.parametrize(
    ("name", "batch", "hidden", "dtype", "expected"),
    [
        pytest.param(name, *case, id=f"{name}-B{case[0]}-H{case[1]}-{case[2]}")
        for name, cases in SIDE_BY_SIDE.items()
        for case in cases
    ],
)
def test_expected_directions(name: str, batch: int, hidden: int, dtype: str, expected) -> None:
    found = directions(B=batch, H=hidden, dtype=dtype, on=DEVICES[name])
    assert found["side_by_side"] == expected


def test_a_wanted_tier_without_room_for_two_runs_in_turn() -> None:
    found = directions(H=2048, tier="grid")
    assert found["us_side_by_side"] is None
    assert not found["side_by_side"]
    assert directions(H=1024, tier="grid")["side_by_side"]


def test_a_graph_hides_what_the_host_needs() -> None:
    """Small steps are enqueued one after the other; a replay has them all at once."""
    small = {"H": 100, "B": 1}
    assert plan(**small)["tier"] == "stepwise"
    assert not directions(**small)["side_by_side"]
    assert directions(**small, replayed=True)["side_by_side"]


def test_no_launch_is_one_of_none() -> None:
    with pytest.raises(ValueError, match="concurrent should be 1 or more"):
        plan(concurrent=0)


@given(problems, devices)
def test_two_launches_fit_side_by_side(problem, on) -> None:
    for tier in PERSISTENT:
        found = plan(**problem, on=on, tier=tier, concurrent=2)
        if found["tier"] in ("grid", "grid-pairs"):
            shape = found[found["tier"]]
            assert 2 * shape["ctas"] * shape["groups"] <= on["sms"]
        elif found["tier"] == "cluster":
            assert 2 * found["cluster"]["ctas"] <= on["sms"]


@given(problems, devices)
def test_two_launches_take_longer_than_one(problem, on) -> None:
    one, two = (plan(**problem, on=on, concurrent=n)["forecasts"] for n in (1, 2))
    for tier in TIERS[1:]:
        if one[tier]["able"] and two[tier]["able"]:
            for cost in ("us_per_step", "us_per_call"):
                assert two[tier][cost] >= 0.999 * one[tier][cost]


@given(problems, devices, st.booleans(), st.sampled_from(TIERS))
def test_directions_run_side_by_side_where_the_forecasts_say_so(problem, on, trains, tier) -> None:
    given = {name: value for name, value in problem.items() if name != "backward"}
    found = directions(**given, on=on, trains=trains, tier=tier)
    us = {1: 0.0, 2: 0.0}
    for concurrent, backward in itertools.product(us, (False, True)[: 1 + trains]):
        one = plan(**given, backward=backward, on=on, tier=tier, concurrent=concurrent)
        if one["tier"] is None:
            us[concurrent] = math.inf
            continue
        cost = one["forecasts"][one["tier"]]
        us[concurrent] += cost["us_per_call"] + given["T"] * cost["us_per_step"]
    together, in_turn = us[2] + 20 * (1 + trains), 2 * us[1]
    if math.isinf(together) or math.isinf(in_turn):
        assert not found["side_by_side"]
        assert found["us_side_by_side"] is None
        return
    assert found["us_side_by_side"] == pytest.approx(together)
    assert found["us_in_turn"] == pytest.approx(in_turn)
    assert found["side_by_side"] == (found["us_side_by_side"] <= found["us_in_turn"])


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
