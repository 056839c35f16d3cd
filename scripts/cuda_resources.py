#!/usr/bin/env python3
"""What the compiler made of the CUDA kernels: registers, spills, barriers; and gates on that.

    python scripts/cuda_resources.py [--arch 90a]... [SOURCE.cu ...]

Compiles launch files to machine code, one architecture at a time, and prints a line per kernel.
Needs nvcc and nvdisasm but no GPU. Exit code 1 when a kernel breaks a rule:

* no spilled register, no stack, no instruction that touches local memory;
* the kernel states its number of threads, and with its registers they fit an SM;
* a persistent kernel (`grid_*`, `cluster_*`) multiplies on tensor cores where its dtype has them,
  with plain multiply-adds where it is to be exact, publishes the state of a step as its tier is
  meant to, and executes no MEMBAR between its last product and that store: a memory barrier there
  waits for every store in flight, longer than the rest of the step takes.

Reports are kept under build/cuda-resources by what went into them: a second run compiles only what
has changed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = ROOT / "csrc" / "launch"
# All that a wheel holds machine code for, and those that a build for the GPU at hand may ask for.
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
FLAGS = ("-std=c++17", "-O3", "-Xptxas=-v")

MESSAGE_LINES = 30  # of a compiler, whose later errors follow from the first
REGISTERS_OF_AN_SM = 65536
REGISTER_STEP = 8  # a thread's registers are given out in steps of this

TENSOR_CORE = re.compile(r"^[HIDQ]G?MMA\b")
PLAIN_PRODUCT = re.compile(r"^FFMA\b")
CTA_BARRIER = re.compile(r"^BAR\b")
WAITS = re.compile(r"^SYNCS\.PHASECHK\b")  # for a message from a neighbour
LOCAL_MEMORY = re.compile(r"^(LDL|STL)\b")
MEMORY_BARRIER = re.compile(r"^MEMBAR\b")
# How a tier hands a step's state over: a store that all SMs see, or one into a neighbour's shared
# memory.
PUBLISHES = {"grid": re.compile(r"^STG\b.*\.STRONG\.GPU"), "cluster": re.compile(r"^STAS\b")}
PERSISTENT = re.compile(r"\b(grid|cluster)_\w*kernel\b")
# The last template argument of a cluster kernel is its number of CTAs; one CTA has no neighbours.
ONE_CTA = re.compile(r"\b1>[> ]*$")
# Hold 48 to 128 KB of weights in shared memory; the GPUs below have 99 KB, too few for the rest.
LARGE_SHARED = re.compile(r"grid_forward_kernel<.*(\bLstmCell|HeldFma<16>, \w+), 8,")
# Copy to both CTAs of a pair at once (kHasMulticast in csrc/device/ptx.h).
PAIRED = re.compile(r"\bPairedGather\b")
SMALL_SHARED_ARCHITECTURES = ("86", "89", "120", "121")
TENSOR_CORE_TYPES = re.compile(
    r"BFloat16|Float16|Bf16|F16|bf16|f16|TensorCore|tf32|Tf32", re.IGNORECASE
)
# Products of float32 that are not rounded (csrc/device/fma.h, csrc/kernels/cluster_fma.cuh).
PLAIN_TYPES = re.compile(r"\b(Held|Cluster)Fma\b")


class ToolError(RuntimeError):
    """A tool is missing or failed; the message says which and how to mend it."""


# --- finding the tools --------------------------------------------------------------------------


def toolkit_folders() -> Iterator[Path]:
    """Folders that may hold CUDA's tools, the most explicit choice first."""
    if os.environ.get("CUDACXX"):
        yield Path(os.environ["CUDACXX"]).parent
    if os.environ.get("CUDA_HOME"):
        yield Path(os.environ["CUDA_HOME"]) / "bin"
    yield from map(Path, os.environ.get("PATH", "").split(os.pathsep))
    yield from sorted(Path(sys.prefix).glob("cuda/nvidia/cu*/bin"))  # make cuda-toolkit
    for folder in map(Path, sys.path):
        yield from sorted(folder.glob("nvidia/cu*/bin"))
        yield folder / "triton" / "backends" / "nvidia" / "bin"
    yield Path("/usr/local/cuda/bin")


