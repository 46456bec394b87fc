"""``python -m seq_models`` is the command ``seq-models``, for ``torchrun -m``."""

from .cli import main

main()
