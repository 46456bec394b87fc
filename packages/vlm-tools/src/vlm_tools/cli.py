"""The command ``vlm-tools``: train, eval, predict, export, benchmark, list, info."""

from collections.abc import Mapping

from attn_core.engine import TaskPackage
from attn_core.engine.cli import run_cli

from .models import card, create_model, list_models, summary


def info(name: str) -> Mapping[str, object]:
    """Rows of a table about a method or model."""
    about = card(name)
    count = sum(parameter.numel() for parameter in create_model(name).parameters())
    return {
        "name": name,
        "what": summary(name),
        "parameters": f"{count:,}" if count else "none, nothing is trained",
        "paper": about.paper,
        "official code": about.code or "none",
    }


PACKAGE = TaskPackage(
    name="vlm-tools",
    module="vlm_tools",
    default_recipe="llava_digits",
    summary="See and repair what a vision-language model looks at.",
    list_models=list_models,
    info=info,
)


def main() -> None:
    """Entry point of the command."""
    run_cli(PACKAGE)
