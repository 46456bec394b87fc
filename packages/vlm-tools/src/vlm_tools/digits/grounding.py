"""Training of Sentence Attention Blocks: the mask of what answers a question, scored by intersection over union."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from attn_core.engine import Metric, TaskModel, build
from vlm_tools.data.digits_world import SIZE
from vlm_tools.data.grounded_scenes import question
from vlm_tools.data.hashed_words import hashed_words
from vlm_tools.data.words import DIGITS
from vlm_tools.models.sentence_blocks import SentenceBlocks
from vlm_tools.pictures.overlay import overlay, strip


def mask_iou(found: Bool[Tensor, "B *Y"], truth: Bool[Tensor, "B *Y"]) -> Float[Tensor, " B"]:
    """Intersection over union of each mask with its truth; 1 where both are empty.

    Raises:
        ValueError: shapes that differ, masks that are not bool.
    """
    if found.shape != truth.shape or found.dtype != torch.bool or truth.dtype != torch.bool:
        raise ValueError(
            f"mask_iou: both masks must be bool and of one shape, got {tuple(found.shape)} of {found.dtype} and "
            f"{tuple(truth.shape)} of {truth.dtype}"
        )
    both, either = ((op(found, truth)).flatten(1).sum(1).double() for op in (torch.logical_and, torch.logical_or))
    return torch.where(either > 0, both / either.clamp_min(1), 1.0)


class GroundingTask(TaskModel):
    """Binary cross-entropy of the mask of one class.

    Args:
        net: `SentenceBlocks`, or its recipe.
        positive_weight: of the answer's pixels in the loss; more than 1 where answers are small.
        threshold: probability from which a pixel belongs to the answer.

    Raises:
        ValueError: a network of several classes, a weight that is not positive, a threshold outside (0, 1).
    """

    def __init__(
        self, net: SentenceBlocks | dict[str, Any], *, positive_weight: float = 1.0, threshold: float = 0.5
    ) -> None:
        super().__init__()
        if not positive_weight > 0:
            raise ValueError(f"GroundingTask: positive_weight must be positive, got positive_weight={positive_weight}")
        if not 0 < threshold < 1:
            raise ValueError(f"GroundingTask: threshold must lie in (0, 1), got threshold={threshold}")
        self.net: SentenceBlocks = build(net)
        classes = self.net.classifier.out_channels
        if classes != 1:
            raise ValueError(f"GroundingTask: one mask is trained, got a network with num_classes={classes}")
        self.positive_weight = positive_weight
        self.threshold = threshold

    def tensor(self, image: Float[Tensor, "B 3 Y X"], text: Float[Tensor, "B E"], **_: Any) -> Float[Tensor, "B 1 Y X"]:
        """The logits."""
        return self.net(image, text)

    def loss(
        self, image: Float[Tensor, "B 3 Y X"], text: Float[Tensor, "B E"], mask: Float[Tensor, "B 1 Y X"], **_: Any
    ) -> dict[str, Tensor]:
        """``{"loss": binary cross-entropy}``."""
        logits = self.net(image, text).float()
        weight = logits.new_tensor(self.positive_weight)
        return {"loss": F.binary_cross_entropy_with_logits(logits, mask, pos_weight=weight)}

    def predict(
        self, image: Float[Tensor, "B 3 Y X"], text: Float[Tensor, "B E"], mask: Float[Tensor, "B 1 Y X"], **_: Any
    ) -> list[dict[str, Any]]:
        """Per sample ``probability`` (Y, X) and ``iou``; and whether the peak lies on the answer, ``hit``."""
        probability = self.net(image, text).float().sigmoid()
        truth = mask > 0.5
        found = mask_iou(probability > self.threshold, truth)
        peaks = truth.flatten(1).gather(1, probability.flatten(1).argmax(1, keepdim=True))[:, 0]
        return [
            {"probability": one[0].cpu(), "iou": float(iou), "hit": bool(peak)}
            for one, iou, peak in zip(probability, found, peaks, strict=True)
        ]


class GroundingIoU(Metric):
    """Mean intersection over union, the share of answers above 0.5, and the pointing game; shares in [0, 1]."""

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:  # noqa: ARG002  mmengine's signature
        """Keep what `GroundingTask.predict` gives."""
        self.results.extend({"iou": sample["iou"], "hit": sample["hit"]} for sample in data_samples)

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Of all samples of all processes."""
        count = len(results)
        return {
            "iou": sum(result["iou"] for result in results) / count,
            "iou_above_half": sum(result["iou"] > 0.5 for result in results) / count,
            "pointing": sum(result["hit"] for result in results) / count,
        }


def draw_grounded(task: GroundingTask, batches: Iterable[dict[str, Any]], path: Path, *, count: int = 12) -> None:
    """A strip of scenes with the probability of the answer over them."""
    pictures: list[Image.Image] = []
    for batch in batches:
        with torch.no_grad():
            probability = task.net(batch["image"], batch["text"]).sigmoid()[:, 0].cpu()
        for image, heat, digit in zip(batch["image"], probability, batch["digit"].tolist(), strict=True):
            if len(pictures) < count:
                shown = Image.fromarray((image[0] * 255).round().byte().cpu().numpy()).convert("RGB")
                pictures.append(overlay(shown, heat, DIGITS[digit], limits=(0.0, 1.0)))
        if len(pictures) >= count:
            break
    strip(pictures).save(path)


def answers(net: SentenceBlocks, picture: Image.Image) -> Float[Tensor, "10 Y X"]:
    """Probability of the answer to the question about each digit, on a picture brought to 36×36 pixels."""
    device = next(net.parameters()).device
    gray = picture.convert("L").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    image = torch.from_numpy(np.asarray(gray, dtype=np.float32) / 255).expand(len(DIGITS), 3, SIZE, SIZE)
    texts = hashed_words([question(name) for name in DIGITS], net.text_dim)
    with torch.no_grad():
        return net(image.to(device), texts.to(device)).sigmoid()[:, 0].cpu()


def draw_answers(
    picture: Image.Image, probability: Float[Tensor, "10 Y X"], path: Path, *, threshold: float = 0.5
) -> list[str]:
    """A strip of what `answers` found; the words of digits whose probability exceeds the threshold somewhere."""
    found = [name for name, heat in zip(DIGITS, probability, strict=True) if float(heat.max()) > threshold]
    shown = picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    drawn = [overlay(shown, heat, name, limits=(0.0, 1.0)) for name, heat in zip(DIGITS, probability, strict=True)]
    strip(drawn).save(path)
    return found
