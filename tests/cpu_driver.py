"""The CPU kernels in a process of their own, on this CPU or on an emulated one.

    kernels = Process(Program("arm64", ["generic"], folder), "generic")
    with kernels.in_use():
        assert_near_oracle(layer("lstm", H=32), torch.bfloat16)

Inside the block ``backend="cpu"`` runs the kernels of that process, and so do tests that call
``_C`` by themselves. The program on the other end is tests/native/cpu_driver.cpp.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pybind11
from recurrence_cases import ISAS

from rnnlm_kernels.backends import cpu
from rnnlm_kernels.build import build_info

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc"
DRIVER = ROOT / "tests" / "native"

# Arguments of the functions of _C, in their order (csrc/python/cpu.cpp). "name:SHAPE" is a tensor,
# "name!SHAPE" one that is written. Shapes are those of csrc/core/params.h, W vectors are saved.
_STEPS = "dtype threads T B batch_sizes:T reverse H"
_PRODUCTS = "I x:NI w_ih:GHI b_ih:GH gates_x:NGH w_hh:GHR b_hh:GH"
_CALLS = {
    "lstm_forward": f"{_STEPS} P {_PRODUCTS} w_hr:RH h0:BR c0:BH"
    " output!NR h_n!BR c_n!BH cells!NH saved!NWH",
    "lstm_backward": f"{_STEPS} P grad_output:NR grad_h_n:BR grad_c_n:BH grad_cells:NH w_hh:GHR"
    " w_hr:RH c0:BH cells:NH saved:NWH dgates!NGH dh0!BR dc0!BH dproj!NR unprojected!NH",
    "gru_forward": f"{_STEPS} reset_before {_PRODUCTS} h0:BR output!NR h_n!BR saved!NWH",
    "gru_backward": f"{_STEPS} reset_before grad_output:NR grad_h_n:BR w_hh:GHR h0:BR output:NR"
    " saved:NWH dgates!NGH candidate!NH dh0!BR",
    "linear": "dtype threads N I V x:NI w:VI out!NV",
    "layer_gradients": "dtype threads T B batch_sizes:T reverse N G H P I reset_before scale"
    " accumulates dgates:NGH candidate:NH dproj:NR unprojected:NH x:NI h0:BR output:NR w_ih:GHI"
    " dx!NI dw_ih!GHI dw_hh!GHR dw_hr!RH db_ih!GH db_hh!GH",
    "cross_entropy": "dtype threads N V logits!NV bias:V target:N class_weight:V class_weight_sum"
    " ignore_index label_smoothing upstream:N gradient losses!N bias_grad!V",
    "dropout": "dtype threads N seed p scale x:N y!N",
    "elementwise": "function dtype N x:N y!N",
}
_INTEGERS = {"batch_sizes", "target"}
_WIDE = {"cells", "grad_cells", "class_weight", "upstream", "losses", "bias_grad"}
_BYTES = (4, 8, 2, 2)  # of a number, by DType
_FUNCTIONS = ("exp", "sigmoid", "tanh")
_ANSWERS_WITHIN = 120.0  # seconds


# --- building -------------------------------------------------------------------------------------

ARM64_COMPILER = shutil.which("aarch64-linux-gnu-g++")
ARM64_EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


# What every CPU has on which emulated_amx.cpp can run, and what is compiled with it.
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c")
EMULATED_AMX = ("-include", DRIVER / "emulated_amx.h")


def missing(target: str) -> str:
    """What this machine lacks to build for a target and to run that: "native", "arm64", or "amx",
    this CPU with what "amx" adds to AVX-512 in software (native/emulated_amx.h)."""
    if target == "arm64":
        found = {"aarch64-linux-gnu-g++": ARM64_COMPILER, "qemu-aarch64": ARM64_EMULATOR}
    else:
        found = {"C++ compiler": shutil.which(compiler())}
    if target == "amx":
        found["AVX-512"] = "avx512" in ISAS
        found["compiler for AMX"] = "amx" in build_info().get("isas", ())
    return ", ".join(name for name, there in found.items() if not there)


def run(*command: object) -> str:
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


def compiler() -> str:
    """That of this machine."""
    return os.environ.get("CXX") or "c++"


class Program:
    """The driver for one target, its kernels compiled as CMakeLists.txt says.

    Attributes:
        objects: the compiled kernels, by source and instruction set.
        commands: how CMake compiles the native module, as JSON.
        command: how to start it.
    """

    def __init__(self, target: str, isas: Sequence[str], folder: Path) -> None:
        self.compiler = ARM64_COMPILER if target == "arm64" else compiler()
        definitions = {
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "RNNLM_BUILD_CUDA": "0",
            "RNNLM_WERROR": os.environ.get("RNNLM_WERROR", ""),
            "CMAKE_CXX_COMPILER": self.compiler,
        }
        if target == "arm64":
            definitions |= {"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": "aarch64"}
        else:  # what is compiled here only to be tested need not be fast
            definitions["CMAKE_CXX_FLAGS_RELEASE"] = "-O1"
        if target == "amx":
            definitions["CMAKE_CXX_FLAGS"] = '{} "{}"'.format(*EMULATED_AMX)
            own = [*AVX512, *EMULATED_AMX, DRIVER / "emulated_amx.cpp"]
        else:
            own = [SOURCES / "cpu" / "isa.cpp"]
        settings = [f"-D{name}={value}" for name, value in definitions.items()]
        run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *settings)
        run("cmake", "--build", folder, "--target", *(f"rnnlm_cpu_{isa}" for isa in isas))
        self.commands = (folder / "compile_commands.json").read_text()
        self.objects = {
            (path.name.removesuffix(".cpp.o"), isa): path
            for isa in isas
            for path in folder.glob(f"CMakeFiles/rnnlm_cpu_{isa}.dir/**/*.o")
        }
        program = folder / "cpu_driver"
        run(
            *(self.compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-pthread", f"-I{SOURCES}"),
            *(f"-DRNNLM_HAVE_{isa.upper()}=1" for isa in isas),
            *(*own, SOURCES / "cpu" / "parallel.cpp", DRIVER / "cpu_driver.cpp"),
            *self.objects.values(),
            *("-ldl", "-o", program),
        )
        self.command = [str(program)]
        if target == "arm64":
            loader = Path(run(self.compiler, "-print-file-name=ld-linux-aarch64.so.1").strip())
            libraries = loader.parent.resolve().parent
            self.command = [str(ARM64_EMULATOR), "-L", str(libraries), str(program)]

    def has(self, library: str) -> bool:
        """Whether the target has a shared library."""
        found = run(self.compiler, f"-print-file-name={library}").strip()
        return Path(found).is_absolute()


# --- talking to it --------------------------------------------------------------------------------


def _text(value: str) -> bytes:
    return struct.pack("=q", len(value)) + value.encode()


def _items(values: dict[str, Any], code: str) -> bytes:
    items = (_text(name) + struct.pack(f"={code}", value) for name, value in values.items())
    return struct.pack("=q", len(values)) + b"".join(items)


class _Call:
    """What one call of _C hands over: numbers and the memory of tensors."""

    def __init__(self, kernel: str, problems: Sequence[Sequence[Any]]) -> None:
        self.kernel = kernel
        self.buffers: dict[int, tuple[int, int]] = {}  # address -> index, bytes
        self.written: set[int] = set()
        self.problems = [self._problem(problem) for problem in problems]

    def _problem(self, arguments: Sequence[Any]) -> bytes:
        parameters = [re.split("([:!])", word) for word in _CALLS[self.kernel].split()]
        given = {p[0]: value for p, value in zip(parameters, arguments, strict=True)}
        numbers = {p[0]: given[p[0]] for p in parameters if len(p) == 1}
        if self.kernel == "elementwise":
            numbers["function"] = _FUNCTIONS.index(numbers["function"])
        sizes = self._sizes(numbers, given.get("batch_sizes", 0))
        tensors = {}
        for name, mark, shape in (p for p in parameters if len(p) > 1 and given[p[0]]):
            size = math.prod(sizes[letter] for letter in shape) * self._width(name, numbers)
            index, known = self.buffers.setdefault(given[name], (len(self.buffers), size))
            assert known == size, f"{name} shares memory with a tensor of another size"
            tensors[name] = index
            if mark == "!":
                self.written.add(given[name])
        return _items(numbers, "d") + _items(tensors, "q")

    @staticmethod
    def _width(name: str, numbers: dict[str, Any]) -> int:
        """Bytes of a number of a tensor."""
        if name in _INTEGERS:
            return 8
        return max(_BYTES[numbers["dtype"]], 4 if name in _WIDE else 0)

    def _sizes(self, numbers: dict[str, Any], batch_sizes: int) -> dict[str, int]:
        sizes = {name: value for name, value in numbers.items() if len(name) == 1}
        if "T" in sizes:
            sizes["N"] = sizes["T"] * sizes["B"]
        if batch_sizes:
            sizes["N"] = sum((ctypes.c_int64 * sizes["T"]).from_address(batch_sizes))
        sizes.setdefault("G", 4 if self.kernel.startswith("lstm") else 3)
        sizes["W"] = 3 if numbers.get("reset_before") else 4
        return {**sizes, "R": sizes.get("P") or sizes.get("H", 0)}

    def message(self) -> bytes:
        parts = [_text(self.kernel), struct.pack("=q", len(self.buffers))]
        for address, (_, size) in self.buffers.items():
            parts += [struct.pack("=q", size), ctypes.string_at(address, size)]
        return b"".join([*parts, struct.pack("=q", len(self.problems)), *self.problems])


class Process:
    """Stands in for ``rnnlm_kernels._C``, as far as the CPU kernels go."""

    def __init__(self, program: Program, isa: str, openmp: str | None = None) -> None:
        """``openmp``: the library whose threads the kernels are to find, if any."""
        self.program, self.isa = program, isa
        self.calls = 0
        self._process = subprocess.Popen(
            [*program.command, *([openmp] if openmp else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "RNNLM_CPU_ISA": isa},
        )
        self._turn = threading.Lock()

    def close(self) -> None:
        with suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.close()
        self._process.wait(_ANSWERS_WITHIN)

    @contextmanager
    def in_use(self, *others: ModuleType) -> Iterator[None]:
        """``others``: modules of tests that call ``_C``."""
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(cpu, "native", self))
            for module in others:
                stack.enter_context(mock.patch.object(module, "_C", self))
            yield

    def __getattr__(self, name: str) -> Any:
        kernel = name.removeprefix("cpu_").removesuffix("_pair")
        if not name.startswith("cpu_") or kernel not in _CALLS:
            raise AttributeError(name)

        def call(*arguments: Any) -> None:
            self._ask(_Call(kernel, arguments if name.endswith("_pair") else [arguments]))

        return call

    def cpu_products_pay(self) -> bool:
        return True  # so that tests run all kernels

    def cpu_info(self) -> dict[str, str]:
        isa, threads_from = self._ask(_Call("info", [])).split()
        return {"isa": isa, "threads_from": threads_from}

    def _ask(self, call: _Call) -> str:
        with self._turn:
            watch = threading.Timer(_ANSWERS_WITHIN, self._process.kill)
            watch.start()
            try:
                return self._exchange(call)
            finally:
                watch.cancel()

    def _exchange(self, call: _Call) -> str:
        self.calls += len(call.problems)
        try:
            self._process.stdin.write(call.message())
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()
        error, words = (self._read(*struct.unpack("=q", self._read(8))).decode() for _ in range(2))
        if error:
            raise MemoryError(error) if error == "out of memory" else ValueError(error)
        for address, (_, size) in call.buffers.items():
            now = self._read(size)
            if address in call.written:
                ctypes.memmove(address, now, size)
            else:
                assert now == ctypes.string_at(address, size), "a kernel has changed its input"
        return words

    def _read(self, size: int) -> bytes:
        data = self._process.stdout.read(size)
        if len(data) < size:
            self._fail()
        return data

    def _fail(self) -> None:
        code = self._process.wait(_ANSWERS_WITHIN)
        raise AssertionError(f"the driver ended with exit code {code}")
