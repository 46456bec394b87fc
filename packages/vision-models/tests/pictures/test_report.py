"""What a test leaves: counts that add up, tables in the users' words, pictures that can be read."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vision_models.pictures.confusion import draw_confusion, write_classes, write_confusion
from vision_models.pictures.predictions import SHOWN
from vision_models.pictures.report import report

CLASSES = ["cat", "dog", "eel"]
COUNTS = torch.tensor([[8, 2, 0], [0, 5, 0], [0, 0, 0]])


def rows(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text(encoding="utf-8").splitlines()))


def test_table_of_classes_holds_recall_precision_and_the_usual_confusion(tmp_path: Path) -> None:
    write_classes(COUNTS, CLASSES, tmp_path / "c.csv")
    assert rows(tmp_path / "c.csv")[1:] == [
        ["cat", "10", "8", "0.8000", "1.0000", "0.8889", "dog"],
        ["dog", "5", "5", "1.0000", "0.7143", "0.8333", ""],
        ["eel", "0", "0", "", "", "", ""],
    ]


def test_table_of_confusion_has_the_true_class_in_the_row(tmp_path: Path) -> None:
    write_confusion(COUNTS, CLASSES, tmp_path / "c.csv")
    assert rows(tmp_path / "c.csv")[1] == ["cat", "8", "2", "0"]


@pytest.mark.parametrize("classes", [2, 10, 30, 200])
def test_picture_of_confusion_is_readable_at_its_size(classes: int, tmp_path: Path) -> None:
    counts = torch.randint(0, 5, (classes, classes), generator=torch.Generator().manual_seed(0))
    draw_confusion(counts, [f"class number {i} with a long name" for i in range(classes)], tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as picture:
        assert 300 < picture.width <= 1100
        assert np.asarray(picture.convert("L")).std() > 10


class Guess(nn.Module):
    """Says of every image the class of its first pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))

    def predict(self, image: Tensor, label: Tensor) -> list[dict[str, Any]]:
        scores = torch.eye(3)[image[:, 0, 0, 0].long()] * 0.8 + 0.2 / 3
        return [{"scores": s, "label": int(target)} for s, target in zip(scores, label, strict=True)]


class Part:
    metainfo = {"classes": ["cat", "猫", "$x_1$"], "preprocess": {"mean": [0.0] * 3, "std": [1.0] * 3}}  # noqa: RUF012


class Loader(list[dict[str, Tensor]]):
    dataset = Part()


def test_report_counts_every_image_once_and_shows_errors_first(tmp_path: Path) -> None:
    guesses = torch.tensor([0, 1, 2, 0, 1, 2, 0] * 10)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 1] * 10)
    images = guesses.view(-1, 1, 1, 1).float().expand(-1, 3, 4, 4)
    batches = [{"image": images[i : i + 16], "label": labels[i : i + 16]} for i in range(0, 70, 16)]
    written = report(Guess().eval(), Loader(batches), tmp_path / "predictions.png")
    assert sorted(written) == ["classes.csv", "confusion.csv", "confusion.png"]
    table = rows(tmp_path / "confusion.csv")
    assert table[0][1:] == ["cat", "猫", "$x_1$"]
    assert [list(map(int, row[1:])) for row in table[1:]] == [[20, 0, 0], [10, 20, 0], [0, 0, 20]]
    with Image.open(tmp_path / "predictions.png") as picture:
        assert picture.width == 1100
        red = (np.asarray(picture.convert("RGB")).astype(int) @ [1, -1, 0] > 100).sum()
    assert red > 1000  # the frames of ten errors
    assert SHOWN == 40
