"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: one grid in the picture's own shape, 2×2 patches per token."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from vlm_tools.intervention.adapters.base import Adapter, Boxes, check_count, grid_boxes


class QwenVL(Adapter):
    """``Qwen2VLForConditionalGeneration`` and its successors."""

    model_types = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

    def image_count(self, inputs: Mapping[str, Any]) -> int | None:
        """``image_grid_thw`` has one row per image."""
        grid = inputs.get("image_grid_thw")
        return None if grid is None else len(grid)

    def pixel_rows(self, config: Any, inputs: Mapping[str, Any]) -> list[int]:  # noqa: ARG002  the adapter's signature
        """Patches of all images stand in one list."""
        return inputs["image_grid_thw"].prod(-1).tolist()

    def boxes(self, config: Any, inputs: Mapping[str, Any], visual: Bool[Tensor, " T"], size: tuple[int, int]) -> Boxes:  # noqa: ARG002  the adapter's signature
        """The picture is resized as a whole."""
        merge = config.vision_config.spatial_merge_size
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        boxes = grid_boxes(rows // merge, columns // merge)
        check_count(int(visual.sum()), len(boxes), "qwen_vl")
        return boxes
