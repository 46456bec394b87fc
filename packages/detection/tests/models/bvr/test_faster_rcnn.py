"""BVR in Faster R-CNN: the host without attention, targets and chosen points beside loops, training."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from detection.models.bvr.faster_rcnn import BVRRoIHeads, RegionKeypoints
from detection.models.bvr.head import KeyAttention, gaussian_radius
from detection.models.bvr.hosts import add_bvr, build_detector


def small(*, bvr: bool = True) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"region_dim": 32, "anchor_scale": 2.0, "min_size": 64, "max_size": 80, "num_heads": 4}
    return build_detector("faster_rcnn", 4, bvr=bvr, backbone="test_resnet", channels=16, strides=(8, 16, 32), **sizes)


def batch(boxes: list[list[float]]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    labels = torch.arange(len(boxes)) % 4
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    targets = [{"boxes": torch.tensor(boxes).view(-1, 4), "labels": labels}, empty]
    return [torch.rand(3, 64, 80), torch.rand(3, 70, 64)], targets


def test_without_output_projections_it_predicts_what_the_host_does() -> None:
    model = small(bvr=False).eval()
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.5)
    images = batch([])[0]
    with torch.no_grad():
        host = model(images)
        assert add_bvr(model, num_heads=4) is model
        other = model(images)
        for module in model.roi_heads.modules():
            if isinstance(module, KeyAttention):
                nn.init.zeros_(module.out_proj.weight)
        same = model(images)
    assert len(host[0]["boxes"]) > 3
    for a, b in zip(host, same, strict=True):
        for name, value in a.items():
            torch.testing.assert_close(b[name], value)
    assert host[0]["labels"].min() >= 0
    assert host[0]["labels"].max() < 4
    assert other[0]["scores"].shape != host[0]["scores"].shape or (other[0]["scores"] != host[0]["scores"]).any()


def test_every_parameter_learns() -> None:
    model = small()
    losses = model(*batch([[8.0, 9, 40, 50], [30, 20, 62, 44]]))
    names = {"loss_classifier", "loss_box_reg", "loss_point_cls", "loss_point_offset", "loss_objectness"}
    assert names <= set(losses)
    torch.stack(list(losses.values())).sum().backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not still


def test_pictures_without_objects_train() -> None:
    losses = small()(*batch([]))
    assert losses["loss_point_offset"] == 0
    assert all(loss.isfinite() for loss in losses.values())


def test_labels_count_from_zero() -> None:
    model = small()
    seen: list[Tensor] = []
    select = model.roi_heads.host.select_training_samples

    def spy(proposals: Any, targets: Any) -> Any:
        seen.extend(target["labels"] for target in targets)
        return select(proposals, targets)

    model.roi_heads.host.select_training_samples = spy
    images, targets = batch([[8.0, 9, 40, 50], [30, 20, 62, 44]])
    model(images, targets)
    assert seen[0].tolist() == [1, 2]  # 0 is torchvision's background
    assert targets[0]["labels"].tolist() == [0, 1]


def test_targets_equal_a_loop_over_cells() -> None:
    head = RegionKeypoints(8, cells=4).double()
    regions = torch.tensor([[10.0, 20, 42, 36], [0, 0, 8, 8]]).double()
    boxes = torch.tensor([[12.0, 19, 40, 37], [6, 6, 30, 30]]).double()
    windows = head.windows(regions)
    assert windows[0].tolist() == [2, 16, 50, 40]
    heat, shift, cell = head.targets(windows, boxes)
    for n in range(2):
        x1, y1, x2, y2 = boxes[n].tolist()
        left, top, right, bottom = windows[n].tolist()
        step_x, step_y = (right - left) / 4, (bottom - top) / 4
        sigma = (2 * float(gaussian_radius(boxes[n, 3] - boxes[n, 1], boxes[n, 2] - boxes[n, 0])) + 1) / 6
        for kind, (x, y) in enumerate([(x1, y1), (x2, y2), ((x1 + x2) / 2, (y1 + y2) / 2)]):
            if not (left <= x < right and top <= y < bottom):
                assert cell[n, kind] == -1
                assert heat[n, kind].max() == 0
                continue
            column, row = int((x - left) / step_x), int((y - top) / step_y)
            center_x, center_y = left + (column + 0.5) * step_x, top + (row + 0.5) * step_y
            assert cell[n, kind] == row * 4 + column
            expected = torch.tensor([(x - center_x) / step_x, (y - center_y) / step_y]).double()
            torch.testing.assert_close(shift[n, kind], expected)
            for other in range(16):
                dx, dy = (other % 4 - column) * step_x, (other // 4 - row) * step_y
                assert float(heat[n, kind, other]) == pytest.approx(math.exp(-(dx**2 + dy**2) / (2 * sigma**2)))


def test_a_chosen_point_lies_where_its_cell_and_offset_say() -> None:
    head = RegionKeypoints(3, cells=4).double()
    windows = torch.tensor([[8.0, 16, 40, 48]]).double()
    logits, offsets = torch.zeros(1, 3, 16).double(), torch.zeros(1, 3, 2, 16).double()
    logits[0, :, 6] = 2.0  # row 1, column 2
    offsets[0, 0, :, 6] = torch.tensor([0.25, -0.5]).double()
    maps = torch.randn(1, 3, 4, 4).double()
    keys = head.select(logits, offsets, maps, windows)
    assert keys.positions[:, 0].tolist() == [[30, 24], [28, 28], [28, 28]]
    torch.testing.assert_close(keys.features[1, 0], maps[0, :, 1, 2])
    halfway = (maps[0, :, 0] + maps[0, :, 1]) / 2
    torch.testing.assert_close(keys.features[0, 0], 0.75 * halfway[:, 2] + 0.25 * halfway[:, 3])
    assert float(keys.scores[0, 0]) == pytest.approx(1 / (1 + math.exp(-2)))


def test_mistakes_are_named() -> None:
    model = small()
    with pytest.raises(ValueError, match="the model has BVR already"):
        add_bvr(model)
    host = small(bvr=False).roi_heads
    host.has_mask = lambda: True
    with pytest.raises(ValueError, match="host must be a Faster R-CNN's, got one with masks or keypoints"):
        BVRRoIHeads(host, 16)
    assert isinstance(model, FasterRCNN)
