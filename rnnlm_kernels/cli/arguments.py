"""Reading what several commands take: devices, thread counts, backends."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..dispatch import BackendError, backends


def parse_threads(text: str) -> list[int]:
    """Read ``"1,2"``; empty text gives an empty list.

    Raises:
        ValueError: something in it is not a positive integer.
    """
    try:
        counts = [int(part) for part in text.split(",") if part]
    except ValueError:
        counts = [0]
    if any(count < 1 for count in counts):
        raise ValueError(f"--threads should be positive integers such as 1,2; got {text!r}")
    return counts


def check_device(device: str) -> None:
    """Make sure that tensors can be put on a device.

    Raises:
        ValueError: torch does not know it, was not built for it, or finds none.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts when it was built without CUDA
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"--device {device!r} cannot be used: {reason}") from None


def check_backends(names: Sequence[str]) -> None:
    """Make sure that every backend asked for exists and is available in this process.

    Raises:
        BackendError: one is unknown or not available; the message says why.
    """
    known = backends()
    for name in names:
        if name not in known:
            raise BackendError(f"unknown backend {name!r}; expected one of {', '.join(known)}")
        available, reason = known[name].available()
        if not available:
            raise BackendError(f"backend {name!r} is not available here: {reason}")
