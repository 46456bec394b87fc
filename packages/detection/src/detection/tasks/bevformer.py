"""Training of the bird's-eye-view detector: CenterPoint's targets and losses, plus the supervision of depth.

Source: Yin et al., Center-based 3D Object Detection and Tracking, CVPR 2021, arXiv 2006.11275; losses of depth:
`detection.layers.dfa3d.DepthHead`. Checked in: ``models/bevformer/test_detector.py``.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attn_core.engine import TaskModel, build
from detection.layers.dfa3d import nearest_depth_bin
from detection.models.bevformer.detector import BEVFormerDFA3D, BEVOutput


def center_targets(
    boxes: Float[Tensor, "N 9"],
    labels: Int[Tensor, " N"],
    num_classes: int,
    bev_size: tuple[int, int],
    region: tuple[float, ...],
    *,
    min_radius: float = 1.0,
) -> tuple[Float[Tensor, "K rows columns"], Int[Tensor, " M"], Float[Tensor, "M 10"]]:
    """Gaussian heatmaps, and cell and box code of every object whose center lies in the region.

    The Gaussian is 1 at the cell of the center; its σ is ⅔ of half the shorter side in cells, or of ``min_radius``.
    """
    rows, columns = bev_size
    x0, y0, _, x1, y1, _ = region
    step_x, step_y = (x1 - x0) / columns, (y1 - y0) / rows
    heat = boxes.new_zeros(num_classes, rows, columns)
    x, y = (boxes[:, 0] - x0) / step_x, (boxes[:, 1] - y0) / step_y
    inside = (x >= 0) & (x < columns) & (y >= 0) & (y < rows)
    boxes, labels, x, y = boxes[inside], labels[inside], x[inside], y[inside]
    column, row = x.long(), y.long()
    across = torch.arange(columns, device=boxes.device)
    along = torch.arange(rows, device=boxes.device)
    radius = (boxes[:, 3:5].amin(1) / (2 * min(step_x, step_y))).clamp(min=min_radius)
    square = (across.view(1, 1, -1) - column.view(-1, 1, 1)) ** 2 + (along.view(1, -1, 1) - row.view(-1, 1, 1)) ** 2
    bumps = torch.exp(-square / (2 * (radius * (2 / 3)).view(-1, 1, 1) ** 2))
    for label in range(num_classes):
        if (labels == label).any():
            heat[label] = bumps[labels == label].amax(0)
    yaw = boxes[:, 6:7]
    code = torch.cat(
        [
            torch.stack([x - column - 0.5, y - row - 0.5], 1),
            boxes[:, 2:3],
            boxes[:, 3:6].log(),
            yaw.sin(),
            yaw.cos(),
            boxes[:, 7:9],
        ],
        1,
    )
    return heat, row * columns + column, code


def center_focal_loss(logits: Float[Tensor, "..."], target: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Focal loss of heatmaps (CornerNet: exponents 2 and 4), divided by the number of centers."""
    log_p, log_rest = nn.functional.logsigmoid(logits), nn.functional.logsigmoid(-logits)
    p = log_p.exp()
    center = target == 1
    positive = torch.where(center, log_p * (1 - p) ** 2, 0.0)
    negative = torch.where(center, 0.0, log_rest * p**2 * (1 - target) ** 4)
    return -(positive.sum() + negative.sum()) / center.sum().clamp(min=1)


class BEVDetectionTask(TaskModel):
    """Losses ``loss_heatmap``, ``loss_box`` and, where depth is predicted, ``loss_depth``.

    Args:
        net: a `BEVFormerDFA3D`, or its recipe.
        box_weight, velocity_weight, depth_weight: of the losses; velocity is part of the box code.
    """

    def __init__(
        self,
        net: nn.Module | dict[str, Any],
        *,
        box_weight: float = 0.5,
        velocity_weight: float = 0.1,
        depth_weight: float = 1.0,
    ) -> None:
        super().__init__()
        built = build(net)
        if not isinstance(built, BEVFormerDFA3D):
            raise ValueError(f"BEVDetectionTask: net must be a BEVFormerDFA3D, got {type(built).__name__}")
        self.net = built
        self.box_weight = box_weight
        self.velocity_weight = velocity_weight
        self.depth_weight = depth_weight

    def tensor(self, image: Tensor, lidar2img: Tensor, depth: Tensor | None = None, **_: Any) -> BEVOutput:
        """The raw output of the network."""
        return self.net(image, lidar2img, depth)

    def loss(
        self, image: Tensor, lidar2img: Tensor, depth: Tensor, boxes: list[Tensor], labels: list[Tensor], **_: Any
    ) -> dict[str, Tensor]:
        """All losses of a batch as `detection.data.ring3d.collate_scenes` makes it."""
        output = self.net(image, lidar2img, depth)
        heat, code_error, objects = [], output.boxes.new_zeros(()), 0
        weight = output.boxes.new_ones(output.boxes.shape[1])
        weight[8:] = self.velocity_weight
        for b, (own, kinds) in enumerate(zip(boxes, labels, strict=True)):
            target, cells, code = center_targets(own, kinds, self.net.num_classes, self.net.bev_size, self.net.region)
            heat.append(target)
            found = output.boxes[b].float().flatten(1)[:, cells].T
            code_error = code_error + ((found - code).abs() * weight).sum()
            objects += len(cells)
        losses = {
            "loss_heatmap": center_focal_loss(output.heatmap.float(), torch.stack(heat)),
            "loss_box": self.box_weight * code_error / max(1, objects),
        }
        head = self.net.pts_dpt_head
        if head is not None and output.depth_logits is not None:
            bins = nearest_depth_bin(depth.flatten(0, 1), self.net.stride, self.net.depth_bound)
            losses["loss_depth"] = self.depth_weight * head.loss(output.depth_logits, bins)
        return losses

    def predict(
        self, image: Tensor, lidar2img: Tensor, depth: Tensor, boxes: list[Tensor], labels: list[Tensor], **_: Any
    ) -> list[dict[str, Any]]:
        """Per sample ``{"boxes", "scores", "labels", "gt_boxes", "gt_labels"}`` on the CPU."""
        found = self.net.decode(self.net(image, lidar2img, depth))
        return [
            {key: value.cpu() for key, value in sample.items()} | {"gt_boxes": own.cpu(), "gt_labels": kinds.cpu()}
            for sample, own, kinds in zip(found, boxes, labels, strict=True)
        ]
