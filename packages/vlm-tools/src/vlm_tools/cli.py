"""The command ``vlm-tools``: the shared verbs, and ask, caption, ground, explain, verbalize, agree, sinks, …"""

from attn_core.engine import TaskPackage
from attn_core.engine.cli import run_cli
from vlm_tools.commands.agree import agree
from vlm_tools.commands.ask import ask
from vlm_tools.commands.benchmark import benchmark
from vlm_tools.commands.caption import caption
from vlm_tools.commands.demo import demo
from vlm_tools.commands.evaluate import evaluate
from vlm_tools.commands.explain import explain_answer
from vlm_tools.commands.export import export_target
from vlm_tools.commands.ground import ground
from vlm_tools.commands.info import info
from vlm_tools.commands.predict import draw_predictions, predict
from vlm_tools.commands.sinks import sinks
from vlm_tools.commands.verbalize import verbalize
from vlm_tools.models import list_models
from vlm_tools.package import PACKAGE

CLI = TaskPackage(
    package=PACKAGE,
    summary="See and repair what a vision-language model looks at.",
    list_models=list_models,
    info=info,
    predict=predict,
    export=export_target,
    benchmark=benchmark,
    draw_predictions=draw_predictions,
    commands={"ask": ask, "caption": caption, "ground": ground, "explain": explain_answer, "verbalize": verbalize,
              "agree": agree, "sinks": sinks, "evaluate": evaluate, "demo": demo},
)  # fmt: skip


def main() -> None:
    """Entry point of the command."""
    run_cli(CLI)
