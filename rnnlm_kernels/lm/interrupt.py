"""Ctrl-C and SIGTERM as a request to stop between two updates, where a model can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest(threading.Event):
    """Set once a stop was asked for; remembers the signal that asked."""

    signal_number: int | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns SIGINT and SIGTERM into an event for :class:`~rnnlm_kernels.lm.Trainer`.

    The first signal sets the event. A second one raises ``KeyboardInterrupt`` at once: the
    checkpoint on disk stays as it was. The former handlers are put back at the end. Outside the
    main thread, where Python allows no handlers, the event is merely given.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if request.is_set():
            raise KeyboardInterrupt
        request.signal_number = number
        request.set()

    former = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            former[number] = signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
