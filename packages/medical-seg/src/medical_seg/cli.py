"""The command ``medical-seg``: train, eval, predict, export, benchmark, list, info."""

from attn_core.engine import TaskPackage
from attn_core.engine.cli import run_cli

PACKAGE = TaskPackage(name="medical-seg", module="medical_seg", default_recipe="")


def main() -> None:
    """Entry point of the command."""
    run_cli(PACKAGE)
