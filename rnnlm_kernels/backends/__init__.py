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
"""

from __future__ import annotations

from types import ModuleType

from . import cpu, cuda, reference

# In the order of preference of automatic choice.
BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "cpu": cpu, "reference": reference}
