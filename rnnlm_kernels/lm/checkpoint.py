"""Checkpoint folders: written whole or not at all, read without executing anything in them.

    DIR/checkpoint.json          which of the folders beside it is the last, and which the best
    DIR/step-00001200/
        config.json              what the model is, how it is trained, how far training has come
        model.safetensors        the weights to use
        tokenizer.json           the tokens
        training.json            what training needs to go on: optimiser, schedule, random state,
        training.safetensors     hidden state, ...; the tensors of it

A folder is complete before ``checkpoint.json`` names it, and ``checkpoint.json`` changes in one
step. At most two folders are kept. All files are safetensors or JSON.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

CHECKPOINT_NAME = "checkpoint.json"
FORMAT = "rnnlm_kernels.lm"
VERSION = 2
Which = Literal["last", "best"]

_ALIASES = "aliases"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, written, or used for what was asked."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint that cannot be written, e.g. because the disk is full."""


def save_checkpoint(payload: Mapping[str, Any], out: str | Path, *, best: bool = False) -> None:
    """Adds a checkpoint to a folder atomically, and drops those no longer needed.

    Whatever happens on the way, the checkpoints that were there are still there, whole.

    Args:
        payload: ``"model"``: a flat dictionary of tensors; ``"tokenizer"``: plain values;
            ``"training"``: nested dictionaries, lists and tuples of tensors and plain values;
            ``"step"``: the number of updates; anything else: plain values.
        out: the folder.
        best: this one is the best so far, and not only the last.

    Raises:
        CheckpointWriteError: it cannot be written.
        CheckpointError: the package safetensors is missing.
    """
    safetensors_torch, safetensors_error = require_safetensors()
    out = Path(out)
    name = _free_name(out, int(payload["step"]))
    temporary = out / f".{name}.{os.getpid()}.tmp"
    index = _read_index(out) or {}
    following = {**index, "format": FORMAT, "version": VERSION, "last": name}
    if best:
        following["best"] = name
    done = False
    try:
        temporary.mkdir()
        for file, write in _writers(payload, safetensors_torch).items():
            write(temporary / file)
            _sync(temporary / file)
        _sync(temporary)
        os.replace(temporary, out / name)
        pointer = temporary.with_suffix(".json")
        try:
            pointer.write_text(json.dumps(following, indent=1), encoding="utf-8")
            _sync(pointer)
            os.replace(pointer, out / CHECKPOINT_NAME)
        finally:
            pointer.unlink(missing_ok=True)
        _sync(out)
        done = True
    except (OSError, safetensors_error) as error:
        kept = "; the checkpoint before it is untouched" if index else ""
        cause = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointWriteError(f"cannot write to {out}: {cause}{kept}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        keep = following if done else index
        for folder in out.glob("step-*"):
            if folder.name not in (keep.get("last"), keep.get("best")):
                shutil.rmtree(folder, ignore_errors=True)


def load_checkpoint(path: str | Path, which: Which | None = None) -> dict[str, Any]:
    """Reads a checkpoint to the CPU. No code in the files is run.

    Args:
        path: the folder that was saved to, or one ``step-...`` folder in it.
        which: ``"last"`` or ``"best"``; None: the last.

    Returns:
        The payload that was saved.

    Raises:
        CheckpointError: missing, damaged, or not one of this package's.
    """
    safetensors_torch, safetensors_error = require_safetensors()
    folder = checkpoint_folder(path, which)
    try:
        payload = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if payload.get("format") != FORMAT:
            raise CheckpointError(f"{folder} is not a checkpoint of rnnlm_kernels.lm")
        if payload.get("version") != VERSION:
            raise CheckpointError(
                f"{folder} has checkpoint version {payload.get('version')}; this release reads "
                f"version {VERSION}"
            )
        payload["tokenizer"] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        model = safetensors_torch.load_file(folder / "model.safetensors")
        for alias, name in payload.pop(_ALIASES).items():
            model[alias] = model[name]
        payload["model"] = model
        tensors = safetensors_torch.load_file(folder / "training.safetensors")
        skeleton = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        payload["training"] = _unpack(skeleton, tensors)
    except CheckpointError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        safetensors_error,
    ) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"cannot read {folder}, it is damaged or no checkpoint: {first_line}"
        ) from error
    return payload


