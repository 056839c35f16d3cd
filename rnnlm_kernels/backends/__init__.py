"""One module per backend, all with the same functions.

``available() -> (bool, reason)``
    whether this backend can run at all in this process.
``supports(problem) -> (bool, reason)``
    whether it can run this problem; the reason says what is in the way.
``plan(problem) -> Plan``
    which kernel it would run.
``lstm_forward, lstm_backward, gru_forward, gru_backward``
    the sequential part of a layer (:mod:`rnnlm_kernels.ops` does the rest): raw contiguous tensors
    in, results written into tensors that the operator allocated. The reference backend has no
    kernels: the operator differentiates :mod:`rnnlm_kernels.reference` instead.

A backend may do more of a layer than that, and then has some of these (the CPU's has all four):

``together(name, first, second)``, ``stacked(name, layers)``
    two calls of one of these functions for layers that do not need each other, calls for layers
    each of which reads the output of the one before (:mod:`rnnlm_kernels.ops.pairs`).
``multiplies(dtype, work) -> bool``, ``layer_gradients``
    whether it computes the gradients of weights, biases and input faster than PyTorch's products
    do, and that (:func:`rnnlm_kernels.ops.products.layer_gradients`).

A backend that can run a pass in several ways has these as well. ``rnnlm-kernels tune`` measures the
ways against each other, and the backend asks :func:`rnnlm_kernels.tuning.lookup` before it chooses.

``DEVICE_TYPE, devices() -> range, current_device() -> int``
    what torch calls the devices that it runs on, the indices of those there are, and of the one
    that tensors are put on when nobody says on which.
``identity(device) -> {field: words}``
    what a measurement on a device depends on and a table of them has to match:
    :func:`rnnlm_kernels.tuning.gpu_identity`, the version of what compiles the kernels, and a
    fingerprint of their sources.
``candidates(problem, backward) -> {name: words}``
    the ways in which it could run one pass of a problem with T and B, the one that it would take
    without any table first. Names are what tables hold, words are for people.
``forced(backward, name) -> context manager``
    inside the block that pass of every layer of the process runs in this way; where it cannot, a
    call raises.
"""

from __future__ import annotations

from types import ModuleType

from . import cpu, cuda, reference, triton

# In the order of preference of automatic choice.
BACKENDS: dict[str, ModuleType] = {
    "cuda": cuda,
    "triton": triton,
    "cpu": cpu,
    "reference": reference,
}


def tunable() -> dict[str, ModuleType]:
    """The backends that can run a pass in several ways."""
    return {name: module for name, module in BACKENDS.items() if hasattr(module, "candidates")}
