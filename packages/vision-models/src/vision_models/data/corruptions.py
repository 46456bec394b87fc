"""What may befall pictures between training and use: noise, blur, low contrast; always the same for the same ones."""

import torch
import torch.nn.functional as F
from torch import Tensor

NOISE = 0.6  # standard deviation, of images in [−1, 1]
BLUR = 0.09  # standard deviation of the Gaussian, as a share of the side
CONTRAST = 0.25  # of the distance to the image's mean that is left


def noise(images: Tensor) -> Tensor:
    """Gaussian noise of a fixed seed."""
    return images + NOISE * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def blur(images: Tensor) -> Tensor:
    """A Gaussian that fills the border with the edge's values."""
    side = images.shape[3]
    far = max(1, round(3 * BLUR * side))
    steps = torch.arange(-far, far + 1, dtype=images.dtype)
    kernel = (-0.5 * (steps / (BLUR * side)).square()).exp()
    kernel = kernel / kernel.sum()
    padded = F.pad(images, (far, far, far, far), mode="replicate").flatten(0, 1)[:, None]
    return F.conv2d(F.conv2d(padded, kernel[None, None, None]), kernel[None, None, :, None]).view_as(images)


def contrast(images: Tensor) -> Tensor:
    """Each image drawn toward its mean."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + CONTRAST * (images - mean)


CORRUPTIONS = {"noise": noise, "blur": blur, "contrast": contrast}
