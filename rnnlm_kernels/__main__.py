"""``python -m rnnlm_kernels`` is ``rnnlm-kernels``."""

from .cli import main

if __name__ == "__main__":
    main()
