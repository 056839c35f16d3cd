"""Tuned tables: which way of running a layer was the fastest on a GPU, as files.

A backend that can run a pass in several ways (the tiers of ``cuda``, the tiles of ``triton``) has a
model of their costs. ``rnnlm-kernels tune`` measures instead, and writes what it found to a JSON
file per backend and GPU. Layers that are called later ask :func:`lookup`.

Where the files are: in ``$RNNLM_TUNED_DIR``, by default ``$XDG_CACHE_HOME/rnnlm-kernels/tuned`` or
``~/.cache/rnnlm-kernels/tuned``; then, for what those do not say, in the folder ``tuned`` of this
package. ``RNNLM_TUNED_DIR=off`` leaves all of them alone. A process reads a file once.

What a file is good for: the GPU, driver, versions and kernels that it was measured with, and no
other. A table that differs in any of them, or is damaged, is not used, and a line in the log says
what differs and how to renew it. Nothing here raises when a layer is called.

Which entry answers. An entry was measured for a :class:`Case` with B rows and T steps. It applies
to a case that equals it in all else and has

* from B/2 to 2B rows, and
* at least T/2 steps (what a call costs once matters less and less for longer sequences).

Of several that apply it is the nearest one: the least ``|log2(rows / B)| + |log2(steps / T)|``, and
of equally near ones that with more rows, then that with more steps.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch

from . import environment
from ._version import __version__
from .files import write_atomically
from .options import Problem

log = logging.getLogger("rnnlm_kernels")

ENVIRONMENT = "RNNLM_TUNED_DIR"
OFF = "off"
KIND = "rnnlm-kernels tuned table"
FORMAT = 1

_SHIPPED = Path(__file__).parent / "tuned"
_DRIVER_FILE = Path("/proc/driver/nvidia/version")

_from_environment = environment.reader(ENVIRONMENT)

# What a table must have been measured on to be used on a device, by field: words for people.
Identity = Callable[[int], Mapping[str, str]]


# --- what is asked ------------------------------------------------------------------------------


class Case(NamedTuple):
    """One pass of one layer in one direction: what is measured, and what is looked up.

    ``cell`` is ``"lstm"``, ``"gru"`` or ``"gru-before"``; ``dtype`` is ``"tf32"`` for float32 whose
    recurrent product may be rounded to TF32. ``steps`` and ``batch`` are T and B.
    """

    cell: str
    backward: bool
    dtype: str
    hidden: int
    proj: int
    packed: bool
    steps: int
    batch: int

    @classmethod
    def of(cls, problem: Problem, backward: bool, tf32: bool = False) -> Case:
        """The case of a problem's pass.

        Raises:
            ValueError: the problem does not say how many steps or rows it has.
        """
        if problem.seq_len is None or problem.batch is None:
            raise ValueError(f"a measured choice depends on T and B, which {problem} leaves open")
        return cls(
            cell_name(problem.cell, problem.options.reset),
            backward,
            dtype_name(problem.dtype, tf32),
            problem.hidden_size,
            problem.proj_size,
            problem.options.packed,
            problem.seq_len,
            problem.batch,
        )

    @property
    def label(self) -> str:
        """In a few words, for tables.

        Example:
            >>> Case("lstm", True, "bfloat16", 512, 0, False, 64, 16).label
            'lstm bfloat16 H=512 B=16 T=64 backward'
        """
        proj, packed = f" proj={self.proj}" if self.proj else "", " packed" if self.packed else ""
        return (
            f"{self.cell} {self.dtype} H={self.hidden}{proj} B={self.batch} T={self.steps}{packed} "
            f"{('forward', 'backward')[self.backward]}"
        )


def cell_name(cell: str, reset: str) -> str:
    return "gru-before" if cell == "gru" and reset == "before" else cell


@functools.cache
def dtype_name(dtype: torch.dtype, tf32: bool) -> str:
    return "tf32" if tf32 else str(dtype).removeprefix("torch.")


def distance(measured: Case, asked: Case) -> float | None:
    """How far a measured case is from one that is asked for; None where it does not apply.

    Example:
        >>> case = Case("gru", False, "float16", 256, 0, False, steps=64, batch=16)
        >>> distance(case, case._replace(batch=32, steps=128))
        2.0
        >>> distance(case, case._replace(batch=33)) is None
        True
    """
    if measured[:-2] != asked[:-2] or min(asked[-2:]) < 1:
        return None
    rows, steps = asked.batch / measured.batch, asked.steps / measured.steps
    if not 0.5 <= rows <= 2 or steps < 0.5:
        return None
    return abs(math.log2(rows)) + abs(math.log2(steps))


# --- a table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What was found out about a case.

    Args:
        case: what was measured.
        choice: the way of running it that was chosen, in the backend's words.
        us: microseconds of a call, median, of each way that was measured.
        measured: the date, ``YYYY-MM-DD``.
    """

    case: Case
    choice: str
    us: Mapping[str, float]
    measured: str

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.case._asdict(),
            "choice": self.choice,
            "us": dict(self.us),
            "measured": self.measured,
        }

    @classmethod
    def from_dict(cls, data: Any) -> Entry:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: it is something else; says which field.
        """
        if not isinstance(data, dict):
            raise ValueError("an entry is not an object")
        fields = get_type_hints(Case)
        for name, kind in {**fields, "choice": str, "us": dict, "measured": str}.items():
            if type(data.get(name)) is not kind:
                raise ValueError(f"{name} of an entry is {data.get(name)!r}")
        case = Case(**{name: data[name] for name in fields})
        if min(case.hidden, case.steps, case.batch) < 1 or case.proj < 0:
            raise ValueError(f"an entry has impossible sizes: {case.label}")
        us = {name: _microseconds(value) for name, value in data["us"].items()}
        if data["choice"] not in us:
            raise ValueError(f"the choice {data['choice']!r} of an entry was not measured")
        try:
            datetime.date.fromisoformat(data["measured"])
        except ValueError:
            raise ValueError(f"measured of an entry is {data['measured']!r}") from None
        return cls(case, data["choice"], us, data["measured"])


_LONGEST_US = 1e12


def _microseconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < _LONGEST_US:
        raise ValueError(f"a time of an entry is {value!r}")
    return float(value)


@dataclass(frozen=True)
class Table:
    """The content of a file: entries for one backend, and what they were measured on."""

    backend: str
    measured_on: Mapping[str, str]
    entries: tuple[Entry, ...] = ()

    @property
    def words(self) -> str:
        """How much it holds and from when, for people."""
        dates = sorted(entry.measured for entry in self.entries)
        return f"{len(dates)} entries" + (f", the last of {dates[-1]}" if dates else "")

    def nearest(self, case: Case) -> Entry | None:
        """The entry that answers for a case, by the rule at the top of this module."""
        near = [(d, e) for e in self.entries if (d := distance(e.case, case)) is not None]
        if not near:
            return None
        return min(near, key=lambda pair: (pair[0], -pair[1].case.batch, -pair[1].case.steps))[1]

    def with_entries(self, entries: Iterable[Entry]) -> Table:
        """The same table with more entries; of the same case the new one stays."""
        by_case = {entry.case: entry for entry in (*self.entries, *entries)}
        return Table(self.backend, self.measured_on, tuple(by_case[c] for c in sorted(by_case)))

    def differences(self, backend: str, identity: Mapping[str, str]) -> list[str]:
        """What is not as it was when the table was measured, field by field."""
        found = {"backend": self.backend, **self.measured_on}
        expected = {"backend": backend, **identity}
        return [
            f"{name}: {found.get(name, 'nothing')!r} in the table, "
            f"{expected.get(name, 'nothing')!r} here"
            for name in {**expected, **found}
            if found.get(name) != expected.get(name)
        ]

    def to_json(self) -> str:
        data = {
            "kind": KIND,
            "format": FORMAT,
            "backend": self.backend,
            "measured_on": dict(self.measured_on),
            "entries": [entry.to_dict() for entry in self.entries],
        }
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Table:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: it is something else, or of another format.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON: {error}") from None
        if not isinstance(data, dict) or data.get("kind") != KIND:
            raise ValueError("not a table of `rnnlm-kernels tune`")
        if data.get("format") != FORMAT:
            raise ValueError(f"format: {data.get('format')!r} in the table, {FORMAT} here")
        measured_on = data.get("measured_on")
        if not isinstance(measured_on, dict) or not all(
            isinstance(value, str) for value in measured_on.values()
        ):
            raise ValueError("measured_on does not say on what it was measured")
        if not isinstance(data.get("backend"), str) or not isinstance(data.get("entries"), list):
            raise ValueError("it lacks its backend or its entries")
        entries = tuple(Entry.from_dict(item) for item in data["entries"])
        return cls(data["backend"], measured_on, entries)


# --- where it is and whether it counts ----------------------------------------------------------


def user_folder() -> Path:
    """Where this user's tables are, and `rnnlm-kernels tune` puts them."""
    chosen = _from_environment()
    if chosen is not None and chosen != OFF:
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "rnnlm-kernels" / "tuned"


