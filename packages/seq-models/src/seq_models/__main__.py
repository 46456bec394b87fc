"""``python -m seq_models`` is the command ``seq-models``, for ``torchrun -m``."""

from seq_models.cli import main

main()
