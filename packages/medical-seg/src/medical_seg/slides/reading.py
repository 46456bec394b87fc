"""A slide through a trained network, in pieces."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attn_core.engine import TrainedRun
from medical_seg.slides.files import Slide
from medical_seg.slides.task import SlideTask


class Reading(NamedTuple):
    """What a network says of a slide.

    Attributes:
        scores: probabilities (K,).
        importance: of each instance (N,), see `BagNetwork.importance`.
        attention: logits (R, H, N); of pooling networks the class logits (K, 1, N).
    """

    scores: Float[Tensor, "K"]
    importance: Float[Tensor, "N"]
    attention: Float[Tensor, "R H N"]


def task_of(run: TrainedRun) -> SlideTask:
    """The task of a run on slides.

    Raises: ValueError for a run on images.
    """
    model: Any = run.model
    if not isinstance(model, SlideTask):
        raise ValueError(f"{run.directory}: a run on images; use medical-seg predict")
    return model


def read_slide(task: SlideTask, slide: Slide, device: torch.device) -> Reading:
    """Memory for one piece of features and for the attention of all instances.

    Raises: ValueError for features of another encoder, or that cannot be read.
    """
    if slide.channels != task.net.in_channels:
        raise ValueError(
            f"{slide.path}: slide {slide.name!r} has {slide.channels} features an instance, the run was trained on "
            f"{task.net.in_channels}: another encoder"
        )
    found = task.net.stream(piece.to(device) for piece in slide.pieces())
    return Reading(
        found.logits[0].float().softmax(-1).cpu(), task.net.importance(found)[0].cpu(), found.attention[0].cpu()
    )
