"""The command ``detection``: train, eval, predict, export, benchmark, list, info."""

from attn_core.engine import TaskPackage
from attn_core.engine.cli import run_cli

PACKAGE = TaskPackage(
    name="detection", module="detection", default_recipe="plain_detr_digits", summary="Attention detectors."
)


def main() -> None:
    """Entry point of the command."""
    run_cli(PACKAGE)
