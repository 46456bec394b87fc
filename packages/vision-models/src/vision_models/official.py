"""Weights of the official releases into our models: files, wrapped dicts, dense checkpoints; strict."""

import argparse
import difflib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .backbone import StagedBackbone, official_names

Backbone = TypeVar("Backbone", bound=StagedBackbone)

WRAPPERS = ("model", "state_dict", "module")
EMA_WRAPPERS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
PREFIXES = ("module.", "backbone.", "model.")


def load_official(
    model: Backbone,
    checkpoint: Mapping[str, Any] | str | Path,
    *,
    ema: bool = False,
    ignore: Sequence[str] = (),
) -> Backbone:
    """Copy an official checkpoint into ``model``, every parameter or none.

    Position tables of another image size are stretched as the official code does.

    Args:
        model: of the same variant; :class:`BiFormerDense` for detection and segmentation checkpoints.
        checkpoint: a file (.pth, .pt, .safetensors) or what it holds: a state dict, also inside ``model``,
            ``state_dict`` or EMA entries, with ``module.`` or ``backbone.`` before its names. Our own names work too.
            Files are read with ``weights_only=True``.
        ema: take the averaged weights; an error if there are none.
        ignore: beginnings of our parameter names that may differ or be missing on either side: ``("head",)`` for other
            classes, ``("head", "norm", "extra_norms")`` to start a dense model from a classification checkpoint.

    Returns:
        ``model``.

    Raises:
        ValueError: the file is no checkpoint, or names and shapes do not fit; the message lists them.
    """
    source = str(checkpoint) if isinstance(checkpoint, (str, Path)) else "the given dict"
    state = _unwrap(_read(checkpoint) if isinstance(checkpoint, (str, Path)) else checkpoint, source, ema=ema)
    own = model.state_dict()
    names = _fitting_layout(model, state)
    # strict=False below could hide a name from us, so every name is accounted for here first.
    skipped = tuple(ignore)
    missing = [name for name in names if name not in state and not (skipped and names[name].startswith(skipped))]
    unexpected = [name for name in state if name not in names and not (skipped and _ours(name).startswith(skipped))]
    unexpected = [name for name in unexpected if not name.endswith(model.official_buffers)]
    converted: dict[str, Tensor] = {}
    wrong_shape = []
    for name, ours in names.items():
        if name not in state:
            continue
        value = model.fit_table(ours, _as_linear(state[name], own[ours]))
        if value.shape == own[ours].shape:
            converted[ours] = value
        elif not (skipped and ours.startswith(skipped)):
            wrong_shape.append(f"{name} is {tuple(value.shape)}, the model has {tuple(own[ours].shape)}")
    problems = [
        *(f"missing {name}{_nearest(name, unexpected)}" for name in missing),
        *(f"unexpected {name}" for name in unexpected),
        *wrong_shape,
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"load_official: {source} does not fit this {type(model).__name__}: {shown}")
    model.load_state_dict(converted, strict=not skipped)
    return model


def our_names(model: StagedBackbone, state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a state dict in any known layout under our names; what fits no name keeps its own."""
    names, own = _fitting_layout(model, state), model.state_dict()
    renamed = {
        names.get(name, name): value for name, value in state.items() if not name.endswith(model.official_buffers)
    }
    return {
        name: model.fit_table(name, _as_linear(value, own[name])) if name in own else value
        for name, value in renamed.items()
    }


def _as_linear(value: Any, own: Tensor | None) -> Any:
    """A 1×1 convolution where we have a linear layer."""
    if own is not None and own.ndim == 2 and isinstance(value, Tensor) and value.shape[2:] == (1, 1):
        return value[:, :, 0, 0]
    return value


def _fitting_layout(model: StagedBackbone, state: Mapping[str, Any]) -> dict[str, str]:
    """Checkpoint name → ours, in the layout that fits best; one of them is what ``model.state_dict()`` writes."""
    layouts = [{name: name for name in model.state_dict()}]
    layouts += [official_names(model, model.key_map, layout) for layout in model.key_map]
    return max(layouts, key=lambda names: len(names.keys() & state.keys()))


def _read(path: str | Path) -> Mapping[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"load_official: {path} is not a file; download the checkpoint first and pass its path")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # The releases carry their command line, an argparse.Namespace: a bag of attributes that runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"load_official: {path} is not a checkpoint that loads safely: {reason}") from error
    except Exception as error:  # safetensors raises its own type, not importable without it
        raise ValueError(f"load_official: {path} is not a checkpoint that loads safely: {error}") from error


def _unwrap(checkpoint: Mapping[str, Any], source: str, *, ema: bool) -> dict[str, Tensor]:
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"load_official: {source} holds a {type(checkpoint).__name__}, not a dict of weights")
    state: Mapping[str, Any] = checkpoint
    if ema:
        found = [name for name in EMA_WRAPPERS if isinstance(state.get(name), Mapping)]
        if not found:
            raise ValueError(f"load_official: {source} has no averaged weights under any of {EMA_WRAPPERS}")
        state = state[found[0]]
    while inner := [name for name in WRAPPERS if isinstance(state.get(name), Mapping)]:
        state = state[inner[0]]
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"load_official: {source} holds no weights, only {', '.join(map(str, list(state)[:5])) or 'nothing'}"
        )
    while shared := [prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in tensors)]:
        prefix = shared[0]
        # A whole detector: its neck and heads are not ours.
        inside = {name: value for name, value in tensors.items() if name.startswith(prefix) or prefix == "module."}
        tensors = {name.removeprefix(prefix): value for name, value in inside.items()}
    return tensors


def _ours(official: str) -> str:
    """The top-level name that ``ignore`` speaks of; official names differ only below it."""
    return "stem" + official if official.startswith("downsample_layers.0.") else official


def _nearest(name: str, candidates: list[str]) -> str:
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.8)
    return f" (there is {close[0]})" if close else ""
