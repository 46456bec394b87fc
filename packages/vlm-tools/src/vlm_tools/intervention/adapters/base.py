"""What differs between families: which tokens are the image's, and which part of the picture each of them shows."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

Boxes = Float[Tensor, "T 4"]


class Adapter(ABC):
    """One family of Hugging Face models.

    Attributes:
        model_types: values of ``config.model_type`` it is responsible for.
    """

    model_types: tuple[str, ...] = ()

    def image_token_id(self, config: Any) -> int:
        """Number of the token that stands for a piece of the image."""
        return int(config.image_token_id)

    def image_count(self, inputs: Mapping[str, Any]) -> int | None:
        """Images in a batch of inputs; None if the inputs do not tell."""
        pixels = inputs.get("pixel_values")
        return None if pixels is None else int(pixels.shape[0])

    def pixel_rows(self, config: Any, inputs: Mapping[str, Any]) -> list[int]:  # noqa: ARG002  for families that need them
        """Rows of ``pixel_values`` that belong to the image of each prompt: one, where the first axis counts images.

        Args:
            config: of the model.
            inputs: of a batch of prompts, one image each.
        """
        return [1] * len(inputs["pixel_values"])

    def has_class_token(self, model: Any) -> bool:  # noqa: ARG002  for families that need them
        """Whether the vision tower has a class token and its other tokens are the image tokens one by one."""
        return False

    @abstractmethod
    def boxes(self, config: Any, inputs: Mapping[str, Any], visual: Bool[Tensor, " T"], size: tuple[int, int]) -> Boxes:
        """Rectangle of the picture that each image token shows.

        Args:
            config: of the model.
            inputs: of one prompt.
            visual: True at its image tokens.
            size: height and width of the picture in pixels.

        Returns:
            x0, y0, x1, y1 as fractions of the picture, in the order of the image tokens; NaN for tokens that show none,
            such as the ends of lines.
        """


def grid_boxes(rows: int, columns: int, *, within: tuple[float, float, float, float] = (0, 0, 1, 1)) -> Boxes:
    """Boxes of a row-major grid that fills the rectangle ``within`` (x0, y0, x1, y1)."""
    x0, y0, x1, y1 = within
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    width, height = (x1 - x0) / columns, (y1 - y0) / rows
    left, top = x0 + x.flatten() * width, y0 + y.flatten() * height
    return torch.stack([left, top, left + width, top + height], dim=1)


def tile_boxes(rows: int, columns: int, side: int) -> Boxes:
    """Boxes of ``rows × columns`` tiles of side² tokens, tile after tile."""
    tiles = grid_boxes(rows, columns).tolist()
    return torch.cat([grid_boxes(side, side, within=(box[0], box[1], box[2], box[3])) for box in tiles])


def tiling(tiles: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of ``tiles`` tiles whose shape comes closest to the picture's."""
    height, width = size
    options = [(rows, tiles // rows) for rows in range(1, tiles + 1) if tiles % rows == 0]
    return min(options, key=lambda option: abs(np.log(option[1] / option[0] * height / width)))


def square(count: int, family: str) -> int:
    """Side of a square grid.

    Raises:
        ValueError: ``count`` is no square.
    """
    side = round(count**0.5)
    if side * side != count:
        raise ValueError(f"{family}: {count} image tokens are no square grid; pass one image per prompt")
    return side


def check_count(found: int, expected: int, family: str) -> None:
    """Raise ValueError unless the prompt has as many image tokens as the geometry says."""
    if found != expected:
        raise ValueError(
            f"{family}: the prompt has {found} image tokens, the picture's geometry asks for {expected}; "
            "pass one image per prompt and its original size"
        )
