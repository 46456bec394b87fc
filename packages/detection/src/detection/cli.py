"""The command ``detection``: train, eval, predict, export, benchmark, check, ring3d, shelves, scanpath, list, info."""

from attn_core.engine import TaskPackage
from attn_core.engine.cli import run_cli
from detection.commands.benchmark import benchmark
from detection.commands.check import check
from detection.commands.export import export_target
from detection.commands.info import info, names
from detection.commands.predict import predict
from detection.commands.ring3d import write_samples
from detection.commands.scanpath import scanpath, write_shelves
from detection.commands.train import draw_predictions, train_settings
from detection.package import PACKAGE

CLI = TaskPackage(
    package=PACKAGE,
    summary="Attention detectors: Plain-DETR, DFA3D, BVR, FeatEnHancer; scanpaths: OAT; events: BMN, CSA.",
    list_models=names,
    info=info,
    predict=predict,
    export=export_target,
    benchmark=benchmark,
    draw_predictions=draw_predictions,
    own_recipes={"data": "own_pictures"},
    train_settings=train_settings,
    commands={"check": check, "ring3d": write_samples, "shelves": write_shelves, "scanpath": scanpath},
)


def main() -> None:
    """Entry point of the command."""
    run_cli(CLI)
