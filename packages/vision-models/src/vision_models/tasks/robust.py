"""Training of classifiers whose attention shall not depend on a few tokens, and its test under corruptions."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from attn_core.engine import ClassificationTask, Metric
from vision_models.layers.token_pooling import attention_of, diversification_loss


class DiverseAttentionTask(ClassificationTask):
    """Cross-entropy, and ADL on the attention of all layers (Guo et al., ICCV 2023, arXiv 2303.11126).

    Args:
        net: As in :class:`ClassificationTask`; a network whose attention can be observed (RVT, FAN).
        diversity: Weight of ADL; 0: plain classification.
        threshold: Entries of attention up to ``threshold``/N do not count.
        label_smoothing, mixup, cutmix: As in :class:`ClassificationTask`.
    """

    def __init__(
        self,
        net: nn.Module | dict[str, Any],
        *,
        diversity: float = 1.0,
        threshold: float = 2.0,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        super().__init__(net, label_smoothing=label_smoothing, mixup=mixup, cutmix=cutmix)
        if diversity < 0 or threshold < 0:
            raise ValueError(
                f"DiverseAttentionTask: diversity and threshold must not be negative, got {diversity} and {threshold}"
            )
        self.diversity = diversity
        self.threshold = threshold

    def loss(self, image: Float[Tensor, "B C Y X"], label: Int[Tensor, " B"], **_: Any) -> dict[str, Tensor]:
        """``{"loss": cross-entropy, "loss_diversity": weighted ADL}``."""
        if self.diversity == 0:
            return super().loss(image, label)
        with attention_of(self.net) as seen:
            losses = super().loss(image, label)
        return {**losses, "loss_diversity": self.diversity * diversification_loss(seen, self.threshold)}

    def predict(self, image: Float[Tensor, "B C Y X"], label: Int[Tensor, " B"], **batch: Any) -> list[dict[str, Any]]:
        """As :class:`ClassificationTask`, with the number of the image's ``corruption`` where the data have such."""
        found = super().predict(image, label)
        kinds = batch.get("corruption")
        if kinds is None:
            return found
        return [{**sample, "corruption": int(kind)} for sample, kind in zip(found, kinds.cpu(), strict=True)]


class CorruptionAccuracy(Metric):
    """Share of samples classified right: ``accuracy`` of those as they are, ``accuracy_<name>`` of each corruption.

    Reads ``{"scores": (K,), "label": int, "corruption": int}`` per sample; 0, and none, is an image as it is.

    Args:
        names: Of the corruptions, from number 1 on.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = ("", *names)

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:  # noqa: ARG002  mmengine's signature
        """Keep whether each sample is right."""
        for sample in data_samples:
            hit = int(sample["scores"].argmax()) == sample["label"]
            self.results.append((sample.get("corruption", 0), hit))

    def compute_metrics(self, results: list[tuple[int, bool]]) -> dict[str, float]:
        """Shares over all samples of all processes."""
        shares = {}
        for number, name in enumerate(self.names):
            hits = [hit for kind, hit in results if kind == number]
            if hits:
                shares["accuracy" + (f"_{name}" if name else "")] = sum(hits) / len(hits)
        return shares
