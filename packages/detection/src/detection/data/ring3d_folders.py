"""Samples of ring3d as folders of pictures, written and read.

A folder holds ``sample.json`` (cameras by name with ``img``, ``lidar2img`` and, if known, ``depth`` as file and
``boxes`` (N, 9), ``names`` of the truth) and its PNG files; depth is 16-bit, in 1/256 m. Other data can be brought into
the same form. Checked in: ``commands/test_ring3d.py``.
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from detection.data.ring3d import CAMERAS, MIN_PIXELS, record


def write_sample(out: Path, scene: int, frame: int) -> Path:
    """Write one ring3d sample; returns its folder."""
    sample = record(scene, frame)
    folder = out / sample["token"]
    folder.mkdir(parents=True, exist_ok=True)
    cameras: dict[str, Any] = {}
    for name, camera in sample["cams"].items():
        Image.fromarray(camera["img"]).save(folder / f"{name}.png")
        Image.fromarray(camera["depth"]).save(folder / f"{name}_depth.png")
        cameras[name] = {"img": f"{name}.png", "depth": f"{name}_depth.png", "lidar2img": camera["lidar2img"].tolist()}
    visible = sample["num_pixels"] >= MIN_PIXELS
    boxes = np.concatenate([sample["gt_boxes"], sample["gt_velocity"]], 1)[visible]
    names = [name for name, seen in zip(sample["gt_names"], visible, strict=True) if seen]
    content = {"token": sample["token"], "cams": cameras, "boxes": boxes.tolist(), "names": names}
    (folder / "sample.json").write_text(json.dumps(content, indent=1))
    return folder


def read_sample(folder: Path, *, depth: bool = False) -> dict[str, Any]:
    """``image`` (6, 3, Y, X), ``lidar2img``, ``depth`` (6, Y, X) if asked for, and ``boxes``, ``names`` if given.

    Raises: ValueError that names what is missing or damaged.
    """
    path = folder / "sample.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no sample.json; 'detection ring3d OUT' writes folders of the right form")
    try:
        content = json.loads(path.read_text())
        cameras = [content["cams"][name] for name in CAMERAS]
        matrices = torch.tensor([camera["lidar2img"] for camera in cameras], dtype=torch.float32).view(6, 4, 4)
        files = [folder / camera["img"] for camera in cameras]
        depths = [folder / camera["depth"] for camera in cameras] if depth else []
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is no sample: {type(error).__name__} {error}") from None
    images = [_read_png(file, "RGB") for file in files]
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"{path}: its pictures differ in size")
    sample: dict[str, Any] = {"image": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255}
    sample |= {"lidar2img": matrices, "token": content.get("token", folder.name)}
    if depths:
        sample["depth"] = torch.from_numpy(
            np.stack([_read_png(file, None) for file in depths]) / np.float32(256)
        ).float()
    if "boxes" in content:
        sample["boxes"] = torch.tensor(content["boxes"], dtype=torch.float32).view(-1, 9)
        sample["names"] = content.get("names", [])
    return sample


def _read_png(path: Path, mode: Literal["RGB"] | None) -> NDArray[Any]:
    try:
        with Image.open(path) as opened:
            return np.asarray(opened.convert(mode) if mode else opened).copy()
    except (OSError, UnidentifiedImageError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise ValueError(f"{path} {reason}") from None
