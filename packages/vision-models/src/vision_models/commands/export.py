"""The verb ``export``: what of a run, or of a registered model, is written as ONNX or for ``torch.export``."""

from typing import Any

import torch
from torch import nn

from attn_core.engine import ExportTarget, TrainedRun
from vision_models.models import create_model


def export_target(run: TrainedRun | str) -> ExportTarget:
    """The network of a run with inputs of its training size, or a fresh model of a registered name.

    ``image`` (batch, channels, height, width) → ``logits`` (batch, classes); height and width are free unless the
    network says why not (``fixed_size``).

    Raises: ValueError: a run whose network takes more than an image.
    """
    from vision_models.data.images import preparation
    from vision_models.tasks.denoising import DenoisingTask

    torch.manual_seed(0)
    if isinstance(run, str):
        model = create_model(run).eval()
        cfg: Any = model.default_cfg
        return _target(model, cfg["input_size"][1:], run)
    net: Any = run.model.net  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(run.model, DenoisingTask):
        raise ValueError(
            f"export: the network of {run.directory} takes noise, a time and a class, which no input here is; "
            "keep it with run.model.net.save_pretrained and use it through diffusers"
        )
    return _target(net, preparation(run.data_info, run.directory)[0].size, run.directory.name)


def _target(net: nn.Module, size: tuple[int, int], name: str) -> ExportTarget:
    from vision_models.insertion.places import input_size_of

    height, width = size
    axes, others, note = {0: "batch"}, (), ""
    # recipes with added modules train networks of timm itself
    fixed = getattr(net, "fixed_size", "timm does not say which sizes its networks take")
    channels = getattr(net, "in_chans", None) or input_size_of(net)[0]
    if fixed:
        note = f"height and width stay {height}×{width}: {fixed}"
    else:
        axes |= {2: "height", 3: "width"}
        others = ((torch.randn(2, channels, height + 64, width + 32),),)
    return ExportTarget(
        net,
        (torch.randn(2, channels, height, width),),
        name,
        input_names=("image",),
        output_names=("logits",),
        axes=(axes,),
        others=others,
        note=note,
    )
