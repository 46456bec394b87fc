"""``python -m vision_models`` is the command ``vision-models``, for ``torchrun -m``."""

from vision_models.cli import main

main()
