"""The command ``vlm-tools``: train, eval, predict, export, benchmark, list, info."""

from attn_core.engine import TaskPackage
from attn_core.engine.cli import run_cli

PACKAGE = TaskPackage(name="vlm-tools", module="vlm_tools", default_recipe="")


def main() -> None:
    """Entry point of the command."""
    run_cli(PACKAGE)
