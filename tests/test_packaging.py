"""What is shipped works where it was not built: sdist, wheel, native module, build switches.

Everything is built from a copy of the source tree with the tools of the running environment, so
nothing is fetched, and for the CPU only, so that it does not take long.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pybind11
import pytest
from cuda_toolkit import cuda_resources, needs_nvcc

import rnnlm_kernels
from rnnlm_kernels import _C, tuning

ROOT = Path(__file__).resolve().parent.parent
LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
IS_X86_64 = sysconfig.get_platform().endswith(("x86_64", "amd64"))
# Shared objects that would tie the module to one torch, one CUDA or a second OpenMP.
FORBIDDEN = re.compile(r"torch|c10|cudart|gomp|omp|libpython", re.IGNORECASE)


def environment(**changes: str) -> dict[str, str]:
    """The environment without what would let a child see the source tree or another build."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "RNNLM_", "CMAKE_", "CUDA"))
    }
    return kept | {"RNNLM_BUILD_CUDA": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | changes


def run(
    *command: str | Path, cwd: Path, env: Mapping[str, str] | None = None, fails: bool = False
) -> str:
    """Runs a command and returns its whole output; asserts that it succeeds, or that it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment() if env is None else env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert (done.returncode != 0) == fails, f"{command}\n{done.stdout[-8000:]}"
    return done.stdout


def one(paths: list[Path]) -> Path:
    assert len(paths) == 1, paths
    return paths[0]


# --- Built once per run -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source tree as a clone would have it."""

    def left_out(folder: str, names: list[str]) -> list[str]:
        patterns = r"build|dist|__pycache__|\.git|\..*_cache|\.hypothesis|.*\.(so|egg-info|pyc)"
        # rnnlm_kernels/build.py is a source, build/ at the top is not.
        return [
            name
            for name in names
            if re.fullmatch(patterns, name) or (Path(folder) / name / "pyvenv.cfg").exists()
        ]

    target = tmp_path_factory.mktemp("source") / "tree"
    shutil.copytree(ROOT, target, ignore=left_out, symlinks=True)
    return target


@pytest.fixture(scope="session")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, cwd=source)
    return one(list(out.glob("*.tar.gz")))


@pytest.fixture(scope="session")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(
            folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
        )
    return one(list(folder.iterdir()))


@pytest.fixture(scope="session")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the sdist builds, where somebody also builds the emulator for tests."""
    out = tmp_path_factory.mktemp("wheel")
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", out, unpacked),
        cwd=out,
        env=environment(RNNLM_BUILD_EMULATOR="1"),
    )
    return one(list(out.glob("*.whl")))


def module_of(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if "/_C." in name)
        return Path(archive.extract(name, folder))


@pytest.fixture(scope="session")
def wheel_module(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return module_of(wheel, tmp_path_factory.mktemp("module"))


def with_nvcc(**changes: str) -> dict[str, str]:
    """An environment in which a build finds nvcc, be it on PATH or not."""
    nvcc = cuda_resources.find_tool("nvcc")
    found = {} if shutil.which("nvcc") else {"CUDACXX": str(nvcc)}
    return environment(RNNLM_BUILD_CUDA="1", **found, **changes)


@pytest.fixture(scope="session")
def cuda_module(wheel: Path, unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The native module of a wheel with CUDA kernels, for one architecture: all take minutes."""
    del wheel  # left its objects in the unpacked tree
    out = tmp_path_factory.mktemp("cuda-wheel")
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", out, unpacked),
        cwd=out,
        env=with_nvcc(RNNLM_CUDA_ARCHS="80-real"),
    )
    return module_of(one(list(out.glob("*.whl"))), out)


