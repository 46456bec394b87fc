"""AGLA: a second view that shows only what matters for the question, whose scores are added.

Paper: An et al., Mitigating Object Hallucinations in Large Vision-Language Models with Assembly of Global and Local
Attention, CVPR 2025, arXiv 2406.12718. Official code: Lackel/AGLA, ``eval/augmentation.py``, ``eval/sample.py``.

The same: keep the share 1 − c/2 of the pixels by relevance (c: cosine of image and question; a better match keeps
fewer), others black before normalization; score z + αz' with the cut max z + log β. Relevance is a map from any source:
`blip_relevance` computes the official one (gradient × cross-attention of BLIP's layer 6) with transformers' BLIP.
Different: the second stream has a cache of its own at all steps (the official code copies the main stream's arguments
inside the loop, so from the second token on both streams read the main cache and the score is (1 + α)z); the map is
computed on the squashed picture and laid over the picture in its own shape (official: the square itself is passed on).
Checked in ``tests/intervention/test_second_stream.py``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import LogitsProcessor

from attn_core.catalog import Card, Entry
from vlm_tools.intervention.method import Method, check_number, check_plausibility, check_share
from vlm_tools.intervention.second_stream import SecondStream, of_image_prompt

if TYPE_CHECKING:
    from vlm_tools.intervention.hooking import Run

SIDE = 384
SIGMA = 0.02 * SIDE
BORDER = 12  # zeros around a map before the spline is fitted, as scipy's zoom with mode "grid-constant"


class AGLA(Method):
    """Assembly of global and local attention.

    Args:
        view: pixel values of the masked view, as the processor makes them of ``masked_view``'s picture; None masks the
            main pixels by their distance from the image's mean color, a stand-in that needs no further model.
        alpha: weight of the masked view.
        plausibility: tokens below this share of the best token's probability are removed (official ``cd_beta``).
        keep: share of pixels that the stand-in keeps.

    Raises:
        ValueError: a share outside its range.
    """

    name = "agla"
    changes_attention = False

    def __init__(
        self,
        view: Tensor | None = None,
        *,
        alpha: float = 2.0,
        plausibility: float = 0.5,
        keep: float = 0.6,
    ) -> None:
        super().__init__()
        if view is not None and not torch.is_tensor(view):
            raise ValueError(f"AGLA: view must be a tensor of pixels, as the processor makes them, got view={view!r}")
        check_number("AGLA", "alpha", alpha)
        check_plausibility("AGLA", plausibility)
        check_share("AGLA", "keep", keep)
        self.view = view
        self.alpha = alpha
        self.plausibility = plausibility
        self.keep = keep

    def logits_processor(self, run: "Run", inputs: Mapping[str, Any]) -> LogitsProcessor:
        """A stream that sees the masked view."""
        second = of_image_prompt(inputs)
        pixels, view = second["pixel_values"], self.view
        if view is None:
            view = keep_salient(pixels, self.keep, rows=run.adapter.pixel_rows(run.model.config, second))
        if view.shape != pixels.shape:
            raise ValueError(f"AGLA: view has shape {tuple(view.shape)}, the main pixels {tuple(pixels.shape)}; "
                             "make both with one processor call")  # fmt: skip
        second["pixel_values"] = view.to(pixels)
        return SecondStream(run, second, lambda z, other: assemble(z, other, self.alpha, self.plausibility))


def assemble(
    logits: Float[Tensor, "B V"], other: Float[Tensor, "B V"], alpha: float, plausibility: float
) -> Float[Tensor, "B V"]:
    """z + αz', −inf where z is below max z + log(plausibility)."""
    cut = logits.amax(-1, keepdim=True) + math.log(plausibility)
    return (logits + alpha * other).masked_fill(logits < cut, -torch.inf)


def keep_salient(
    pixels: Float[Tensor, "P *B"], keep: float, *, rows: Sequence[int] | None = None
) -> Float[Tensor, "P *B"]:
    """Values of each tile, or patches of each image, that differ least from the mean become 0, the mean color.

    For pixels as models take them: (B, C, Y, X), (B, tiles, C, Y, X), or Qwen's (patches, width).

    Args:
        rows: patches of each image, in their order; None: all are of one.
    """
    size = pixels.abs().float()
    if pixels.dim() == 2:
        images = size.mean(1, keepdim=True).split([len(pixels)] if rows is None else list(rows))
        return pixels * torch.cat([image >= _cut(image.flatten(), keep) for image in images])
    return pixels * (size >= _cut(size.flatten(-3), keep)[..., None, None])


def _cut(values: Float[Tensor, "*B N"], keep: float) -> Float[Tensor, "*B 1"]:
    """Where the largest ``keep`` of the values begin; above all of them for 0."""
    if keep == 0:
        return values.amax(-1, keepdim=True) + 1
    return values.quantile(1 - keep, dim=-1, keepdim=True)


def keep_share(cosine: float) -> float:
    """Share of pixels to keep: min(1 − c/2, 1 − 1e−5)."""
    return min(1 - cosine / 2, 1 - 1e-5)


