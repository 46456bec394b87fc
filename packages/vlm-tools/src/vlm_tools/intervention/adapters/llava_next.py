"""LLaVA-NeXT and LLaVA-OneVision: the whole picture, then its tiles without padding, each line ended by a token."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from vlm_tools.intervention.adapters.base import Adapter, Boxes, check_count, grid_boxes


class LlavaNext(Adapter):
    """``LlavaNextForConditionalGeneration``."""

    model_types = ("llava_next",)

    def image_count(self, inputs: Mapping[str, Any]) -> int | None:
        """``image_sizes`` has one row per image."""
        sizes = inputs.get("image_sizes")
        return None if sizes is None else len(sizes)

    def boxes(self, config: Any, inputs: Mapping[str, Any], visual: Bool[Tensor, " T"], size: tuple[int, int]) -> Boxes:  # noqa: ARG002  the adapter's signature
        """Base grid over the squashed picture, then the tiles' grid with a column of line ends."""
        vision = config.vision_config
        side = vision.image_size // vision.patch_size
        height, width = size
        whole = select_best_resolution([height, width], config.image_grid_pinpoints)  # pyright: ignore[reportArgumentType]
        rows, columns = whole[0] // vision.image_size * side, whole[1] // vision.image_size * side
        rows, columns = self.shrunk(*_unpadded(rows, columns, height, width), side, config)
        tiles = grid_boxes(rows, columns).view(rows, columns, 4)
        ends = torch.full((rows, 1, 4), torch.nan)
        boxes = torch.cat([grid_boxes(side, side), torch.cat([tiles, ends], dim=1).flatten(0, 1)])
        check_count(int(visual.sum()), len(boxes), self.model_types[0])
        return boxes

    def shrunk(self, rows: int, columns: int, side: int, config: Any) -> tuple[int, int]:  # noqa: ARG002  the adapter's signature
        """Rows and columns that are left of a large grid: all of them."""
        return rows, columns


class LlavaOnevision(LlavaNext):
    """``LlavaOnevisionForConditionalGeneration``: grids beyond nine tiles are scaled down."""

    model_types = ("llava_onevision",)

    def shrunk(self, rows: int, columns: int, side: int, config: Any) -> tuple[int, int]:
        """``anyres_max_9``: at most nine tiles' worth of tokens."""
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * side**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)


def _unpadded(rows: int, columns: int, height: int, width: int) -> tuple[int, int]:
    """The part of a tile grid that shows the picture, without the bars that keep its shape."""
    if width / height > columns / rows:
        bar = (rows - int(round(height * (columns / width), 7))) // 2
        return rows - 2 * bar, columns
    bar = (columns - int(round(width * (rows / height), 7))) // 2
    return rows, columns - 2 * bar
