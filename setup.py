"""Builds `rnnlm_kernels._C` with CMake and Ninja; everything declarative is in pyproject.toml.

CMakeLists.txt explains the variables honoured here: RNNLM_BUILD_CUDA, RNNLM_CUDA_ARCHS,
RNNLM_SANITIZE, RNNLM_WERROR, RNNLM_BUILD_EMULATOR. CMAKE_ARGS adds arguments to the configure step
and CMAKE_BUILD_PARALLEL_LEVEL limits the number of compilers.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OPTIONS = (
    "RNNLM_BUILD_CUDA",
    "RNNLM_CUDA_ARCHS",
    "RNNLM_SANITIZE",
    "RNNLM_WERROR",
    "RNNLM_BUILD_EMULATOR",
)
# What CMake reads from the environment once and then remembers.
TOOLCHAIN = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDA_HOME", "CUDAHOSTCXX")


def find_tool(name: str, package: str, folder_attribute: str) -> str:
    """Path of a build tool: the PyPI package's if that is importable, else the one on PATH."""
    try:
        module = importlib.import_module(package)
        found = shutil.which(name, path=getattr(module, folder_attribute))
    except (ImportError, AttributeError):
        found = None
    found = found or shutil.which(name)
    if found is None:
        raise SystemExit(f"rnnlm-kernels: {name} is needed to build. Run: pip install {package}")
    return found


def find_pybind11() -> str:
    try:
        return importlib.import_module("pybind11").get_cmake_dir()
    except ImportError:
        raise SystemExit(
            "rnnlm-kernels: pybind11 is needed to build. Run: pip install pybind11"
        ) from None


def build_folder() -> Path:
    """One per platform, interpreter and sanitizer, kept so that builds are incremental."""
    tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        tag += "t"
    if os.environ.get("RNNLM_SANITIZE"):
        tag += "-sanitize"
    return ROOT / "build" / tag


class CMakeBuild(build_ext):
    """Configures, compiles what changed, and puts `_C` where setuptools expects it.

    `_emulated`, which only tests need, goes straight into the source tree, and only where the
    package is used from there: setuptools knows nothing of it and cannot pack it.
    """

    def run(self) -> None:
        super().run()
        if self.inplace and os.environ.get("RNNLM_BUILD_EMULATOR") == "1":
            self.build_emulator()

    def build_extension(self, ext: Extension) -> None:
        folder = build_folder()
        folder.mkdir(parents=True, exist_ok=True)
        cmake = find_tool("cmake", "cmake", "CMAKE_BIN_DIR")
        arguments = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={find_pybind11()}",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'ninja', 'BIN_DIR')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            *(f"-D{name}={os.environ.get(name, '')}" for name in OPTIONS),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        if self.remembers_other_settings(folder):
            arguments.append("--fresh")
        self.call(cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *arguments)
        self.call(cmake, "--build", str(folder), "--target", "_C")

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / "python" / target.name, target)

    def build_emulator(self) -> None:
        folder = build_folder()
        cmake = find_tool("cmake", "cmake", "CMAKE_BIN_DIR")
        self.call(cmake, "--build", str(folder), "--target", "_emulated")
        target = ROOT / self.get_ext_filename("rnnlm_kernels._emulated")
        shutil.copy2(folder / "python" / target.name, target)

    @staticmethod
    def remembers_other_settings(folder: Path) -> bool:
        """True when CMake's cache was made for another source folder, compiler or environment."""
        settings = {name: os.environ.get(name, "") for name in (*TOOLCHAIN, "CMAKE_ARGS")}
        settings["nvcc"] = shutil.which("nvcc") or ""
        settings["source"] = str(ROOT)
        record = folder / "settings.json"
        text = json.dumps(settings, indent=1)
        same = record.is_file() and record.read_text() == text
        record.write_text(text)
        return not same and (folder / "CMakeCache.txt").exists()

    @staticmethod
    def call(*command: str) -> None:
        sys.stdout.flush()  # keeps our output and CMake's in order when both go to one log
        if subprocess.run(command).returncode != 0:
            raise SystemExit(f"rnnlm-kernels: this step failed, see above: {shlex.join(command)}")


class CleanBuildPy(build_py):
    """Starts from an empty folder: setuptools would pack modules that the source has lost."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "rnnlm_kernels", ignore_errors=True)
        super().run()


setup(
    ext_modules=[Extension("rnnlm_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": CleanBuildPy},
)