def find_tool(name: str) -> Path | None:
    """Path of nvcc or nvdisasm, None when there is none."""
    for folder in toolkit_folders():
        if os.access(folder / name, os.X_OK) and (folder / name).is_file():
            return folder / name
    return None


def require_tool(name: str) -> Path:
    path = find_tool(name)
    if path is None:
        package = "make cuda-toolkit" if name == "nvcc" else "pip install nvidia-cuda-nvdisasm"
        raise ToolError(f"{name} was not found; `{package}` installs it, without a GPU or a driver")
    return path


# --- what is known of a kernel ------------------------------------------------------------------


@dataclasses.dataclass
class Kernel:
    """One instantiation for one architecture.

    ``barriers_before_publish`` counts the MEMBARs on a path from a product to a publishing store
    that passes no other product. Where products are plain multiply-adds, which the gates are made
    of as well, on one from the last of them to the barrier of the CTA, or from there to the store.
    """

    symbol: str
    name: str
    arch: str
    source: str
    registers: int = 0
    shared: int = 0  # static, bytes
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    threads: int = 0  # launch bound, 0 where none is stated
    instructions: int = 0
    local: int = 0
    tensor_core: int = 0
    plain: int = 0  # multiply-adds, of products and of gates
    membars: int = 0
    publishes: int = 0
    barriers_before_publish: int = 0

    @property
    def tier(self) -> str | None:
        """Which persistent tier the kernel belongs to, None for the others."""
        match = PERSISTENT.search(self.name)
        return match.group(1) if match else None

    def violations(self) -> list[str]:
        """The rules that the kernel breaks."""
        found = []
        if self.spill_stores or self.spill_loads:
            found.append(f"spills {self.spill_stores} + {self.spill_loads} bytes")
        if self.stack:
            found.append(f"has a stack of {self.stack} bytes")
        if self.local:
            found.append(f"{self.local} instructions touch local memory")
        if not self.threads:
            found.append("states no launch bound")
        granted = -(-self.registers // REGISTER_STEP) * REGISTER_STEP
        if granted * self.threads > REGISTERS_OF_AN_SM:
            found.append(f"{self.registers} registers x {self.threads} threads exceed an SM")
        if self.tier is not None and self.runs_here:
            if TENSOR_CORE_TYPES.search(self.name) and not self.tensor_core:
                found.append("does not use tensor cores")
            if PLAIN_TYPES.search(self.name) and (self.tensor_core or not self.plain):
                found.append("does not multiply with plain multiply-adds")
            if not self.publishes and not self.is_alone:
                found.append("publishes nothing")
            if self.barriers_before_publish:
                found.append(
                    f"{self.barriers_before_publish} MEMBAR between product and publishing"
                )
        return found

    @property
    def is_alone(self) -> bool:
        return self.tier == "cluster" and ONE_CTA.search(self.name) is not None

    @property
    def runs_here(self) -> bool:
        """Where a kernel cannot be launched it has no body: clusters exist from sm_90 on."""
        arch = self.arch.rstrip("af")
        if PAIRED.search(self.name):
            return arch == "90"
        if LARGE_SHARED.search(self.name):
            return arch not in SMALL_SHARED_ARCHITECTURES
        return self.tier != "cluster" or self.is_alone or int(arch) >= 90


# --- reading what the tools say -----------------------------------------------------------------


def parse_ptxas(log: str, arch: str, source: str) -> dict[str, Kernel]:
    """Kernels by symbol, from what `ptxas -v` prints."""
    kernels: dict[str, Kernel] = {}
    current: Kernel | None = None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for", line):
            symbol = match.group(1)
            current = kernels[symbol] = Kernel(symbol, symbol, arch, source)
        elif match := re.search(r"Function properties for (\S+)", line):
            # Of a function that is no kernel: its frame lies on the stack of one that calls it.
            current = kernels.get(match.group(1), current)
        elif current is None:
            continue
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            stack, stores, loads = map(int, match.groups())
            current.stack += stack
            current.spill_stores += stores
            current.spill_loads += loads
        elif match := re.search(r"Used (\d+) registers", line):
            current.registers = int(match.group(1))
            shared = re.search(r"(\d+) bytes smem", line)
            current.shared = int(shared.group(1)) if shared else 0
    return kernels


@dataclasses.dataclass
class Code:
    """Instructions of one kernel, each with the indices of those that may come next."""

    instructions: list[str] = dataclasses.field(default_factory=list)
    targets: list[str | None] = dataclasses.field(
        default_factory=list
    )  # label that a branch leads to
    falls_through: list[bool] = dataclasses.field(default_factory=list)
    labels: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, text: str) -> None:
        match = re.match(r"(@!?U?P\w+\s+)?(.*)", text)
        assert match is not None
        predicate, instruction = match.groups()
        name = instruction.split()[0]
        label = re.search(r"`\((\.L\w+)\)", instruction)
        is_branch = name.split(".")[0] in ("BRA", "BRX", "JMP")
        # BSSY and CALL name a label too, but go on with the next instruction (a call after it has
        # returned). A branch may depend on a predicate among its operands.
        conditional = bool(predicate) or re.search(r"\bU?P[0-6]\b", instruction) is not None
        ends = is_branch or name in ("EXIT", "RET", "KILL") or name.startswith("RET.")
        self.instructions.append(instruction)
        self.targets.append(label.group(1) if is_branch and label else None)
        self.falls_through.append(conditional or not ends)

    def predecessors(self) -> list[list[int]]:
        before: list[list[int]] = [[] for _ in self.instructions]
        for i, (target, falls) in enumerate(zip(self.targets, self.falls_through, strict=True)):
            if falls and i + 1 < len(before):
                before[i + 1].append(i)
            if target is not None and self.labels.get(target, len(before)) < len(before):
                before[self.labels[target]].append(i)
        return before

    def indices(self, pattern: re.Pattern[str]) -> set[int]:
        return {i for i, text in enumerate(self.instructions) if pattern.search(text)}

    def on_path(self, first: set[int], between: re.Pattern[str], last: set[int]) -> set[int]:
        """Matches of `between` on a path from `first` to `last` that passes no other of `first`."""
        before = self.predecessors()
        after: list[list[int]] = [[] for _ in before]
        for i, sources in enumerate(before):
            for source in sources:
                after[source].append(i)
        return reach(last, before, first) & reach(first, after, first) & self.indices(between)


