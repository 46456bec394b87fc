"""What an intervention is: the base of every method, and what a layer hands to it."""

from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import LogitsProcessor

from vlm_tools.intervention.visibility import Visibility

if TYPE_CHECKING:
    from vlm_tools.intervention.hooking import Run


@dataclass
class LayerStatistics:
    """What a method did in one layer, summed over calls.

    Attributes:
        rows: (query, head) pairs that the method looked at.
        edited: pairs whose attention it changed.
        moved: attention mass that it moved, summed over pairs.
    """

    rows: int = 0
    edited: int = 0
    moved: float = 0.0


@dataclass
class AttentionCall:
    """One attention of one text layer, before it is computed.

    Attributes:
        layer: number of the layer.
        q: (B, H, N, D).
        k, v: (B, Hk, M, D), all keys of the cache included, not repeated for the heads of a group.
        scale: factor of the dot products.
        visible: which keys a query sees.
        visual: (B, M) True at image tokens.
        after_image: (B, N) True at queries behind the last image token of their row.
        prefill: whether the call holds prompt tokens.
        hidden: (B, N, C) residual stream that enters the layer, if the method asked for it.
        state: the method's own memory of this layer, kept from prefill to the last token.
        statistics: to be filled in.
        plain: ordinary attention, (B, N, H, D).
    """

    layer: int
    q: Float[Tensor, "B H N D"]
    k: Float[Tensor, "B Hk M D"]
    v: Float[Tensor, "B Hk M D"]
    scale: float
    visible: Visibility
    visual: Bool[Tensor, "B M"]
    after_image: Bool[Tensor, "B N"]
    prefill: bool
    hidden: Float[Tensor, "B N C"] | None
    state: dict[str, Any]
    statistics: LayerStatistics
    plain: Callable[[], Float[Tensor, "B N H D"]]
    align: Callable[[Bool[Tensor, "B T"]], Bool[Tensor, "B M"]] = field(repr=False)

    @property
    def visible_keys(self) -> tuple[Tensor, Tensor]:
        """Keys and values without the empty places of a static cache."""
        return self.k[:, :, : self.visible.keys], self.v[:, :, : self.visible.keys]


class Method(ABC):
    """An intervention; subclasses override what they change. All are training-free.

    Args:
        layers: numbers of the text layers to change; None means the published choice.
    """

    name: ClassVar[str]
    needs_image: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = False
    changes_attention: ClassVar[bool] = True

    def __init__(self, layers: Sequence[int] | None = None) -> None:
        self.layers = None if layers is None else tuple(layers)

    def default_layers(self, count: int) -> Sequence[int]:
        """The published choice in a decoder of ``count`` layers."""
        return range(count)

    def chosen_layers(self, count: int) -> frozenset[int]:
        """Layers to change in a decoder of ``count`` layers.

        Raises:
            ValueError: a layer that does not exist.
        """
        chosen = self.default_layers(count) if self.layers is None else self.layers
        wrong = [layer for layer in chosen if not 0 <= layer < count]
        if wrong:
            raise ValueError(f"{self.name}: the model has layers 0 … {count - 1}, got layers={list(self.layers or ())}")
        return frozenset(chosen)

    def bind(self, run: "Run") -> None:  # noqa: B027  most methods have nothing to look at
        """Look at the model once, before the first call; raise ValueError if the method cannot work on it."""

    def attend(self, call: AttentionCall) -> Float[Tensor, "B N H D"]:
        """Attention of a chosen layer."""
        return call.plain()

    def logits_processor(self, run: "Run", inputs: Mapping[str, Any]) -> LogitsProcessor | None:
        """What generation adds to the scores; None if the method changes attention only."""
        return None

    def parameters(self) -> Iterator[Tensor]:
        """None: there is nothing to train; here so that tables can count."""
        return iter(())


def check_share(method: str, name: str, value: float) -> None:
    """Raise ValueError unless ``value`` lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{method}: {name} must lie in [0, 1], got {name}={value}")


def last_rows(mask: Bool[Tensor, "B N"]) -> int:
    """First query for which any row of the batch is chosen; N if none is."""
    columns = mask.any(0).nonzero()
    return int(columns[0]) if len(columns) else mask.shape[1]


def note(call: AttentionCall, edited: Tensor, moved: Tensor | None = None) -> None:
    """Add edited (B, H, N) pairs and the mass they moved to the statistics."""
    call.statistics.rows += edited.numel()
    call.statistics.edited += int(edited.sum())
    if moved is not None:
        call.statistics.moved += float(torch.where(edited, moved, 0.0).sum())
