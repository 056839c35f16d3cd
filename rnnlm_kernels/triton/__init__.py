"""Kernels in Triton: for GPUs that the CUDA build does not reach, and for people to change.

``cells`` is the gate math. ``stepwise`` (with its kernels in ``steps``) is one launch a step,
``sequence`` one a layer, ``persistent`` one of programs that wait for each other. ``launch`` and
``tiles`` say what a call hands them and which tile they run in. All but these two import triton, so
:mod:`rnnlm_kernels.backends.triton` imports them only when it has a tensor on a GPU.
docs/triton.md explains it all.
"""
