"""``predictions.png``: a test case of a run."""

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
    data_set: Any = loader.dataset  # pyright: ignore[reportAttributeAccessIssue]
    info = data_set.metainfo
    chosen = next((k for k in range(min(len(data_set), 5)) if data_set[k]["label"].any()), 0)  # no healthy control
    image, label = (data_set[chosen][key] for key in ("image", "label"))
    segment: Callable[[Tensor], Tensor] = model.segment  # pyright: ignore[reportAssignmentType]
    found = segment(image.to(next(model.parameters()).device))
    spacing = tuple(info["spacing"] or (1.0,) * 3)
    volume = Volume(image[:1].numpy(), spacing, np.eye(4), None, None, path)  # pyright: ignore[reportArgumentType]
    # Data without cases of their own are named by their class, not by the engine's wrapper around them.
    case = (
        data_set.cases[chosen].name
        if hasattr(data_set, "cases")
        else type(getattr(data_set, "dataset", data_set)).__name__
    )
    masks = [("truth", label.numpy()), ("prediction", found.cpu().numpy())]
    names = model.label_names(info["classes"])  # pyright: ignore[reportCallIssue]
    draw_planes(volume, masks, names, path, case=case)
