"""The CUDA kernels compile without a GPU, and what came out keeps the rules of cuda_resources.py.

`make compile-check` does this for every architecture; here two stand for all.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cuda_toolkit import ROOT, cuda_resources, needs_toolkit

Kernel = cuda_resources.Kernel


# --- The gate itself, on text as the tools print it -----------------------------------------------

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4gridv' for 'sm_90a'
ptxas info    : Function properties for _Z4gridv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 250 registers, used 1 barriers, 8192 bytes smem, 372 bytes cmem[0]
ptxas info    : Compile time = 19.506 ms
ptxas info    : Compiling entry function '_Z5otherv' for 'sm_90a'
ptxas info    : Function properties for _Z5otherv
    40 bytes stack frame, 52 bytes spill stores, 56 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
ptxas info    : Function properties for _Z6calledv
    16 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
"""


def sass(symbol: str, *lines: str, threads: int | None = 256) -> str:
    """Disassembly of one kernel; a line that ends in a colon is a label."""
    code = [
        line if line.endswith(":") else f"        /*{16 * i:04x}*/                   {line} ;"
        for i, line in enumerate(lines)
    ]
    bound = [
        f'	.section	.nv.info.{symbol},"",@"SHT_CUDA_INFO"',
        "	//----- nvinfo : EIATTR_MAX_THREADS",
        "        /*0064*/ 	.byte	0x04, 0x05",
        f"        /*0068*/ 	.word	0x{threads or 0:08x}",
        "        /*006c*/ 	.word	0x00000001",
        "        /*0070*/ 	.word	0x00000001",
        "	//----- nvinfo : EIATTR_CBANK_PARAM_SIZE",
        "        /*0074*/ 	.word	0x00000007",
    ]
    return "\n".join(
        [
            *(bound if threads else []),
            f'	.section	.text.{symbol},"ax",@progbits',
            f"{symbol}:",
            *code,
        ]
    )


# A time step as the compiler lays it out: wait, product, barrier, gates, publish, next step.
STEP = (
    "MOV R1, c[0x0][0x28]",
    ".L_x_0:",
    "LDG.E.128.STRONG.GPU R8, desc[UR8][R4.64]",
    "@P1 BRA `(.L_x_0)",
    "HMMA.16816.F32.BF16 R88, R12, R8.reuse, RZ",
    "HMMA.16816.F32.BF16 R80, R68, R76, R80",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "STG.E.STRONG.GPU desc[UR8][R6.64], R9",
    "STG.E desc[UR8][R10.64], R11",
    "@!P0 BRA `(.L_x_0)",
    "EXIT",
)
PUBLISH = STEP.index("STG.E.STRONG.GPU desc[UR8][R6.64], R9")


def read(*lines: str, name: str = "grid_forward_kernel<BFloat16>", **values: object) -> Kernel:
    codes, threads = cuda_resources.parse_sass(sass("_Z1kv", *lines))
    kernel = Kernel("_Z1kv", name, "90a", "k.cu", registers=200, threads=threads["_Z1kv"])
    for key, value in values.items():
        setattr(kernel, key, value)
    cuda_resources.read_code(kernel, codes["_Z1kv"])
    return kernel


def with_line(index: int, line: str) -> tuple[str, ...]:
    return (*STEP[:index], line, *STEP[index:])


def test_registers_shared_memory_stack_and_spills_are_read() -> None:
    kernels = cuda_resources.parse_ptxas(PTXAS, "90a", "k.cu")
    grid, other = kernels["_Z4gridv"], kernels["_Z5otherv"]
    assert (grid.registers, grid.shared, grid.stack) == (250, 8192, 0)
    assert (grid.spill_stores, grid.spill_loads) == (0, 0)
    # What a function spills that the kernel calls counts as the kernel's.
    assert (other.registers, other.stack) == (255, 56)
    assert (other.spill_stores, other.spill_loads) == (56, 56)
    assert set(kernels) == {"_Z4gridv", "_Z5otherv"}


def test_a_good_step_breaks_no_rule() -> None:
    kernel = read(*STEP)
    assert kernel.violations() == []
    assert (kernel.tensor_core, kernel.publishes, kernel.membars) == (2, 1, 0)
    assert kernel.threads == 256
    assert kernel.instructions == len(STEP) - 1  # one of the lines is a label


@pytest.mark.parametrize(
    ("values", "words"),
    [
        pytest.param({"spill_stores": 4}, "spills 4 + 0", id="spill-store"),
        pytest.param({"spill_loads": 4}, "spills 0 + 4", id="spill-load"),
        pytest.param({"stack": 8}, "stack of 8", id="stack"),
        pytest.param({"threads": 0}, "launch bound", id="no-launch-bound"),
        pytest.param({"registers": 129, "threads": 512}, "exceed an SM", id="too-many-registers"),
    ],
)
def test_resources_over_the_limit_are_violations(values: dict[str, int], words: str) -> None:
    (violation,) = read(*STEP, **values).violations()
    assert words in violation


