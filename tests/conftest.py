"""Settings of the whole suite."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

# In CI the same examples every time: a red run must be about the change. Elsewhere new ones.
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# What somebody has measured on this machine must not decide which kernels are tested.
os.environ.setdefault("RNNLM_TUNED_DIR", "off")

# Read when triton is imported: its kernels then run on the CPU, in Python. On a GPU they are to be
# compiled, for its own tests and for torch.compile.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
