"""Pictures of RVT: pooling and attention of the last two blocks of each stage."""

from torch import Tensor

from vision_models.models.rvt import RVT
from vision_models.pictures.explain.panel import Panel
from vision_models.pictures.explain.pooling import columns


def panels(net: RVT, image: Tensor, point: tuple[float, float]) -> list[list[Panel]]:
    """A column for each of those blocks; one stage alone shows four blocks."""
    each = 4 if len(net.stages) == 1 else 2
    chosen, maps = {}, []
    features = net.forward_intermediates(image[None], intermediates_only=True)
    for number, (stage, tokens) in enumerate(zip(net.stages, features, strict=True), start=1):
        blocks = list(stage.blocks)  # pyright: ignore[reportArgumentType]
        for i in range(max(0, len(blocks) - each), len(blocks)):
            chosen[blocks[i]] = f"block {number}.{i + 1}"
            maps.append((tokens.shape[2], tokens.shape[3]))  # pyright: ignore[reportAttributeAccessIssue]
    return columns(net, chosen, image, point, maps)
