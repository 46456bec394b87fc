"""The command ``detection``: train, eval, predict, export, benchmark, ring3d, list, info."""

from attn_core.engine import TaskPackage
from attn_core.engine.cli import run_cli
from detection.bench.attention import benchmark
from detection.commands.end_of_run import draw_predictions
from detection.commands.export import export_target
from detection.commands.info import info
from detection.commands.predict import predict
from detection.commands.ring3d import write_samples
from detection.models import list_models
from detection.package import PACKAGE

CLI = TaskPackage(
    package=PACKAGE,
    summary="Attention detectors: Plain-DETR, DFA3D, BVR.",
    list_models=list_models,
    info=info,
    predict=predict,
    export=export_target,
    benchmark=benchmark,
    draw_predictions=draw_predictions,
    commands={"ring3d": write_samples},
)


def main() -> None:
    """Entry point of the command."""
    run_cli(CLI)
