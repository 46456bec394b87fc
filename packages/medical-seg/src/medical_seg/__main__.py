"""``python -m medical_seg`` is the command ``medical-seg``, for ``torchrun -m``."""

from .cli import main

main()
