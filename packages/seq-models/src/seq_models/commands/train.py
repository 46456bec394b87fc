"""What ``seq-models train`` adds to the engine's: the picture at the end of a run."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from seq_models.language.pictures import draw_accuracy
from seq_models.language.task import LanguageTask
from seq_models.pointing.pictures import draw_answers
from seq_models.pointing.task import PointingTask


def draw_predictions(model: nn.Module, loader: Iterable[dict[str, Any]], path: Path) -> None:
    """Answers of a Pointer Network beside the truth; of a language model, where in the rows it is right.

    See :func:`draw_answers` and :func:`draw_accuracy`.
    """
    if isinstance(model, PointingTask):
        draw_answers(model, loader, path, loader.dataset.metainfo["task"])  # pyright: ignore
    elif isinstance(model, LanguageTask):
        draw_accuracy(model, loader, path)
