"""Pictures of DeiT: those of the attention it hosts, agent and InLine attention or mixture of heads."""

from torch import Tensor

from vision_models.models.deit import DeiT
from vision_models.pictures.explain import mixing
from vision_models.pictures.explain.mixture_of_heads import routed_panels, routers_by_name
from vision_models.pictures.explain.panel import Panel, spread

__all__ = ["panels"]


def panels(net: DeiT, image: Tensor, point: tuple[float, float]) -> list[list[Panel]]:
    """Columns of :mod:`mixing`, then the gates of at most four blocks with a mixture of heads."""
    names = [f"block {i}" for i in range(1, len(net.blocks) + 1)]
    every = list(routers_by_name(net.blocks, names).items())
    routing = [entry for entry in every if entry[0].num_routed] or every
    shown = dict(routing[i] for i in spread(len(routing), 4)) if routing else {}
    grid = (image.shape[1] // net.min_side, image.shape[2] // net.min_side)
    found = mixing.panels(net, image, point)
    return found + (routed_panels(net, shown, image, dict.fromkeys(shown, grid), point) if shown else [])  # pyright: ignore[reportArgumentType]
