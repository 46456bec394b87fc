"""Samples of each class, and what a run that makes them says where a classifier is expected."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vision_models.commands.export import export_target
from vision_models.commands.predict import predict
from vision_models.commands.train import draw_predictions
from vision_models.data import Digits
from vision_models.tasks.denoising import DenoisingTask


class Gray(DenoisingTask):
    """Samples of a later class are brighter."""

    def samples(self, label: Tensor) -> Tensor:
        return (label / 4.5 - 1).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)


def test_every_column_holds_samples_of_its_class_below_a_picture(tmp_path: Path) -> None:
    task = Gray(nn.Linear(1, 1)).eval()
    loader: Any = DataLoader(Digits("val", size=8), batch_size=64)
    assert draw_predictions(task, loader, tmp_path / "samples.png") == []
    pixels = np.asarray(Image.open(tmp_path / "samples.png").convert("L")).astype(float)
    columns = pixels.reshape(len(pixels), 10, -1).transpose(1, 0, 2)
    below = [column[-60:-40, 40:70].mean() for column in columns]
    assert below == sorted(below)
    assert below[0] < 5
    assert below[9] > 250
    assert all(column[60:140, 20:90].std() > 30 for column in columns)


def test_a_run_that_makes_pictures_is_no_classifier(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(model=Gray(nn.Linear(1, 1)), directory=Path("runs/dit"), data_info={})
    with pytest.raises(ValueError, match=r"predict: runs.dit makes pictures and classifies none; its samples are in"):
        next(predict(run, [], tmp_path))
    with pytest.raises(ValueError, match=r"export: the network of runs.dit takes noise, a time and a class"):
        export_target(run)
