"""Penalties that are added to the loss: on activations, on their change in time, on weights."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn


def activation_penalty(dropped: Tensor) -> Tensor:
    """Mean square of the last outputs after dropout (AR, Merity et al. 2017)."""
    return dropped.square().mean()


def temporal_penalty(raw: Tensor, batch_sizes: Tensor | None = None) -> Tensor:
    """Mean square of the change of the last outputs from one step to the next (TAR).

    Args:
        raw: [T, B, H] before dropout; or [N, H] of packed sequences.
        batch_sizes: of packed sequences.

    Returns:
        A scalar; 0 where there is only one step.

    Source: Merity et al. 2017, https://arxiv.org/abs/1708.01009.
    """
    if batch_sizes is None:
        change = raw[1:] - raw[:-1]
    else:
        sizes = batch_sizes.tolist()
        steps = raw.split(sizes)
        pairs = zip(steps[1:], steps[:-1], sizes[1:], strict=True)
        changes = [later - earlier[:size] for later, earlier, size in pairs]
        change = torch.cat(changes) if changes else raw[:0]
    return change.square().mean() if change.numel() else raw.sum() * 0.0


def weight_penalty(
    model: nn.Module, l1: Mapping[str, float], l2: Mapping[str, float]
) -> Tensor | None:
    """``l1`` times the sum of absolute values plus ``l2`` times the sum of squares of parameters.

    Args:
        model: its parameters are chosen by name.
        l1, l2: coefficients by pattern, e.g. ``{"layers.*.weight_hh*": 1e-5}``. ``*`` stands for
            anything; a parameter that fits several patterns is penalised by each.

    Returns:
        A scalar, None when there is no pattern.
    """
    total: Tensor | None = None
    named = dict(model.named_parameters())
    for patterns, measure in ((l1, torch.abs), (l2, torch.square)):
        for pattern, coefficient in patterns.items():
            for name in matching(named, pattern):
                penalty = coefficient * measure(named[name]).sum()
                total = penalty if total is None else total + penalty
    return total


def matching(names: Mapping[str, object], pattern: str) -> list[str]:
    """The names that fit a pattern.

    Raises:
        ValueError: none does; a typing error should not switch a penalty off.
    """
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise ValueError(f"no parameter fits {pattern!r}; there are {', '.join(names)}")
    return found
