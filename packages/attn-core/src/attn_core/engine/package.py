"""How a task package plugs into the shared command line."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PackageId:
    """What the engine must know of a task package to train its recipes and to find and open its runs.

    Attributes:
        name: The command, e.g. ``"vision-models"``.
        module: The import name, e.g. ``"vision_models"``; recipes are the files of ``<module>/configs``, and
            ``<module>`` is the registry scope in which recipes are built.
        default_recipe: The recipe that ``train`` without an argument runs: embedded data, minutes on a CPU.
    """

    name: str
    module: str
    default_recipe: str


@dataclass(frozen=True)
class TrainedRun:
    """A finished or interrupted run, loaded for use.

    Attributes:
        directory: The run directory.
        config: The resolved recipe as a plain nested dict.
        model: The task model with the best weights loaded, in eval mode, on ``device``.
        device: Where the model is.
        checkpoint: The weights file that was loaded.
        data_info: The training data set's ``metainfo``, e.g. ``{"classes": [...]}``; empty if it had none.
    """

    directory: Path
    config: dict[str, Any]
    model: nn.Module
    device: torch.device
    checkpoint: Path
    data_info: dict[str, Any]


@dataclass(frozen=True)
class ExportTarget:
    """What ``export`` writes: a module in eval mode and the positional example inputs it is traced with.

    Attributes:
        module: Called as ``module(*inputs)``.
        inputs: Example inputs.
        name: Stem of the written file.
        input_names: Names of the inputs in the file; empty: the parameters of ``module.forward``.
        output_names: Names of the outputs; empty: the keys of a dict, else ``output`` or ``output_0``, ...
        axes: For each input its axes of free size, by name; empty: ``{0: "batch"}`` for each. Axes of one name are
            equally long.
        others: Inputs of other sizes (another height and width) that the file must compute as the module does.
        note: What ``export`` adds to its line: why a size is fixed.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    name: str
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    axes: tuple[Mapping[int, str], ...] = ()
    others: tuple[tuple[Tensor, ...], ...] = ()
    note: str = ""


DrawPredictions = Callable[[nn.Module, Iterable[dict[str, Any]], Path], Sequence[str] | None]


@dataclass(frozen=True)
class BenchmarkRequest:
    """Options of ``benchmark``.

    Attributes:
        models: Names to measure; empty means the package's own choice.
        batch_size: Samples per call; None means the package's own choice.
        device: Where to measure.
        json: File for the rows, or None.
    """

    models: Sequence[str]
    batch_size: int | None
    device: torch.device
    json: Path | None


@dataclass(frozen=True)
class TaskPackage:
    """The verbs of a task package's command line.

    ``train`` and ``eval`` need ``package`` alone; a verb whose callable is missing exits with one line that says so.
    Keyword-only parameters of ``predict``, ``benchmark`` and ``train_settings`` become options of the verb:
    ``loud: Annotated[bool, typer.Option(help=...)] = False``.

    Attributes:
        package: Which package this is.
        summary: One line for ``--help``.
        register: Called before a verb runs: makes the package's models known to a library, where importing the package
            leaves that to its own command (``seq_models``, ``vision_models``).
        list_models: Names of the registered models.
        info: Name → rows of a table (parameters, paper, input size, ...); a value that takes long to compute is given
            as a function without arguments. Raise ValueError for an unknown name.
        predict: (run, inputs, out directory) → lines to print. Writes its files under the out directory. Raise
            ValueError or OSError with one clear line for an unusable input.
        export: Run or registered model name → what to export.
        benchmark: BenchmarkRequest → rows (dicts with equal keys), printed as a table and written to ``--json``.
        draw_predictions: (model, data loader, file) → writes ``predictions.png`` at the end of a run, and in ``eval``
            into ``<run>/eval_<split>``; gives the names of what it wrote beside it. The model is the `TaskModel` in
            eval mode with the best weights; the loader iterates over the test split (validation if the recipe has
            none).
        own_recipes: Options of ``train_settings`` that name data of one's own → the recipe of ``train`` without a name
            beside them: ``train --data FOLDER``.
        train_settings: The package's own options of ``train`` → ``KEY=VALUE`` settings, as of ``--set``, which comes
            after them.
        commands: Further verbs by name. A callable's parameters, annotated for typer, are those of the verb and its
            docstring is the help; it gives the lines to print and raises ValueError or OSError with one clear line.
        groups: Command lines below this one by name, for inputs of another kind: ``medical-seg slides train``.
        verbs: The shared verbs that the command has; None: all.
    """

    package: PackageId
    summary: str = ""
    register: Callable[[], object] | None = None
    list_models: Callable[[], Iterable[str]] | None = None
    info: Callable[[str], Mapping[str, object]] | None = None
    predict: Callable[..., Iterable[str]] | None = None
    export: Callable[[TrainedRun | str], ExportTarget] | None = None
    benchmark: Callable[..., Iterable[Mapping[str, object]]] | None = None
    draw_predictions: DrawPredictions | None = None
    own_recipes: Mapping[str, str] = field(default_factory=dict)
    train_settings: Callable[..., Iterable[str]] | None = None
    commands: Mapping[str, Callable[..., Iterable[str]]] = field(default_factory=dict)
    groups: Mapping[str, "TaskPackage"] = field(default_factory=dict)
    verbs: Collection[str] | None = None


ExportFormat = Literal["onnx", "torch-export"]
