"""The command ``medical-seg``: train, eval, predict, export, benchmark, list, info and its own verbs."""

from attn_core.engine import TaskPackage
from attn_core.engine.cli import run_cli
from medical_seg.commands.benchmark import benchmark
from medical_seg.commands.convert_weights import convert_weights
from medical_seg.commands.demo import demo
from medical_seg.commands.evaluate import evaluate
from medical_seg.commands.export import export_target
from medical_seg.commands.info import info
from medical_seg.commands.plan import plan
from medical_seg.commands.predict import predict
from medical_seg.commands.slides import SLIDES
from medical_seg.commands.train import draw_predictions, train_settings
from medical_seg.models import list_models
from medical_seg.package import PACKAGE

CLI = TaskPackage(
    package=PACKAGE,
    summary="Attention networks for medical image segmentation: from a folder of volumes or pictures to masks.",
    list_models=list_models,
    info=info,
    predict=predict,
    export=export_target,
    benchmark=benchmark,
    draw_predictions=draw_predictions,
    own_recipes={"data": "volumes"},
    train_settings=train_settings,
    commands={"evaluate": evaluate, "plan": plan, "demo": demo, "convert-weights": convert_weights},
    groups={"slides": SLIDES},
)


def main() -> None:
    """Entry point of the command."""
    run_cli(CLI)
