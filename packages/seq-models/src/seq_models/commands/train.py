"""What ``seq-models train`` adds to the engine's: text of your own, and the picture at the end of a run."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn


def train_settings(
    *,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Files or folders of text, for recipes named …_text; transnormer_text by default (repeatable).",
            exists=True,
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="A tokenizer.json or a folder of Hugging Face's: tokens in place of bytes; `tokenizer` makes one.",
            exists=True,
        ),
    ] = None,
) -> Iterator[str]:
    """Settings of the recipe; paths are made absolute, so that the run can be evaluated from anywhere.

    Raises:
        ValueError: a tokenizer without text of one's own, or one that cannot be read.
    """
    if text:
        yield f"texts={[str(path.absolute()) for path in text]!r}"
    if tokenizer:
        from seq_models.data.tokenizers import open_tokenizer

        if not text:
            raise ValueError("train: --tokenizer needs --text, your own files")
        yield f"tokenizer={str(tokenizer.absolute())!r}"
        yield f"vocab_size={len(open_tokenizer(tokenizer))}"


def draw_predictions(model: nn.Module, loader: Iterable[dict[str, Any]], path: Path) -> None:
    """Answers of a Pointer Network beside the truth; of a language model, where in the rows it is right.

    See `seq_models.pointing.pictures.draw_answers` and `seq_models.language.pictures.draw_accuracy`.
    """
    from seq_models.language.pictures import draw_accuracy
    from seq_models.language.task import LanguageTask
    from seq_models.pointing.pictures import draw_answers
    from seq_models.pointing.task import PointingTask

    if isinstance(model, PointingTask):
        draw_answers(model, loader, path, loader.dataset.metainfo["task"])  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(model, LanguageTask):
        draw_accuracy(model, loader, path)
