"""``python -m vlm_tools`` is the command ``vlm-tools``, for ``torchrun -m``."""

from .cli import main

main()
