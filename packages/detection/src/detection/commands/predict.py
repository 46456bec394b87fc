"""``detection predict``: boxes of pictures, drawn and as COCO results."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torchvision.transforms.v2 import functional as F

from attn_core.engine import TrainedRun
from detection.commands.ring3d import predict_samples
from detection.data.coco import SUFFIXES, read_image
from detection.data.transforms import DetectionTransform
from detection.models.bevformer.detector import BEVFormerDFA3D
from detection.pictures.boxes import draw
from detection.tasks.detection import to_original


def predict(
    run: TrainedRun,
    inputs: Sequence[Path],
    out: Path,
    *,
    threshold: Annotated[float, typer.Option(help="Lowest score that is drawn and written.")] = 0.3,
) -> Iterator[str]:
    """``<out>/<name>.png`` with boxes for each picture, and all boxes in ``<out>/predictions.json`` (COCO results).

    ``image_id`` counts the pictures from 1; ``predictions.json`` is written when all are done, beside ``images.json``
    with their names.

    Raises:
        ValueError: a threshold outside [0, 1]; a picture that cannot be read, a folder without pictures.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"--threshold must be in [0, 1], got {threshold}")
    net: Any = getattr(run.model, "net", None)
    if isinstance(net, BEVFormerDFA3D):
        yield from predict_samples(run, inputs, out, threshold=threshold)
        return
    if net is None or "classes" not in run.data_info or "category_ids" not in run.data_info:
        raise ValueError(f"{run.directory}: not a run of a detector of boxes in pictures")
    classes, categories = run.data_info["classes"], run.data_info["category_ids"]
    transform = DetectionTransform(**{"short_sides": (), **run.data_info.get("preprocess", {})})
    paths = list(_pictures(inputs))
    for path in paths:
        read_image(path)  # all are readable, or nothing is written
    results: list[dict[str, Any]] = []
    images = []
    taken: set[str] = set()
    out.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(paths, 1):
        pixels = read_image(path)
        image, _, _ = transform(pixels, torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
        found = net([image.to(run.device)])[0]
        kept = found["scores"] >= threshold
        boxes = to_original(found["boxes"][kept], image.shape[-2:], pixels.shape[-2:]).cpu()
        scores, labels = found["scores"][kept].float().cpu(), found["labels"][kept].cpu().tolist()
        name = path.stem if path.stem not in taken else f"{path.stem}_{number}"
        taken.add(name)
        images.append({"id": number, "file_name": str(path), "height": pixels.shape[1], "width": pixels.shape[2]})
        for box, score, label in zip(boxes.tolist(), scores.tolist(), labels, strict=True):
            x0, y0, x1, y1 = (round(value, 2) for value in box)
            results.append({"image_id": number, "category_id": categories[label], "score": round(score, 5),
                            "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]})  # fmt: skip
        texts = [f"{classes[label]}: {100 * score:.0f} %" for label, score in zip(labels, scores.tolist(), strict=True)]
        F.to_pil_image(draw(pixels, boxes, labels, texts)).save(out / f"{name}.png")
        yield f"{path}: {len(texts)} objects" + (f" ({', '.join(texts[:5])})" if texts else "") + f" → {out}/{name}.png"
    (out / "images.json").write_text(json.dumps(images, indent=1) + "\n")
    (out / "predictions.json.part").write_text(json.dumps(results) + "\n")
    (out / "predictions.json.part").replace(out / "predictions.json")
    yield f"wrote {len(results)} boxes to {out / 'predictions.json'}"


def _pictures(inputs: Sequence[Path]) -> Iterator[Path]:
    for path in inputs:
        if not path.is_dir():
            yield path
            continue
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"{path} holds no pictures ({', '.join(sorted(SUFFIXES))})")
        yield from found
