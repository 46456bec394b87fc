"""Official weights of AGUNet and DAUNet: Keras ``.h5`` files.

Layers are numbered by Keras (``conv3d_7``), from wherever the process that built them had arrived, and a file lists
them sorted by depth. What identifies a weight is its place among the layers of its class, in order of creation; our
modules are registered in that order.

The three projections of DAUNet's position attention are in no file: officially they are created inside the layer's
call, which Keras does not track. Loading warns, and draws them from a seed.
"""

import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from attn_core import weights
from medical_seg.layers.dual_attention import ChannelAttention, PositionAttention
from medical_seg.models.agunet import AGUNet, AttentionUNet
from medical_seg.models.daunet import DAUNet

logger = logging.getLogger(__name__)

KINDS = ("conv3d_transpose", "conv3d", "batch_normalization", "pam", "cam")
Layers = dict[str, list[list[np.ndarray]]]


def read_keras(path: Path) -> Layers:
    """Arrays of every layer, grouped by class, in order of creation.

    Args:
        path: a weights file or a whole model, as Keras writes them.

    Raises: ValueError if h5py is missing or the file is no Keras file or has layers of another class.
    """
    try:
        import h5py
    except ImportError as error:
        raise ValueError(
            "convert-weights: reading Keras files needs h5py; pip install 'medical-seg[weights]'"
        ) from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path}: not an HDF5 file") from error
    with file:
        try:
            found = _layers(file, path)
        except ValueError as error:
            raise error if str(error).startswith(f"{path}: ") else ValueError(f"{path}: {error}") from None
        except Exception as error:  # HDF5 raises KeyError, RuntimeError, OSError … on damaged groups
            raise ValueError(f"{path}: the file is damaged ({' '.join(str(error).split())[:160]})") from None
    return {kind: [arrays for _, arrays in sorted(rows, key=lambda row: row[0])] for kind, rows in found.items()}


def _layers(file: Any, path: Path) -> dict[str, list[tuple[int, list[np.ndarray]]]]:
    """Numbered layers by class."""
    root: Any = file.get("model_weights", file)
    if "layer_names" not in root.attrs:
        raise ValueError(f"{path}: no Keras weights (the attribute layer_names is missing)")
    found: dict[str, list[tuple[int, list[np.ndarray]]]] = {kind: [] for kind in KINDS}
    for layer in map(_text, root.attrs["layer_names"]):
        arrays = [np.asarray(root[layer][_text(name)]) for name in root[layer].attrs["weight_names"]]
        if not arrays:
            continue
        kind, number = _kind(layer, path)
        found[kind].append((number, arrays))
    return found


def build_from_keras(path: Path, arch: Literal["agunet", "daunet"], *, seed: int = 0) -> AttentionUNet:
    """The network that a Keras file was written by, with its weights; options are read off the arrays.

    Args:
        path: the ``.h5`` file.
        arch: which of the two.
        seed: of DAUNet's projections that no file holds.

    Raises: ValueError if the file fits no combination of options.
    """
    if arch not in ("agunet", "daunet"):
        raise ValueError(f"convert-weights: --arch must be agunet or daunet, got {arch!r}")
    layers = read_keras(path)
    if not layers["conv3d"] or not layers["conv3d_transpose"]:
        raise ValueError(f"{path}: holds no 3-D U-Net ({_counts(layers)})")
    ups = layers["conv3d_transpose"]
    if any(len(arrays) != 2 or arrays[0].ndim != 5 for arrays in (*layers["conv3d"], *ups)):
        raise ValueError(f"{path}: holds no 3-D U-Net (a convolution is not three-dimensional)")
    for pyramid, deep, guided in itertools.product((False, True), (False, True), (False, True)):
        if guided and (arch == "agunet" or len(ups) % 2):
            continue
        stage_ups = ups[::2] if guided else ups
        filters = (*(int(arrays[0].shape[3]) for arrays in reversed(stage_ups)), int(ups[0][0].shape[4]))
        if arch == "daunet" and filters[-1] < 8:
            continue
        channels, classes = int(layers["conv3d"][0][0].shape[3]), int(layers["conv3d"][-1][0].shape[4])
        options: dict[str, Any] = {"deep_supervision": deep, "input_pyramid": pyramid}
        if arch == "daunet":
            options |= {"attention_guiding": guided, "guide": "holes"}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = (AGUNet if arch == "agunet" else DAUNet)(3, channels, classes, filters, **options)
        try:
            load_official(model, layers)
        except ValueError:
            continue
        if arch == "daunet":
            logger.warning(
                "%s: position attention's projections are in no official file; drawn with seed %d", path, seed
            )
        return model
    raise ValueError(f"{path}: fits no {arch} with any of its options ({_counts(layers)})")


