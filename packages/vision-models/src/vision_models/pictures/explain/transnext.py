"""Pictures of TransNeXt: with a mixture of heads which tokens take which heads, else how long the tokens are."""

from torch import Tensor

from vision_models.models.transnext import TransNeXt
from vision_models.pictures.explain import stages
from vision_models.pictures.explain.mixture_of_heads import routed_panels, routers_by_name
from vision_models.pictures.explain.panel import Panel


def panels(net: TransNeXt, image: Tensor, point: tuple[float, float]) -> list[list[Panel]]:
    """Per stage the gates of its last block, a row for each of the heads that are taken most."""
    names = [f"stage {i}" for i in range(1, len(net.stages) + 1)]
    shown = routers_by_name([stage.blocks[-1] for stage in net.stages], names)  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    if not shown:
        return stages.panels(net, image, point)
    grids = {
        router: tuple(-(-side // net.feature_info[int(name[-1]) - 1]["reduction"]) for side in image.shape[1:])
        for router, name in shown.items()
    }
    return routed_panels(net, shown, image, grids, point)  # pyright: ignore[reportArgumentType]
