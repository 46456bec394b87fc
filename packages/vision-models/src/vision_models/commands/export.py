"""The verb ``export``: what of a run, or of a registered model, is written as ONNX or for ``torch.export``."""

from typing import TYPE_CHECKING, Any

import torch

from attn_core.engine import ExportTarget, TrainedRun
from vision_models.models import create_model

if TYPE_CHECKING:
    from vision_models.backbone import StagedBackbone


def export_target(run: TrainedRun | str) -> ExportTarget:
    """The network of a run with inputs of its training size, or a fresh model of a registered name.

    ``image`` (batch, channels, height, width) → ``logits`` (batch, classes); height and width are free unless the
    network says why not (``fixed_size``).
    """
    from vision_models.data.images import preparation

    torch.manual_seed(0)
    if isinstance(run, str):
        model = create_model(run).eval()
        cfg: Any = model.default_cfg
        return _target(model, cfg["input_size"][1:], run)
    net: Any = run.model.net  # pyright: ignore[reportAttributeAccessIssue]
    return _target(net, preparation(run.data_info, run.directory)[0].size, run.directory.name)


def _target(net: "StagedBackbone", size: tuple[int, int], name: str) -> ExportTarget:
    height, width = size
    axes, others, note = {0: "batch"}, (), ""
    if net.fixed_size:
        note = f"height and width stay {height}×{width}: {net.fixed_size}"
    else:
        axes |= {2: "height", 3: "width"}
        others = ((torch.randn(2, net.in_chans, height + 64, width + 32),),)
    return ExportTarget(
        net,
        (torch.randn(2, net.in_chans, height, width),),
        name,
        input_names=("image",),
        output_names=("logits",),
        axes=(axes,),
        others=others,
        note=note,
    )
