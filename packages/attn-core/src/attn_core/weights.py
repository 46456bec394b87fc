"""Official weights into our models: read a file, unwrap it, rename, stretch tables, account for every name.

Every package's ``load_official(model, source, *, ignore=())`` is these three steps: ::

    checkpoint = weights.read(source)                                   # file, hf://owner/repo/file, or dict
    names = weights.fitting_names(model, KEY_MAP, checkpoint)           # official name → ours
    return weights.fill(model, checkpoint, names, ignore=ignore)        # every parameter or none
"""

import argparse
import difflib
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
# Layout of a release → (pattern, replacement) pairs that turn our parameter names into that layout's, in order.
KeyMap = Mapping[str, Sequence[tuple[str, str]]]
Names = Mapping[str, str] | Callable[[str], str | None]

WRAPPERS = ("model", "state_dict", "teacher", "student", "net", "network_weights", "module")
EMA_WRAPPERS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.")
COUNTERS = ("num_batches_tracked",)  # of batch norms: they do not change what a network computes
HUB = "hf://"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by official name, and where they are from, for messages."""

    source: str
    tensors: Mapping[str, Tensor]


def local_file(source: str, *, caller: str = "local_file") -> Path:
    """A file or folder for ``source``: a local path, or ``hf://owner/repo/path[@revision]``, downloaded once, cached.

    Raises: ValueError: there is no such path; the hub cannot be reached and the file is not in its cache.
    """
    if not source.startswith(HUB):
        path = Path(source).expanduser()
        if not path.exists():
            hint = f"; for the hub write {HUB}{source}/<file>" if source.count("/") == 1 else ""
            raise ValueError(f"{caller}: {source} does not exist{hint}")
        return path
    name, _, revision = source.removeprefix(HUB).partition("@")
    parts = name.split("/")
    if len(parts) < 3:
        raise ValueError(f"{caller}: expected {HUB}owner/repo/file, got {source!r}")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise ValueError(f"{caller}: hub files need the package huggingface-hub; install the extra 'hub'") from None
    try:
        return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:]), revision=revision or None))
    except LocalEntryNotFoundError:
        raise ValueError(
            f"{caller}: {source} is not in the local cache and the hub cannot be reached; connect to the internet "
            "once, or give the path of a file that you have"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(f"{caller}: {source}: {str(error).splitlines()[0]}") from None


def read(
    source: Mapping[str, Any] | str | Path,
    *,
    ema: bool = False,
    prefixes: Sequence[str] = PREFIXES,
    caller: str = "load_official",
) -> Checkpoint:
    """The tensors of a checkpoint, out of what training scripts wrap around them.

    Args:
        source: A file (.safetensors; .pth, .pt, .bin with ``weights_only=True``), ``hf://owner/repo/file``, or what
            such a file holds: a state dict, also inside ``model``, ``state_dict``, ``teacher``, …
        ema: Take the averaged weights.
        prefixes: Beginnings that are cut off where names have them; the names without are then left out, since they
            are another network's: the neck and heads of a detector beside ``backbone.``. ``module.`` cuts only.
        caller: The function that messages name.

    Raises: ValueError: no such file, a file that does not load safely, nothing in it, no averaged weights in it.
    """
    if isinstance(source, Mapping):
        held, said = source, "the given dict"
    else:
        said = str(source)
        held = _read_file(local_file(said, caller=caller), caller)
    if not isinstance(held, Mapping):
        raise ValueError(f"{caller}: {said} holds a {type(held).__name__}, not a dict of weights")
    if ema:
        found = [name for name in EMA_WRAPPERS if isinstance(held.get(name), Mapping)]
        if not found:
            raise ValueError(f"{caller}: {said} has no averaged weights under any of {', '.join(EMA_WRAPPERS)}")
        held = held[found[0]]
    while inner := [name for name in WRAPPERS if isinstance(held.get(name), Mapping)]:
        held = held[inner[0]]
    tensors = {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{caller}: {said} holds no weights, only {', '.join(map(str, list(held)[:5])) or 'nothing'}")
    while shared := [prefix for prefix in prefixes if any(name.startswith(prefix) for name in tensors)]:
        prefix = shared[0]
        whole = prefix in ("module.", "_orig_mod.")
        tensors = {n.removeprefix(prefix): value for n, value in tensors.items() if whole or n.startswith(prefix)}
    return Checkpoint(said, tensors)


def _read_file(path: Path, caller: str) -> Any:
    if not path.is_file():
        raise ValueError(f"{caller}: {path} is not a file; give the path of a checkpoint")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # Releases carry their command line, an argparse.Namespace: a bag of attributes that runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, OSError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{caller}: {path} is not a checkpoint that loads safely: {reason}") from error
    except Exception as error:  # safetensors raises a type of its own, which is not importable without it
        raise ValueError(f"{caller}: {path} is not a checkpoint that loads safely: {error}") from error


def official_names(model: nn.Module, pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Official name → ours, for each entry of ``model.state_dict()``."""
    names = {}
    for ours in model.state_dict():
        official = ours
        for pattern, replacement in pairs:
            official = re.sub(pattern, replacement, official)
        names[official] = ours
    return names


