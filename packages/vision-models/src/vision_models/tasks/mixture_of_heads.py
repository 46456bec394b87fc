"""Classification by mixture of heads: cross-entropy, and routed heads that are chosen equally often."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attn_core.engine import ClassificationTask
from attn_core.nn import balance_losses


class MixtureOfHeadsTask(ClassificationTask):
    """Cross-entropy and the mean balance of the network's routers.

    Args:
        net: The network, or its recipe.
        balance: Weight of the routers' balance (Jin et al. 2024, eq. 6).
        options: Those of :class:`attn_core.engine.ClassificationTask`.
    """

    def __init__(self, net: nn.Module | dict[str, Any], *, balance: float = 0.01, **options: Any) -> None:
        super().__init__(net, **options)
        self.balance = balance

    def loss(self, image: Float[Tensor, "B C Y X"], label: Int[Tensor, " B"], **batch: Any) -> dict[str, Tensor]:
        """``{"loss": cross-entropy, "loss_balance": …}``; the latter is missing where the network routes nothing."""
        with balance_losses(self.net) as found:
            losses = super().loss(image, label, **batch)
        return {**losses, "loss_balance": self.balance * torch.stack(found).mean()} if found else losses
