"""Llava 1.5: one square grid over the center crop that CLIP's processor takes."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from vlm_tools.intervention.adapters.base import Adapter, Boxes, grid_boxes, square


class Llava(Adapter):
    """``LlavaForConditionalGeneration``: 24×24 tokens of the centered square, class token dropped."""

    model_types = ("llava",)

    def has_class_token(self, model: Any) -> bool:
        """CLIP has one; ``vision_feature_select_strategy="full"`` makes it an image token."""
        config = model.config
        return config.vision_config.model_type == "clip_vision_model" and (
            config.vision_feature_select_strategy == "default"
        )

    def boxes(self, config: Any, inputs: Mapping[str, Any], visual: Bool[Tensor, " T"], size: tuple[int, int]) -> Boxes:  # noqa: ARG002  the adapter's signature
        """The square in the middle of the picture."""
        side = square(int(visual.sum()), "llava")
        height, width = size
        short = min(height, width)
        x, y = (1 - short / width) / 2, (1 - short / height) / 2
        return grid_boxes(side, side, within=(x, y, 1 - x, 1 - y))
