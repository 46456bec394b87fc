"""COCO's twelve numbers, by pycocotools, or by faster-coco-eval where that is installed; the numbers are equal.

Source: https://github.com/cocodataset/cocoapi. Checked in: ``metrics/test_coco_map.py``.
"""

import contextlib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from attn_core.engine import Metric

NAMES = ("mAP", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large",
         "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")  # fmt: skip


class CocoMap(Metric):
    """AP and AR of boxes in [0, 1]; −1 where there are no objects of a size.

    Reads per sample ``image_id``, ``annotations`` (COCO records of the picture, labels as ``category_id``), ``boxes``
    (xyxy in pixels of the original), ``scores`` and ``labels``.

    Args:
        library: ``"pycocotools"`` or ``"faster-coco-eval"``; None takes the faster one if it is installed.
        per_class: add ``AP/<category>`` for each class that has objects, by the name that the data set gives it.

    Raises: ValueError if the library is not installed.
    """

    def __init__(
        self, library: Literal["pycocotools", "faster-coco-eval"] | None = None, *, per_class: bool = False
    ) -> None:
        super().__init__()
        fast = importlib.util.find_spec("faster_coco_eval") is not None
        chosen = library or ("faster-coco-eval" if fast else "pycocotools")
        if importlib.util.find_spec(chosen.replace("-", "_")) is None:
            raise ValueError(f"CocoMap: {chosen} is not installed; pip install {chosen}")
        self.library = chosen
        self.per_class = per_class

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:  # noqa: ARG002  mmengine's signature
        """Keep boxes and records as plain lists."""
        for sample in data_samples:
            boxes = np.asarray(sample["boxes"], dtype=np.float64).reshape(-1, 4)
            boxes[:, 2:] -= boxes[:, :2]
            self.results.append(
                {
                    "image_id": sample["image_id"],
                    "annotations": sample["annotations"],
                    "boxes": boxes,
                    "scores": np.asarray(sample["scores"], dtype=np.float64),
                    "labels": np.asarray(sample["labels"], dtype=np.int64),
                }
            )

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """The twelve numbers over all samples of all processes."""
        truth: list[dict[str, Any]] = []
        found: list[dict[str, Any]] = []
        for sample in results:
            # Ids from 1: pycocotools takes id 0 for "no match".
            for record in sample["annotations"]:
                truth.append({**record, "id": len(truth) + 1, "image_id": sample["image_id"]})
            for box, score, label in zip(sample["boxes"], sample["scores"], sample["labels"], strict=True):
                found.append({"image_id": sample["image_id"], "category_id": int(label), "bbox": box.tolist(),
                              "score": float(score)})  # fmt: skip
        categories = sorted({record["category_id"] for record in (*truth, *found)})
        content = {
            "info": {},
            "images": [{"id": sample["image_id"]} for sample in results],
            "annotations": truth,
            "categories": [{"id": category, "name": str(category)} for category in categories],
        }
        if not found:  # loadRes([]) fails in pycocotools
            sizes = [record["area"] for record in truth if not record["iscrowd"]]
            some = [bool(sizes), any(a < 32**2 for a in sizes), any(32**2 <= a < 96**2 for a in sizes),
                    any(a >= 96**2 for a in sizes)]  # fmt: skip
            kinds = [0, 0, 0, 1, 2, 3, 0, 0, 0, 1, 2, 3]
            numbers = {name: 0.0 if some[kind] else -1.0 for name, kind in zip(NAMES, kinds, strict=True)}
            real = {record["category_id"] for record in truth if not record["iscrowd"]}
            return numbers | self._by_category({label: np.zeros(int(label in real)) for label in categories})
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = self._evaluate(content, found)
        numbers: dict[str, float] = dict(zip(NAMES, (float(value) for value in evaluation.stats[:12]), strict=True))
        precision = evaluation.eval["precision"][:, :, :, 0, 2]
        shares = {category: precision[:, :, index] for index, category in enumerate(categories)}
        return numbers | self._by_category({category: own[own > -1] for category, own in shares.items()})

    def _by_category(self, precisions: Mapping[int, Any]) -> dict[str, float]:
        """``AP/<name>`` of the categories that have objects; a name that stands twice gets its label."""
        if not self.per_class:
            return {}
        names: Sequence[str] = (self.dataset_meta or {}).get("classes", ())
        found = {}
        for label, own in precisions.items():
            name = names[label] if label < len(names) and names[label] else str(label)
            name = f"{name} ({label})" if list(names).count(name) > 1 else name
            if len(own):
                found[f"AP/{name}"] = float(own.mean())
        return found

    def _evaluate(self, content: dict[str, Any], found: list[dict[str, Any]]) -> Any:
        if self.library == "faster-coco-eval":
            from faster_coco_eval import COCO, COCOeval_faster

            truth: Any = COCO(content)
            evaluation: Any = COCOeval_faster(truth, truth.loadRes(found), "bbox")
        else:
            from pycocotools.coco import COCO as PlainCOCO
            from pycocotools.cocoeval import COCOeval

            truth = PlainCOCO()
            truth.dataset = content
            truth.createIndex()
            evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return evaluation
