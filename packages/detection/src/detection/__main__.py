"""``python -m detection`` is the command ``detection``, for ``torchrun -m``."""

from detection.cli import main

main()
