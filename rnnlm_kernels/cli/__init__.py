"""The command line, ``rnnlm-kernels``: ``info``, ``check``, ``bench`` and ``train``."""

from .app import app, main

__all__ = ["app", "main"]
