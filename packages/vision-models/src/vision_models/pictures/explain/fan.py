"""Pictures of FAN: pooling and attention of four blocks spread over it."""

from torch import Tensor

from vision_models.models.fan import FAN
from vision_models.pictures.explain.panel import Panel, spread
from vision_models.pictures.explain.pooling import columns


def panels(net: FAN, image: Tensor, point: tuple[float, float]) -> list[list[Panel]]:
    """A column for each of those blocks."""
    grid = net.tokens(image[None])[1]
    numbers = spread(len(net.blocks), 4)
    chosen = {net.blocks[i]: f"block {i + 1}" for i in numbers}
    return columns(net, chosen, image, point, [grid] * len(chosen))
