"""Frames of videos: GIF by Pillow, others by OpenCV, which comes with mmengine. Checked in: ``data/test_video.py``."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

ENDINGS = (".gif", ".mp4", ".mov", ".avi", ".mkv", ".webm")


def is_video(path: Path) -> bool:
    """Whether a file is read frame by frame, by its ending."""
    return path.suffix.lower() in ENDINGS


def read_frames(path: Path, *, every: int = 1) -> Iterator[tuple[int, UInt8[Tensor, "3 Y X"]]]:
    """The number of each ``every``-th frame, from 0, and its pixels.

    Raises: ValueError naming the file, if it is none that can be read, or has no frames.
    """
    read = _gif if path.suffix.lower() == ".gif" else _opencv
    count = 0
    for frame in read(path):
        if count % every == 0:
            yield count, torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)
        count += 1
    if not count:
        raise ValueError(f"{path}: the video cannot be read, or has no frames")


def _gif(path: Path) -> Iterator[NDArray[np.uint8]]:
    from PIL import Image, ImageSequence

    try:
        with Image.open(path) as opened:
            for frame in ImageSequence.Iterator(opened):
                yield np.array(frame.convert("RGB"))
    except (OSError, SyntaxError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: the video cannot be read: {error}") from None


def _opencv(path: Path) -> Iterator[NDArray[np.uint8]]:
    try:
        import cv2
    except ImportError:
        raise ValueError(f"{path}: videos are read by OpenCV; pip install opencv-python-headless") from None
    opened = cv2.VideoCapture(str(path))
    try:
        while True:
            found, frame = opened.read()
            if not found:
                return
            yield np.asarray(frame[..., ::-1], np.uint8)  # OpenCV has blue first
    finally:
        opened.release()
