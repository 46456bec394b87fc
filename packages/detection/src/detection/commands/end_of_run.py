"""``predictions.png`` of a run: pictures of the test split beside what the best weights find in them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.transforms.v2 import functional as F

from detection.pictures.boxes import draw
from detection.pictures.ring3d import draw_scenes
from detection.tasks.bevformer import BEVDetectionTask
from detection.tasks.detection import DetectionTask


@torch.no_grad()
def draw_predictions(model: nn.Module, loader: Iterable[dict[str, Any]], path: Path) -> None:
    """Twelve test pictures: what is there on the left, boxes above a score of 0.3 on the right.

    Of a `BEVDetectionTask` one sample is drawn in all cameras and from above; of other models nothing.
    """
    if isinstance(model, BEVDetectionTask):
        draw_scenes(model, loader, path)
        return
    if not isinstance(model, DetectionTask):
        return
    info: Mapping[str, Any] = loader.dataset.metainfo  # pyright: ignore[reportAttributeAccessIssue]
    classes = info["classes"]
    pairs = []
    for batch in loader:
        net: Any = model.net
        device = next(model.parameters()).device
        results = net([image.to(device) for image in batch["image"]])
        for image, boxes, labels, found in zip(batch["image"], batch["boxes"], batch["labels"], results, strict=True):
            pixels = (image * 255).round().to(torch.uint8).cpu()
            kept = found["scores"].cpu() > 0.3
            kinds = found["labels"].cpu()[kept].tolist()
            shares = found["scores"].cpu()[kept].tolist()
            truth = draw(pixels, boxes.cpu(), labels.tolist(), [classes[label] for label in labels.tolist()])
            texts = [f"{classes[label]}: {100 * share:.0f} %" for label, share in zip(kinds, shares, strict=True)]
            pairs.append(torch.cat([truth, draw(pixels, found["boxes"].cpu()[kept], kinds, texts)], 2))
            if len(pairs) == 12:
                break
        if len(pairs) == 12:
            break
    height, width = (max(pair.shape[axis] for pair in pairs) for axis in (1, 2))
    cells = [nn.functional.pad(p, (0, width - p.shape[2] + 8, 0, height - p.shape[1] + 8), value=255) for p in pairs]
    cells += [torch.full_like(cells[0], 255)] * (-len(cells) % 3)
    rows = [torch.cat(cells[start : start + 3], 2) for start in range(0, len(cells), 3)]
    F.to_pil_image(torch.cat(rows, 1)).save(path)
