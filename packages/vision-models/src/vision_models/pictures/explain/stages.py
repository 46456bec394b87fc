"""What any family shows that has no file of its own here: how large the maps are behind each stage."""

from torch import Tensor

from vision_models.backbone import StagedBackbone
from vision_models.pictures.explain.panel import Panel, brightness, token_at


def panels(net: StagedBackbone, image: Tensor, point: tuple[float, float]) -> list[list[Panel]]:
    """Per stage: the length of each token, which a later stage or the pooling reads; the token at the point framed."""
    maps = net.forward_intermediates(image[None], intermediates_only=True)
    columns = []
    for number, features in enumerate(maps, start=1):
        length = features[0].norm(dim=0)
        row, column = token_at(point, (length.shape[0], length.shape[1]))
        columns.append([Panel(f"stage {number}: length of tokens", brightness(length), frames=[(row, column, 1, 1)])])
    return columns