def checkpoint_folder(path: str | Path, which: Which | None = None) -> Path:
    """The ``step-...`` folder that ``path`` stands for.

    Args:
        path: the folder that was saved to, or one ``step-...`` folder in it.
        which: ``"last"`` or ``"best"``; None: the last.

    Raises:
        CheckpointError: none there, or none of that kind.
    """
    path = Path(path)
    if (path / "config.json").exists() and not (path / CHECKPOINT_NAME).exists():
        return path
    index = _read_index(path)
    if index is None:
        raise CheckpointError(f"no checkpoint in {path}")
    name = index.get(which or "last")
    if name is None:
        raise CheckpointError(f"{path} has no {which} checkpoint: training was never evaluated")
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(f"{path / CHECKPOINT_NAME} is damaged: it names {name!r}")
    return path / name


def has_checkpoint(path: str | Path, which: Which = "last") -> bool:
    """Whether there is a checkpoint in a folder."""
    index = _read_index(Path(path))
    return index is not None and which in index


def _read_index(out: Path) -> dict[str, Any] | None:
    path = out / CHECKPOINT_NAME
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path}, it is damaged or no checkpoint: {error}"
        ) from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise CheckpointError(f"{path} is damaged or no checkpoint of rnnlm_kernels.lm")
    if index.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {index.get('version')}; this release reads version "
            f"{VERSION}"
        )
    return index


def _free_name(out: Path, step: int) -> str:
    name = f"step-{step:08d}"
    count = 1
    while (out / name).exists():
        count += 1
        name = f"step-{step:08d}.{count}"
    return name


def _writers(payload: Mapping[str, Any], safetensors_torch: Any) -> dict[str, Callable]:
    """What to call, with a path, for every file of a checkpoint."""
    model, aliases = _without_aliases(payload["model"])
    tensors: dict[str, Tensor] = {}
    skeleton = _pack(payload.get("training", {}), tensors)
    plain = {k: v for k, v in payload.items() if k not in ("model", "tokenizer", "training")}
    config = {"format": FORMAT, "version": VERSION, **plain, _ALIASES: aliases}
    return {
        "config.json": _json_writer(config),
        "tokenizer.json": _json_writer(payload["tokenizer"]),
        "training.json": _json_writer(skeleton),
        "model.safetensors": lambda path: safetensors_torch.save_file(model, path),
        "training.safetensors": lambda path: safetensors_torch.save_file(tensors, path),
    }


def _json_writer(value: Any) -> Callable[[Path], object]:
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    return lambda path: path.write_text(text, encoding="utf-8")


def _without_aliases(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and which further names it has (the tied head is the embedding)."""
    first: dict[tuple[int, torch.Size], str] = {}
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            unique[name] = tensor.detach().contiguous()
    return unique, aliases


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON of nested values; tensors go to ``tensors`` and leave their name."""
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        # A copy, since safetensors refuses tensors that share memory.
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        items = [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]
        return {"dict": items}
    if isinstance(value, tuple):
        return {"tuple": [_pack(each, tensors) for each in value]}
    if isinstance(value, list):
        return [_pack(each, tensors) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(each, tensors) for each in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "dict":
            return {_unpack(k, tensors): _unpack(v, tensors) for k, v in content}
        if kind == "tuple":
            return tuple(_unpack(each, tensors) for each in content)
        if kind == "float":
            return float(content)
        raise ValueError(f"unknown kind of value {kind!r}")
    return value


def _sync(path: Path) -> None:
    """Makes a file, or the names in a folder, survive a power cut."""
    # Where a folder cannot be opened (Windows) there is no such call.
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_safetensors() -> tuple[Any, type[Exception]]:
    """The module ``safetensors.torch`` and the error it raises.

    Raises:
        CheckpointError: it is not installed; says what to install.
    """
    with contextlib.suppress(ModuleNotFoundError):
        import safetensors.torch

        return safetensors.torch, safetensors.SafetensorError
    raise CheckpointError("checkpoints need safetensors: pip install 'rnnlm-kernels[lm]'")