@pytest.fixture(scope="session")
def fresh_venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel in it and, by a .pth, torch from the outer one.

    A .pth adds the outer folder after the environment's own and runs none of its .pth files, so
    an editable install out there stays out of sight.
    """
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel),
        cwd=folder,
    )
    purelib = one(list(folder.glob("lib/python3*/site-packages")))
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (purelib / "outer.pth").write_text("\n".join(sorted(outer)) + "\n")
    return folder


# --- sdist and wheel ----------------------------------------------------------------------------


@pytest.mark.slow
def test_sdist_holds_every_source_and_nothing_built(source: Path, unpacked: Path) -> None:
    def files(root: Path) -> set[str]:
        return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}

    shipped = files(unpacked)
    needed = {
        name
        for name in files(source)
        if name.startswith(("csrc/", "rnnlm_kernels/", "tests/", "requirements/"))
    } | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile"}
    needed = {name for name in needed if "__pycache__" not in name}
    assert needed <= shipped
    assert not [name for name in shipped if name.endswith((".so", ".pyc", ".o"))]
    assert not [name for name in shipped if name.startswith(("build/", "dist/", ".venv"))]


@pytest.mark.slow
def test_wheel_holds_the_package_the_module_and_the_licence_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"rnnlm_kernels-{rnnlm_kernels.__version__}.dist-info"
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    package = {str(p.relative_to(ROOT)) for p in (ROOT / "rnnlm_kernels").rglob("*.py")}
    module = f"rnnlm_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    in_package = {name for name in names if not name.startswith(info)}
    assert in_package == package | {module, "rnnlm_kernels/py.typed"}
    assert f"{info}/licenses/LICENSE" in names
    assert "rnnlm-kernels = rnnlm_kernels.cli:main" in entry_points
    assert re.search(r"^License-Expression: Apache-2\.0$", metadata, re.MULTILINE)
    assert re.search(r"^Requires-Dist: torch>=2\.6$", metadata, re.MULTILINE)
    assert not wheel.name.endswith("none-any.whl")


@pytest.mark.slow
def test_installed_wheel_computes_what_torch_computes(
    fresh_venv: Path, unpacked: Path, tmp_path: Path
) -> None:
    program = """
import json, torch, rnnlm_kernels
from rnnlm_kernels import _C
ours, theirs = rnnlm_kernels.LSTM(5, 7), torch.nn.LSTM(5, 7)
theirs.load_state_dict(ours.state_dict())
x = torch.randn(4, 3, 5)
error = (ours(x)[0] - theirs(x)[0]).abs().max().item()
print(json.dumps([rnnlm_kernels.__file__, rnnlm_kernels.__version__, _C.build_info(), error]))
"""
    out = run(fresh_venv / "bin" / "python", "-c", program, cwd=tmp_path)
    file, version, info, error = json.loads(out.splitlines()[-1])
    assert Path(file).is_relative_to(fresh_venv)
    assert version == info["version"] == rnnlm_kernels.__version__
    assert info["cuda"] is False
    folders = ("core", "device", "kernels", "launch")
    kernels = [path for name in folders for path in (unpacked / "csrc" / name).iterdir()]
    assert info["kernels"] == tuning.fingerprint(unpacked / "csrc", kernels)
    assert error < 1e-5


@pytest.mark.slow
def test_installed_wheel_brings_its_command(fresh_venv: Path, tmp_path: Path) -> None:
    out = run(fresh_venv / "bin" / "rnnlm-kernels", "info", cwd=tmp_path)
    assert rnnlm_kernels.__version__ in out


@pytest.mark.slow
def test_a_module_that_was_removed_does_not_stay_in_the_build(source: Path, tmp_path: Path) -> None:
    # setuptools copies into build/lib and never deletes there.
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path]
    extra = source / "rnnlm_kernels" / "gone_tomorrow.py"
    extra.write_text("")
    try:
        run(*build, cwd=source)
        assert (tmp_path / "rnnlm_kernels" / extra.name).exists()
    finally:
        extra.unlink()
    run(*build, cwd=source)
    assert not (tmp_path / "rnnlm_kernels" / extra.name).exists()
    assert (tmp_path / "rnnlm_kernels" / "_version.py").exists()


# --- The native module --------------------------------------------------------------------------


@pytest.fixture(params=["running", "wheel", pytest.param("cuda", marks=needs_nvcc)])
def module_file(request: pytest.FixtureRequest) -> Path:
    if request.param == "running":
        assert _C.__file__ is not None
        return Path(_C.__file__)
    path = request.getfixturevalue(f"{request.param}_module")
    assert isinstance(path, Path)
    return path


@LINUX_ONLY
@pytest.mark.slow
def test_module_needs_no_torch_cudart_or_openmp(module_file: Path) -> None:
    dynamic = run("readelf", "-d", "-W", module_file, cwd=module_file.parent)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert any(name.startswith("libc.") for name in needed), dynamic
    assert not [name for name in needed if FORBIDDEN.search(name)]
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


@LINUX_ONLY
@pytest.mark.slow
def test_module_asks_torch_for_no_symbol_and_exports_only_its_init(module_file: Path) -> None:
    def symbols(kind: str) -> set[str]:
        table = run("nm", "-D", kind, module_file, cwd=module_file.parent)
        return {line.split()[-1].partition("@")[0] for line in table.splitlines()}

    undefined = symbols("--undefined-only")
    assert any(name.startswith("Py") for name in undefined)
    assert not [name for name in undefined if re.search(r"torch|c10|N2at|cuda|GOMP|omp_", name)]
    assert symbols("--defined-only") == {"PyInit__C"}


@LINUX_ONLY
@pytest.mark.slow
def test_module_does_not_say_where_it_was_built(wheel_module: Path, unpacked: Path) -> None:
    assert str(unpacked).encode() not in wheel_module.read_bytes()


@LINUX_ONLY
def test_module_loads_without_torch_in_the_process() -> None:
    program = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", {_C.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.build_info()["version"] == {rnnlm_kernels.__version__!r}
assert "torch" not in sys.modules and "numpy" not in sys.modules
print(*{{line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}}, sep="\\n")
"""
    maps = run(sys.executable, "-c", program, cwd=ROOT)
    loaded = [Path(line).name for line in maps.splitlines()]
    assert Path(str(_C.__file__)).name in loaded
    assert not [name for name in loaded if re.match(r"lib(torch|c10|cudart|gomp|omp)", name)]


