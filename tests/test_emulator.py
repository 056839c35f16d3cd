"""The emulator (csrc/emulator): it computes as a GPU would, and it shows the bugs it is there for.

Each test runs under several seeds, that is, schedules of threads and orders of stores.
"""

from __future__ import annotations

import math
import re

import pytest
import torch

emulated = pytest.importorskip(
    "rnnlm_kernels._emulated", reason="built without RNNLM_BUILD_EMULATOR"
)

SEEDS = range(1, 9)
CTAS, THREADS = 4, 128  # of most kernels in csrc/emulator/selftest.cpp


@pytest.fixture(autouse=True)
def _fresh_emulator() -> None:
    emulated.emulator_reset()


@pytest.fixture(params=SEEDS, ids="seed{}".format)
def seed(request: pytest.FixtureRequest) -> int:
    emulated.emulator_configure(seed=request.param, spins=300)
    return int(request.param)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def run(
    name: str,
    *,
    input: torch.Tensor | None = None,
    output: torch.Tensor | None = None,
    scratch: torch.Tensor | None = None,
    n: int = 0,
) -> None:
    """Runs a selftest on tensors of 32-bit words; absent ones are plenty of zeros."""
    words = [t if t is not None else zeros(4096) for t in (input, output, scratch)]
    assert all(t.is_contiguous() and t.element_size() == 4 for t in words)
    emulated.selftest(name, *(t.data_ptr() for t in words), n=n)


def report(name: str, **arguments: object) -> str:
    """Runs a selftest that must fail and returns what the emulator says."""
    with pytest.raises(RuntimeError, match=f"CUDA error while launching {name}: ") as caught:
        run(name, **arguments)  # type: ignore[arg-type]
    return str(caught.value)


# --- Shared memory and barriers -----------------------------------------------------------------


