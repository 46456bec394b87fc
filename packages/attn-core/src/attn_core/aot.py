"""``python -m attn_core.aot``: the command of :mod:`attn_core.kernels.aot`."""

import sys

from .kernels.aot import main

if __name__ == "__main__":
    sys.exit(main())
