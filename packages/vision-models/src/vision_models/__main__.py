"""``python -m vision_models`` is the command ``vision-models``, for ``torchrun -m``."""

from .cli import main

main()