def test_registers_that_just_fit_are_allowed() -> None:
    assert read(*STEP, registers=128, threads=512).violations() == []


@pytest.mark.parametrize("instruction", ["LDL R0, [R1+0x8]", "@P0 STL.64 [R1], R2"])
def test_local_memory_is_a_violation_in_any_kernel(instruction: str) -> None:
    (violation,) = read(*with_line(1, instruction), name="step_kernel<float>").violations()
    assert "local memory" in violation


@pytest.mark.parametrize(
    ("place", "is_violation"),
    [
        pytest.param(0, False, id="before-the-loop"),
        pytest.param(2, False, id="before-the-product"),
        pytest.param(6, True, id="after-the-product"),
        pytest.param(PUBLISH, True, id="just-before-publishing"),
        pytest.param(PUBLISH + 1, False, id="after-publishing"),
    ],
)
def test_a_memory_barrier_counts_between_product_and_publishing(
    place: int, is_violation: bool
) -> None:
    kernel = read(*with_line(place, "MEMBAR.ALL.GPU"))
    assert kernel.membars == 1
    assert bool(kernel.violations()) == is_violation
    assert kernel.barriers_before_publish == is_violation


def test_a_memory_barrier_is_found_where_the_code_was_moved_out_of_line() -> None:
    moved = (
        *STEP[:PUBLISH],
        "@P2 BRA `(.L_x_9)",
        ".L_x_8:",
        *STEP[PUBLISH:],
        ".L_x_9:",
        "MEMBAR.ALL.GPU",
        "BRA `(.L_x_8)",
    )
    assert read(*moved).barriers_before_publish == 1


def test_a_memory_barrier_on_the_way_out_is_none_between_product_and_publishing() -> None:
    leaving = (
        *STEP[:PUBLISH],
        "@P2 BRA `(.L_x_9)",
        *STEP[PUBLISH:],
        ".L_x_9:",
        "MEMBAR.ALL.GPU",
        "EXIT",
    )
    assert read(*leaving).violations() == []


def test_a_persistent_kernel_without_tensor_cores_or_publishing_is_a_violation() -> None:
    plain = [line.replace("HMMA.16816.F32.BF16", "FFMA") for line in STEP]
    assert read(*plain).violations() == ["does not use tensor cores"]
    assert read(*plain, name="grid_forward_kernel<float>").violations() == []
    weak = [line.replace("STG.E.STRONG.GPU", "STG.E") for line in STEP]
    assert read(*weak).violations() == ["publishes nothing"]


PLAIN = "grid_forward_kernel<GridForwardConfig<HeldFma<16>, LstmCell, 4, 1> >"


def plain_step(*after: tuple[int, str]) -> tuple[str, ...]:
    """STEP with plain multiply-adds, of the product and, behind the barrier, of the gates; with
    more lines in front of some."""
    step = [line.replace("HMMA.16816.F32.BF16", "FFMA") for line in STEP]
    step.insert(PUBLISH, "FFMA R9, R88, R80, R9")
    for index, line in after:
        step.insert(index, line)
    return tuple(step)


def test_a_kernel_that_is_to_be_exact_multiplies_with_plain_multiply_adds() -> None:
    assert read(*plain_step(), name=PLAIN).violations() == []
    words = ["does not multiply with plain multiply-adds"]
    assert read(*STEP, name=PLAIN).violations() == words
    nothing = [line.replace("FFMA", "FADD") for line in plain_step()]
    assert read(*nothing, name=PLAIN).violations() == words


@pytest.mark.parametrize(
    ("place", "is_violation"),
    [
        pytest.param(2, False, id="before-the-product"),
        pytest.param(6, True, id="between-product-and-barrier"),
        pytest.param(7, True, id="between-barrier-and-gates"),
        pytest.param(PUBLISH + 1, True, id="between-gates-and-publishing"),
        pytest.param(PUBLISH + 2, False, id="after-publishing"),
    ],
)
def test_a_memory_barrier_is_found_among_plain_multiply_adds(
    place: int, is_violation: bool
) -> None:
    kernel = read(*plain_step((place, "MEMBAR.ALL.GPU")), name=PLAIN)
    assert kernel.barriers_before_publish == is_violation