def block_sum(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.arange(CTAS * THREADS, dtype=torch.float32).view(CTAS, THREADS)
    sums = torch.empty(CTAS)
    run(name, input=x, output=sums)
    return sums, x.sum(1)


def test_a_reduction_with_its_barriers_is_right(seed: int) -> None:
    sums, expected = block_sum("block_sum")
    assert torch.equal(sums, expected)


def test_a_missing_barrier_gives_a_wrong_sum(seed: int) -> None:
    sums, expected = block_sum("block_sum without a barrier")
    assert not torch.equal(sums, expected)


@pytest.mark.parametrize(
    ("name", "byte"), [("above", 4 * THREADS), ("below", -4)], ids=["above", "below"]
)
def test_a_store_outside_shared_memory_is_blamed_on_its_thread(
    seed: int, name: str, byte: int
) -> None:
    said = report(f"block_sum writes {name}")
    assert re.search(rf"CTA \d: byte {byte} of its 512 bytes .* was written by thread 77$", said)


def test_a_store_far_outside_shared_memory_is_seen_at_the_barrier(seed: int) -> None:
    said = report("block_sum writes far above")
    assert re.search(r"CTA \d: byte 912 of its 512 bytes .*; seen at the barrier", said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_shared_memory_starts_as_nan_in_every_format(dtype: torch.dtype) -> None:
    word = zeros(1)
    run("untouched", output=word)
    assert torch.cat([word, word]).view(dtype).isnan().all()


def test_more_shared_memory_than_the_device_has_is_refused() -> None:
    run("much shared memory")
    emulated.emulator_configure(shared_per_block=100 * 1024)
    with pytest.raises(RuntimeError, match=r"invalid argument \(cudaErrorInvalidValue\)"):
        run("much shared memory")


def test_threads_that_have_ended_do_not_count_at_a_barrier(seed: int) -> None:
    stayed = zeros(THREADS)
    run("some leave", output=stayed)
    assert stayed.view(-1, 32).sum(1).tolist() == [32, 32, 0, 32]


def test_threads_at_two_barriers_are_told_apart(seed: int) -> None:
    said = report("two barriers")
    lines = re.search(
        r"is at the __syncthreads of selftest\.cpp:(\d+) while thread \d+ waits at that of "
        r"selftest\.cpp:(\d+)",
        said,
    )
    assert lines is not None
    assert lines[1] != lines[2]


def test_a_barrier_that_some_never_reach_says_who_waits_where(seed: int) -> None:
    said = report("barrier and poll")
    assert "CTA 0 threads 0, 1, 2, 3 and 28 more wait for a poll at selftest.cpp" in said
    assert "threads 32, 33, 34, 35 and 92 more wait for __syncthreads at selftest.cpp" in said
    assert "where 96 of 128 threads are" in said


# --- Warps --------------------------------------------------------------------------------------


def test_shuffles_bring_what_the_named_lane_has(seed: int) -> None:
    source = torch.randint(0, 32, (32,), dtype=torch.int32)
    out = zeros(5, 32)
    run("shuffles", input=source, output=out, n=5)
    lanes = torch.arange(32)
    assert torch.equal(out[0], source)
    assert torch.equal(out[1].view(torch.float32), (lanes ^ 5) + 0.5)
    doubles = out[2:4].T.contiguous().view(torch.float64).flatten()
    assert torch.equal(doubles, 1 / (source.double() + 1))
    assert (out[4] == (source == 5).any()).all()


def test_a_lane_that_left_is_named(seed: int) -> None:
    said = report("a lane leaves")
    assert re.search(
        r"CTA 0 thread 37 has ended while lanes .* in shuffle|but lane 5 of its warp has ended",
        said,
    )


def test_lanes_in_different_collectives_are_named_with_both(seed: int) -> None:
    said = report("lanes diverge")
    assert re.search(
        r"thread \d+ takes part in (shuffle_xor|warp_any) at selftest\.cpp:\d+ while thread \d+ "
        r"of its warp waits in (?!\1)(shuffle_xor|warp_any) at selftest\.cpp:\d+",
        said,
    )


def as_words(x: torch.Tensor) -> torch.Tensor:
    """One element a word, as the mma selftests take them."""
    if x.element_size() == 4:
        return x.view(torch.int32).flatten()
    return (x.view(torch.int16).to(torch.int32) & 0xFFFF).flatten()


@pytest.mark.parametrize(
    ("name", "dtype", "depth", "bits"),
    [
        ("mma_bf16", torch.bfloat16, 16, 8),
        ("mma_f16", torch.float16, 16, 11),
        ("mma_tf32", torch.float32, 8, 11),
    ],
    ids=["bf16", "f16", "tf32"],
)
def test_mma_is_the_product_of_its_operands(
    seed: int, name: str, dtype: torch.dtype, depth: int, bits: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b, c = (
        torch.randn(*shape, generator=generator) for shape in [(16, depth), (depth, 8), (16, 8)]
    )
    a, b = a.to(dtype), b.to(dtype)
    d = torch.empty(16, 8)
    words = torch.cat([as_words(a), as_words(b), as_words(c)])
    run(name, input=words, output=d)
    if dtype is torch.float32:  # the 13 last bits do not count
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
    expected = c.double() + a.double() @ b.double()
    magnitude = c.double().abs() + a.double().abs() @ b.double().abs()
    assert ((d - expected).abs() <= magnitude * depth * 2**-24).all()
    assert (d - expected).abs().max() < 2 ** -(bits + 3)  # far below a wrong operand's error


# --- Conversions --------------------------------------------------------------------------------


def floats() -> torch.Tensor:
    """Every upper half of a float's bits, with lower halves around the points of rounding."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    lower = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xF000, 0xFFFF]
    return torch.cat([upper | bits for bits in lower]).view(torch.float32)


def converted(name: str, words: torch.Tensor) -> torch.Tensor:
    out = zeros(words.numel())
    run(name, input=words.contiguous(), output=out, n=words.numel())
    return out


@pytest.mark.parametrize(
    ("name", "dtype"), [("to_bf16", torch.bfloat16), ("to_f16", torch.float16)]
)
def test_rounding_to_16_bits_is_torchs(name: str, dtype: torch.dtype) -> None:
    x = floats()
    bits = converted(name, x).to(torch.int16)
    expected = x.to(dtype)
    nan = x.isnan()
    assert nan.any()
    assert (bits[nan] == 0x7FFF).all()
    assert torch.equal(bits[~nan], expected[~nan].view(torch.int16))


def test_every_f16_has_torchs_value() -> None:
    words = torch.arange(2**16, dtype=torch.int32)
    values = converted("from_f16", words).view(torch.float32)
    expected = words.to(torch.int16).view(torch.float16).float()
    assert torch.equal(values.isnan(), expected.isnan())
    known = ~expected.isnan()
    assert torch.equal(values[known].view(torch.int32), expected[known].view(torch.int32))


def test_tf32_rounds_to_nearest_and_ties_away_from_zero() -> None:
    x = floats()
    result = converted("to_tf32", x).view(torch.float32)
    assert torch.equal(result.isnan(), x.isnan())
    assert ((result.view(torch.int32) & 0x1FFF == 0) | x.isnan()).all()
    finite = x.isfinite()
    x, result = x[finite].double(), result[finite].double()
    _, exponent = torch.frexp(x)
    step = torch.ldexp(torch.ones_like(x), exponent.clamp(min=-125) - 11)
    expected = torch.sign(x) * torch.floor(x.abs() / step + 0.5) * step
    overflow = expected.abs() >= 2.0**128
    assert overflow.any()
    expected[overflow] *= math.inf
    assert torch.equal(result, expected)


# --- The grid -----------------------------------------------------------------------------------


def test_a_payload_that_is_its_own_flag_needs_no_release(seed: int) -> None:
    rounds, sums = 5, zeros(CTAS)
    run("payload_as_flag", output=sums, scratch=zeros(rounds, CTAS), n=rounds)
    expected = 0
    for _ in range(rounds):
        words = [(3 * expected + cta + 1) % 2**32 | 1 << 31 for cta in range(CTAS)]
        expected = sum(words) % 2**32
    assert [value % 2**32 for value in sums.tolist()] == [expected] * CTAS


def test_a_word_that_nobody_writes_is_named_in_the_report(seed: int) -> None:
    scratch = zeros(5, CTAS)
    said = report("payload_as_flag never written", scratch=scratch, n=5)
    address = scratch.data_ptr() + 4 * (CTAS + 1)
    assert "the threads poll and nothing happens" in said
    for cta in range(CTAS):
        assert re.search(
            rf"CTA {cta} thread 1 waits for a poll at selftest\.cpp:\d+; "
            rf"last loaded 0x0 from address {address:#x} ",
            said,
        )
        assert re.search(rf"CTA {cta} threads .* wait for __syncthreads", said)


def handed_over(name: str) -> torch.Tensor:
    rounds = 12
    counts = zeros(rounds, CTAS)
    run(name, output=counts, scratch=zeros(rounds * (THREADS + 1)), n=rounds)
    return counts


def test_released_payload_is_there_behind_the_flag(seed: int) -> None:
    assert (handed_over("flag_handover") == THREADS).all()


@pytest.mark.parametrize("bug", ["with a relaxed flag", "without a barrier"])
def test_a_missing_release_or_barrier_shows_as_old_payload(seed: int, bug: str) -> None:
    assert (handed_over(f"flag_handover {bug}") < THREADS).any()


def test_without_weak_stores_a_missing_release_stays_unseen(seed: int) -> None:
    # What the weak mode is for.
    emulated.emulator_configure(weak=False)
    assert (handed_over("flag_handover with a relaxed flag") == THREADS).all()


def test_a_barrier_of_the_grid_orders_stores(seed: int) -> None:
    rounds, sums = 6, zeros(CTAS)
    run("grid_barrier", output=sums, scratch=zeros((rounds + 1) * CTAS), n=rounds)
    expected = sum(step + cta for step in range(rounds) for cta in range(CTAS))
    assert sums.tolist() == [expected] * CTAS


def test_a_grid_that_waits_for_itself_must_fit_the_device(seed: int) -> None:
    emulated.emulator_configure(sms=CTAS - 1)
    scratch = zeros(7 * CTAS)
    said = report("grid_barrier not cooperative", scratch=scratch, n=6)
    assert "1 CTAs of the grid have not started: the device holds 3 at once" in said
    said = report("grid_barrier", scratch=scratch, n=6)
    assert "too many blocks in cooperative launch" in said
    emulated.emulator_configure(bounded=False)
    run("grid_barrier not cooperative", scratch=zeros(7 * CTAS), n=6)


def test_a_device_without_cooperative_launches_refuses_them() -> None:
    emulated.emulator_configure(cooperative=False)
    with pytest.raises(RuntimeError, match=r"not supported \(cudaErrorNotSupported\)"):
        run("grid_barrier", scratch=zeros(8), n=1)


def test_stores_to_one_word_arrive_in_order_and_their_cta_sees_them_first(seed: int) -> None:
    wrong = zeros(CTAS)
    run("order_of_stores", output=wrong, n=50)
    assert wrong.tolist() == [0] * CTAS
    assert emulated.emulator_stats()["delayed_stores"] == 50 * 65


def test_a_wait_of_seconds_reaches_its_limit(seed: int) -> None:
    emulated.emulator_configure(spins=10_000)
    ended = zeros(CTAS)
    run("timed_wait never written", output=ended, n=2000)
    assert ended.tolist() == [2] * CTAS
    run("timed_wait", output=ended, n=2000)
    assert ended.tolist() == [1] * CTAS


def test_lost_messages_are_counted_and_make_a_wait_endless(seed: int) -> None:
    emulated.emulator_configure(drop=2)
    rounds = 20  # 80 messages
    said = report("payload_as_flag", scratch=zeros(rounds, CTAS), n=rounds)
    assert "nothing happens" in said
    assert emulated.emulator_stats()["dropped"] > 0


# --- Clusters -----------------------------------------------------------------------------------


def gathered(name: str, rounds: int = 7) -> list[int]:
    sums = zeros(8)
    run(name, output=sums, n=rounds)
    return [value % 2**32 for value in sums.tolist()]


def gather_expected(rounds: int = 7) -> list[int]:
    total = 0
    for _ in range(rounds):
        total = sum(rank + total + i for rank in range(4) for i in range(4)) % 2**32
    return [total] * 8


def test_a_cluster_hands_round_its_words(seed: int) -> None:
    assert gathered("cluster_gather") == gather_expected()
    assert emulated.emulator_stats()["async_stores"] == 7 * 8 * 4


def test_sending_before_all_have_read_does_not_go_well(seed: int) -> None:
    outcome: list[int] | str
    try:
        outcome = gathered("cluster_gather without a barrier", 40)
    except RuntimeError as error:
        outcome = str(error)
    # The words are wrong, or a thread that was left behind waits for a phase long gone.
    assert outcome != gather_expected(40)
    if isinstance(outcome, str):
        assert re.search(r"the mbarrier at byte \d, .* misses 1 arrivals and 0 bytes", outcome)


def test_a_message_to_a_cta_that_ended_is_an_error(seed: int) -> None:
    said = report("cluster_gather leaves early", n=7)
    assert re.search(
        r"CTA \d has ended while \d+ messages are under way|"
        r"st_async to the shared memory of CTA \d, which has ended",
        said,
    )


def test_an_mbarrier_must_be_fenced_before_other_ctas_use_it(seed: int) -> None:
    said = report("cluster_gather without a fence", n=7)
    assert re.search(r"mbarrier at byte 0 of CTA \d before mbarrier_init_fence", said)


def test_an_mbarrier_that_never_completes_says_what_it_misses(seed: int) -> None:
    said = report("cluster_gather expects more", n=7)
    assert re.search(
        r"CTA 0 threads 0, 1, 2, 3 and 60 more wait for the mbarrier at byte 0, parity 0, at "
        r"selftest\.cpp:\d+, which is in phase 0 and misses 0 arrivals and 16 bytes",
        said,
    )


def copied(name: str, rounds: int) -> list[int]:
    sums = zeros(CTAS)
    run(name, output=sums, scratch=zeros(rounds, CTAS, 16), n=rounds)
    return sums.tolist()


def copies_expected(rounds: int) -> list[int]:
    return [32 * sum(range(1, rounds + 1))] * CTAS


@pytest.mark.parametrize("stale", [0, 1], ids=["fresh", "stale"])
def test_pairs_share_what_either_reads(seed: int, stale: int) -> None:
    emulated.emulator_configure(stale=stale)
    assert copied("multicast", 9) == copies_expected(9)
    assert emulated.emulator_stats()["copies"] == 9 * CTAS * 2
    assert (emulated.emulator_stats()["stale"] > 0) == (stale > 0)


def test_a_copy_may_bring_what_was_there_before(seed: int) -> None:
    assert copied("multicast unexamined", 9) != copies_expected(9)


def test_a_copy_that_arrives_too_early_does_not_go_well(seed: int) -> None:
    outcome: list[int] | str
    try:
        outcome = copied("multicast without asking", 40)
    except RuntimeError as error:
        outcome = str(error)
    assert outcome != copies_expected(40)


def test_a_copy_to_a_cta_that_ended_is_an_error(seed: int) -> None:
    said = report("multicast leaves early", scratch=zeros(3, CTAS, 16), n=3)
    assert re.search(
        r"CTA \d has ended while \d+ messages are under way|"
        r"copy_multicast to the shared memory of CTA \d, which has ended",
        said,
    )


@pytest.mark.parametrize("settings", [{"sms": 3}, {"compute_capability": 80}])
def test_clusters_that_the_device_cannot_run_are_refused(settings: dict[str, int]) -> None:
    emulated.emulator_configure(**settings)
    assert "cudaErrorInvalidClusterSize" in report("cluster_gather", n=1)


def test_clusters_start_together_when_only_one_fits(seed: int) -> None:
    emulated.emulator_configure(sms=7)
    assert gathered("cluster_gather") == gather_expected()


# --- The emulator as a device -------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 257, 256 * 1024 * 3 + 5])
def test_the_probe_computes_as_on_a_gpu(n: int) -> None:
    x, y = torch.randn(n), torch.randn(n)
    expected = y + 0.5 * x
    emulated.cuda_probe(x.data_ptr(), y.data_ptr(), n, 0.5)
    assert torch.equal(y, expected)


def test_an_absent_device_is_an_error_with_its_mend() -> None:
    with pytest.raises(RuntimeError, match=r"cudaErrorInvalidDevice.*CUDA_VISIBLE_DEVICES"):
        emulated.cuda_probe(16, 16, 4, 1.0, device=1)


def test_the_log_has_every_launch_with_its_shape() -> None:
    run("block_sum")
    run("cluster_gather", n=1)
    run("untouched")
    emulated.emulator_configure(sms=1)
    report("grid_barrier", n=1)
    first, second, third = emulated.emulator_log()  # a refused launch is none
    assert first == {
        "name": "launching block_sum",
        "grid": (CTAS, 1, 1),
        "threads": THREADS,
        "shared": 4 * THREADS,
        "cluster": 1,
        "cooperative": False,
        "programmatic": False,
        "waiting_ctas": 0,
    }
    assert (second["name"], second["grid"], second["cluster"]) == (
        "launching cluster_gather",
        (8, 1, 1),
        4,
    )
    assert third["waiting_ctas"] == 1


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    def switches(seed: int) -> tuple[int, int]:
        emulated.emulator_reset()
        emulated.emulator_configure(seed=seed)
        handed_over("flag_handover")
        stats = emulated.emulator_stats()
        return stats["switches"], stats["polls"]

    assert switches(1) == switches(1)
    assert len({switches(seed) for seed in SEEDS}) > 1


def test_the_device_works_on_after_an_error(seed: int) -> None:
    for _ in range(3):
        report("cluster_gather expects more", n=7)
        report("two barriers")
        assert gathered("cluster_gather") == gather_expected()


def test_a_setting_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TypeError, match="no such setting"):
        emulated.emulator_configure(speed=1)
    with pytest.raises(ValueError, match="sms and spins"):
        emulated.emulator_configure(sms=0)
