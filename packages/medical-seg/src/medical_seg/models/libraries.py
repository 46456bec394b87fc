"""Networks of MONAI and segmentation-models-pytorch: ``monai:UNet``, ``smp:Unet``."""

import importlib
import importlib.util
import inspect
from typing import Any

from torch import nn

from attn_core.catalog import did_you_mean


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

    if importlib.util.find_spec("vision_models") is not None:
        importlib.import_module("vision_models")


def _check_options(name: str, options: dict[str, Any], parameters: Any) -> None:
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for option in options:
        if option not in parameters:
            raise ValueError(f"create_model: {name} has no option {option!r}{did_you_mean(option, parameters)}")


LIBRARIES = {"monai": _monai, "smp": _smp}