def switched_off() -> bool:
    """Whether ``RNNLM_TUNED_DIR=off`` leaves all tables alone."""
    return _from_environment() == OFF


def file_name(backend: str, gpu: str) -> str:
    """The name of the file for a backend on a kind of GPU.

    Example:
        >>> file_name("cuda", "NVIDIA H100 80GB HBM3")
        'cuda-nvidia-h100-80gb-hbm3.json'
    """
    return f"{backend}-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


@dataclass(frozen=True)
class Source:
    """A file for a device: its table, or why it is not used."""

    path: Path
    table: Table | None
    refusal: str = ""


def read(path: Path, backend: str, identity: Mapping[str, str]) -> Source:
    """Read a file and see whether it is good for a device of this identity."""
    try:
        table = Table.from_json(path.read_bytes())
    except (OSError, ValueError) as error:
        words = error.strerror if isinstance(error, OSError) else error
        return Source(path, None, f"it is damaged ({words})")
    if differences := table.differences(backend, identity):
        return Source(path, None, f"it is stale ({'; '.join(differences)})")
    return Source(path, table)


def sources(backend: str, device: int, identity: Identity) -> tuple[Source, ...]:
    """The files there are for a device, the user's first; each is read once in a process."""
    return _sources(backend, device, identity, _from_environment())


