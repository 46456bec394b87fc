"""Training and evaluation of any detector that speaks torchvision's protocol, through the engine.

In training mode ``net(images, targets)`` gives a dict of losses, in eval mode ``net(images)`` a list of dicts of
``boxes`` (N, 4) xyxy in pixels of the given image, ``scores`` and ``labels``. Plain-DETR and torchvision's own
detectors do. Checked in: ``losses/test_set_criterion.py``.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from attn_core.engine import TaskModel, build


class DetectionTask(TaskModel):
    """Losses and predictions of batches as `detection.data.collate_detection` makes them.

    Args:
        net: the detector, or its recipe ``dict(type=..., ...)``.
    """

    def __init__(self, net: nn.Module | dict[str, Any]) -> None:
        super().__init__()
        self.net: nn.Module = build(net)

    def loss(
        self,
        image: Sequence[Float[Tensor, "3 _ _"]],
        boxes: Sequence[Float[Tensor, "_ 4"]],
        labels: Sequence[Int[Tensor, " _"]],
        **_: Any,
    ) -> dict[str, Tensor]:
        """The detector's losses, each under a name that begins with ``loss_``."""
        targets = [{"boxes": own, "labels": kinds} for own, kinds in zip(boxes, labels, strict=True)]
        losses = self.net(list(image), targets)
        return {name if name.startswith("loss") else f"loss_{name}": value for name, value in losses.items()}

    def predict(
        self,
        image: Sequence[Float[Tensor, "3 _ _"]],
        image_id: Sequence[int],
        original_size: Sequence[tuple[int, int]],
        annotations: Sequence[list[dict[str, Any]]],
        **_: Any,
    ) -> list[dict[str, Any]]:
        """Per picture boxes in pixels of the original, scores and labels on the CPU, and what the metric needs."""
        samples = []
        for found, pixels, number, size, records in zip(
            self.net(list(image)), image, image_id, original_size, annotations, strict=True
        ):
            samples.append(
                {
                    "boxes": to_original(found["boxes"], pixels.shape[-2:], size).cpu(),
                    "scores": found["scores"].float().cpu(),
                    "labels": found["labels"].cpu(),
                    "image_id": number,
                    "annotations": records,
                }
            )
        return samples


def to_original(boxes: Float[Tensor, "N 4"], size: Sequence[int], original_size: Sequence[int]) -> Float[Tensor, "N 4"]:
    """xyxy boxes of a resized image (Y, X) in pixels of its original."""
    y, x = original_size[0] / size[0], original_size[1] / size[1]
    return boxes.float() * boxes.new_tensor([x, y, x, y], dtype=boxes.float().dtype)
