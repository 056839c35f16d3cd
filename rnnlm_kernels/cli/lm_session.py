"""What the language model's commands share: errors in one line, threads, devices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
import typer

from rnnlm_kernels import BackendError, lm
from rnnlm_kernels.lm.checkpoint import Which

from .arguments import check_device


def fail(message: str, code: int = 2) -> NoReturn:
    """Ends the command with one line on stderr."""
    typer.echo("error: " + " ".join(message.split()), err=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What the user can mend is said in one line: exit code 2 for what was asked, 1 for what
    happened on the way."""
    try:
        yield
    except (lm.CheckpointWriteError, lm.DivergenceError) as error:
        fail(str(error), 1)
    except (lm.CorpusError, lm.CheckpointError, BackendError, ModuleNotFoundError) as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:
        # torch has no exception of its own for a CPU allocation that fails.
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(
            error
        ):
            fail("not enough memory: try a smaller --hidden, --batch, --bptt or --max-vocab", 1)
        raise


@contextlib.contextmanager
def thread_count(threads: int | None) -> Iterator[None]:
    """Sets torch's number of CPU threads for a while; None leaves it."""
    former = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def chosen_device(name: str | None) -> torch.device:
    """The device asked for; without a wish a GPU where torch sees one, else the CPU.

    Raises:
        ValueError: torch cannot use it.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device(name)
    return torch.device(name)


def load_model(
    folder: Path, which: Which | None, device: torch.device
) -> tuple[lm.RNNLanguageModel, lm.Tokenizer]:
    """The model of a checkpoint folder on a device, and its tokenizer."""
    model, tokenizer = lm.load_model(folder, which)
    return model.to(device), tokenizer
