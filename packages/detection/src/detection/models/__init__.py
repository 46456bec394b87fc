"""The detectors of this package by name; each file below ends with its own entries."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from attn_core.catalog import Catalog

CATALOG: Catalog[nn.Module] = Catalog("detection.models")
MODULES: Catalog[nn.Module] = Catalog("detection.layers", kind="module", caller="create_module")
SCANPATHS: Catalog[nn.Module] = Catalog("detection.scanpaths", kind="searcher", caller="create_searcher")
list_models, card, info = CATALOG.names, CATALOG.card, CATALOG.info


def create_model(name: str, **options: Any) -> nn.Module:
    """Build a detector with fresh weights; recipes name it as a type.

    Args:
        name: one of :func:`list_models`.
        options: arguments of its class.

    Raises: ValueError: unknown name or option, with the nearest known one; a value that the class refuses.
    """
    return CATALOG.create(name, **options)


def load_official(model: nn.Module, source: Mapping[str, Any] | str | Path, *, ignore: Sequence[str] = ()) -> nn.Module:
    """Copy official weights into a model of this package, every parameter or none; returns it.

    Args:
        model: built as the checkpoint's was; what is read of each family says its own ``load_official``.
        source: a file (.pth, .safetensors), ``hf://owner/repo/file``, or what such a file holds.
        ignore: beginnings of our parameter names that may differ or be missing, such as ``("class_embed.",)``.

    Raises: ValueError for another model, and where names or shapes do not fit, naming them.
    """
    from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet

    from detection.layers import featenhancer
    from detection.models.bevformer import detector as bevformer
    from detection.models.bmn import network as bmn
    from detection.models.bvr import hosts
    from detection.models.plain_detr import detector as plain_detr

    if isinstance(model, plain_detr.PlainDETR):
        return plain_detr.load_official(model, source, ignore=ignore)
    if isinstance(model, bevformer.BEVFormerDFA3D):
        return bevformer.load_official(model, source, ignore=ignore)
    if isinstance(model, featenhancer.FeatEnHancer | featenhancer.Enhanced):
        return featenhancer.load_official(model, source, ignore=ignore)
    if isinstance(model, bmn.BMN):
        return bmn.load_official(model, source, ignore=ignore)
    if isinstance(model, RetinaNet | FCOS | FasterRCNN):
        return hosts.load_official(model, source, ignore=ignore)
    raise ValueError(f"load_official: there are no official weights for a {type(model).__name__}")


def pretrained(name: str, weights: str = "", **options: Any) -> nn.Module:
    """`create_model`, with the backbone of an official pre-training file if ``weights`` names one; for recipes.

    Raises: ValueError as `create_model` and `load_backbone` of Plain-DETR; for weights of another detector.
    """
    from detection.models.plain_detr.detector import PlainDETR, load_backbone

    model = create_model(name, **options)
    if not weights:
        return model
    if not isinstance(model, PlainDETR):
        raise ValueError(f"pretrained: weights are read for Plain-DETR only, got name={name!r}")
    return load_backbone(model, weights)
