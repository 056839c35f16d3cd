"""Errors as a user wants them: one clear line and exit code 2, no traceback."""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

import typer

log = logging.getLogger("rnnlm_kernels")

R = TypeVar("R")

BAD_USE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

# What wrong input raises here and in torch. Anything else is a bug, and its traceback is wanted.
_EXPECTED = (ValueError, RuntimeError, OSError)
_LONGEST_MESSAGE = 600


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM, which a time limit or a batch system sends, end the block as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # only it may set handlers
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def one_line_errors(command: Callable[..., R]) -> Callable[..., R]:
    """Wrap a command so that expected errors end it with one line on stderr and exit code 2.

    ``--verbose`` shows the traceback as well.
    """

    @functools.wraps(command)
    def wrapped(*args: object, **kwargs: object) -> R:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort):  # these are RuntimeErrors, and how typer ends a command
            raise
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except _EXPECTED as error:
            log.debug("traceback of the error below", exc_info=True)
            text = str(error)
            if isinstance(error, OSError) and error.filename is not None:
                text = f"{error.filename}: {error.strerror}"
            message = " ".join(text.split()) or type(error).__name__
            typer.echo(f"error: {message[:_LONGEST_MESSAGE]}", err=True)
            raise typer.Exit(BAD_USE) from None

    return wrapped