def smooth_map(relevance: Float[Tensor, "Y X"]) -> np.ndarray[Any, Any]:
    """(384, 384) in [0, 1]: cubic enlargement (0 outside), Gaussian blur of 7.68 pixels, scaled to its range twice."""
    scaled = _to_unit(np.asarray(relevance, dtype=np.float64))
    large = torch.from_numpy(_cubic(scaled, SIDE))[None, None]
    radius = int(4 * SIGMA + 0.5)
    x = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (x / SIGMA) ** 2)
    kernel = kernel / kernel.sum()
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        pad = (0, 0, radius, radius) if shape[2] == -1 else (radius, radius, 0, 0)
        large = F.conv2d(_mirrored(large, pad), kernel.view(shape))
    return _to_unit(large[0, 0].numpy())


def masked_view(picture: Image.Image, relevance: Float[Tensor, "Y X"], cosine: float) -> Image.Image:
    """The picture in which only the most relevant pixels are left.

    Args:
        relevance: any map over the squashed picture, for example from `blip_relevance`.
        cosine: similarity of picture and question.
    """
    smooth = smooth_map(relevance)
    order = np.sort(smooth.ravel())[::-1]
    mask = smooth >= order[int(smooth.size * keep_share(cosine))]
    own = Image.fromarray((mask * 255).astype(np.uint8)).resize(picture.size, Image.Resampling.NEAREST)
    return Image.fromarray(np.asarray(picture.convert("RGB")) * (np.asarray(own) > 0)[..., None].astype(np.uint8))


def blip_relevance(
    blip: Any,
    pixel_values: Float[Tensor, "1 3 Y X"],
    input_ids: Int[Tensor, "1 T"],
    *,
    layer: int = 6,
    encode_token: int | None = None,
) -> tuple[Float[Tensor, "y x"], float]:
    """Relevance map and image-text cosine of a `transformers.BlipForImageTextRetrieval`.

    Args:
        blip: for the published numbers ``Salesforce/blip-itm-large-coco``.
        pixel_values, input_ids: from its processor.
        layer: text layer whose cross-attention is used.
        encode_token: the token that the official code puts in place of the first one for matching: ``[ENC]``, 30523 in
            the released vocabulary; None leaves the prompt as it is.

    Raises:
        ValueError: no such layer.
    """
    layers = blip.text_encoder.encoder.layer
    if not 0 <= layer < len(layers):
        raise ValueError(f"blip_relevance: the text encoder has layers 0 … {len(layers) - 1}, got layer={layer}")
    kept: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        kept.append(output[1])

    handle = layers[layer].crossattention.self.register_forward_hook(keep)
    matching = input_ids.clone()
    if encode_token is not None:
        matching[:, 0] = encode_token
    try:
        with torch.enable_grad():
            score = blip(input_ids=matching, pixel_values=pixel_values, use_itm_head=True)[0][:, 1].sum()
            (gradient,) = torch.autograd.grad(score, kept[0])
    finally:
        handle.remove()
    with torch.no_grad():
        cosine = float(blip(input_ids=input_ids, pixel_values=pixel_values, use_itm_head=False)[0].flatten()[0])
    relevance = (kept[0] * gradient.clamp_min(0))[0, :, 1:-1, 1:].mean((0, 1)).detach()
    side = round(len(relevance) ** 0.5)
    return relevance.view(side, side), cosine


def _to_unit(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    low, high = x.min(), x.max()
    return (x - low) / (high - low) if high > low else np.zeros_like(x)


def _cubic(x: np.ndarray[Any, Any], side: int) -> np.ndarray[Any, Any]:
    """Interpolating cubic spline at pixel centers of a map that is 0 outside, cut off at the map's own range."""
    padded = np.pad(x, BORDER)
    rows, columns = (_spline_matrix(length, side) for length in x.shape)
    return np.clip(rows @ padded @ columns.T, x.min(), x.max())


def _spline_matrix(points: int, side: int) -> np.ndarray[Any, Any]:
    """Values of the cubic B-spline interpolant at ``side`` places, as a (side, points + 2·BORDER) matrix."""
    length = points + 2 * BORDER

    def mirrored(index: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:  # d c b | a b c d | c b a
        index = np.abs(index)
        return np.where(index >= length, 2 * length - 2 - index, index)

    def weights(distance: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        d = np.abs(distance)
        return np.where(d < 1, 2 / 3 - d**2 + d**3 / 2, np.where(d < 2, (2 - d) ** 3 / 6, 0))

    def basis(places: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        out = np.zeros((len(places), length))
        start = np.floor(places).astype(int)
        for offset in range(-1, 3):
            np.add.at(out, (np.arange(len(places)), mirrored(start + offset)), weights(places - start - offset))
        return out

    places = (np.arange(side) + 0.5) * points / side - 0.5 + BORDER
    return basis(places) @ np.linalg.inv(basis(np.arange(length, dtype=float)))


def _mirrored(x: Tensor, pad: tuple[int, int, int, int]) -> Tensor:
    """Padding d c b a | a b c d | d c b a."""
    for axis, (before, after) in ((3, pad[:2]), (2, pad[2:])):
        if before or after:
            first, last = x.narrow(axis, 0, before), x.narrow(axis, x.shape[axis] - after, after)
            x = torch.cat([first.flip(axis), x, last.flip(axis)], axis)
    return x


CARD = Card(
    family="AGLA", paper="2406.12718", code="https://github.com/Lackel/AGLA", license="", test="methods/test_agla.py"
)
ENTRIES = [Entry("agla", AGLA, CARD("assembly of global and local attention"))]
