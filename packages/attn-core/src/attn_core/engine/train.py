"""One run from the recipe to the pictures: the guided tour of the engine.

    prepare   recipe, options and run directory; nothing is built yet          prepare.py, recipes.py, config.py
    claim     the run directory is this process's alone until the run ends     run_directory.py
    build     model, optimizer, schedules, data, hooks                         runner.py, names.py, sampling.py
    train     loops, moving average, checkpoints, signals, what is logged      loops.py, hooks.py, reporting.py, ...
    test      the selected weights, loaded from their file, once               runner.py, checkpoint.py
    report    result.json, curves.png, predictions.png                         results.py, pictures.py

Afterwards `attn_core.engine.run` opens and evaluates what was written.
"""

from collections.abc import Callable

from attn_core.engine.distributed import choose_device, on_main, only_on_main, processes
from attn_core.engine.package import DrawPredictions, PackageId
from attn_core.engine.prepare import TrainOptions, prepare
from attn_core.engine.results import Stopwatch, TrainResult, announce, describe_run, report
from attn_core.engine.run_directory import claim
from attn_core.engine.runner import build_runner

__all__ = ["TrainOptions", "TrainResult", "train"]


def train(
    package: PackageId,
    options: TrainOptions,
    *,
    say: Callable[[str], object] = print,
    draw: DrawPredictions | None = None,
) -> TrainResult:
    """Train a recipe, test the selected weights once, draw the pictures.

    Args:
        package: The task package.
        options: See `TrainOptions`.
        say: Called with lines for the user, on process 0 only.
        draw: Writes ``predictions.png`` (see `TaskPackage.draw_predictions`).

    Raises:
        EngineError: whatever the user can mend; its message is one line.
    """
    watch = Stopwatch()
    with processes(options.launcher, choose_device(options.device)):
        plan = on_main(lambda: prepare(package, options))
        with only_on_main(claim(plan.directory)), build_runner(plan) as runner:
            describe_run(plan, runner)
            announce(plan, runner, say)
            runner.train()
            metrics = runner.test_selected()
            return report(plan, runner, metrics, watch, draw)
