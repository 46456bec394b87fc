"""``python -m vlm_tools`` is the command ``vlm-tools``, for ``torchrun -m``."""

from vlm_tools.cli import main

main()
