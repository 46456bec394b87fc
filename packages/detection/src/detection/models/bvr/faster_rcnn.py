"""BVR in torchvision's Faster R-CNN: the features of regions attend to corners and centers of objects.

Paper: as `detection.models.bvr.head`, which names Faster R-CNN as a host (+1.9 AP); the official code has dense hosts
only, so there are no checkpoints. From the paper: keys come from features that RoIAlign cuts out, through a head like
Mask R-CNN's, and have interpolated features; the regions are the queries. Ours, because nothing is published about it:
the head reads the first 100 proposals of each image in a window 1.5 times as wide and high, because corners lie on the
border of a good proposal, and has one heatmap for each type of point, trained as those of the dense hosts;
classification attends to centers and box regression to corners, as there; the geometry table is read as there, too.

`BVRRoIHeads` takes the place of a model's ``roi_heads`` and keeps its parts and weights. With the attention's output
projections at zero it predicts what the host does. Checked in: ``models/bvr/test_faster_rcnn.py``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.ops import MultiScaleRoIAlign, box_iou

from detection.models.bvr.head import (
    POINT_TYPES,
    BVRTransformer,
    ConvModule,
    Keys,
    PointType,
    RelativeGeometry,
    gaussian_focal_loss,
    gaussian_radius,
)

Targets = Sequence[Mapping[str, Tensor]]


class RegionKeypoints(nn.Module):
    """Corners and centers of the objects in regions: for each type one point, its score and its features.

    Args:
        dim: channels of the maps. cells: side of the grid in a window. window: its side in sides of the region.
        stacked_convs: 3×3 convolutions with ReLU, for all types.

    Shapes: maps (n, dim, cells, cells) of n windows (n, 4: x1, y1, x2, y2 in pixels) → heatmap logits and offsets in
    cells, (n, 3, cells²) and (n, 3, 2, cells²).
    """

    def __init__(self, dim: int, cells: int = 14, *, window: float = 1.5, stacked_convs: int = 4) -> None:
        super().__init__()
        self.cells, self.window = cells, window
        self.layers = nn.Sequential(*(ConvModule(dim, dim, norm=True) for _ in range(stacked_convs)))
        self.heat = nn.Conv2d(dim, len(POINT_TYPES), 1)
        self.offset = nn.Conv2d(dim, 2 * len(POINT_TYPES), 1)
        for layer, bias in ((self.heat, -4.595), (self.offset, 0.0)):  # probability 0.01
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.constant_(layer.bias, bias)  # pyright: ignore[reportArgumentType]

    def forward(
        self, maps: Float[Tensor, "n C y x"]
    ) -> tuple[Float[Tensor, "n 3 cells"], Float[Tensor, "n 3 2 cells"]]:
        """Logits of each point type in each cell, and its offset within the cell as (x, y)."""
        x = self.layers(maps)
        return self.heat(x).flatten(2), self.offset(x).flatten(2).unflatten(1, (len(POINT_TYPES), 2))

    def windows(self, boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
        """Boxes made larger around their center."""
        center, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) * (self.window / 2)
        return torch.cat([center - half, center + half], 1)

    def cell_positions(self, windows: Float[Tensor, "n 4"]) -> Float[Tensor, "n cells 2"]:
        """Pixels (x, y) of the centers of a window's cells, row by row."""
        steps = (torch.arange(self.cells, device=windows.device, dtype=windows.dtype) + 0.5) / self.cells
        grid = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).flatten(0, 1).flip(-1)
        return windows[:, None, :2] + grid * (windows[:, None, 2:] - windows[:, None, :2])

    def select(
        self, logits: Tensor, offsets: Tensor, maps: Float[Tensor, "n C y x"], windows: Float[Tensor, "n 4"]
    ) -> Keys:
        """The best point of each window and type, as Keys (3, n, …): features are read where the point lies."""
        scores, cell = logits.sigmoid().max(2)
        shift = offsets.gather(3, cell[:, :, None, None].expand(-1, -1, 2, -1)).squeeze(3)
        in_grid = torch.stack([cell % self.cells, cell // self.cells], -1) + 0.5 + shift  # (n, 3, 2), in cells
        read = F.grid_sample(maps, (2 * in_grid / self.cells - 1).unsqueeze(1), align_corners=False)  # (n, C, 1, 3)
        size = (windows[:, 2:] - windows[:, :2]).unsqueeze(1)
        positions = windows[:, None, :2] + in_grid / self.cells * size
        return Keys(read.squeeze(2).permute(2, 0, 1), positions.transpose(0, 1), scores.T)

    def targets(
        self, windows: Float[Tensor, "n 4"], boxes: Float[Tensor, "n 4"]
    ) -> tuple[Float[Tensor, "n 3 cells"], Float[Tensor, "n 3 2"], Int[Tensor, "n 3"]]:
        """Heat around the cell nearest to a box's point, offset of the point, and that cell; −1 outside the window."""
        cells = self.cell_positions(windows)
        points = torch.stack([boxes[:, :2], boxes[:, 2:], (boxes[:, :2] + boxes[:, 2:]) / 2], 1)
        size = (windows[:, 2:] - windows[:, :2]).unsqueeze(1)
        place = (points - windows[:, None, :2]) / size * self.cells
        inside = ((place >= 0) & (place < self.cells)).all(-1)
        column, row = place.clamp(0, self.cells - 1e-3).long().unbind(-1)
        cell = row * self.cells + column
        nearest = cells.gather(1, cell.unsqueeze(-1).expand(-1, -1, 2))
        sigma = (2 * gaussian_radius(boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]) + 1) / 6
        squares = (cells.unsqueeze(1) - nearest.unsqueeze(2)).square().sum(-1)
        heat = torch.exp(-0.5 * squares / sigma.view(-1, 1, 1) ** 2) * inside.unsqueeze(-1)
        return heat, place - place.floor() - 0.5, torch.where(inside, cell, -1)

    def loss(
        self, logits: Tensor, offsets: Tensor, windows: Float[Tensor, "n 4"], boxes: Float[Tensor, "n 4"]
    ) -> dict[str, Tensor]:
        """``loss_point_cls`` (Gaussian focal, 0.25) and ``loss_point_offset`` (smooth L1), per point in its window.

        ``boxes`` are the objects of the windows, NaN where there is none.
        """
        objects = boxes.isfinite().all(1)
        heat, shift = torch.zeros_like(logits, dtype=torch.float32), offsets.new_zeros(()).float()
        goal, wanted, cell = self.targets(windows[objects], boxes[objects])
        heat[objects] = goal
        found = offsets[objects].float().gather(3, cell.clamp(min=0)[:, :, None, None].expand(-1, -1, 2, -1)).squeeze(3)
        error = F.smooth_l1_loss(found, wanted, reduction="none").sum(-1)
        positives = (cell >= 0).sum().clamp(min=1)
        shift = shift + (error * (cell >= 0)).sum()
        return {
            "loss_point_cls": 0.25 * gaussian_focal_loss(logits.float(), heat) / positives,
            "loss_point_offset": shift / positives,
        }


class BVRRoIHeads(nn.Module):
    """A Faster R-CNN's second stage, enhanced; the parts of ``host`` stay in it under their names.

    Args:
        host: torchvision's, with a box head that ends in vectors and a `FastRCNNPredictor`.
        dim: channels of the maps.
        num_heads: of the attention. base_size: of the geometry table. unit: its step in pixels.
        proposals: so many of an image give keys. total: so many keys of each type stay.
    """

    def __init__(
        self,
        host: RoIHeads,
        dim: int = 256,
        *,
        num_heads: int = 8,
        base_size: int = 400,
        unit: float = 8.0,
        proposals: int = 100,
        total: int = 50,
    ) -> None:
        super().__init__()
        if host.has_mask() or host.has_keypoint():
            raise ValueError("BVRRoIHeads: host must be a Faster R-CNN's, got one with masks or keypoints")
        self.host = host
        width = host.box_predictor.cls_score.in_features
        self.keypoint_head = RegionKeypoints(dim)
        self.keypoint_pool = MultiScaleRoIAlign(host.box_roi_pool.featmap_names, self.keypoint_head.cells, 2)
        self.key_proj = nn.Sequential(nn.Linear(dim, width), nn.ReLU())
        geometry = [RelativeGeometry(num_heads, min(256, 4 * (width // 4)), base_size) for _ in range(2)]
        self.cls_transformer = BVRTransformer(width, num_heads, 1, geometry=geometry[0])
        self.reg_transformer = BVRTransformer(width, num_heads, 2, geometry=geometry[1])
        self.unit, self.proposals, self.total = unit, proposals, total

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As torchvision's ``RoIHeads``: detections in eval mode, losses in training."""
        host = self.host
        keys, losses = self.keys(features, [own[: self.proposals] for own in proposals], image_shapes, targets)
        labels: list[Tensor] = []
        goals: list[Tensor] = []
        if self.training:
            proposals, _, labels, goals = host.select_training_samples(proposals, targets)
        x = host.box_head(host.box_roi_pool(features, proposals, image_shapes))
        cls, reg = self.enhance(x, proposals, keys)
        logits = host.box_predictor.cls_score(cls)
        deltas = host.box_predictor.bbox_pred(reg)
        if self.training:
            classification, regression = fastrcnn_loss(logits, deltas, labels, goals)
            return [], {"loss_classifier": classification, "loss_box_reg": regression, **losses}
        found = host.postprocess_detections(logits, deltas, proposals, image_shapes)
        names = ("boxes", "scores", "labels")
        return [dict(zip(names, image, strict=True)) for image in zip(*found, strict=True)], {}

    def keys(
        self,
        features: dict[str, Tensor],
        regions: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[list[dict[PointType, Keys]], dict[str, Tensor]]:
        """The best keys of every image by type, and in training the losses of the points; objects are regions, too."""
        head = self.keypoint_head
        if self.training and targets is not None:
            regions = [torch.cat([own, target["boxes"]]) for own, target in zip(regions, targets, strict=True)]
        windows = [head.windows(own) for own in regions]
        maps = self.keypoint_pool(features, windows, image_shapes)
        logits, offsets = head(maps)
        chosen: list[dict[PointType, Keys]] = []
        start = 0
        for own in windows:
            rows = slice(start, start + len(own))
            start += len(own)
            points = head.select(logits[rows], offsets[rows], maps[rows], own)
            of_type: dict[PointType, Keys] = {}
            for kind, *parts in zip(POINT_TYPES, *points, strict=True):
                best = parts[2].topk(min(self.total, len(own))).indices
                of_type[kind] = Keys(*(part[best].unsqueeze(0) for part in parts))
            chosen.append(of_type)
        if not self.training or targets is None:
            return chosen, {}
        objects = torch.cat([_objects(own, target["boxes"]) for own, target in zip(regions, targets, strict=True)])
        return chosen, head.loss(logits, offsets, torch.cat(windows), objects)

    def enhance(
        self, x: Float[Tensor, "n C"], proposals: list[Tensor], keys: Sequence[Mapping[PointType, Keys]]
    ) -> tuple[Float[Tensor, "n C"], Float[Tensor, "n C"]]:
        """Features of the regions of all images for classification and for box regression."""
        cls, reg = [], []
        for own, boxes, points in zip(x.split([len(p) for p in proposals]), proposals, keys, strict=True):
            centers = (boxes[:, :2] + boxes[:, 2:]) / 2
            wide = {kind: key._replace(features=self.key_proj(key.features)) for kind, key in points.items()}
            corners = [wide["top_left_corner"], wide["bottom_right_corner"]]
            query = own.unsqueeze(0)
            cls.append(self.cls_transformer.attend(query, centers, [wide["center"]], self.unit)[0])
            reg.append(self.reg_transformer.attend(query, centers, corners, self.unit)[0])
        return torch.cat(cls), torch.cat(reg)


def _objects(regions: Float[Tensor, "n 4"], boxes: Float[Tensor, "m 4"]) -> Float[Tensor, "n 4"]:
    """The box that a region overlaps most, NaN where no IoU reaches 0.5."""
    if not len(boxes):
        return torch.full_like(regions, torch.nan)
    overlap, which = box_iou(regions, boxes).max(1)
    return torch.where((overlap >= 0.5).unsqueeze(1), boxes[which], torch.nan)


class LabelsFromZero(FasterRCNN):
    """Torchvision's Faster R-CNN with labels 0 … num_classes − 1, as the other hosts have; inside, 0 is background."""

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """As torchvision's detector, which counts the background as label 0; here labels begin at 0 without it."""
        if targets is not None:
            targets = [{**target, "labels": target["labels"] + 1} for target in targets]
        found: Any = super().forward(images, targets)
        return found if self.training else [{**image, "labels": image["labels"] - 1} for image in found]


def faster_rcnn(
    body: nn.Module,
    num_classes: int,
    *,
    anchors: Any,
    maps: Sequence[str],
    region_dim: int,
    min_size: int,
    max_size: int,
    score_thresh: float,
    nms_thresh: float,
) -> LabelsFromZero:
    """Torchvision's Faster R-CNN on a pyramid; RoIAlign reads ``maps``, vectors of regions have ``region_dim``."""
    pool = MultiScaleRoIAlign(list(maps), 7, 2)
    channels: Any = body.out_channels
    return LabelsFromZero(
        body,
        rpn_anchor_generator=anchors,
        box_roi_pool=pool,
        box_head=TwoMLPHead(channels * 7**2, region_dim),
        box_predictor=FastRCNNPredictor(region_dim, num_classes + 1),
        min_size=min_size,
        max_size=max_size,
        box_score_thresh=score_thresh,
        box_nms_thresh=nms_thresh,
    )
