"""``digits_coco_dark``: the pictures of `detection.data.digits_coco` as a camera would take them at night.

Light of a sixteenth, a lens that is darker towards its corners, and noise that grows with the light, all from a seed;
boxes and splits stay. Checked in: ``data/test_low_light.py``.
"""

from typing import Any, Literal

import numpy as np

from detection.data.digits_coco import SPLITS, DigitsCoco

GAMMA = 2.2  # of the files
SHOT, READ = 0.002, 4e-6  # variance of the noise: per unit of light, and in the dark
OFFSET = 500_000  # of the seeds, above those that compose the pictures
NEAR_CENTER = 0.25  # the lens's brightest point lies in the middle half of each side


class DarkDigitsCoco(DigitsCoco):
    """One split in the dark, as items of `detection.data.collate_detection`.

    Args:
        split, transform, limit: of `DigitsCoco`.
        light, noise, vignette: of `darken`.

    Raises: ValueError as `DigitsCoco` and `darken`.
    """

    def __init__(
        self,
        split: Literal["train", "val", "test"] = "train",
        *,
        light: float = 0.06,
        noise: float = 1.0,
        vignette: float = 0.5,
        transform: dict[str, Any] | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__(split, transform=transform, limit=limit)
        first = SPLITS[split][3] + OFFSET
        self.pictures = [
            (darken(pixels, first + k, light=light, noise=noise, vignette=vignette), boxes, labels)
            for k, (pixels, boxes, labels) in enumerate(self.pictures)
        ]


def darken(
    pixels: np.ndarray, seed: int, *, light: float = 0.06, noise: float = 1.0, vignette: float = 0.5
) -> np.ndarray:
    """A picture (Y, X, 3) uint8 in less light, equal for equal seeds.

    Args:
        light: share of the linear light that is left.
        noise: times the standard deviation of a sensor's shot and read noise.
        vignette: share of the light that is lost a half diagonal from the lens's center, which the seed places.

    Raises: ValueError for a share outside [0, 1] or noise below 0.
    """
    for name, value, most in (("light", light, 1.0), ("vignette", vignette, 1.0), ("noise", noise, np.inf)):
        if not 0 <= value <= most:
            rule = "in [0, 1]" if most == 1 else "at least 0"
            raise ValueError(f"darken: {name} must be {rule}, got {name}={value}")
    draw = np.random.RandomState(seed)
    grain = draw.standard_normal(pixels.shape)
    height, width = pixels.shape[:2]
    y, x = draw.uniform(NEAR_CENTER, 1 - NEAR_CENTER, 2) * (height, width)
    rows, columns = np.arange(height)[:, None] + 0.5 - y, np.arange(width)[None] + 0.5 - x
    distance = (rows**2 + columns**2) / ((height**2 + width**2) / 4)
    linear = (pixels / 255.0) ** GAMMA * light * (1 - vignette * np.minimum(distance, 1))[..., None]
    linear = linear + noise * grain * np.sqrt(linear * SHOT + READ)
    return np.floor(np.clip(linear, 0, 1) ** (1 / GAMMA) * 255 + 0.5).astype(np.uint8)