@functools.cache
def _sources(
    backend: str, device: int, identity: Identity, setting: str | None
) -> tuple[Source, ...]:
    if setting == OFF:
        return ()
    folders = [f for f in (user_folder(), _SHIPPED) if _holds_tables(f, backend)]
    if not folders:
        return ()
    here = identity(device)
    paths = [folder / file_name(backend, here["gpu"]) for folder in folders]
    found = tuple(read(path, backend, here) for path in paths if os.path.exists(path))
    for source in found:
        if source.refusal:
            # Nobody did anything wrong where the driver is newer than a table that was shipped.
            shipped = source.path.parent == _SHIPPED
            _log_once(
                logging.INFO if shipped else logging.WARNING,
                f"the tuned table {source.path} is not used: {source.refusal}; "
                f"`rnnlm-kernels tune --backend {backend}` makes a new one",
            )
    return found


def _holds_tables(folder: Path, backend: str) -> bool:
    try:
        return any(name.startswith(f"{backend}-") for name in os.listdir(folder))
    except OSError:  # there is none, or it is not ours to read
        return False


@functools.cache
def _log_once(level: int, message: str) -> None:
    log.log(level, message)


@dataclass(frozen=True)
class Tuned:
    """What a table says of a case."""

    choice: str
    path: Path
    measured: str

    def __str__(self) -> str:
        return f"the tuned table of {self.path}, measured {self.measured}"


def lookup(backend: str, device: int, case: Case, identity: Identity) -> Tuned | None:
    """The measured choice for a case on a device, None where no table has one.

    Args:
        backend: its name.
        device: index of the GPU.
        case: the pass that is about to run.
        identity: what a table for the device has to match; only called where there are tables.
            Pass the same function each time: answers are remembered by it.
    """
    return _lookup(backend, device, case, identity, _from_environment())


@functools.lru_cache(maxsize=4096)
def _lookup(
    backend: str, device: int, case: Case, identity: Identity, setting: str | None
) -> Tuned | None:
    for source in _sources(backend, device, identity, setting):
        entry = source.table.nearest(case) if source.table is not None else None
        if entry is not None:
            return Tuned(entry.choice, source.path, entry.measured)
    return None


def save(folder: Path, backend: str, identity: Mapping[str, str], entries: Iterable[Entry]) -> Path:
    """Add entries to the file for a device, atomically; returns its path.

    A file there that is damaged, or was measured on something else, is replaced.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / file_name(backend, identity["gpu"])
    before = read(path, backend, identity).table if path.exists() else None
    table = (before or Table(backend, dict(identity))).with_entries(entries)
    write_atomically(path, table.to_json())
    forget()
    return path


def forget() -> None:
    """Read the files again when they are needed next."""
    _sources.cache_clear()
    _lookup.cache_clear()


# --- what identifies a device -------------------------------------------------------------------


def gpu_identity(device: int) -> dict[str, str]:
    """What every backend's tables depend on: the GPU, its driver, and the versions in use."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "sms": str(properties.multi_processor_count),
        "driver": _driver(),
        "runtime": str(torch.version.cuda or torch.version.hip),
        "torch": str(torch.__version__),
        "rnnlm_kernels": __version__,
    }


def _driver() -> str:
    """The driver's version, where the system shows it; else the API that it has."""
    with contextlib.suppress(OSError):
        if found := re.search(r"\b\d+\.\d+(\.\d+)*\b", _DRIVER_FILE.read_text()):
            return found.group()
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return f"API {version()}" if version is not None else "unknown"


def fingerprint(root: Path, files: Iterable[Path]) -> str:
    """The names below ``root`` and the contents of source files, in 16 digits.

    CMakeLists.txt computes the same of the CUDA kernels.
    """
    lines = sorted(
        f"{path.relative_to(root).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n"
        for path in files
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]
