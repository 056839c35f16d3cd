"""Checkpoint files: written whole or not at all, read without executing anything in them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

CHECKPOINT_NAME = "checkpoint.pt"
FORMAT = "rnnlm_kernels.lm"
VERSION = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, written, or used for what was asked."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint that cannot be written, e.g. because the disk is full."""


def save_checkpoint(payload: dict[str, Any], path: str | Path) -> None:
    """Writes ``payload`` to ``path`` atomically.

    The bytes go to a temporary file in the same folder, reach the disk, and only then take the name
    ``path``. Whatever happens before that, a checkpoint that was there is still there, whole.

    Args:
        payload: tensors and plain Python values (numbers, strings, lists, tuples, dictionaries,
            None).
        path: the file.

    Raises:
        CheckpointWriteError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **payload}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    # torch reports some failed writes as RuntimeError.
    except (OSError, RuntimeError) as error:
        kept = "; the checkpoint before it is untouched" if path.exists() else ""
        cause = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointWriteError(f"cannot write {path}: {cause}{kept}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    # The new name itself must survive a power cut; where a folder cannot be opened (Windows), there
    # is no such call.
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU.

    Only tensors and plain values are accepted; no code in the file is run.

    Args:
        path: the file, or the folder that holds ``checkpoint.pt``.

    Raises:
        CheckpointError: missing, damaged, or not one of this package's.
    """
    path = Path(path)
    if path.is_dir():
        path = path / CHECKPOINT_NAME
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"cannot read {path}, it is damaged or no checkpoint: {first_line}"
        ) from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of rnnlm_kernels.lm")
    if payload.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {payload.get('version')}; this release reads version "
            f"{VERSION}"
        )
    return payload
