"""``python -m medical_seg`` is the command ``medical-seg``, for ``torchrun -m``."""

from medical_seg.cli import main

main()
