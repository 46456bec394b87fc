"""The networks of this package by name, and those of MONAI and segmentation-models-pytorch behind one call."""

from typing import Any

import numpy as np
import torch
from torch import nn

from attn_core.catalog import Catalog
from medical_seg.models.libraries import LIBRARIES

CATALOG: Catalog[nn.Module] = Catalog("medical_seg.models")
list_models, card = CATALOG.names, CATALOG.card


def create_model(name: str, **options: Any) -> nn.Module:
    """Build a network image → logits.

    Args:
        name: one of :func:`list_models`; ``monai:UNet`` and every other network of ``monai.networks.nets`` that takes
            ``in_channels`` and ``out_channels``; ``smp:Unet`` and every other architecture of
            segmentation-models-pytorch, whose ``encoder_name`` may also be any backbone that timm knows.
        options: constructor arguments. ``in_channels`` and ``out_channels`` go by these names everywhere.

    Raises:
        ValueError: unknown name or option, with the nearest known one; a library that is not installed.
    """
    prefix, colon, rest = name.partition(":")
    if not colon:
        return CATALOG.create(name, **options)
    if prefix not in LIBRARIES:
        raise ValueError(f"create_model: unknown library {prefix!r} in {name!r}; choose from {', '.join(LIBRARIES)}")
    return LIBRARIES[prefix](rest, options)


def is_planar(name: str) -> bool:
    """Whether a network reads pictures only, and has no option ``spatial_dims``."""
    return name.startswith("smp:") or (":" not in name and CATALOG.card(name).family == "MSA")


def window_divisor(name: str, options: dict[str, Any], *, planar: bool) -> int:
    """What each axis of a window must be divisible by.

    Args:
        name, options: as of :func:`create_model`.
        planar: it is fed pictures.
    """
    if ":" not in name:
        dims = {} if is_planar(name) else {"spatial_dims": 2 if planar else 3}
        with torch.device("meta"):
            model: Any = create_model(name, **{**options, **dims})
        return int(model.divisor)
    if strides := options.get("strides"):
        return int(np.prod(strides))
    return 32
