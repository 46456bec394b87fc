"""Idefics3 and SmolVLM: tiles between marker words, then the whole picture."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from vlm_tools.intervention.adapters.base import Adapter, Boxes, check_count, grid_boxes, tile_boxes, tiling


class Idefics(Adapter):
    """``Idefics3ForConditionalGeneration`` and ``SmolVLMForConditionalGeneration``."""

    model_types = ("idefics3", "smolvlm")

    def image_count(self, inputs: Mapping[str, Any]) -> int | None:  # noqa: ARG002  the adapter's signature
        """Unknown: tiles of all images stand in one row."""
        return None

    def boxes(self, config: Any, inputs: Mapping[str, Any], visual: Bool[Tensor, " T"], size: tuple[int, int]) -> Boxes:  # noqa: ARG002  the adapter's signature
        """Tiles in rows and columns that fit the picture, and the whole last; alone if it was not split."""
        vision = config.vision_config
        side = int(vision.image_size // vision.patch_size / config.scale_factor)
        views = int(visual.sum()) // side**2
        check_count(int(visual.sum()), views * side**2, "idefics")
        whole = grid_boxes(side, side)
        return whole if views == 1 else torch.cat([tile_boxes(*tiling(views - 1, size), side), whole])
