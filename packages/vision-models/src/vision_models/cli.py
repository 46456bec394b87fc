"""The command ``vision-models``: train, eval, predict, export, benchmark, list, info."""

from attn_core.engine import TaskPackage
from attn_core.engine.cli import run_cli
from vision_models.commands.benchmark import benchmark
from vision_models.commands.export import export_target
from vision_models.commands.info import info
from vision_models.commands.predict import predict
from vision_models.commands.train import draw_predictions, train_settings
from vision_models.models import list_models
from vision_models.package import PACKAGE

CLI = TaskPackage(
    package=PACKAGE,
    summary="Attention backbones for vision.",
    register=list_models,
    list_models=list_models,
    info=info,
    predict=predict,
    export=export_target,
    benchmark=benchmark,
    draw_predictions=draw_predictions,
    own_recipes={"data": "pictures"},
    train_settings=train_settings,
)


def main() -> None:
    """Entry point of the command."""
    run_cli(CLI)
