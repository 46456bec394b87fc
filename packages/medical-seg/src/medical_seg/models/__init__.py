"""The networks of this package by name, and those of MONAI and segmentation-models-pytorch behind one call."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from attn_core.catalog import Catalog
from medical_seg.layers.state_space import BLOCKS
from medical_seg.models import acmil, keras_weights, mhs_vm, multi_scale_attention, ssm_unet, vm_unet
from medical_seg.models.agunet import AttentionUNet
from medical_seg.models.libraries import LIBRARIES
from medical_seg.models.multi_scale_attention import MultiScaleAttention

CATALOG: Catalog[nn.Module] = Catalog("medical_seg.models")
list_models, card = CATALOG.names, CATALOG.card

__all__ = ["BLOCKS", "CATALOG", "card", "create_model", "is_planar", "list_models", "load_official", "window_divisor"]


def create_model(name: str, **options: Any) -> nn.Module:
    """Build a network image → logits.

    Args:
        name: one of :func:`list_models`, ``ssm_unet:ss2d`` among them; ``monai:UNet`` and every other network of
            ``monai.networks.nets`` that takes ``in_channels`` and ``out_channels``; ``smp:Unet`` and every other
            architecture of segmentation-models-pytorch, whose ``encoder_name`` may also be any backbone that timm
            knows.
        options: constructor arguments. ``in_channels`` and ``out_channels`` go by these names everywhere.

    Raises:
        ValueError: unknown name or option, with the nearest known one; a library that is not installed.
    """
    prefix, colon, rest = name.partition(":")
    if not colon or prefix == ssm_unet.PREFIX:
        return CATALOG.create(name, **options)
    if prefix not in LIBRARIES:
        raise ValueError(f"create_model: unknown library {prefix!r} in {name!r}; choose from {', '.join(LIBRARIES)}")
    return LIBRARIES[prefix](rest, options)


def load_official(model: Any, source: Any, *, ignore: Sequence[str] = ()) -> Any:
    """Copy the authors' weights into a network of this package: every parameter or none.

    Args:
        model: AGUNet, DAUNet (Keras ``.h5`` files), MSA, ACMIL, VM-UNet or MHS-VM (state
            dicts).
        source: a file, ``hf://owner/repo/file``, or what such a file holds.
        ignore: beginnings of our parameter names that may be missing or differ.

    Raises: ValueError if the file cannot be read, or names or shapes do not fit; the message lists them.
    """
    if isinstance(model, MultiScaleAttention):
        return multi_scale_attention.load_official(model, source, ignore=ignore)
    if isinstance(model, (vm_unet.VMUNet, mhs_vm.MHSVM)):
        return vm_unet.load_official(model, source, ignore=ignore)
    if isinstance(model, acmil.BagNetwork):
        return acmil.load_official(model, source, ignore=ignore)
    if isinstance(model, AttentionUNet):
        return keras_weights.load_official(model, source, ignore=ignore)
    raise ValueError(f"load_official: no official weights are known for a {type(model).__name__}")


def _is_ours(name: str) -> bool:
    prefix, colon, _ = name.partition(":")
    return not colon or prefix == ssm_unet.PREFIX


def is_planar(name: str) -> bool:
    """Whether a network reads pictures only, and has no option ``spatial_dims``."""
    planar = {module.CARD.family for module in (multi_scale_attention, vm_unet, mhs_vm)}
    if _is_ours(name):
        return CATALOG.card(name).family in planar or ssm_unet.is_planar(name)
    return name.startswith("smp:")


def window_divisor(name: str, options: dict[str, Any], *, planar: bool) -> int:
    """What each axis of a window must be divisible by.

    Args:
        name, options: as of :func:`create_model`.
        planar: it is fed pictures.

    Raises: ValueError for options that make no network.
    """
    if _is_ours(name) and CATALOG.card(name).family == acmil.CARD.family:
        raise ValueError(f"{name} reads bags of features, no images; use medical-seg slides train")
    try:
        if not _is_ours(name):
            return max(1, int(np.prod(options.get("strides") or 32)))
        dims = {} if is_planar(name) else {"spatial_dims": 2 if planar else 3}
        with torch.device("meta"):
            model: Any = create_model(name, **{**options, **dims})
        return int(model.divisor)
    except ValueError:
        raise
    except Exception as error:  # options are typed by hand: torch and MONAI raise whatever they stumble over
        text = " ".join(str(error).split())[:160]
        raise ValueError(f"create_model: {name} cannot be built with {options} ({text})") from None
