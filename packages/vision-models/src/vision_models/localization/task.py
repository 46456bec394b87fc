"""Training from labels of pictures, predicting classes and boxes."""

from typing import Any, Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from attn_core.engine import TaskModel, build
from vision_models.localization.boxes import scaled
from vision_models.localization.losses import batch_area_loss, normalization_loss
from vision_models.localization.rollout import rollout
from vision_models.localization.sat import SAT

MapKind = Literal["token", "cam", "rollout"]


class LocalizationTask(TaskModel):
    """SAT's losses, and maps of the object by one of three ways.

    Args:
        net: :class:`SAT`, or its recipe.
        map: ``"token"``: SAT's own; ``"cam"``: the right class's activations; ``"rollout"``: of attention.
        area: share of the picture that objects cover, over a batch; 0.25 for CUB, 0.35 for ImageNet.
        area_weight, norm_weight: of the two losses beside cross-entropy; they need SAT's map.
        label_smoothing: share of the target spread over all classes.

    Raises: ValueError: a map that the network does not have, or an unknown one; an area outside (0, 1).
    """

    def __init__(
        self,
        net: SAT | dict[str, Any],
        *,
        map: MapKind = "token",
        area: float = 0.25,
        area_weight: float = 1.0,
        norm_weight: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if map not in ("token", "cam", "rollout"):
            raise ValueError(f"LocalizationTask: map must be 'token', 'cam' or 'rollout', got map={map!r}")
        if not 0 < area < 1:
            raise ValueError(f"LocalizationTask: area must lie in (0, 1), got area={area}")
        self.net: SAT = build(net)
        blocks: Any = self.net.blocks
        if map == "token" and not any(block.attn.gated for block in blocks):
            raise ValueError("LocalizationTask: map='token' needs a network with last_k>0; use map='cam'")
        self.map = map
        self.area = area
        self.area_weight = area_weight
        self.norm_weight = norm_weight
        self.label_smoothing = label_smoothing

    def tensor(self, image: Float[Tensor, "B C Y X"], **_: Any) -> Float[Tensor, "B K"]:
        """The logits."""
        return self.net(image)

    def loss(self, image: Float[Tensor, "B C Y X"], label: Int[Tensor, " B"], **_: Any) -> dict[str, Tensor]:
        """Cross-entropy, and of a network with gates the losses of its map, weighted."""
        found = self.net.located(image)
        losses = {"loss_class": F.cross_entropy(found.logits.float(), label, label_smoothing=self.label_smoothing)}
        if found.map is not None:
            maps = found.map.float()
            losses["loss_area"] = self.area_weight * batch_area_loss(maps, self.area)
            losses["loss_norm"] = self.norm_weight * normalization_loss(maps)
        return losses

    def predict(self, image: Float[Tensor, "B C Y X"], label: Int[Tensor, " B"], **batch: Any) -> list[dict[str, Any]]:
        """Per sample ``{"scores": (K,), "label": int, "map": (Y, X) in [0, 1]}`` and what the batch says of boxes."""
        found = self.net.located(image)
        if self.map == "token":
            assert found.map is not None
            maps = found.map
        elif self.map == "cam":
            maps = found.classes[range(len(label)), label]
        else:
            maps = rollout(self.net, image)
        maps = scaled(maps.float(), (image.shape[2], image.shape[3])).cpu()
        scores = found.logits.float().softmax(-1).cpu()
        boxes = batch.get("boxes")
        return [
            {"scores": s, "label": int(t), "map": m, **({} if boxes is None else {"boxes": boxes[i].cpu()})}
            for i, (s, t, m) in enumerate(zip(scores, label.cpu(), maps, strict=True))
        ]
