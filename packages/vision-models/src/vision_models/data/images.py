"""Pictures from files into tensors: every colour mode converted on purpose, every unusable file named."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attn_core.pictures import read_picture

INTERPOLATION = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}


def read_image(path: str | Path, mode: Literal["RGB", "L"] = "RGB") -> Image.Image:
    """Decode a picture, upright, as 8-bit RGB or grey, by :func:`attn_core.pictures.read_picture`.

    Raises:
        ValueError: what that refuses, and levels without a black and a white; the message names the file.
    """
    picture = read_picture(path)
    return Image.fromarray(picture.rgb() if mode == "RGB" else picture.grey())


LARGEST = 8192  # side of a network's input, in pixels


class Preprocess:
    """The evaluation transform that a data set keeps in its ``metainfo["preprocess"]``, for single pictures.

    Args:
        mode: ``"RGB"`` or ``"L"``.
        size: rows and columns of the result.
        crop_pct: the short side is resized to size/crop_pct and the center cut out; None squeezes the whole picture.
        through: rows and columns of an intermediate size, for data whose originals are that small.

    Shapes: picture → (1 or 3, size) float32.
    """

    def __init__(
        self,
        *,
        mode: Literal["RGB", "L"] = "RGB",
        size: Sequence[int] = (224, 224),
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        crop_pct: float | None = None,
        interpolation: Literal["bicubic", "bilinear", "box"] = "bicubic",
        through: Sequence[int] | None = None,
    ) -> None:
        if mode not in ("RGB", "L"):
            raise ValueError(f"Preprocess: mode must be 'RGB' or 'L', got mode={mode!r}")
        for option, sides in (("size", size), ("through", through)):
            if sides is not None and not (
                len(sides) == 2 and all(isinstance(side, int) and 0 < side <= LARGEST for side in sides)
            ):
                raise ValueError(f"Preprocess: {option} must be two numbers from 1 to {LARGEST}, got {option}={sides}")
        channels = 1 if mode == "L" else 3
        if len(mean) not in (1, channels) or len(std) not in (1, channels):
            raise ValueError(f"Preprocess: mean and std must have {channels} entries, got {mean} and {std}")
        if crop_pct is not None and not 0.05 <= crop_pct <= 1:
            raise ValueError(f"Preprocess: crop_pct must lie in [0.05, 1], got crop_pct={crop_pct}")
        if interpolation not in INTERPOLATION:
            raise ValueError(f"Preprocess: interpolation must be one of {tuple(INTERPOLATION)}, got {interpolation!r}")
        self.mode: Literal["RGB", "L"] = mode
        self.size = (int(size[0]), int(size[1]))
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.crop_pct = crop_pct
        self.interpolation = INTERPOLATION[interpolation]
        self.through = through

    def read(self, path: str | Path) -> tuple[Image.Image, Tensor]:
        """The picture as the network sees it (before normalization), and the network's input (C, Y, X)."""
        image = self.crop(read_image(path, self.mode))
        return image, self.to_tensor(image)

    def crop(self, image: Image.Image) -> Image.Image:
        """The image at the size that the network takes: scaled and center-cropped, pixels not yet normalized."""
        height, width = self.size
        if self.through is not None:
            image = image.resize((self.through[1], self.through[0]), Image.Resampling.BOX)
            return image.resize((width, height), Image.Resampling.BILINEAR)
        if self.crop_pct is None:
            return image.resize((width, height), self.interpolation)
        scale = max(width / image.width, height / image.height) / self.crop_pct
        wide, high = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        image = image.resize((wide, high), self.interpolation)
        left, top = (wide - width) // 2, (high - height) // 2
        return image.crop((left, top, left + width, top + height))

    def to_tensor(self, image: Image.Image) -> Tensor:
        """A cropped image, 8 bits a channel → (C, Y, X) float32 with ``mean`` and ``std`` taken out."""
        array: Any = np.array(image, dtype=np.float32)
        pixels = torch.from_numpy(array.reshape(*self.size, -1)).permute(2, 0, 1) / 255
        return (pixels - self.mean) / self.std


def preparation(info: Any, where: Path) -> tuple[Preprocess, list[str]]:
    """The transform and the classes' names that a run notes about its data.

    Args:
        info: the data set's ``metainfo`` as it stands in ``run.json``.
        where: the run's folder, for the message.

    Raises:
        ValueError: they are not there, or no transform and no names.
    """
    known = info if isinstance(info, Mapping) else {}
    options, classes = known.get("preprocess"), known.get("classes")
    if not isinstance(options, Mapping) or not isinstance(classes, list) or not classes:
        raise ValueError(f"{where / 'run.json'} names neither preprocessing nor classes; train it again")
    try:
        return Preprocess(**options), [str(name) for name in classes]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where / 'run.json'}: preprocess is unusable: {str(error).splitlines()[0]}") from None
