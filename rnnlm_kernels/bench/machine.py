"""What a result must say about where it was measured. Never a host name, never a path."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy
import torch

from .._version import __version__

# The features that decide which kernel runs or what a core can reach.
_FEATURES = (
    "avx",
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "asimd",
    "bf16",
    "sve",
)


def describe() -> dict[str, Any]:
    """CPU, cores, vector features, memory, system and, when there is one, the GPU."""
    cpu, features = _cpu()
    machine: dict[str, Any] = {
        "cpu": cpu,
        "cores": _cores(),
        "features": features,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": _memory_gib(),
        "system": platform.system(),
        "architecture": platform.machine(),
    }
    if torch.cuda.is_available():
        machine["gpus"] = [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ]
        machine["gpu"] = _gpu()
    return machine


def versions() -> dict[str, str]:
    found = {
        "rnnlm_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
    }
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def commit() -> dict[str, Any] | None:
    """The commit of the repository that this package is run from, None when installed elsewhere.

    A copy of the tree without its repository may be told by ``RNNLM_COMMIT``.
    """
    if told := os.environ.get("RNNLM_COMMIT"):
        return {"commit": told[:12], "modified": None}
    package = Path(__file__).resolve().parents[1]
    top = _git(package, "rev-parse", "--show-toplevel")
    # A virtual environment inside someone's repository is not that repository's code.
    if top is None or Path(top).resolve() != package.parent:
        return None
    revision = _git(package, "rev-parse", "--short=12", "HEAD")
    if revision is None:
        return None
    changes = _git(package, "status", "--porcelain", "--untracked-files=no")
    return {"commit": revision, "modified": bool(changes)}


def load() -> float | None:
    """Runnable processes over the last minute, or None where the system does not say.

    Taken before a run, it tells whether somebody else was using the cores.
    """
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def short_name(machine: dict[str, Any], device: str = "cpu") -> str:
    """A folder name for a machine's results.

    Example:
        >>> short_name({"cpu": "AMD EPYC 9554 64-Core Processor", "cores": 8})
        'cpu-amd-epyc-9554-64-core-8c'
    """
    if torch.device(device).type == "cuda" and machine.get("gpus"):
        return "gpu-" + _slug(machine["gpus"][0])
    return f"cpu-{_slug(machine['cpu'])}-{machine['cores']}c"


def _slug(text: str) -> str:
    text = re.sub(r"\((r|tm|c)\)|\bcpu\b|\bprocessor\b|@.*$", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-") or "unknown"


def _gpu() -> dict[str, Any]:
    """What the current GPU is, and how its driver has set it."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    gpu = {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }
    asked = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return gpu
    return gpu | dict(zip(asked, (word.strip() for word in answer.split(",")), strict=False))


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cores() -> int:
    """Cores this process may use, which a container or taskset may have limited."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu() -> tuple[str, list[str]]:
    """Model name and the vector features that matter."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags.group(1).split()) if flags else set()
    model = name.group(1).strip() if name else platform.processor() or platform.machine()
    return model, [feature for feature in _FEATURES if feature in present]


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None
