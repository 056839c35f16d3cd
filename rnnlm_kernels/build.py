"""The native extension, if it is there, and what was built into it."""

from __future__ import annotations

import importlib
from typing import Any

from ._version import __version__

# Any: the module has no stub, and callers reach it only when available() said yes.
native: Any
import_error: str

try:
    native, import_error = importlib.import_module("rnnlm_kernels._C"), ""
except ImportError as error:
    native, import_error = None, str(error)


def build_info() -> dict[str, Any]:
    """What this installation consists of.

    Returns:
        ``version`` (of the package) and ``native`` (whether ``_C`` could be imported). With it, all
        that ``_C`` says of itself: ``compiler``, ``cxx_flags``, ``isas``, ``cuda``, ``cuda_archs``,
        ..., and ``cpu`` (instruction set in use, where its threads come from). Without it,
        ``import_error``.
    """
    if native is None:
        return {"version": __version__, "native": False, "import_error": import_error}
    info = {**native.build_info(), "version": __version__, "native": True}
    try:
        info["cpu"] = native.cpu_info()
    except ValueError as error:
        info["cpu"] = {"error": str(error)}
    return info
