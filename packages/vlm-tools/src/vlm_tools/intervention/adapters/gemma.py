"""PaliGemma and Gemma 3: one square grid over the squashed picture."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from vlm_tools.intervention.adapters.base import Adapter, Boxes, grid_boxes, square


class Gemma(Adapter):
    """``PaliGemmaForConditionalGeneration`` (tokens before ``<bos>``), ``Gemma3ForConditionalGeneration``."""

    model_types = ("paligemma", "gemma3")

    def boxes(self, config: Any, inputs: Mapping[str, Any], visual: Bool[Tensor, " T"], size: tuple[int, int]) -> Boxes:  # noqa: ARG002  the adapter's signature
        """The whole picture; Gemma 3's pan and scan makes several images and is not supported."""
        side = square(int(visual.sum()), "gemma")
        return grid_boxes(side, side)
