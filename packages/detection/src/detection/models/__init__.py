"""The detectors of this package by name."""

import inspect
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from attn_core.registry import ModelCard, Registry, did_you_mean
from detection.models.bevformer import detector as bevformer
from detection.models.bvr import hosts as bvr
from detection.models.plain_detr import detector as plain_detr

REGISTRY: Registry[nn.Module] = Registry("model", "create_model")
FAMILIES: dict[Any, Callable[..., nn.Module]] = {
    plain_detr: plain_detr.PlainDETR,
    bvr: bvr.build_detector,
    bevformer: bevformer.BEVFormerDFA3D,
}
for _module in FAMILIES:
    for _builder in _module.VARIANTS:
        REGISTRY.register(_builder)


def list_models() -> list[str]:
    """Names that :func:`create_model` takes, sorted."""
    return list(REGISTRY)


def card(name: str) -> ModelCard:
    """What the tables say about a model.

    Raises: ValueError for an unknown name, with the nearest known one.
    """
    builder = REGISTRY.get(name)
    summary = (builder.__doc__ or "").split("\n", 1)[0]
    published = re.search(r"published (AP \d+\.\d+)", summary)
    family, paper, code, license_, test = _module_of(builder).CARD
    return ModelCard(family, summary, paper, code, license_, test, published[1] if published else "")


def create_model(name: str, **options: Any) -> nn.Module:
    """Build a detector with fresh weights.

    Args:
        name: one of :func:`list_models`.
        options: arguments of its class, `PlainDETR`.

    Raises: ValueError: unknown name or option, with the nearest known one.
    """
    builder: Callable[..., nn.Module] = REGISTRY.get(name)
    known = inspect.signature(FAMILIES[_module_of(builder)]).parameters
    for option in options:
        if option not in known:
            raise ValueError(f"create_model: {name} has no option {option!r}{did_you_mean(option, known)}")
    return builder(**options)


def pretrained(name: str, weights: str = "", **options: Any) -> nn.Module:
    """`create_model`, with the backbone of an official pre-training file if ``weights`` names one; for recipes.

    Raises: ValueError as `create_model` and `load_official` of Plain-DETR; for weights of another detector.
    """
    model = create_model(name, **options)
    if not weights:
        return model
    if not isinstance(model, plain_detr.PlainDETR):
        raise ValueError(f"pretrained: weights are read for Plain-DETR only, got name={name!r}")
    return plain_detr.load_official(model, weights, backbone_only=True)


def _module_of(builder: Callable[..., nn.Module]) -> Any:
    return next(module for module in FAMILIES if builder in module.VARIANTS)
