"""COCO's numbers equal pycocotools' on the same json, and the hard cases have values."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.metrics.coco_map import NAMES, CocoMap


def samples(count: int = 6) -> list[dict[str, Any]]:
    draw = np.random.RandomState(0)
    made = []
    for image in range(count):
        records, boxes = [], []
        for _ in range(draw.randint(1, 5)):
            x, y, w, h = (float(v) for v in draw.uniform((0, 0, 8, 8), (200, 200, 150, 150)))
            crowd = int(draw.rand() < 0.2)
            records.append(
                {"bbox": [x, y, w, h], "category_id": int(draw.randint(3)), "area": 0.8 * w * h, "iscrowd": crowd}
            )
            boxes += [np.array([x, y, x + w, y + h]) + draw.uniform(-6, 6, 4) for _ in range(2)]
        made.append(
            {
                "image_id": 10 * image,
                "annotations": records,
                "boxes": torch.tensor(np.array(boxes)),
                "scores": torch.rand(len(boxes), dtype=torch.float64),
                "labels": torch.tensor([records[i // 2]["category_id"] for i in range(len(boxes))]),
            }
        )
    return made


def evaluated(metric: CocoMap, given: list[dict[str, Any]]) -> dict[str, float]:
    metric.process(None, given)
    return metric.compute_metrics(metric.results)


@pytest.mark.parametrize("library", ["pycocotools", "faster-coco-eval"])
def test_all_numbers_equal_pycocotools(library: Any) -> None:
    torch.manual_seed(0)
    given = samples()
    truth: Any = COCO()
    truth.dataset = {
        "images": [{"id": s["image_id"]} for s in given],
        "categories": [{"id": c} for c in range(3)],
        "annotations": [],
    }
    found = []
    for sample in given:
        for record in sample["annotations"]:
            number = len(truth.dataset["annotations"]) + 1
            truth.dataset["annotations"].append({**record, "id": number, "image_id": sample["image_id"]})
        for (x0, y0, x1, y1), score, label in zip(
            sample["boxes"].tolist(), sample["scores"].tolist(), sample["labels"].tolist(), strict=True
        ):
            found.append({"image_id": sample["image_id"], "category_id": label, "score": score,
                          "bbox": [x0, y0, x1 - x0, y1 - y0]})  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        expected = COCOeval(truth, truth.loadRes(found), "bbox")
        expected.evaluate()
        expected.accumulate()
        expected.summarize()
    numbers = evaluated(CocoMap(library), given)
    assert [numbers[name] for name in NAMES] == pytest.approx(expected.stats.tolist(), abs=1e-12)
    assert 0.1 < numbers["mAP"] < 0.99


def test_no_predictions_score_zero_and_absent_sizes_minus_one() -> None:
    given = [{**s, "boxes": torch.empty(0, 4), "scores": torch.empty(0), "labels": torch.empty(0)} for s in samples()]
    for sample in given:
        for record in sample["annotations"]:
            record["area"] = 5000.0
    numbers = evaluated(CocoMap(), given)
    assert numbers["mAP"] == 0 == numbers["mAP_medium"]
    assert numbers["mAP_small"] == -1


def test_perfect_boxes_score_one_for_each_class() -> None:
    box = [5.0, 5.0, 40.0, 40.0]
    given = [
        {"image_id": i, "annotations": [{"bbox": box, "category_id": i, "area": 1600.0, "iscrowd": 0}],
         "boxes": torch.tensor([[5.0, 5, 45, 45]]), "scores": torch.tensor([0.9]), "labels": torch.tensor([i])}
        for i in range(2)
    ]  # fmt: skip
    metric = CocoMap(per_class=True)
    metric.dataset_meta = {"classes": ["Katze 猫", "dog", "never"]}
    numbers = evaluated(metric, given)
    assert numbers["mAP"] == pytest.approx(1.0) == numbers["AP/Katze 猫"] == numbers["AP/dog"]
    assert "AP/never" not in numbers
    metric.dataset_meta = {"classes": ["x", "x"]}
    nothing = [{**sample, "boxes": torch.empty(0, 4), "scores": [], "labels": []} for sample in given]
    metric.results.clear()
    assert [name for name in evaluated(metric, nothing) if name.startswith("AP/")] == ["AP/x (0)", "AP/x (1)"]
    assert not [name for name in evaluated(CocoMap(), given) if name.startswith("AP/")]


def test_boxes_in_pictures_without_objects_are_counted_without_an_error() -> None:
    given = [{"image_id": 1, "annotations": [], "boxes": torch.tensor([[5.0, 5, 45, 45]]), "scores": [0.9],
              "labels": [0]}]  # fmt: skip
    assert set(evaluated(CocoMap(per_class=True), given).values()) == {-1.0}


def test_an_absent_library_is_named() -> None:
    with pytest.raises(ValueError, match="other_library is not installed"):
        CocoMap("other_library")  # pyright: ignore[reportArgumentType]