def reach(start: Iterable[int], edges: list[list[int]], stop: set[int]) -> set[int]:
    """All that can be reached from `start` along `edges` without going beyond one of `stop`."""
    seen: set[int] = set()
    pending = [follower for i in start for follower in edges[i]]
    while pending:
        i = pending.pop()
        if i not in seen:
            seen.add(i)
            if i not in stop:
                pending += edges[i]
    return seen


def parse_sass(text: str) -> tuple[dict[str, Code], dict[str, int]]:
    """Code of every kernel by symbol, and its launch bound, from nvdisasm."""
    codes: dict[str, Code] = {}
    threads: dict[str, int] = {}
    code: Code | None = None
    info: str | None = None
    bound: list[int] | None = None
    for line in text.splitlines():
        if match := re.match(r"\s*\.section\s+([^,\s]+)", line):
            section = match.group(1)
            code = codes.setdefault(section[6:], Code()) if section.startswith(".text.") else None
            info = section[9:] if section.startswith(".nv.info.") else None
            bound = None
        elif code is not None:
            if match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
                code.add(match.group(1).strip("{} "))
            elif match := re.match(r"(\.L\w+):", line):
                code.labels[match.group(1)] = len(code.instructions)
        elif info is not None:
            if "nvinfo :" in line:
                bound = [] if "EIATTR_MAX_THREADS" in line else None
            elif bound is not None and (match := re.search(r"\.word\s+0x([0-9a-f]+)", line)):
                bound.append(int(match.group(1), 16))
                if len(bound) == 3:
                    threads[info] = bound[0] * bound[1] * bound[2]
    return codes, threads


