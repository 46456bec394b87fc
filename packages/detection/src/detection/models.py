"""The detectors of this package by name."""

import inspect
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from attn_core.registry import ModelCard, Registry, did_you_mean

from . import bevformer_dfa3d, bvr_hosts
from .bevformer_dfa3d import BEVFormerDFA3D
from .bvr_hosts import build_detector
from .plain_detr import PlainDETR, load_official
from .swin_v2 import SwinV2

REGISTRY: Registry[nn.Module] = Registry("model", "create_model")
_CODE = "https://github.com/impiga/Plain-DETR"


@REGISTRY.register
def plain_detr_swin_v2_small_ape(**options: Any) -> PlainDETR:
    """62.6 M parameters, Swin V2-S supervised, no box bias: sup_pt_ape, published AP 37.2."""
    return PlainDETR(**{"position_bias": "none", **options})


@REGISTRY.register
def plain_detr_swin_v2_small_sup(**options: Any) -> PlainDETR:
    """62.7 M parameters, Swin V2-S supervised, BoxRPB: sup_pt_boxrpe, published AP 46.1."""
    return PlainDETR(**options)


@REGISTRY.register
def plain_detr_swin_v2_small_mim(**options: Any) -> PlainDETR:
    """62.7 M parameters, Swin V2-S pre-trained by SimMIM, BoxRPB: mim_pt_boxrpe, published AP 48.7."""
    return PlainDETR(**{"backbone_options": {"pretrained_window": 12}, **options})


@REGISTRY.register
def plain_detr_swin_v2_small_mim_reparam(**options: Any) -> PlainDETR:
    """62.7 M parameters, the same with boxes in pixels: mim_pt_boxrpe_reparam, published AP 50.9."""
    return PlainDETR(**{"backbone_options": {"pretrained_window": 12}, "reparam": True, **options})


@REGISTRY.register
def plain_detr_resnet50(**options: Any) -> PlainDETR:
    """38 M parameters, ResNet-50 with frozen batch norm, boxes in pixels."""
    return PlainDETR(**{"backbone": "resnet50", "reparam": True, **options})


@REGISTRY.register
def plain_detr_swin_v2_large(**options: Any) -> PlainDETR:
    """213 M parameters, Swin V2-L, boxes in pixels; the paper's 59.8 has 12 more window layers, not released."""
    return PlainDETR(**{"backbone": "swin_v2_large", "reparam": True, **options})


@REGISTRY.register
def plain_detr_vit_base(**options: Any) -> PlainDETR:
    """98 M parameters, timm's ViT-B/16 on pictures of any size, boxes in pixels; not released by the authors."""
    vit = {"options": {"dynamic_img_size": True, "dynamic_img_pad": True}, "drop_path": 0.1}
    return PlainDETR(**{"backbone": "vit_base_patch16_224", "backbone_options": vit, "reparam": True, **options})


@REGISTRY.register
def test_plain_detr(**options: Any) -> PlainDETR:
    """0.2 M parameters, for tests."""
    body = SwinV2(
        embed_dim=16,
        depths=(1, 1, 2, 2),
        num_heads=(1, 1, 2, 2),
        window=4,
        pretrained_window=(4, 4, 4, 2),
        mlp_ratio=1.0,
        drop_path=0.0,
    )
    small = {"dim": 32, "num_heads": 2, "ffn_dim": 32, "num_layers": 2, "queries": 10, "queries_many": 12, "repeats": 2}
    return PlainDETR(**{"backbone": body, "num_classes": 10, "rpb_hidden_dim": 16, "top_k": 10, **small, **options})


test_plain_detr.__test__ = False  # pyright: ignore  # pytest would take the name for a test's


for _builder in (*bvr_hosts.VARIANTS, *bevformer_dfa3d.VARIANTS):
    REGISTRY.register(_builder)


def list_models() -> list[str]:
    """Names that :func:`create_model` takes, sorted."""
    return list(REGISTRY)


def card(name: str) -> ModelCard:
    """What the tables say about a model.

    Raises: ValueError for an unknown name, with the nearest known one.
    """
    summary = (REGISTRY.get(name).__doc__ or "").split("\n", 1)[0]
    published = re.search(r"published (AP \d+\.\d+)", summary)
    for module in (bvr_hosts, bevformer_dfa3d):
        if REGISTRY.get(name) in module.VARIANTS:
            family, paper, code, license_, test = module.CARD
            return ModelCard(family, summary, paper, code, license_, test, published[1] if published else "")
    return ModelCard(
        family="Plain-DETR",
        summary=summary,
        paper="2308.01904",
        code=_CODE,
        license="MIT",
        test="test_plain_detr.py",
        published=published[1] if published else "",
    )


def create_model(name: str, **options: Any) -> nn.Module:
    """Build a detector with fresh weights.

    Args:
        name: one of :func:`list_models`.
        options: arguments of its class, `PlainDETR`.

    Raises: ValueError: unknown name or option, with the nearest known one.
    """
    builder: Callable[..., nn.Module] = REGISTRY.get(name)
    makers = {bvr_hosts.VARIANTS: build_detector, bevformer_dfa3d.VARIANTS: BEVFormerDFA3D}
    maker = next((maker for variants, maker in makers.items() if builder in variants), PlainDETR)
    known = inspect.signature(maker).parameters
    for option in options:
        if option not in known:
            raise ValueError(f"create_model: {name} has no option {option!r}{did_you_mean(option, known)}")
    return builder(**options)


def pretrained(name: str, weights: str = "", **options: Any) -> nn.Module:
    """`create_model`, with the backbone of an official pre-training file if ``weights`` names one; for recipes.

    Raises: ValueError as `create_model` and `detection.plain_detr.load_official`; for weights of another detector.
    """
    model = create_model(name, **options)
    if not weights:
        return model
    if not isinstance(model, PlainDETR):
        raise ValueError(f"pretrained: weights are read for Plain-DETR only, got name={name!r}")
    return load_official(model, weights, backbone_only=True)
