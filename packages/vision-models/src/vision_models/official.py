"""Weights of the official releases into our models: files, wrapped dicts, dense checkpoints; strict."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from attn_core import weights
from vision_models.backbone import StagedBackbone

Backbone = TypeVar("Backbone", bound=StagedBackbone)


def load_official(
    model: Backbone,
    source: Mapping[str, Any] | str | Path,
    *,
    ema: bool = False,
    ignore: Sequence[str] = (),
) -> Backbone:
    """Copy an official checkpoint into ``model``, every parameter or none.

    Position tables of another image size are stretched as the official code does.

    Args:
        model: of the same variant; a ``…Dense`` class for detection and segmentation checkpoints.
        source: a file (.pth, .pt, .safetensors), ``hf://owner/repo/file``, or what such a file holds: a state dict,
            also inside ``model``, ``state_dict`` or EMA entries, with ``module.`` or ``backbone.`` before its names.
            Our own names work too.
        ema: take the averaged weights; an error if there are none.
        ignore: beginnings of our parameter names that may differ or be missing on either side: ``("head",)`` for other
            classes, ``("head", "norm", "out_norms")`` to start a dense model from a classification checkpoint.

    Returns:
        ``model``.

    Raises:
        ValueError: the file is no checkpoint, or names and shapes do not fit; the message lists them.
    """
    checkpoint = weights.read(source, ema=ema)
    names = weights.fitting_names(model, model.key_map, checkpoint)
    return weights.fill(model, checkpoint, names, ignore=ignore, fit=model.fit_table, computed=model.official_buffers)


def converted(model: StagedBackbone, checkpoint: weights.Checkpoint) -> weights.Checkpoint:
    """A checkpoint in any known layout under our names and in our shapes; what fits no name keeps its own."""
    names = weights.fitting_names(model, model.key_map, checkpoint)
    own = model.state_dict()
    kept = {n: value for n, value in checkpoint.tensors.items() if not n.endswith(model.official_buffers)}
    renamed = weights.renamed(replace(checkpoint, tensors=kept), names).tensors
    fitted = {
        name: model.fit_table(name, weights.as_linear(value, own[name])) if name in own else value
        for name, value in renamed.items()
    }
    return replace(checkpoint, tensors=fitted)
