"""What the Runner trains: a network with its loss and its predictions.

A data set item is a flat dict of tensors and numbers, such as ``{"image": (C, Y, X) float32, "label": int}``. Items are
stacked by ``torch.utils.data.default_collate`` (set ``collate_fn`` in the data loader for anything else), moved to the
device, and their keys become the keyword arguments of `TaskModel.loss` and `TaskModel.predict`:

    item {"image", "label"} → batch {"image": (B, C, Y, X), "label": (B,)} → loss(image, label) / predict(image, label)

`predict` returns one dict per sample, in the order of the batch; these dicts go to the metrics.
"""

from abc import abstractmethod
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core.engine.names import build


class TaskModel(BaseModel):
    """Base of everything that is trained: subclasses write `loss` and `predict`.

    Networks initialize themselves in their constructors (after the Runner has set the seed). Randomness inside
    `loss` may come from torch's, numpy's or Python's global generators: the Runner seeds them from (seed, step, rank)
    before every step, so that a resumed run draws the same numbers.
    """

    @abstractmethod
    def loss(self, *args: Any, **batch: Any) -> dict[str, Tensor]:
        """Scalar losses by name; those with ``loss`` in their name are summed and minimized, all are logged."""

    @abstractmethod
    def predict(self, *args: Any, **batch: Any) -> list[dict[str, Any]]:
        """One plain dict per sample: what the metrics and the pictures need, targets included."""

    def tensor(self, *args: Any, **batch: Any) -> Any:
        """The raw output of the network, for tools that call ``model(**batch)``."""
        raise NotImplementedError(f"{type(self).__name__} defines no raw output; use mode='loss' or mode='predict'")

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # mmengine's names inputs and data_samples
        self, *, mode: Literal["tensor", "loss", "predict"] = "tensor", **batch: Any
    ) -> Any:
        """Called by the Runner with ``mode="loss"`` in training and ``mode="predict"`` in validation and test."""
        if mode == "loss":
            return self.loss(**batch)
        if mode == "predict":
            return self.predict(**batch)
        return self.tensor(**batch)

    def init_weights(self) -> None:
        """Nothing: mmengine's version would call ``init_weights`` of every child and undo loaded weights."""


class ClassificationTask(TaskModel):
    """Cross-entropy training of a network image → logits.

    Args:
        net: The network, or its recipe ``dict(type=..., ...)``; called with ``image`` (B, C, Y, X), gives (B, K).
        label_smoothing: Share of the target spread over all classes.
        cutmix: Parameter of the Beta distribution of CutMix; 0 switches it off.
        mixup: Parameter of the Beta distribution of mixup; 0 switches it off. With both, each batch draws one.
    """

    def __init__(
        self,
        net: nn.Module | dict[str, Any],
        *,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        super().__init__()
        self.net: nn.Module = build(net)
        self.label_smoothing = label_smoothing
        self.mixup = mixup
        self.cutmix = cutmix

    def tensor(self, image: Float[Tensor, "B C Y X"], **_: Any) -> Float[Tensor, "B K"]:
        """The logits."""
        return self.net(image)

    def loss(self, image: Float[Tensor, "B C Y X"], label: Int[Tensor, " B"], **_: Any) -> dict[str, Tensor]:
        """``{"loss": cross-entropy}``; keys of the batch other than image and label are ignored."""
        if not (self.mixup or self.cutmix):
            logits = self.net(image)
            return {"loss": F.cross_entropy(logits.float(), label, label_smoothing=self.label_smoothing)}
        image, partner, share = self._mix(image)
        logits = self.net(image).float()
        own = F.cross_entropy(logits, label, label_smoothing=self.label_smoothing)
        other = F.cross_entropy(logits, label[partner], label_smoothing=self.label_smoothing)
        return {"loss": share * own + (1 - share) * other}

    def predict(self, image: Float[Tensor, "B C Y X"], label: Int[Tensor, " B"], **_: Any) -> list[dict[str, Any]]:
        """Per sample ``{"scores": (K,) probabilities, "label": int}``."""
        scores = self.net(image).float().softmax(-1).cpu()
        return [{"scores": s, "label": int(target)} for s, target in zip(scores, label.cpu(), strict=True)]

    def _mix(self, image: Tensor) -> tuple[Tensor, Tensor, float]:
        """Blend each image with a partner (mixup) or paste a rectangle of it (CutMix)."""
        use_cutmix = bool(self.cutmix) and (not self.mixup or bool(torch.rand(()) < 0.5))
        alpha = self.cutmix if use_cutmix else self.mixup
        share = float(torch.distributions.Beta(alpha, alpha).sample())
        partner = torch.randperm(image.shape[0]).to(image.device)
        if not use_cutmix:
            return share * image + (1 - share) * image[partner], partner, share
        height, width = image.shape[-2:]
        cut_y, cut_x = round(height * (1 - share) ** 0.5), round(width * (1 - share) ** 0.5)
        top = int(torch.randint(height - cut_y + 1, ()))
        left = int(torch.randint(width - cut_x + 1, ()))
        image = image.clone()
        window = (..., slice(top, top + cut_y), slice(left, left + cut_x))
        image[window] = image[partner][window]
        return image, partner, 1 - cut_y * cut_x / (height * width)
