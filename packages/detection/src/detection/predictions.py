"""What the command line makes of a trained detector: pictures with boxes, a COCO json, and the end-of-run grid."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import ImageDraw
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from attn_core.engine import TrainedRun

from .bevformer_dfa3d import BEVFormerDFA3D
from .bevformer_task import BEVDetectionTask
from .data.coco import SUFFIXES, read_image
from .data.transforms import DetectionTransform
from .detection_task import DetectionTask, to_original
from .ring3d_picture import draw_scenes, predict_samples

COLORS = ("#e03131", "#1971c2", "#2f9e44", "#f08c00", "#9c36b5", "#0c8599", "#e8590c", "#6741d9", "#c2255c", "#66a80f")


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


def draw(pixels: Tensor, boxes: Tensor, labels: Sequence[int], texts: Sequence[str]) -> Tensor:
    """(3, Y, X) uint8 with boxes; small pictures are enlarged, so that the texts can be read."""
    factor = max(1, round(384 / max(pixels.shape[-2:])))
    image = F.to_pil_image(pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2))
    pen = ImageDraw.Draw(image)
    for (x0, y0, x1, y1), label, text in zip((boxes * factor).tolist(), labels, texts, strict=True):
        color = COLORS[label % len(COLORS)]
        pen.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=color, width=2)
        place = (x0 + 2, max(0.0, y0 - 11))
        pen.rectangle(pen.textbbox(place, text), fill=color)
        pen.text(place, text, fill="white")
    return F.pil_to_tensor(image)


def _pictures(inputs: Sequence[Path]) -> Iterator[Path]:
    for path in inputs:
        if not path.is_dir():
            yield path
            continue
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"{path} holds no pictures ({', '.join(sorted(SUFFIXES))})")
        yield from found


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
