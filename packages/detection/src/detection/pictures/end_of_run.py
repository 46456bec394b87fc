"""``predictions.png`` and ``categories.csv`` of a run: test pictures beside what is found in them, AP by category."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detection.data.events import collate_events
from detection.layers.featenhancer import Enhanced
from detection.metrics.coco_map import CocoMap
from detection.metrics.events import join_windows
from detection.pictures.boxes import Boxes, as_picture, sheet
from detection.pictures.fonts import counted
from detection.pictures.ring3d import draw_scenes
from detection.pictures.scanpath import FIXATIONS, TRUTH, draw_path, stacked
from detection.pictures.timeline import below, draw_timeline
from detection.scanpaths.searchers import decode
from detection.scanpaths.task import ScanpathTask
from detection.tasks.bevformer import BEVDetectionTask
from detection.tasks.detection import DetectionTask
from detection.tasks.events import EventTask

SHOWN = 6
THRESHOLD = 0.3


@torch.no_grad()
def draw_predictions(model: nn.Module, loader: Iterable[dict[str, Any]], path: Path) -> list[str]:
    """Six test pictures: what is there on the left, boxes with a score of at least 0.3 on the right.

    Where the detector sees enhanced pictures, the right shows those. Of a `BEVDetectionTask` one sample is drawn in all
    cameras and from above, of a `ScanpathTask` two shelves, of an `EventTask` the timelines of six videos; of other
    models nothing. Beside the picture stands ``categories.csv``; returns its name if it was written.
    """
    if isinstance(model, EventTask):
        draw_events(model, loader, path)
    if isinstance(model, BEVDetectionTask):
        draw_scenes(model, loader, path)
    if isinstance(model, ScanpathTask):
        draw_searches(model, loader, path)
    if not isinstance(model, DetectionTask):
        return []
    classes: Sequence[str] = loader.dataset.metainfo["classes"]  # pyright: ignore[reportAttributeAccessIssue]
    rows, titles = [], []
    enhanced = isinstance(model.net, Enhanced)
    for item, found in _found(model, loader):
        labels: list[int] = item["labels"].tolist()
        truth = Boxes(item["boxes"], labels, [str(classes[label]) for label in labels])
        kept = found["scores"] >= THRESHOLD
        labels, scores = found["labels"][kept].tolist(), found["scores"][kept].tolist()
        texts = [f"{classes[label]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
        pixels = (item["image"] * 255).round().to(torch.uint8)
        own = (as_picture(found["enhanced"], pixels.shape[-2:]),) if enhanced else ()
        rows.append((pixels, truth, Boxes(found["boxes"][kept], labels, texts), *own))
        best = f", the best has {found['scores'].max():.2f}" if len(found["scores"]) and not len(labels) else ""
        titles.append(
            (
                f"truth, image {item['image_id']}: {counted(len(truth.labels), 'object', 'objects')}",
                f"{'enhanced, ' if enhanced else ''}prediction: {counted(len(labels), 'box', 'boxes')} "
                f"with a score of at least {THRESHOLD}{best}",
            )
        )
    if rows:
        sheet(rows, titles).save(path)
    return write_categories(model, loader, path.with_name("categories.csv"))


def draw_searches(model: ScanpathTask, loader: Iterable[dict[str, Any]], path: Path) -> None:
    """Two shelves of the loader's data set, each with the most likely path and the one that was recorded."""
    dataset: Any = loader.dataset  # pyright: ignore[reportAttributeAccessIssue]
    device = next(model.parameters()).device
    pages, titles = [], []
    for index in range(min(2, len(dataset))):
        item, shelf = dataset[index], dataset.shelf(index)
        seen = model.net.encode(item["crops"].unsqueeze(0).to(device), torch.tensor([item["target"]], device=device))
        found = decode(model.net, seen, max_length=model.max_length)[0]
        pages += [draw_path(shelf, found), draw_path(shelf, shelf.path, color=TRUTH)]
        titles += [
            f"shelf {index}, most likely: {counted(len(found), *FIXATIONS)}",
            f"recorded: {counted(len(shelf.path), *FIXATIONS)}",
        ]
    stacked(pages, titles).save(path)


def draw_events(model: EventTask, loader: Iterable[dict[str, Any]], path: Path) -> None:
    """Timelines of the first six windows: what happens, and the best proposals after soft-NMS."""
    dataset: Any = loader.dataset  # pyright: ignore[reportAttributeAccessIssue]
    batch = collate_events([dataset[index] for index in range(min(SHOWN, len(dataset)))])
    device = next(model.parameters()).device
    pages = []
    for one in model.predict(**{**batch, "features": batch["features"].to(device)}):
        found = join_windows([one])
        title = f"{one['video']}: {counted(len(one['truth'].segments), 'event', 'events')}, the best proposals below"
        names = dataset.metainfo["classes"] if model.classes else ()
        pages.append(draw_timeline(title, one["truth"], found, one["duration"], names))
    below(pages).save(path)


def write_categories(model: DetectionTask, loader: Iterable[dict[str, Any]], table: Path) -> list[str]:
    """The AP of each category that has objects: as the run's ``result.json`` has it, or (in ``eval``) measured."""
    file = table.with_name("result.json")
    if file.is_file():
        metrics = json.loads(file.read_text()).get("test", {})
    else:
        metric = CocoMap(per_class=True)
        metric.dataset_meta = loader.dataset.metainfo  # pyright: ignore[reportAttributeAccessIssue]
        for batch in loader:
            metric.process(batch, model.predict(**{**batch, "image": _moved(batch["image"], model)}))
        metrics = metric.compute_metrics(metric.results)
    rows = [(name.removeprefix("AP/"), value) for name, value in metrics.items() if name.startswith("AP/")]
    if not rows:
        return []
    with open(table, "w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([("category", "AP"), *rows])
    return [table.name]


def _moved(images: Sequence[Tensor], model: nn.Module) -> list[Tensor]:
    device = next(model.parameters()).device
    return [image.to(device) for image in images]


def _found(
    model: DetectionTask, loader: Iterable[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Items of the loader with what the detector finds in them, on the CPU, as many as are shown."""
    count = 0
    for batch in loader:
        images = batch["image"][: SHOWN - count]
        moved = _moved(images, model)
        results = model.net(moved)
        if isinstance(model.net, Enhanced):
            seen = model.net.enhance(moved)
            results = [{**found, "enhanced": image} for found, image in zip(results, seen, strict=True)]
        for index, found in enumerate(results):
            item = {name: batch[name][index] for name in ("image", "boxes", "labels", "image_id")}
            yield (
                item,
                {name: value.float().cpu() if name != "labels" else value.cpu() for name, value in found.items()},
            )
        count += len(images)
        if count == SHOWN:
            return
