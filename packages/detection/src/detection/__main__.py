"""``python -m detection`` is the command ``detection``, for ``torchrun -m``."""

from .cli import main

main()