def test_a_cluster_kernel_publishes_into_its_neighbours_shared_memory() -> None:
    name = "cluster_forward_kernel<Config<Float16, 128, 4> >"
    assert read(*STEP, name=name).violations() == ["publishes nothing"]
    stas = [line.replace("STG.E.STRONG.GPU desc", "STAS.128 desc") for line in STEP]
    assert read(*stas, name=name).violations() == []
    # For older GPUs the kernel is an empty one, unless its only CTA has no neighbours.
    assert read("EXIT", name=name, arch="80").violations() == []
    alone = name.replace(", 4>", ", 1>")
    assert read(*STEP, name=alone).violations() == []
    assert read("EXIT", name=alone, arch="80").violations() == ["does not use tensor cores"]


# A step of a cluster with plain multiply-adds: wait, product, sums of lanes, gates, publish.
PLAIN_CLUSTER = "cluster_forward_kernel<ClusterForwardConfig<ClusterFma, LstmUnit, 128, 4> >"
CLUSTER_STEP = (
    ".L_x_0:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2+UR4], R3",
    "@!P0 BRA `(.L_x_0)",
    "FFMA R8, R12, R16, R8",
    "SHFL.BFLY PT, R9, R8, 0x4, 0x1f",
    "FFMA R9, R8, R9, R10",
    "STAS.128 [R4.64], R8",
    "STG.E desc[UR8][R10.64], R9",
    "@P1 BRA `(.L_x_0)",
    "EXIT",
)


@pytest.mark.parametrize(
    ("place", "is_violation"),
    [
        pytest.param(0, False, id="before-the-loop"),
        pytest.param(3, True, id="before-the-product"),
        pytest.param(5, True, id="between-product-and-gates"),
        pytest.param(6, True, id="between-gates-and-publishing"),
        pytest.param(7, False, id="after-publishing"),
    ],
)
def test_a_memory_barrier_is_found_between_a_clusters_wait_and_publishing(
    place: int, is_violation: bool
) -> None:
    step = (*CLUSTER_STEP[:place], "MEMBAR.ALL.GPU", *CLUSTER_STEP[place:])
    assert read(*step, name=PLAIN_CLUSTER).barriers_before_publish == is_violation


def test_the_last_meeting_of_a_cluster_may_wait_for_memory() -> None:
    end = ("MEMBAR.ALL.GPU", "UCGABAR_ARV", "BAR.SYNC.DEFER_BLOCKING 0x0", "EXIT")
    assert read(*CLUSTER_STEP[:-1], *end, name=PLAIN_CLUSTER).violations() == []


def test_a_kernel_has_a_body_wherever_its_shared_memory_fits() -> None:
    name = "grid_forward_kernel<GridForwardConfig<TensorCore16<Bf16>, LstmCell, {}, 1> >"
    for arch in ("86", "89", "120"):
        assert read("EXIT", name=name.format(8), arch=arch).violations() == []
        assert read("EXIT", name=name.format(6), arch=arch).violations() != []
    for arch in ("80", "90a", "100"):
        assert read("EXIT", name=name.format(8), arch=arch).violations() != []
    exact = "grid_forward_kernel<GridForwardConfig<HeldFma<16>, GruAfterCell, {}, 1> >"
    assert read("EXIT", name=exact.format(8), arch="86").violations() == []
    assert read("EXIT", name=exact.format(6), arch="86").violations() != []
    assert read("EXIT", name=exact.format(8), arch="90a").violations() != []


def test_a_kernel_of_pairs_has_a_body_where_multicast_is_compiled() -> None:
    name = "grid_forward_kernel<GridForwardConfig<TensorCore16<Bf16>, LstmCell, 4, 2, {}Gather> >"
    for arch in ("80", "89", "100", "120"):
        assert read("EXIT", name=name.format("Paired"), arch=arch).violations() == []
        assert read("EXIT", name=name.format("Polled"), arch=arch).violations() != []
    assert read("EXIT", name=name.format("Paired"), arch="90a").violations() != []


@pytest.mark.parametrize(("arch", "is_violation"), [("90a", True), ("80", True), ("86", False)])
def test_a_kernel_is_empty_only_where_its_shared_memory_has_no_place(
    arch: str, is_violation: bool
) -> None:
    name = "grid_forward_kernel<GridForwardConfig<TensorCore16<Bf16>, LstmCell, 8, 1> >"
    assert bool(read("EXIT", name=name, arch=arch).violations()) == is_violation
    assert read("EXIT", name=name.replace("8", "4"), arch=arch).violations() != []


