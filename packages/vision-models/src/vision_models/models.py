"""The models of this package by name."""

import difflib
import inspect
import re
from typing import Any

import timm

from attn_core.registry import ModelCard

from . import biformer, cswin, davit, deit, focalnet, halonet, pvt, ravlt, swin
from .backbone import StagedBackbone
from .biformer import BiFormer
from .cswin import CSwin
from .davit import DaViT
from .deit import DeiT
from .focalnet import FocalNet
from .halonet import HaloNet
from .pvt import PVT
from .ravlt import RAVLT
from .swin import Swin

FAMILIES = {
    BiFormer: biformer,
    CSwin: cswin,
    DaViT: davit,
    DeiT: deit,
    FocalNet: focalnet,
    HaloNet: halonet,
    PVT: pvt,
    RAVLT: ravlt,
    Swin: swin,
}
REGISTRY: dict[str, type[StagedBackbone]] = {
    name: family for family, module in FAMILIES.items() for name in module.VARIANTS
}
# Attentions that stand in the blocks of other families' networks, by the first word of the models' names.
HOSTED = {"agent": "Agent Attention", "inline": "InLine attention"}


def list_models() -> list[str]:
    """Names that :func:`create_model` takes, sorted."""
    return sorted(REGISTRY)


def timm_name(name: str) -> str:
    """The name of a model in timm's registry: its own, or ``attn_…`` where timm has a model of that name."""
    return f"attn_{name}" if hasattr(FAMILIES[REGISTRY[name]], f"attn_{name}") else name


def card(name: str) -> ModelCard:
    """What the tables say about a model."""
    family = REGISTRY[name]
    system, module = family.__name__, FAMILIES[family].__name__.rpartition(".")[2]
    attention = name.removeprefix("test_").partition("_")[0]
    if attention in HOSTED:  # one attention in the blocks of several families
        system, module = HOSTED[attention], attention
    cfg: Any = timm.get_pretrained_cfg(timm_name(name))
    summary = (timm.model_entrypoint(timm_name(name)).__doc__ or "").split("\n", 1)[0]
    published = re.search(r"published (.*? %)", summary)
    return ModelCard(
        family=system,
        summary=summary,
        paper=cfg.paper_ids.removeprefix("arXiv:"),
        code=cfg.origin_url,
        license="" if cfg.license == "none stated" else cfg.license,
        test=f"test_{module}.py",
        published=published[1] if published else "",
    )


def create_model(name: str, **options: Any) -> StagedBackbone:
    """Build a model of this package under its paper's name, as ``timm.create_model``; errors name the mistake.

    Args:
        name: one of :func:`list_models`.
        options: constructor arguments of the class, or timm's (``features_only``, ``out_indices``, ``pretrained_cfg``,
            ``checkpoint_path``, …).

    Raises:
        ValueError: unknown name or option, with the nearest known one.
    """
    if name not in REGISTRY:
        raise ValueError(f"create_model: unknown model {name!r}{_suggestion(name, list_models())}")
    known = {*inspect.signature(REGISTRY[name]).parameters, *inspect.signature(timm.create_model).parameters}
    known |= {"features_only", "out_indices", "feature_cls", "output_fmt", "pretrained_strict"}
    for option in options:
        if option not in known:
            raise ValueError(f"create_model: {name} has no option {option!r}{_suggestion(option, sorted(known))}")
    return timm.create_model(timm_name(name), **options)  # pyright: ignore[reportReturnType]


def _suggestion(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"
