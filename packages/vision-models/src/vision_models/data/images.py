"""Pictures from files into tensors: every colour mode converted on purpose, every unusable file named."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

INTERPOLATION = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}


def read_image(path: str | Path, mode: Literal["RGB", "L"] = "RGB") -> Image.Image:
    """Decode a picture, upright, as 8-bit RGB or grey.

    Transparent pixels are laid on white; 16-bit grey is scaled (Pillow alone would clip it at 255); float pictures must
    lie in [0, 1]; CMYK, palette and the rest go through Pillow; of an animation the first frame is taken.

    Raises:
        ValueError: no picture, empty, damaged, a single pixel or row, or not finite; the message names the file.
    """
    path = Path(path)
    try:
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: the file is empty (0 bytes)")
        with Image.open(path) as opened:
            # load() before transposing: a truncated file must fail here, under its own name
            opened.load()
            image = ImageOps.exif_transpose(opened)
            return _eight_bit(image, path).convert(mode)
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not an image, or of an unknown format") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
            raise ValueError(f"{path}: {error.strerror}") from None
        raise ValueError(f"{path}: the image is damaged: {error}") from None


def _eight_bit(image: Image.Image, path: Path) -> Image.Image:
    if min(image.size) < 2:
        raise ValueError(f"{path}: {image.width}×{image.height} pixels are too few for an image")
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError(f"{path}: {int((~np.isfinite(values)).sum())} pixels are NaN or infinite")
        top = 1.0 if image.mode == "F" else 65535.0
        if values.min() < 0 or values.max() > top:
            raise ValueError(
                f"{path}: pixels must lie in 0…{top:g} for mode {image.mode}, got {values.min():g}…{values.max():g}"
            )
        return Image.fromarray(np.round(values * (255.0 / top)).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image)
    return image


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
        array: Any = np.array(image, dtype=np.float32)
        pixels = torch.from_numpy(array.reshape(*self.size, -1)).permute(2, 0, 1) / 255
        return (pixels - self.mean) / self.std
