"""Frames of videos, and files that are none."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from detection.data.video import is_video, read_frames


def test_frames_come_in_order_with_their_numbers(tmp_path: Path) -> None:
    video = tmp_path / "a.GIF"
    frames = [Image.new("RGB", (12, 9), color) for color in ("red", "lime", "blue", "white")]
    frames[0].save(video, save_all=True, append_images=frames[1:])
    found = [(number, pixels[:, 4, 5].tolist(), tuple(pixels.shape)) for number, pixels in read_frames(video, every=2)]
    assert found == [(0, [255, 0, 0], (3, 9, 12)), (2, [0, 0, 255], (3, 9, 12))]
    assert is_video(video)
    assert not is_video(tmp_path / "a.png")


def test_frames_of_mp4_keep_their_colors(tmp_path: Path) -> None:
    video = tmp_path / "b.mp4"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    for blue in (0, 120, 240):
        writer.write(np.full((48, 64, 3), (blue, 60, 200), np.uint8))  # OpenCV has blue first
    writer.release()
    found = list(read_frames(video))
    assert [number for number, _ in found] == [0, 1, 2]
    for (_, pixels), blue in zip(found, (0, 120, 240), strict=True):
        assert pixels.shape == (3, 48, 64)
        assert np.abs(pixels[:, 24, 32].numpy() - np.array([200, 60, blue])).max() < 30


@pytest.mark.parametrize("name", ["a.gif", "a.mp4", "a.mkv"])
def test_files_that_are_no_videos_are_named(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(np.arange(99, dtype=np.uint8).tobytes())
    with pytest.raises(ValueError, match=rf"{name}: the video cannot be read.+"):
        list(read_frames(file))