@LINUX_ONLY
@pytest.mark.slow
@pytest.mark.skipif(not IS_X86_64, reason="only x86-64 has kernels for several instruction sets")
@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512bf16", "amx"])
def test_code_for_a_wider_instruction_set_is_not_shared(
    wheel: Path, unpacked: Path, isa: str
) -> None:
    # Of an inline function that several objects define, the linker keeps one for all. Were it the
    # AVX-512 one, older processors would stop at an illegal instruction.
    del wheel  # building it left the objects in the unpacked tree
    objects = list(unpacked.glob(f"build/*/CMakeFiles/rnnlm_cpu_{isa}.dir/**/*.o"))
    assert objects
    table = run("nm", "-C", "--defined-only", *objects, cwd=unpacked)
    symbols = re.findall(r"^[0-9a-f]+ ([A-Zuv]) (.+)$", table, re.MULTILINE)
    shared = [name for kind, name in symbols if kind in "TDBRWVuv" and f"::{isa}::" not in name]
    # A reference to the personality routine, one pointer without code.
    assert [name for name in shared if not name.startswith("DW.ref.")] == []


@pytest.mark.sanitize
def test_a_sanitizer_run_tests_the_sanitized_module() -> None:
    built_with = _C.build_info()["sanitizers"]
    preloaded = "libasan" in os.environ.get("LD_PRELOAD", "")
    assert built_with == (("address", "undefined") if preloaded else ())


# --- Build switches -----------------------------------------------------------------------------


def configure(
    tmp_path: Path, env: Mapping[str, str], *definitions: str, fails: bool = False
) -> str:
    """Runs only CMake's configure step on the source tree, in a folder of its own."""
    return run(
        *("cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", "-Wno-dev"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
        *(f"-D{definition}" for definition in definitions),
        cwd=tmp_path,
        env=env,
        fails=fails,
    )


def one_line(text: str) -> str:
    """CMake wraps its messages; sentences are compared without that."""
    return " ".join(text.split())


def tools_first(path: str) -> str:
    """PATH with the environment's scripts in front, where cmake and ninja are."""
    return os.pathsep.join([sysconfig.get_path("scripts"), path])


@pytest.fixture
def path_without_nvcc(tmp_path: Path) -> str:
    """PATH in which a folder that holds nvcc is replaced by links to all else in it."""
    folders = []
    for number, folder in enumerate(tools_first(os.environ["PATH"]).split(os.pathsep)):
        if not (Path(folder) / "nvcc").exists():
            folders.append(folder)
            continue
        links = tmp_path / f"bin{number}"
        links.mkdir()
        for entry in Path(folder).iterdir():
            if entry.name != "nvcc":
                (links / entry.name).symlink_to(entry)
        folders.append(str(links))
    return os.pathsep.join(folders)


def test_a_wrong_cuda_switch_stops_the_build_and_names_the_choices(
    source: Path, tmp_path: Path
) -> None:
    out = run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", tmp_path, source),
        cwd=tmp_path,
        env=environment(RNNLM_BUILD_CUDA="bogus"),
        fails=True,
    )
    assert 'RNNLM_BUILD_CUDA is "bogus": it must be auto (CUDA when nvcc is found), 0' in out
    assert not list(tmp_path.glob("*.whl"))


