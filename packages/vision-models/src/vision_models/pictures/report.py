"""What a test of a classifier leaves: pictures of its errors and its confusion, and a table of its classes.

``train`` writes them into the run, ``eval`` into ``<run>/eval_<split>``.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attn_core.lettering import lettered
from vision_models.pictures.confusion import draw_confusion, write_classes, write_confusion
from vision_models.pictures.predictions import Gallery


@torch.no_grad()
def report(model: nn.Module, loader: Iterable[dict[str, Any]], path: Path) -> list[str]:
    """Predict a part once; gives the names of the files written beside ``path``.

    Args:
        model: a ``ClassificationTask`` in eval mode.
        loader: of a data set whose ``metainfo`` holds ``classes`` and ``preprocess``.
        path: of ``predictions.png``; ``confusion.png``, ``confusion.csv`` and ``classes.csv`` stand beside it.
    """
    info = loader.dataset.metainfo  # pyright: ignore[reportAttributeAccessIssue]
    classes: list[str] = [str(name) for name in info["classes"]]
    gallery = Gallery(info["preprocess"])
    counts = torch.zeros(len(classes), len(classes), dtype=torch.long)
    device = next(model.parameters()).device
    for batch in loader:
        on_device = {key: value.to(device) for key, value in batch.items()}
        results = model.predict(**on_device)  # pyright: ignore[reportCallIssue]
        scores = torch.stack([torch.as_tensor(result["scores"]) for result in results])
        labels = torch.tensor([result["label"] for result in results])
        _add(counts, labels, scores.argmax(1))
        gallery.add(batch["image"], scores, labels)
    write_confusion(counts, classes, path.with_name("confusion.csv"))
    write_classes(counts, classes, path.with_name("classes.csv"))
    with lettered(classes) as shown:
        draw_confusion(counts, shown, path.with_name("confusion.png"))
        gallery.draw(shown, path)
    return ["confusion.png", "confusion.csv", "classes.csv"]


def _add(counts: Tensor, labels: Tensor, guesses: Tensor) -> None:
    """One more in row ``label``, column ``guess``, for each image."""
    ones = torch.ones_like(labels)
    counts.index_put_((labels, guesses), ones, accumulate=True)