def read_code(kernel: Kernel, code: Code) -> None:
    """Fill in what the machine code says of a kernel."""
    plain = PLAIN_TYPES.search(kernel.name) is not None
    products = code.indices(PLAIN_PRODUCT if plain else TENSOR_CORE)
    kernel.instructions = len(code.instructions)
    kernel.local = len(code.indices(LOCAL_MEMORY))
    kernel.tensor_core = len(code.indices(TENSOR_CORE))
    kernel.plain = len(code.indices(PLAIN_PRODUCT))
    kernel.membars = len(code.indices(MEMORY_BARRIER))
    if kernel.tier is not None:
        publishes = code.indices(PUBLISHES[kernel.tier])
        kernel.publishes = len(publishes)
        found = code.on_path(products, MEMORY_BARRIER, publishes)
        if plain:
            # A CTA of a cluster meets others at its mbarriers; and not after its last message.
            meetings = code.indices(CTA_BARRIER) & reach(publishes, code.predecessors(), set())
            found |= code.on_path(products, MEMORY_BARRIER, meetings)
            found |= code.on_path(meetings | code.indices(WAITS), MEMORY_BARRIER, publishes)
        kernel.barriers_before_publish = len(found)


def demangle(symbols: list[str]) -> list[str]:
    """Readable names, where the machine has c++filt."""
    tool = shutil.which("c++filt")
    if tool is None or not symbols:
        return symbols
    lines = subprocess.run(
        [tool], input="\n".join(symbols), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    # Parameters and return type say nothing that the template arguments do not.
    return [re.sub(r"^void |\((?!anonymous).*\)$|rnnlm::", "", line) for line in lines]


# --- compiling, and remembering what came out ---------------------------------------------------


def included(source: Path) -> list[Path]:
    """A source and every file of csrc that it includes, directly or not."""
    found: dict[Path, None] = {}
    pending = [source]
    while pending:
        path = pending.pop()
        if path in found or not path.is_file():
            continue
        found[path] = None
        text = path.read_text("utf-8")
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
            pending += [ROOT / "csrc" / name, path.parent / name]
    return sorted(found)


def fingerprint(source: Path, arch: str, version: str) -> str:
    digest = hashlib.sha256()
    for part in (version, arch, *FLAGS):
        digest.update(part.encode() + b"\0")
    for path in (Path(__file__), *included(source.resolve())):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


@dataclasses.dataclass
class Report:
    """The kernels of one source for one architecture; ``error`` where it does not compile."""

    source: str
    arch: str
    seconds: float
    kernels: list[Kernel]
    cached: bool = False
    error: str = ""


class Compiler:
    """nvcc and nvdisasm, with the reports of earlier runs."""

    def __init__(self, cache: Path | None = ROOT / "build" / "cuda-resources") -> None:
        self.nvcc = require_tool("nvcc")
        self.nvdisasm = require_tool("nvdisasm")
        self.cache = cache
        self.version = self._run(self.nvcc, "--version").stdout.strip().splitlines()[-1]

    @staticmethod
    def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode != 0:
            said = (done.stdout + done.stderr).splitlines()[:MESSAGE_LINES]
            raise ToolError("\n".join([f"{Path(command[0]).name} failed:", *said]))
        return done

    def report(self, source: Path, arch: str) -> Report:
        """Compile one source for one architecture, or recall what came out of it."""
        kept = (
            self.cache
            and self.cache / f"{source.stem}-{arch}-{fingerprint(source, arch, self.version)}.json"
        )
        if kept and kept.is_file():
            data = json.loads(kept.read_text())
            return Report(
                **{**data, "kernels": [Kernel(**k) for k in data["kernels"]], "cached": True}
            )
        start = time.monotonic()
        try:
            kernels, error = self._compile(source, arch), ""
        except ToolError as failure:
            kernels, error = [], str(failure)
        seconds = round(time.monotonic() - start, 2)
        report = Report(source.name, arch, seconds, kernels, error=error)
        if kept and not error:
            kept.parent.mkdir(parents=True, exist_ok=True)
            for old in kept.parent.glob(f"{source.stem}-{arch}-*.json"):
                old.unlink(missing_ok=True)
            kept.write_text(json.dumps(dataclasses.asdict(report), indent=1))
        return report

    def _compile(self, source: Path, arch: str) -> list[Kernel]:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "code.cubin"
            target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
            log = self._run(
                self.nvcc, "-cubin", *FLAGS, target, f"-I{ROOT / 'csrc'}", "-o", cubin, source
            ).stderr
            sass = self._run(self.nvdisasm, cubin).stdout
        kernels = parse_ptxas(log, arch, source.name)
        for kernel, name in zip(kernels.values(), demangle(list(kernels)), strict=True):
            kernel.name = name
        codes, threads = parse_sass(sass)
        for symbol, kernel in kernels.items():
            kernel.threads = threads.get(symbol, 0)
            read_code(kernel, codes[symbol])
        return list(kernels.values())

    def reports(self, pairs: Iterable[tuple[Path, str]], jobs: int) -> Iterator[Report]:
        """One report for each source and architecture, several at a time, in order."""
        with concurrent.futures.ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
            yield from pool.map(lambda pair: self.report(*pair), pairs)


# --- showing it ---------------------------------------------------------------------------------

HEADER = (
    "regs",
    "threads",
    "smem",
    "stack",
    "spills",
    "MMA",
    "FFMA",
    "MEMBAR",
    "publish",
    "kernel",
)


def row(kernel: Kernel) -> tuple[str, ...]:
    return (
        *(str(value) for value in (kernel.registers, kernel.threads, kernel.shared, kernel.stack)),
        f"{kernel.spill_stores}+{kernel.spill_loads}",
        *(
            str(value)
            for value in (kernel.tensor_core, kernel.plain, kernel.membars, kernel.publishes)
        ),
        kernel.name,
    )


def show(report: Report) -> int:
    """Print one report; returns how many kernels break a rule, 1 for a source that is broken."""
    kept = "kept from an earlier run" if report.cached else f"{report.seconds:.1f} s"
    print(f"\n{report.source} for sm_{report.arch} ({kept})")
    if report.error:
        print("  VIOLATION: " + report.error.replace("\n", "\n    "))
        return 1
    rows = [HEADER, *map(row, report.kernels)]
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(HEADER) - 1)]
    bad = 0
    for index, cells in enumerate(rows):
        print("  " + "  ".join([*map(str.rjust, cells[:-1], widths), cells[-1]]))
        violations = report.kernels[index - 1].violations() if index else []
        bad += bool(violations)
        for violation in violations:
            print(f"  ^ VIOLATION: {violation}")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "sources", nargs="*", type=Path, metavar="SOURCE.cu", help="default: all of csrc/launch"
    )
    parser.add_argument(
        "--arch", action="append", help=f"repeatable; default: {' '.join(ARCHITECTURES)}"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    arguments = parser.parse_args()
    sources = arguments.sources or sorted(LAUNCHERS.glob("*.cu"))
    bad = count = 0
    try:
        pairs = itertools.product(sources, arguments.arch or ARCHITECTURES)
        for report in Compiler().reports(pairs, arguments.jobs):
            bad += show(report)
            count += len(report.kernels)
            sys.stdout.flush()
    except ToolError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{count} kernels, {bad} broken rules or sources")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