def test_no_cuda_when_switched_off(tmp_path: Path) -> None:
    env = environment(PATH=tools_first(os.environ["PATH"]))
    out = configure(tmp_path, env, "RNNLM_BUILD_CUDA=0")
    assert "CUDA" not in out
    config = (tmp_path / "build" / "generated" / "build_config.h").read_text()
    assert "#define RNNLM_WITH_CUDA 0" in config


def test_automatic_without_nvcc_builds_for_the_cpu_and_says_so(
    tmp_path: Path, path_without_nvcc: str
) -> None:
    out = configure(tmp_path, environment(PATH=path_without_nvcc), "RNNLM_BUILD_CUDA=")
    lines = [line for line in out.splitlines() if "CPU only" in line]
    assert lines == [
        "-- rnnlm-kernels: CPU only: nvcc was not found in $CUDACXX, $CUDA_HOME/bin or PATH"
    ]


def test_demanded_cuda_without_nvcc_stops_and_says_what_to_do(
    tmp_path: Path, path_without_nvcc: str
) -> None:
    env = environment(PATH=path_without_nvcc)
    out = one_line(configure(tmp_path, env, "RNNLM_BUILD_CUDA=1", fails=True))
    assert "RNNLM_BUILD_CUDA=1 asks for the CUDA kernels, but nvcc was not found" in out
    assert "Install the CUDA toolkit or set CUDA_HOME" in out


def test_an_nvcc_that_does_not_work_cannot_stop_an_automatic_build(tmp_path: Path) -> None:
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    env = environment(PATH=tools_first(os.environ["PATH"]), CUDACXX=str(broken))
    out = one_line(configure(tmp_path, env, "RNNLM_BUILD_CUDA=auto"))
    assert f"rnnlm-kernels: CPU only: {broken} cannot compile a program" in out
    out = one_line(configure(tmp_path, env, "RNNLM_BUILD_CUDA=1", fails=True))
    assert "RNNLM_BUILD_CUDA=1 asks for the CUDA kernels, but" in out


@pytest.mark.parametrize("archs", ["sm_90", "80;ninety"])
def test_a_wrong_architecture_is_named(tmp_path: Path, archs: str) -> None:
    env = environment(PATH=tools_first(os.environ["PATH"]))
    out = one_line(configure(tmp_path, env, f"RNNLM_CUDA_ARCHS={archs}", fails=True))
    assert f'RNNLM_CUDA_ARCHS holds "{archs.split(";")[-1]}"' in out


@needs_nvcc
def test_an_architecture_that_nvcc_does_not_know_is_named(tmp_path: Path) -> None:
    env = with_nvcc(PATH=tools_first(os.environ["PATH"]))
    out = configure(tmp_path, env, "RNNLM_BUILD_CUDA=1", "RNNLM_CUDA_ARCHS=20", fails=True)
    assert 'RNNLM_CUDA_ARCHS holds "20", which nvcc' in one_line(out)


@needs_nvcc
@pytest.mark.slow
def test_chosen_architectures_are_the_ones_compiled_for(tmp_path: Path) -> None:
    env = with_nvcc(PATH=tools_first(os.environ["PATH"]))
    configure(tmp_path, env, "RNNLM_BUILD_CUDA=1", "RNNLM_CUDA_ARCHS=80-real, 90a-real")
    commands = json.loads((tmp_path / "build" / "compile_commands.json").read_text())
    command = one([Path(c["command"]) for c in commands if c["file"].endswith("probe.cu")])
    assert set(re.findall(r"\bsm_\w+", str(command))) == {"sm_80", "sm_90a"}

    target = "CMakeFiles/rnnlm_cuda.dir/csrc/launch/probe.cu.o"
    run("cmake", "--build", tmp_path / "build", "--target", target, cwd=tmp_path, env=env)
    assert (tmp_path / "build" / target).stat().st_size > 0


