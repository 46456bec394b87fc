"""What the commands draw of a detector that sees enhanced pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from attn_core.engine import TrainedRun
from detection.commands.predict import predict
from detection.data import DarkDigitsCoco, collate_detection
from detection.layers.featenhancer import Enhanced, FeatEnHancer
from detection.models import create_model
from detection.pictures.end_of_run import draw_predictions
from detection.tasks.detection import DetectionTask


@pytest.fixture
def task() -> DetectionTask:
    """A detector behind a module whose last bias makes every picture white."""
    net: Any = Enhanced(create_model("test_plain_detr", queries=8, queries_many=0), FeatEnHancer(width=4))
    torch.nn.init.constant_(net.enhancer.residuals.bias, 30.0)
    return DetectionTask(net).eval()


def test_predict_draws_the_enhanced_picture_beside_the_input(task: DetectionTask, tmp_path: Path) -> None:
    pixels, _, _ = DarkDigitsCoco("val", limit=1).pictures[0]
    Image.fromarray(pixels[:80]).save(tmp_path / "a.png")
    info = {
        "classes": [str(i) for i in range(10)],
        "category_ids": list(range(1, 11)),
        "preprocess": {"short_sides": (64,)},
    }
    run = TrainedRun(tmp_path, {}, task, torch.device("cpu"), tmp_path, info)
    with torch.inference_mode():
        assert len(list(predict(run, [tmp_path / "a.png"], tmp_path / "out", threshold=1.0))) == 2
    drawn = np.asarray(Image.open(tmp_path / "out" / "a.png").convert("RGB"))
    assert drawn.shape == (240, 384 + 6 + 384, 3)
    assert (drawn[:, :384] == pixels[:80].repeat(3, 0).repeat(3, 1)).all()
    assert drawn[:, -384:].min() == 255


def test_the_picture_at_the_end_of_a_run_shows_both(task: DetectionTask, tmp_path: Path) -> None:
    loader: Any = DataLoader(DarkDigitsCoco("val", limit=3), batch_size=2, collate_fn=collate_detection)  # pyright: ignore[reportArgumentType]
    (tmp_path / "result.json").write_text('{"test": {}}')
    draw_predictions(task, loader, tmp_path / "predictions.png")
    page = np.asarray(Image.open(tmp_path / "predictions.png").convert("RGB")).mean(2)
    middle = page.shape[1] // 2
    assert np.median(page[:, :middle]) < 100 < np.median(page[:, middle:])
