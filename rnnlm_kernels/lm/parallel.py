"""Several processes that train one model: who this one is, and sums over all.

``torchrun`` starts the processes and tells each its rank. Everything here is also right,
and does nothing, in a single process.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Process:
    """One of ``world`` processes.

    Attributes:
        rank: its number, from 0; process 0 writes the files and speaks.
        world: how many there are.
    """

    rank: int
    world: int


def this_process() -> Process:
    """Rank and number of processes of the default group; 0 of 1 without one."""
    if dist.is_available() and dist.is_initialized():
        return Process(dist.get_rank(), dist.get_world_size())
    return Process(0, 1)


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Joins the processes that ``torchrun`` started; in a single process does nothing.

    Yields:
        The device of this process: its GPU (NCCL), or the CPU (gloo).
    """
    device = torch.device("cpu")
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        yield device
        return
    cuda = torch.cuda.is_available()
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
    finally:
        # Wrapped and sharded modules are reference cycles that hold the group. Left to the end of
        # the interpreter, its threads now and then aborted a process that had done all its work.
        gc.collect()
        dist.destroy_process_group()


def sum_over_processes(value: float) -> float:
    """The sum of a number over all processes."""
    if this_process().world == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=_collective_device())
    dist.all_reduce(total)
    return float(total)


def any_over_processes(value: bool) -> bool:
    """Whether it holds in any process."""
    return sum_over_processes(float(value)) > 0.0


def gather_rows(tensor: Tensor) -> Tensor:
    """Joins the shares of all processes along dimension 1, the batch; all must be of one shape."""
    world = this_process().world
    if world == 1:
        return tensor
    if tensor.dtype == torch.bool:  # which not every library of collectives knows
        return gather_rows(tensor.byte()).bool()
    parts = [torch.empty_like(tensor) for _ in range(world)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim=1)


def wait_for_all() -> None:
    """Returns once every process has come here."""
    if this_process().world > 1:
        dist.barrier()


def _collective_device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
