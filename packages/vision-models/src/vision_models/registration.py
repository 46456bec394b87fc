"""What every family tells timm's registry: settings of its pretrained weights, and models built from its variants."""

from collections.abc import Mapping
from typing import Any, TypeVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg

from .backbone import StagedBackbone
from .official import our_names

Family = TypeVar("Family", bound=StagedBackbone)


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


def build_variant(
    family: type[Family],
    variant: str,
    pretrained: bool,
    options: Mapping[str, Any],
    kwargs: Mapping[str, Any],
    *,
    feature_cfg: Mapping[str, Any] | None = None,
) -> Family:
    """A registered model, built and filled by timm.

    Args:
        family: the class.
        variant: name under which timm knows the settings of the pretrained weights.
        pretrained: fetch them, in any layout that ``family.key_map`` knows.
        options: the variant's arguments of the constructor. kwargs: the user's, which go before them; timm's own too.
        feature_cfg: how timm finds the maps of ``features_only``; default: four stages.
    """
    return build_model_with_cfg(
        family,
        variant,
        pretrained,
        feature_cfg=dict(feature_cfg or {"flatten_sequential": True, "out_indices": (0, 1, 2, 3)}),
        pretrained_filter_fn=_from_checkpoint,
        **{**options, **kwargs},
    )


def _from_checkpoint(state: dict[str, Any], model: StagedBackbone) -> dict[str, Any]:
    return our_names(model, state)
