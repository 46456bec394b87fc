"""InternVL: tiles, then a thumbnail of the whole picture."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from vlm_tools.intervention.adapters.base import Adapter, Boxes, check_count, grid_boxes, tile_boxes, tiling


class InternVL(Adapter):
    """``InternVLForConditionalGeneration``: (image side / patch · downsample)² tokens per tile."""

    model_types = ("internvl",)

    def image_count(self, inputs: Mapping[str, Any]) -> int | None:  # noqa: ARG002  the adapter's signature
        """Unknown: tiles of all images stand in one row."""
        return None

    def pixel_rows(self, config: Any, inputs: Mapping[str, Any]) -> list[int]:
        """Tiles of all images stand in one list."""
        tokens = (inputs["input_ids"] == self.image_token_id(config)).sum(1)
        return (tokens // _side(config) ** 2).tolist()

    def boxes(self, config: Any, inputs: Mapping[str, Any], visual: Bool[Tensor, " T"], size: tuple[int, int]) -> Boxes:  # noqa: ARG002  the adapter's signature
        """Tiles in rows and columns that fit the picture, and the whole last; alone if it was not split."""
        side = _side(config)
        views = int(visual.sum()) // side**2
        check_count(int(visual.sum()), views * side**2, "internvl")
        whole = grid_boxes(side, side)
        return whole if views == 1 else torch.cat([tile_boxes(*tiling(views - 1, size), side), whole])


def _side(config: Any) -> int:
    """Tokens along a side of a tile."""
    vision = config.vision_config
    return int(vision.image_size[0] // vision.patch_size[0] * config.downsample_ratio)
