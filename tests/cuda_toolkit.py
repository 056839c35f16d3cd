"""The CUDA toolkit for tests that compile, wherever the machine has it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _script() -> ModuleType:
    path = ROOT / "scripts" / "cuda_resources.py"
    spec = importlib.util.spec_from_file_location("cuda_resources", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


cuda_resources = _script()


def _needs(*tools: str) -> pytest.MarkDecorator:
    missing = [tool for tool in tools if cuda_resources.find_tool(tool) is None]
    reason = f"{' and '.join(missing)} not found; see `make cuda-toolkit`"
    return pytest.mark.skipif(bool(missing), reason=reason)


needs_nvcc = _needs("nvcc")
needs_toolkit = _needs("nvcc", "nvdisasm")
