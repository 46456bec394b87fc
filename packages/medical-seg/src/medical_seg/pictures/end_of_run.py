"""``predictions.png``: the first test case of a run."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medical_seg.data.volumes import Volume
from medical_seg.pictures.planes import draw_planes


@torch.no_grad()
def draw_predictions(model: nn.Module, loader: Iterable[dict[str, Any]], path: Path) -> None:
    """Three planes of the first test case: image, truth, prediction."""
    info = loader.dataset.metainfo  # pyright: ignore
    item = loader.dataset[0]  # pyright: ignore
    image, label = item["image"], item["label"]
    segment: Callable[[Tensor], Tensor] = model.segment  # pyright: ignore
    found = segment(image.to(next(model.parameters()).device))
    data = image[:1].numpy()
    volume = Volume(data, tuple(info["spacing"] or (1.0,) * 3), np.eye(4), None, None, path)  # pyright: ignore[reportArgumentType]
    masks = [("truth", label.numpy()), ("prediction", found.cpu().numpy())]
    draw_planes(volume, masks, model.label_names(info["classes"]), path)