@needs_nvcc
@pytest.mark.slow
def test_by_default_every_generation_gets_machine_code_and_the_future_ptx(tmp_path: Path) -> None:
    env = with_nvcc(PATH=tools_first(os.environ["PATH"]))
    out = configure(tmp_path, env, "RNNLM_BUILD_CUDA=1")
    (archs,) = re.findall(r"rnnlm-kernels: with CUDA \S+ for (\S+)", out)
    chosen = archs.split(";")
    assert {"80-real", "90a-real"} <= set(chosen)
    assert any(not arch.endswith("-real") for arch in chosen)


@needs_nvcc
@LINUX_ONLY
@pytest.mark.slow
def test_a_cuda_module_built_without_a_gpu_loads_without_one(cuda_module: Path) -> None:
    program = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_C", {str(cuda_module)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.build_info()["cuda_archs"])
try:
    module.cuda_probe(16, 16, 4, 1.0, device=1 << 20)
except RuntimeError as error:
    print(error)
"""
    archs, error = run(sys.executable, "-c", program, cwd=ROOT).splitlines()
    assert archs == "('80-real',)"
    assert error.startswith("CUDA error while")
    assert "nvidia-smi" in error or "CUDA_VISIBLE_DEVICES" in error


@pytest.mark.parametrize(
    ("gpus", "wishes", "expected"),
    [
        pytest.param("", {}, ["0", ""], id="no-gpu-no-cuda"),
        pytest.param("9.0\n9.0\n8.6\n", {}, ["auto", "86-real 90a-real"], id="for-these-gpus"),
        pytest.param("[N/A]\n", {}, ["0", ""], id="a-gpu-that-does-not-say"),
        pytest.param("9.0\n", {"RNNLM_BUILD_CUDA": "0"}, ["0", ""], id="told-not-to"),
        pytest.param("", {"RNNLM_BUILD_CUDA": "1"}, ["1", ""], id="told-to"),
        pytest.param("", {"RNNLM_CUDA_ARCHS": "120"}, ["", "120"], id="told-for-which"),
    ],
)
def test_make_builds_cuda_kernels_for_the_gpus_of_the_machine(
    tmp_path: Path, gpus: str, wishes: dict[str, str], expected: list[str]
) -> None:
    venv_folder = tmp_path / "venv"
    venv_folder.mkdir()
    (venv_folder / ".created").touch()
    smi = tmp_path / "nvidia-smi"
    (tmp_path / "gpus").write_text(gpus)
    smi.write_text(f"#!/bin/sh\ncat '{tmp_path}/gpus'\n")
    smi.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    env = environment(PATH=path, RNNLM_BUILD_CUDA="") | wishes
    settings = venv_folder / ".settings"
    run("make", f"VENV={venv_folder}", settings, cwd=ROOT, env=env)
    assert settings.read_text().splitlines()[1:3] == expected


# --- What is written in two places --------------------------------------------------------------


def test_version_is_the_same_everywhere() -> None:
    assert rnnlm_kernels.__version__ == _C.build_info()["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {rnnlm_kernels.__version__}" in changelog
    try:
        installed = importlib.metadata.version("rnnlm-kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from the source tree without an install")
    assert installed == rnnlm_kernels.__version__


def test_pre_commit_runs_the_pinned_tools() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    pins = (ROOT / "requirements" / "dev.txt").read_text().splitlines()
    used = set(re.findall(r'"([a-z-]+==[^"]+)"', hooks))
    assert used == {pin for pin in pins if pin.startswith(("ruff==", "clang-format=="))}


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert {"test", "bench", "lint", "format", "sanitize", "wheel", "clean"} <= targets
    out = run("make", "--no-print-directory", "help", cwd=ROOT)
    assert set(re.findall(r"^  make ([a-z-]+)", out, re.MULTILINE)) == targets
