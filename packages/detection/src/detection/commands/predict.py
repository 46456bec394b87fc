"""``detection predict``: boxes of pictures, drawn and as COCO results."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor

from attn_core.engine import TrainedRun
from attn_core.engine.inputs import InputFile, PredictionTable, find_inputs
from detection.commands.ring3d import predict_samples

if TYPE_CHECKING:
    from detection.data.transforms import DetectionTransform


def predict(
    run: TrainedRun,
    inputs: Sequence[Path],
    out: Path,
    *,
    threshold: Annotated[float, typer.Option(help="Lowest score that is drawn and written.")] = 0.3,
    every: Annotated[int, typer.Option(help="Of videos, each so many frames one is searched.")] = 1,
) -> Iterator[str]:
    """``<out>/<folders>/<name>.png`` with boxes for each picture; all boxes in ``<out>/predictions.json`` and ``.csv``.

    Where the detector sees enhanced pictures, the enhanced one stands beside the input.

    Of videos, which must be named, each frame counts as a picture: ``<out>/<folders>/<name>_<frame>.png``, and
    ``frame`` in the table.

    Folders are searched at any depth and mirrored. The json is a list of COCO results with the file's name in each;
    ``image_id`` counts the pictures from 1, ``images.json`` names and sizes them all.

    Raises:
        ValueError: a threshold outside [0, 1], every below 1; a picture or a video's first frame that cannot be read, a
            folder without pictures.
    """
    from detection.data.coco import SUFFIXES, read_image
    from detection.data.transforms import DetectionTransform
    from detection.data.video import is_video, read_frames
    from detection.models.bevformer.detector import BEVFormerDFA3D
    from detection.pictures.boxes import Boxes, as_picture, beside, draw

    if every < 1:
        raise ValueError(f"--every must be at least 1, got {every}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"--threshold must be in [0, 1], got {threshold}")
    net: Any = getattr(run.model, "net", None)
    if isinstance(net, BEVFormerDFA3D):
        yield from predict_samples(run, inputs, out, threshold=threshold)
        return
    if net is None or "classes" not in run.data_info or "category_ids" not in run.data_info:
        raise ValueError(f"{run.directory}: not a run of a detector of boxes in pictures")
    files = find_inputs(inputs, SUFFIXES, what="pictures", out=out)
    for file in files:
        # all are readable, or nothing is written
        next(read_frames(file.path)) if is_video(file.path) else read_image(file.path)
    classes, categories = run.data_info["classes"], run.data_info["category_ids"]
    transform = DetectionTransform(**{"short_sides": (), **run.data_info.get("preprocess", {})})
    images: list[dict[str, Any]] = []
    with PredictionTable(out) as table:
        for number, (file, frame, pixels) in enumerate(_pictures(files, every), 1):
            place = {} if frame is None else {"frame": frame}
            found = detect(net, transform, pixels, run.device, threshold)
            images.append(
                {
                    "id": number,
                    "file_name": str(file.path),
                    **place,
                    "height": pixels.shape[1],
                    "width": pixels.shape[2],
                }
            )
            labels, scores = found["labels"].tolist(), found["scores"].tolist()
            for box, label, score in zip(found["boxes"].tolist(), labels, scores, strict=True):
                x0, y0, x1, y1 = (round(value, 2) for value in box)
                corner_and_size = [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]
                table.add(file, image_id=number, category_id=categories[label], category=classes[label], **place,
                          score=round(score, 5), bbox=corner_and_size)  # fmt: skip
            texts = [f"{classes[label]}: {100 * score:.0f} %" for label, score in zip(labels, scores, strict=True)]
            picture = file.output(out, ".png" if frame is None else f"_{frame:06d}.png")
            boxes = Boxes(found["boxes"], labels, texts)
            page = draw(pixels, boxes)
            if "enhanced" in found:
                page = beside(page, draw(as_picture(found["enhanced"], pixels.shape[-2:]), boxes))
            page.save(picture)
            yield (
                f"{file.path}{'' if frame is None else f' frame {frame}'}: {len(texts)} objects"
                + (f" ({', '.join(texts[:5])})" if texts else "")
                + f" → {picture}"
            )
    (out / "images.json").write_text(json.dumps(images, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if not table.rows:  # an empty list of results is an answer, too
        for path, text in zip(table.files, ("file,image_id,category_id,category,score,bbox\n", "[]\n"), strict=True):
            path.write_text(text)
    yield f"wrote {len(table.rows)} boxes to {table.files[1]} and {table.files[0].name}"


def _pictures(files: Sequence[InputFile], every: int) -> Iterator[tuple[InputFile, int | None, Tensor]]:
    """Each picture, and each frame of a video with its number."""
    from detection.data.coco import read_image
    from detection.data.video import is_video, read_frames

    for file in files:
        if is_video(file.path):
            yield from ((file, number, pixels) for number, pixels in read_frames(file.path, every=every))
        else:
            yield file, None, read_image(file.path)


def detect(
    net: Any, transform: "DetectionTransform", pixels: Tensor, device: torch.device, threshold: float
) -> Mapping[str, Tensor]:
    """Boxes of one picture (3, Y, X) uint8 in its pixels, scores of at least ``threshold`` and labels, on the CPU.

    Of an `Enhanced` detector also what it sees, as ``enhanced``.
    """
    from detection.layers.featenhancer import Enhanced
    from detection.tasks.detection import to_original

    image, _, _ = transform(pixels, torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
    found = net([image.to(device)])[0]
    kept = found["scores"] >= threshold
    boxes = to_original(found["boxes"][kept], image.shape[-2:], pixels.shape[-2:]).cpu()
    seen = {"enhanced": net.enhance([image.to(device)])[0]} if isinstance(net, Enhanced) else {}
    return {
        "boxes": boxes,
        "scores": found["scores"][kept].float().cpu(),
        "labels": found["labels"][kept].cpu(),
        **seen,
    }
