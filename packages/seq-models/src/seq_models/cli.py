"""The command ``seq-models``: which verbs there are."""

from attn_core.engine import TaskPackage
from attn_core.engine.cli import run_cli
from seq_models.commands.benchmark import benchmark
from seq_models.commands.demo import demo
from seq_models.commands.export import export_target
from seq_models.commands.generate import generate
from seq_models.commands.predict import predict
from seq_models.commands.tokenizer import tokenizer
from seq_models.commands.train import draw_predictions, train_settings
from seq_models.models import info, list_models
from seq_models.package import PACKAGE

CLI = TaskPackage(
    package=PACKAGE,
    summary="Attention models for sequences.",
    register=list_models,
    list_models=list_models,
    info=info,
    predict=predict,
    export=export_target,
    benchmark=benchmark,
    draw_predictions=draw_predictions,
    own_recipes={"text": "transnormer_text"},
    train_settings=train_settings,
    commands={"generate": generate, "tokenizer": tokenizer, "demo": demo},
)


def main() -> None:
    """Entry point of the command."""
    run_cli(CLI)
