"""What every family tells timm's registry: settings of its pretrained weights, and models built from its variants."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model

from attn_core import weights
from attn_core.catalog import Card, Entry
from vision_models.backbone import StagedBackbone
from vision_models.official import converted

Family = TypeVar("Family", bound=StagedBackbone)
# How timm finds the maps of ``features_only`` in a network of four stages.
STAGES: Mapping[str, Any] = {"flatten_sequential": True, "out_indices": (0, 1, 2, 3)}


@dataclass(frozen=True)
class TimmEntry(Entry[StagedBackbone]):
    """A name of the catalogue that timm knows, too.

    Attributes:
        family: The class.
        settings: The variant's arguments of the constructor.
        timm_name: The name there: its own, or ``attn_…`` where timm has a model of that name.
    """

    family: type[StagedBackbone] = StagedBackbone
    settings: Mapping[str, Any] = ()  # pyright: ignore[reportAssignmentType]
    timm_name: str = ""


def pretrained_cfg(size: int = 224, **entries: Any) -> dict[str, Any]:
    """timm's settings of weights trained on ImageNet-1k at ``size``²; ``entries`` add to them or replace them."""
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (-(-size // 32),) * 2,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head.fc",
        **entries,
    }


def timm_entries(
    family: type[Family],
    variants: Mapping[str, Mapping[str, Any]],
    cards: Mapping[str, Card],
    default_cfgs: Mapping[str, Any],
    *,
    maps: Callable[[str], Mapping[str, Any]] = lambda _: STAGES,
) -> list[TimmEntry]:
    """The catalogue's entries of a family, registered with timm.

    Args:
        family: The class.
        variants: Arguments of the constructor for each name.
        cards: What the tables say of each name.
        default_cfgs: Of the family's module: timm's settings by timm's name. Where that is ``attn_<name>``, timm has a
            model of its own called ``<name>``.
        maps: Name → how timm finds the maps of ``features_only``.
    """
    entries = []
    for name, settings in variants.items():
        timm_name = f"attn_{name}" if f"attn_{name}" in default_cfgs else name
        _register(family, timm_name, settings, cards[name], maps(name))
        build: Any = partial(timm.create_model, timm_name)
        entries.append(TimmEntry(name, build, cards[name], (family, timm.create_model, _timm_options), family,
                                 settings, timm_name))  # fmt: skip
    return entries


def _timm_options(
    features_only: bool, out_indices: Any, feature_cls: Any, output_fmt: Any, pretrained_strict: bool
) -> None:
    """Options that ``timm.create_model`` hands on without naming them."""


def _register(
    family: type[Family], name: str, settings: Mapping[str, Any], card: Card, maps: Mapping[str, Any]
) -> None:
    """Give timm a function of that name in the family's module, which is where timm looks for it."""

    def build(pretrained: bool = False, **kwargs: Any) -> StagedBackbone:
        return build_model_with_cfg(
            family,
            name,
            pretrained,
            feature_cfg=dict(maps),
            pretrained_filter_fn=_from_checkpoint,
            **{**settings, **kwargs},  # the user's, and timm's own, go before the variant's
        )

    build.__name__ = build.__qualname__ = name
    build.__module__ = family.__module__
    build.__doc__ = f"{card.summary}."
    setattr(sys.modules[family.__module__], name, build)
    register_model(build)


def _from_checkpoint(state: dict[str, Any], model: StagedBackbone) -> dict[str, Any]:
    """The entries of a state dict in any known layout under our names; what fits no name keeps its own."""
    return dict(converted(model, weights.read(state)).tensors)
