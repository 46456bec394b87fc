"""What an intervention is: the base of every method, and what a layer hands to it."""

import math
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
        self.layers = None if layers is None else checked_numbers(self.name, "layers", layers)

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

    def logits_processor(self, run: "Run", inputs: Mapping[str, Any]) -> LogitsProcessor | None:  # noqa: ARG002  for methods that need them
        """What generation adds to the scores; None if the method changes attention only."""
        return None

    def parameters(self) -> Iterator[Tensor]:
        """None: there is nothing to train; here so that tables can count."""
        return iter(())


def check_number(
    method: str, name: str, value: Any, rule: str = "be a finite number", fits: Callable[[Any], bool] = lambda _: True
) -> None:
    """Raise ValueError unless ``value`` is a finite number that fits; ``rule`` ends "<name> must …"."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not fits(value):
        raise ValueError(f"{method}: {name} must {rule}, got {name}={value!r}")


def check_share(method: str, name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` lies in [0, 1]."""
    check_number(method, name, value, "lie in [0, 1]", lambda share: 0 <= share <= 1)


def check_plausibility(method: str, value: Any) -> None:
    """Raise ValueError unless ``value`` lies in (0, 1]: it is a share of a probability, whose logarithm is taken."""
    check_number(method, "plausibility", value, "lie in (0, 1]", lambda share: 0 < share <= 1)


def check_whole(method: str, name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise ValueError unless ``value`` is an integer from ``least`` to ``most``."""
    rule = f"be at least {least}" if most is None else f"lie in {least} … {most}"
    fits = isinstance(value, int) and value >= least and (most is None or value <= most)
    check_number(method, name, value, rule, lambda _: fits)


def check_switch(method: str, name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{method}: {name} must be true or false, got {name}={value!r}")


def checked_numbers(method: str, name: str, values: Any) -> tuple[int, ...]:
    """Numbers of layers, heads or dimensions as a tuple.

    Raises:
        ValueError: not a sequence of integers from 0 on.
    """
    listed = list(values) if isinstance(values, Sequence | range) and not isinstance(values, str) else None
    if listed is None or any(not isinstance(one, int) or isinstance(one, bool) or one < 0 for one in listed):
        raise ValueError(f"{method}: {name} must be a list of numbers from 0 on, got {name}={values!r}")
    return tuple(listed)


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