def test_a_change_in_any_included_file_compiles_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_resources, "ROOT", tmp_path)
    for folder in ("launch", "kernels", "device"):
        (tmp_path / "csrc" / folder).mkdir(parents=True)
    source = tmp_path / "csrc" / "launch" / "a.cu"
    source.write_text('#include "kernels/a.cuh"\n')
    (tmp_path / "csrc" / "kernels" / "a.cuh").write_text('#include "device/b.h"\n')
    deep = tmp_path / "csrc" / "device" / "b.h"
    other = tmp_path / "csrc" / "device" / "c.h"
    deep.write_text("int b;\n")
    prints = [cuda_resources.fingerprint(source, "90a", "13.0")]
    other.write_text("int c;\n")
    assert cuda_resources.fingerprint(source, "90a", "13.0") == prints[0]
    deep.write_text("long b;\n")
    prints.append(cuda_resources.fingerprint(source, "90a", "13.0"))
    prints.append(cuda_resources.fingerprint(source, "80", "13.0"))
    prints.append(cuda_resources.fingerprint(source, "80", "12.8"))
    assert len(set(prints)) == 4


# --- The kernels ----------------------------------------------------------------------------------

LAUNCHERS = sorted((ROOT / "csrc" / "launch").glob("*.cu"))
PROBE = ROOT / "csrc" / "launch" / "probe.cu"


def chosen() -> list[tuple[Path, str]]:
    """Every kernel for one architecture, a sample for the oldest: compiling takes seconds each.

    float16 goes without saying: its kernels are those of bfloat16 with another instruction for the
    product. `make compile-check` leaves nothing out.
    """
    usual = [source for source in LAUNCHERS if not source.stem.endswith("_f16")]
    sample = [
        source
        for source in usual
        if source.stem.endswith(
            ("lstm_bf16", "stepwise_f32", "grid_forward_lstm_f32", "cluster_lstm_f32")
        )
    ]
    return [*((source, "90a") for source in usual), *((source, "80") for source in sample)]


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, str], object]:
    found = cuda_resources.Compiler().reports(chosen(), os.cpu_count() or 1)
    return {(report.source, report.arch): report for report in found}


@needs_toolkit
@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "arch"), chosen(), ids=[f"{source.stem}-sm_{arch}" for source, arch in chosen()]
)
def test_kernels_break_no_rule(reports: dict, source: Path, arch: str) -> None:
    report = reports[source.name, arch]
    assert report.error == ""
    found = {kernel.name: "; ".join(kernel.violations()) for kernel in report.kernels}
    bad = [f"{name}: {violations}" for name, violations in found.items() if violations]
    assert not bad, "\n".join(bad)


@needs_toolkit
@pytest.mark.slow
def test_every_tier_has_kernels_that_use_tensor_cores_and_publish(reports: dict) -> None:
    """Guards the rules themselves: renamed kernels would escape them."""
    kernels = [kernel for report in reports.values() for kernel in report.kernels]
    for tier in ("grid", "cluster"):
        for direction in ("forward", "backward"):
            own = [k for k in kernels if k.name.startswith(f"{tier}_{direction}_kernel")]
            assert any(k.tier == tier and k.tensor_core and k.publishes for k in own)


@pytest.fixture
def spilling(tmp_path: Path) -> Path:
    """A kernel that needs more registers than its launch bound leaves it."""
    path = tmp_path / "spilling.cu"
    path.write_text("""
__global__ void __launch_bounds__(1024, 2) spilling_kernel(const float* x, float* y, int n) {
  float a[64];
  for (int i = 0; i < 64; ++i) a[i] = x[i * n + threadIdx.x];
  for (int k = 0; k < n; ++k)
    for (int i = 0; i < 64; ++i) a[i] = a[i] * a[(i + 7) % 64] + x[k];
  for (int i = 0; i < 64; ++i) y[i * n + threadIdx.x] = a[i];
}
""")
    return path


@needs_toolkit
@pytest.mark.slow
def test_the_gate_fails_a_kernel_that_spills(spilling: Path) -> None:
    report = cuda_resources.Compiler(cache=None).report(spilling, "90a")
    (kernel,) = report.kernels
    assert kernel.threads == 1024
    assert kernel.registers <= 32
    assert any(violation.startswith("spills") for violation in kernel.violations())
    assert any("local memory" in violation for violation in kernel.violations())


@needs_toolkit
@pytest.mark.slow
def test_a_second_run_compiles_nothing(tmp_path: Path) -> None:
    compiler = cuda_resources.Compiler(cache=tmp_path)
    first, second = compiler.report(PROBE, "90a"), compiler.report(PROBE, "90a")
    assert (first.cached, second.cached) == (False, True)
    assert first.kernels == second.kernels
    assert first.kernels[0].name.startswith("probe_kernel")


@needs_toolkit
def test_a_source_that_does_not_compile_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "broken.cu"
    broken.write_text("__global__ void broken() { no_such_thing(); }\n")
    for _ in range(2):  # a failure is not remembered
        report = cuda_resources.Compiler(cache=tmp_path).report(broken, "90a")
        assert "no_such_thing" in report.error
        assert (report.kernels, report.cached) == ([], False)
    assert cuda_resources.show(report) == 1
