"""What the engine trains: a bag network with its losses."""

from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from attn_core.engine import TaskModel
from medical_seg.models import create_model
from medical_seg.models.acmil import BagNetwork, BagOutput, bag_loss, load_official


class SlideTask(TaskModel):
    """Training of a bag network.

    Args:
        network: ``acmil_ga``, ``acmil_mha``, ``abmil``, ``mean_pooling`` or ``max_pooling``.
        in_channels: features of an instance.
        out_channels: classes.
        options: its further constructor arguments.
        weights: an official checkpoint to start from, or one of our names.
        ignore: beginnings of parameter names that the checkpoint may lack, such as ``["Slide_classifier"]``.

    Raises: ValueError if the network reads no bags, or the weights do not fit.
    """

    def __init__(
        self,
        network: str = "acmil_ga",
        *,
        in_channels: int = 384,
        out_channels: int = 2,
        options: dict[str, Any] | None = None,
        weights: str | None = None,
        ignore: list[str] | None = None,
    ) -> None:
        super().__init__()
        net = create_model(network, in_channels=in_channels, out_channels=out_channels, **(options or {}))
        if not isinstance(net, BagNetwork):
            raise ValueError(f"SlideTask: {network} reads images; slides need a network of bags, such as acmil_ga")
        self.net = net
        if weights is not None:
            load_official(self.net, weights, ignore=ignore or ())

    def tensor(self, features: Float[Tensor, "B N C"], mask: Bool[Tensor, "B N"] | None = None, **_: Any) -> BagOutput:
        """Logits and attention."""
        return self.net(features, mask)

    def loss(
        self, features: Float[Tensor, "B N C"], mask: Bool[Tensor, "B N"], label: Int[Tensor, "B"], **_: Any
    ) -> dict[str, Tensor]:
        """Of the bag, of the branches, of how alike these attend."""
        return bag_loss(self.net(features, mask), label)

    def predict(
        self, features: Float[Tensor, "B N C"], mask: Bool[Tensor, "B N"], label: Int[Tensor, "B"], **_: Any
    ) -> list[dict[str, Any]]:
        """Per slide ``{"scores": (K,) probabilities, "label": int}``."""
        scores = self.net(features, mask).logits.float().softmax(-1).cpu()
        return [{"scores": s, "label": int(target)} for s, target in zip(scores, label.cpu(), strict=True)]
