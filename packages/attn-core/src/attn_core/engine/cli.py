"""The command line of every task package: the same verbs and flags, implemented once.

What a verb works with is imported when it runs, here and in the packages' ``commands``: ``--help`` takes little more
than torch does.
"""

import functools
import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.table import Table

from attn_core.catalog import did_you_mean
from attn_core.engine.errors import ConfigError, EngineError, UnknownSettingError
from attn_core.engine.failures import CLOSED_PIPE, describe
from attn_core.engine.listing import model_rows, shown
from attn_core.engine.package import BenchmarkRequest, ExportFormat, PackageId, TaskPackage

_FORMATS: dict[ExportFormat, str] = {"onnx": ".onnx", "torch-export": ".pt2"}
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<n>.")]


# Whole: typer reads verbs and options off the signatures; each body is one call into a room of its own.
def build_cli(task: TaskPackage) -> typer.Typer:
    """The typer application of a package: train, eval, predict, export, benchmark, list, info and its own verbs."""
    package = task.package
    app = typer.Typer(
        name=package.name,
        help=task.summary or None,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    out = Console(highlight=False, soft_wrap=True)
    if not out.is_terminal:
        out.width = 10_000  # a row of a table is a line, for grep and cut

    def add(verb: str, function: Callable[..., None]) -> None:
        if task.verbs is not None and verb not in (*task.verbs, *task.commands):
            return

        @functools.wraps(function)
        def command(**values: Any) -> None:
            if task.register is not None:
                task.register()
            function(**values)

        app.command(verb)(command)

    def train_command(
        recipe: Annotated[str | None, typer.Argument(help="Name (see list) or .py file.", show_default=False)] = None,
        out_dir: Annotated[Path | None, typer.Option("--out", help="Run directory (default: runs/<recipe>).")] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest intact checkpoint.")] = False,
        amp: Annotated[bool, typer.Option("--amp", help="bfloat16 autocast, on CPU and GPU.")] = False,
        launcher: Annotated[str, typer.Option(help="none, or pytorch under torchrun.")] = "none",
        strategy: Annotated[str | None, typer.Option(help="ddp or fsdp2, with several processes.")] = None,
        settings: Annotated[
            list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: a.b=c (repeatable).")
        ] = None,
        seed: Annotated[
            int | None, typer.Option(help="Seed of everything random (default: the recipe's, or 0).", min=0)
        ] = None,
        device: _Device = "auto",
        tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard files too.")] = False,
        wandb: Annotated[bool, typer.Option("--wandb", help="Log to Weights & Biases too.")] = False,
        **own: Any,
    ) -> None:
        """Train a recipe (without an argument: embedded data, minutes on a CPU) and test the best weights once."""
        from attn_core.engine.distributed import LAUNCHERS, STRATEGIES
        from attn_core.engine.reporting import format_number
        from attn_core.engine.train import TrainOptions, train

        _one_of("--launcher", launcher, LAUNCHERS)
        if strategy is not None:
            _one_of("--strategy", strategy, STRATEGIES)
        asked = tuple(task.train_settings(**own)) if task.train_settings else ()
        options = TrainOptions(
            recipe=recipe or next((name for option, name in task.own_recipes.items() if own.get(option)), None),
            out=out_dir,
            resume=resume,
            overrides=(*asked, *(settings or ())),
            amp=amp,
            launcher=launcher,
            strategy=strategy,
            seed=seed,
            device=device,
            tensorboard=tensorboard,
            wandb=wandb,
        )
        try:
            result = train(package, options, say=lambda line: out.print(line, markup=False), draw=task.draw_predictions)
        except UnknownSettingError as error:
            raise _attributed(error, asked, own) from None
        if not result.files:  # not process 0
            return
        for name, value in result.metrics.items():
            out.print(f"test {name.replace('_', ' ')}: {format_number(name, value)}", markup=False)
        if not result.metrics:
            out.print("no test split in this recipe; eval measures the validation split", markup=False)
        out.print(f"took {result.seconds:.1f} s; wrote {', '.join(result.files)} to {result.directory}", markup=False)

    add("train", _with_options_of(task.train_settings, train_command))

    def eval_command(
        run: Annotated[Path, typer.Argument(help="Run directory.")],
        split: Annotated[
            str | None, typer.Option(help="test or val (default: test, or val where the recipe has no test split).")
        ] = None,
        device: _Device = "auto",
    ) -> None:
        """Evaluate the selected weights of a run on its test split."""
        from attn_core.engine.reporting import format_number
        from attn_core.engine.run import evaluate

        if split is not None:
            _one_of("--split", split, ("test", "val"))
        split, metrics = evaluate(package, run, split=split, device=device, draw=task.draw_predictions)
        for name, value in metrics.items():
            out.print(f"{split} {name.replace('_', ' ')}: {format_number(name, value)}", markup=False)

    add("eval", eval_command)

    def predict_command(
        inputs: Annotated[list[Path], typer.Argument(help="Files or folders.", metavar="INPUT...")],
        run: Annotated[str | None, typer.Option(help="Run directory (default: the newest under runs).")] = None,
        out_dir: Annotated[Path, typer.Option("--out", help="Where files are written.")] = Path("predictions"),
        device: _Device = "auto",
        **options: Any,
    ) -> None:
        """Apply a trained model to your own inputs."""
        from attn_core.engine.run import open_run

        function = _need(package.name, "predict", task.predict)
        for path in inputs:
            if not path.exists():
                raise EngineError(f"predict: {path} does not exist")
        trained = open_run(package, run, device=device)
        with torch.inference_mode():
            for line in function(trained, inputs, out_dir, **options):
                out.print(line, markup=False)

    add("predict", _with_options_of(task.predict, predict_command))

    def export_command(
        target: Annotated[str | None, typer.Argument(help="Run directory or model name (default: newest run).")] = None,
        kind: Annotated[str, typer.Option("--format", help="onnx or torch-export.")] = "onnx",
        file: Annotated[Path | None, typer.Option("--out", help="File (default: exports/<name>).")] = None,
    ) -> None:
        """Write a model for other runtimes and compare the outputs."""
        from attn_core.engine.export import export as write_export
        from attn_core.engine.run import open_run

        function = _need(package.name, "export", task.export)
        _one_of("--format", kind, _FORMATS)
        is_run = target is None or Path(target).is_dir() or "/" in target
        what = function(open_run(package, target, device="cpu") if is_run else str(target))
        path = file or Path("exports") / f"{what.name}{_FORMATS[kind]}"  # type: ignore[index]
        report = write_export(what, kind, path)  # type: ignore[arg-type]
        batch = "any batch size" if report.any_batch else f"batch size {what.inputs[0].shape[0]} only"
        sizes = ", any ".join([batch, " and ".join(report.axes)] if report.axes else [batch])
        names = f"{', '.join(report.inputs)} → {', '.join(report.outputs)}" + (f"; {what.note}" if what.note else "")
        out.print(
            f"wrote {report.path} ({sizes}; {names}); largest relative difference {report.error:.1e}", markup=False
        )

    add("export", export_command)

    def benchmark_command(
        models: Annotated[list[str] | None, typer.Argument(help="Model names (default: the package's choice).")] = None,
        batch_size: Annotated[int | None, typer.Option(help="Samples per call.", min=1)] = None,
        device: _Device = "auto",
        file: Annotated[Path | None, typer.Option("--json", help="Write the rows to a file.")] = None,
        **options: Any,
    ) -> None:
        """Measure speed and memory of models."""
        from attn_core.engine.distributed import choose_device

        function = _need(package.name, "benchmark", task.benchmark)
        rows = list(function(BenchmarkRequest(models or [], batch_size, choose_device(device), file), **options))
        if file is not None:
            file.write_text(json.dumps([dict(row) for row in rows], indent=1, default=str) + "\n")
        out.print(_table(rows))

    add("benchmark", _with_options_of(task.benchmark, benchmark_command))

    def list_command(
        counted: Annotated[
            bool, typer.Option("--multiply-adds", help="Count them, where models have fixed ones (minutes).")
        ] = False,
    ) -> None:
        """List recipes, and models with what they cost and what their authors report."""
        from attn_core.engine.recipes import recipe_names

        recipes = [{"recipe": name, "what": text} for name, text in recipe_names(package.module).items()]
        out.print(_table(recipes))
        if models := model_rows(task, counted=counted):
            out.print()
            out.print(_table(models))

    add("list", list_command)

    def info_command(name: Annotated[str, typer.Argument(help="Model or recipe name.")]) -> None:
        """Describe a model, or a recipe with all its settings."""
        from attn_core.engine.config import find_recipe, format_config, load_recipe, read_recipe, recipe_names

        recipes = recipe_names(package.module)
        if name in recipes:
            path = find_recipe(package.module, name)
            settings = format_config(load_recipe(path, scope=package.module))
            out.print(f"{name}: {read_recipe(path).about}\n\n{settings}", markup=False)
            return
        models = set(task.list_models()) if task.list_models else set()
        if task.info is None or (models and name not in models):
            raise ConfigError(f"info: unknown name {name!r}{did_you_mean(name, models | set(recipes))}")
        for key, value in task.info(name).items():
            out.print(f"{key}: {shown(value)}", markup=False)

    add("info", info_command)

    for verb, function in task.commands.items():
        add(verb, _printing(function, out))
    for name, group in task.groups.items():
        app.add_typer(build_cli(group), name=name)

    return app


def _attributed(error: UnknownSettingError, asked: Sequence[str], own: Mapping[str, Any]) -> ConfigError:
    """The error, said of the package's own option if the setting came from one."""
    if error.name not in (setting.partition("=")[0] for setting in asked):
        return error
    given = " ".join(f"--{option.replace('_', '-')}" for option, value in own.items() if value)
    return ConfigError(f"{given}: this recipe has no setting {error.name!r}; without a recipe's name one is chosen")


def _printing(function: Callable[..., Iterable[str]], out: Console) -> Callable[..., None]:
    """``function`` as a command: same parameters, its lines printed as they come."""

    @functools.wraps(function)
    def command(**values: Any) -> None:
        for line in function(**values):
            out.print(line, markup=False)

    return command


def _with_options_of(function: Callable[..., Any] | None, command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with the keyword-only parameters of a package's function as further command line options."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    theirs = inspect.signature(function).parameters.values() if function else ()
    added = [p for p in theirs if p.kind is p.KEYWORD_ONLY]

    @functools.wraps(command)
    def combined(**values: Any) -> None:
        command(**values)

    described: Any = combined
    described.__signature__ = inspect.Signature([*own, *added])
    described.__annotations__ = {p.name: p.annotation for p in (*own, *added)}
    return combined


def run_cli(task: TaskPackage, arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of a package's command: run a verb; an error becomes one line on stderr and an exit code.

    Exit codes: 0 done, 1 data or run error, 2 wrong usage or recipe, 70 unexpected (the line names a log file with the
    traceback), 130 SIGINT, 143 SIGTERM.
    """
    package = task.package
    _quiet(package)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    code, message, verb = 0, "", ""
    try:
        command = typer.main.get_command(build_cli(task))
        verb = arguments[0] if arguments and arguments[0] in getattr(command, "commands", {}) else ""
        code = command.main(arguments, prog_name=package.name, standalone_mode=False) or 0
        sys.stdout.flush()
    except BaseException as error:
        code, message = describe(error, package, verb)
    if message:
        name = f"{package.name} {verb}".strip()
        message = " ".join(message.split("\n"))  # of a library, inside ours
        # A name may hold what moves the cursor or what no terminal can show.
        message = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        print(f"{name}: {message.removeprefix(f'{verb}: ')}", file=sys.stderr)
    if code == CLOSED_PIPE:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more when it ends
    sys.exit(code)


class _Notes(logging.Handler):
    """Warnings of the engine and of the package, one line each on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"note: {record.getMessage()}", file=sys.stderr)


def _quiet(package: PackageId) -> None:
    """Show the user our own words only: warnings of libraries are for developers (python -W default shows them)."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for name in ("attn_core", package.module):
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _Notes) for handler in logger.handlers):
            logger.addHandler(_Notes(logging.WARNING))


def _one_of(option: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{option}: {value!r} is not one of {', '.join(allowed)}{did_you_mean(value, allowed)}")


def _need(package: str, verb: str, function: Any) -> Any:
    if function is None:
        raise EngineError(f"{verb}: {package} does not offer it")
    return function


def _table(rows: Sequence[Mapping[str, object]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in rows[0] if rows else ():
        table.add_column(str(name), overflow="fold")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    return table
