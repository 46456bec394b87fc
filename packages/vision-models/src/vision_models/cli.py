"""The command ``vision-models``."""

from attn_core.engine import TaskPackage
from attn_core.engine.cli import run_cli

from .models import list_models

PACKAGE = TaskPackage(
    name="vision-models",
    module="vision_models",
    default_recipe="biformer_digits",
    summary="Attention backbones for vision: train, evaluate, predict, export, benchmark.",
    list_models=list_models,
)


def main() -> None:
    run_cli(PACKAGE)