def fitting_names(model: nn.Module, key_map: KeyMap, checkpoint: Checkpoint) -> dict[str, str]:
    """Official name → ours in the layout that fits the checkpoint best; our own names are a layout, too."""
    layouts = [{name: name for name in model.state_dict()}]
    layouts += [official_names(model, pairs) for pairs in key_map.values()]
    return max(layouts, key=lambda names: len(names.keys() & checkpoint.tensors.keys()))


def renamed(checkpoint: Checkpoint, names: Names) -> Checkpoint:
    """The checkpoint under our names: what has none keeps its own, what a function maps to None is left out."""
    find = names if callable(names) else lambda name: names.get(name, name)
    found = {find(name): value for name, value in checkpoint.tensors.items()}
    return replace(checkpoint, tensors={name: value for name, value in found.items() if name is not None})


def fill(
    model: Model,
    checkpoint: Checkpoint,
    names: Names | None = None,
    *,
    ignore: Sequence[str] = (),
    fit: Callable[[str, Tensor], Tensor] | None = None,
    computed: Sequence[str] = (),
    caller: str = "load_official",
) -> Model:
    """Copy a checkpoint into ``model``, every parameter or none.

    Args:
        names: Official name → ours (None leaves an entry out); default: the checkpoint has our names.
        ignore: Beginnings of our parameter names that may differ or be missing on either side: ``("head",)`` for other
            classes.
        fit: (our name, value) → value: stretches position tables, turns 1×1 convolutions into linear layers.
        computed: Endings of official names that hold what we compute.
        caller: The function that messages name.

    Raises: ValueError: names or shapes do not fit; the message lists them by their official names.
    """
    own, skipped = model.state_dict(), tuple(ignore)
    find = names if callable(names) else (names.get if names is not None else lambda name: name)
    found: dict[str, Tensor] = {}
    unexpected: list[str] = []
    wrong: dict[str, str] = {}
    for official, value in checkpoint.tensors.items():
        ours = find(official)
        if official.endswith(tuple(computed)) or (ours is None and callable(names)):
            continue
        if ours is None or ours not in own:
            if not (skipped and (ours or official).startswith(skipped)) and not official.endswith(COUNTERS):
                unexpected.append(official)
            continue
        value = as_linear(value, own[ours])
        value = fit(ours, value) if fit is not None else value
        if value.shape == own[ours].shape:
            found[ours] = value
        elif not (skipped and ours.startswith(skipped)):
            wrong[ours] = f"{official} is {tuple(value.shape)}, the model has {tuple(own[ours].shape)}"
    official_of = {} if names is None or callable(names) else {ours: official for official, ours in names.items()}
    missing = [
        official_of.get(ours, ours)
        for ours in own
        if ours not in found
        and ours not in wrong
        and not ours.endswith(COUNTERS)
        and not (skipped and ours.startswith(skipped))
    ]
    problems = [f"missing {name}{_nearest(name, unexpected)}" for name in missing]
    problems += [*(f"unexpected {name}" for name in unexpected), *wrong.values()]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{caller}: {checkpoint.source} does not fit this {type(model).__name__}: {shown}")
    model.load_state_dict({**own, **found})
    return model


def as_linear(value: Tensor, own: Tensor | None) -> Tensor:
    """The weight of a 1×1 convolution where we have a linear layer."""
    if own is not None and own.ndim == 2 and value.ndim == 4 and value.shape[2:] == (1, 1):
        return value[:, :, 0, 0]
    return value


def _nearest(name: str, candidates: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.8)
    return f" (there is {close[0]})" if close else ""