def load_official(
    model: AttentionUNet, source: str | Path | Mapping[str, list[list[np.ndarray]]], *, ignore: Sequence[str] = ()
) -> AttentionUNet:
    """Copy a Keras file, or what `read_keras` gave, into a network: every parameter or none.

    Arrays go by names such as ``conv3d/4/0``: class, place among its layers, place in the layer. The projections of
    position attention, which no official file holds, keep the values they have.

    Args:
        source: the ``.h5`` file, ``hf://owner/repo/file``, or arrays by class.
        ignore: beginnings of our parameter names that may be missing or differ.

    Raises: ValueError if names or shapes do not fit; nothing is copied then.
    """
    layers = source if isinstance(source, Mapping) else read_keras(weights.local_file(str(source)))
    said = "the given arrays" if isinstance(source, Mapping) else str(source)
    own = {id(value): name for name, value in model.state_dict(keep_vars=True).items()}
    names, untracked = {}, []
    for kind, modules in _modules(model).items():
        for number, module in enumerate(modules):
            names |= {f"{kind}/{number}/{place}": own[id(t)] for place, t in enumerate(_tensors(module))}
            if isinstance(module, PositionAttention):
                untracked += [own[id(parameter)] for child in module.children() for parameter in child.parameters()]
    tensors = {
        f"{kind}/{number}/{place}": torch.from_numpy(_to_torch(array))
        for kind, rows in layers.items()
        for number, arrays in enumerate(rows)
        for place, array in enumerate(arrays)
    }
    return weights.fill(model, weights.Checkpoint(said, tensors), names, ignore=(*ignore, *untracked))


def to_keras(model: AttentionUNet) -> Layers:
    """Arrays by class as :func:`load_official` takes them."""
    written: Layers = {}
    for kind, modules in _modules(model).items():
        written[kind] = [[_to_keras(t.detach().cpu().numpy()) for t in _tensors(module)] for module in modules]
    return written


def _modules(model: AttentionUNet) -> dict[str, list[nn.Module]]:
    found: dict[str, list[nn.Module]] = {kind: [] for kind in KINDS}
    untracked = {m for pam in model.modules() if isinstance(pam, PositionAttention) for m in pam.children()}
    kinds: list[tuple[type[nn.Module], str]] = [
        (nn.ConvTranspose3d, "conv3d_transpose"),
        (nn.Conv3d, "conv3d"),
        (nn.BatchNorm3d, "batch_normalization"),
        (PositionAttention, "pam"),
        (ChannelAttention, "cam"),
    ]
    for module in model.modules():
        for kind, name in kinds:
            if isinstance(module, kind) and module not in untracked:
                found[name].append(module)
    return found


def _tensors(module: Any) -> list[Tensor]:
    if isinstance(module, nn.BatchNorm3d):
        return [module.weight, module.bias, module.running_mean, module.running_var]  # pyright: ignore[reportReturnType]
    if isinstance(module, PositionAttention | ChannelAttention):
        return [module.gamma]
    return [module.weight, module.bias]


def _to_torch(array: np.ndarray) -> np.ndarray:
    """Kernels (d, h, w, in, out) → (out, in, d, h, w); of transposed convolutions (d, h, w, out, in) → (in, out, …)."""
    return np.ascontiguousarray(array.transpose(4, 3, 0, 1, 2)) if array.ndim == 5 else array


def _to_keras(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(2, 3, 4, 1, 0)) if array.ndim == 5 else array


def _kind(layer: str, path: Path) -> tuple[str, int]:
    match = re.fullmatch(r"(.*?)(?:_v\d)?(?:_(\d+))?", layer)
    name = match[1] if match else layer
    if name not in KINDS:
        raise ValueError(f"{path}: layer {layer!r} is of no class that AGUNet or DAUNet has ({', '.join(KINDS)})")
    return name, int(match[2] or 0) if match else 0


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _counts(layers: Layers) -> str:
    return ", ".join(f"{len(rows)} {kind}" for kind, rows in layers.items())
