"""The models of this package by name, and those of MONAI and segmentation-models-pytorch behind one call."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from attn_core.registry import ModelCard, did_you_mean

from .agunet import AGUNet
from .daunet import DAUNet
from .multi_scale_attention import MultiScaleAttention

_BOUGET = {"paper": "2101.07715", "code": "https://github.com/dbouget/mri_brain_tumor_segmentation"}
_PUBLISHED = "Dice 81.6 %, patient-wise F1 95.6 % (600 private volumes)"


@dataclass(frozen=True)
class Entry:
    """A registered name: what builds it, and what the tables say."""

    build: Callable[..., nn.Module]
    card: ModelCard
    in_channels: int = 1
    out_channels: int = 2


def _unet(build: Callable[..., nn.Module], family: str, summary: str, published: str = "") -> Entry:
    card = ModelCard(family, summary, license="BSD-2-Clause", test="test_agunet.py", published=published, **_BOUGET)
    return Entry(build, card)


def _guided(build: Callable[..., nn.Module], summary: str) -> Entry:
    card = ModelCard(
        family="MSA",
        summary=summary,
        paper="1906.02849",
        code="https://github.com/sinAshish/Multi-Scale-Attention",
        license="",
        test="test_multi_scale_attention.py",
    )
    return Entry(build, card, out_channels=5)


REGISTRY: dict[str, Entry] = {
    "agunet": _unet(AGUNet, "AGUNet", "Attention gates on the skip connections.", _PUBLISHED),
    "agunet_full": _unet(
        partial(AGUNet, input_pyramid=True, deep_supervision=True),
        "AGUNet",
        "Attention gates, input pyramid, deep supervision.",
    ),
    "agunet_small": _unet(
        partial(AGUNet, filters=(16, 32, 64), stem=2),
        "AGUNet",
        "Three levels on half the grid, the last look at full size, for small machines.",
    ),
    "daunet": _unet(DAUNet, "DAUNet", "Position and channel attention at the bottom."),
    "daunet_full": _unet(
        partial(DAUNet, input_pyramid=True, deep_supervision=True, attention_guiding=True),
        "DAUNet",
        "Dual attention that guides every stage, input pyramid, deep supervision.",
    ),
    "daunet_small": _unet(
        partial(DAUNet, filters=(16, 32, 64), attention_guiding=True, stem=2),
        "DAUNet",
        "Three guided levels on half the grid, for small machines.",
    ),
    "msa": _guided(MultiScaleAttention, "Two passes of attention over four scales of ResNeXt-101, 2-D."),
    "msa_resnet18": _guided(partial(MultiScaleAttention, backbone="resnet18"), "The same over ResNet-18, 2-D."),
    "test_agunet": _unet(partial(AGUNet, filters=(4, 8, 16)), "AGUNet", "For tests."),
    "test_daunet": _unet(partial(DAUNet, filters=(4, 8, 16), attention_guiding=True), "DAUNet", "For tests."),
    "test_msa": _guided(partial(MultiScaleAttention, backbone="test_efficientnet", width=8), "For tests."),
}


def list_models() -> list[str]:
    """Names of this package, sorted; :func:`create_model` takes more."""
    return sorted(REGISTRY)


def card(name: str) -> ModelCard:
    """What the tables say about a model."""
    return REGISTRY[name].card


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
    if colon:
        builders = {"monai": _monai, "smp": _smp}
        if prefix not in builders:
            raise ValueError(f"create_model: unknown library {prefix!r} in {name!r}; choose from monai, smp")
        return builders[prefix](rest, options)
    if name not in REGISTRY:
        raise ValueError(f"create_model: unknown model {name!r}{did_you_mean(name, list_models())}")
    build = REGISTRY[name].build
    _check_options(name, options, inspect.signature(build).parameters)
    return build(**options)


def _monai(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        from monai.networks import nets
    except ImportError as error:
        raise ValueError("create_model: monai is not installed; pip install 'medical-seg[train]'") from error
    known = [key for key, value in vars(nets).items() if inspect.isclass(value) and issubclass(value, nn.Module)]
    if name not in known:
        raise ValueError(f"create_model: MONAI has no network {name!r}{did_you_mean(name, known)}")
    network = getattr(nets, name)
    parameters = inspect.signature(network).parameters
    if not {"in_channels", "out_channels"} <= set(parameters):
        raise ValueError(f"create_model: MONAI's {name} takes no in_channels and out_channels; it segments nothing")
    _check_options(f"monai:{name}", options, parameters)
    try:
        return network(**options)
    except TypeError as error:
        raise ValueError(f"create_model: monai:{name}: {error}; set it with --option NAME=VALUE") from error


def _smp(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise ValueError(
            "create_model: segmentation-models-pytorch is not installed; pip install 'medical-seg[smp]'"
        ) from error
    known: dict[str, Any] = {
        architecture.__name__: architecture for architecture in smp.MODEL_ARCHITECTURES_MAPPING.values()
    }
    if name not in known:
        raise ValueError(f"create_model: segmentation-models-pytorch has no {name!r}{did_you_mean(name, known)}")
    given = {"encoder_weights": None, **options}
    given["classes"] = given.pop("out_channels", 1)
    given.pop("spatial_dims", None)
    _check_options(f"smp:{name}", given, inspect.signature(known[name]).parameters)
    encoder = given.get("encoder_name")
    if encoder is not None and encoder not in smp.encoders.encoders:
        _register_backbones()
        import timm

        backbone = encoder.removeprefix("tu-")
        if not timm.is_model(backbone):
            near = did_you_mean(encoder, [*smp.encoders.encoders, *timm.list_models()])
            raise ValueError(f"create_model: {name} knows no encoder {encoder!r}{near}")
        given["encoder_name"] = f"tu-{backbone}"
    return known[name](**given)


def _register_backbones() -> None:
    """Our vision package adds its backbones to timm when it is imported."""
    import importlib.util

    if importlib.util.find_spec("vision_models") is not None:
        importlib.import_module("vision_models")


def _check_options(name: str, options: dict[str, Any], parameters: Any) -> None:
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for option in options:
        if option not in parameters:
            raise ValueError(f"create_model: {name} has no option {option!r}{did_you_mean(option, parameters)}")
