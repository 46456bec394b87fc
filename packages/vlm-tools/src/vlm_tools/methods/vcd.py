"""VCD: what a noisy image suggests as well is prior, not evidence; its scores are subtracted.

Paper: Leng et al., Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive
Decoding, CVPR 2024, arXiv 2311.16922. Official code: DAMO-NLP-SG/VCD, ``vcd_utils/vcd_add_noise.py``,
``vcd_utils/vcd_sample.py``.

The same: noise schedule and step, (1 + α)z − αz' with the plausibility cut on the main stream's scores. Different: the
noise has a seed of its own and starts anew for each image, so that a row of a batch is as alone; any decoding, not
sampling alone. Checked in ``tests/intervention/test_second_stream.py``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LogitsProcessor

from attn_core.catalog import Card, Entry
from vlm_tools.intervention.method import Method, check_number, check_plausibility, check_whole
from vlm_tools.intervention.second_stream import SecondStream, of_image_prompt

if TYPE_CHECKING:
    from vlm_tools.intervention.hooking import Run

STEPS = 1000


class VCD(Method):
    """Visual contrastive decoding.

    Args:
        alpha: weight of the contrast; 1 in the official command line.
        plausibility: tokens below this share of the best token's probability are removed (official ``cd_beta``).
        step: noise step, 0 … 999; 500 in the official POPE script, 999 leaves almost no image.
        seed: of the noise.

    Raises:
        ValueError: a step or a plausibility out of range.
    """

    name = "vcd"
    changes_attention = False

    def __init__(self, alpha: float = 1.0, *, plausibility: float = 0.1, step: int = 500, seed: int = 0) -> None:
        super().__init__()
        check_number("VCD", "alpha", alpha)
        check_plausibility("VCD", plausibility)
        check_whole("VCD", "step", step, 0, STEPS - 1)
        check_whole("VCD", "seed", seed, 0, 2**63 - 1)
        self.alpha = alpha
        self.plausibility = plausibility
        self.step = step
        self.seed = seed

    def logits_processor(self, run: "Run", inputs: Mapping[str, Any]) -> LogitsProcessor:
        """A stream that sees the noisy image."""
        second = of_image_prompt(inputs)
        rows = run.adapter.pixel_rows(run.model.config, second)
        second["pixel_values"] = diffuse(second["pixel_values"], self.step, seed=self.seed, rows=rows)
        return SecondStream(run, second, lambda z, other: contrast(z, other, self.alpha, self.plausibility))


def diffuse(
    pixels: Float[Tensor, "P *B"], step: int, *, seed: int = 0, rows: Sequence[int] | None = None
) -> Float[Tensor, "P *B"]:
    """√ᾱ_t·x + √(1 − ᾱ_t)·ε of normalized pixels, with β_t from a sigmoid schedule of 1,000 steps.

    Args:
        rows: rows of ``pixels`` that make up each image, in their order; None: all of them are one. The noise of an
            image depends on ``seed`` and its own shape alone, and that of its first tiles not on how many follow.
    """
    beta = torch.linspace(-6, 6, STEPS).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
    kept = (1 - beta).cumprod(0)[step]
    images = pixels.split([len(pixels)] if rows is None else list(rows))
    noise = torch.cat([_noise(image, seed) for image in images])
    return kept.sqrt() * pixels + (1 - kept).sqrt() * noise.to(pixels.device)


def _noise(image: Float[Tensor, "P *B"], seed: int) -> Float[Tensor, "P *B"]:
    """Standard normal values, tile by tile or patch by patch."""
    generator = torch.Generator().manual_seed(seed)
    tiles = image.flatten(0, 1) if image.dim() == 5 else image
    drawn = [torch.randn(tile.shape, generator=generator, dtype=image.dtype) for tile in tiles]
    return torch.stack(drawn).view(image.shape)


def contrast(
    logits: Float[Tensor, "B V"], other: Float[Tensor, "B V"], alpha: float, plausibility: float
) -> Float[Tensor, "B V"]:
    """(1 + α)z − αz', −inf where z is below max z + log(plausibility)."""
    cut = logits.amax(-1, keepdim=True) + math.log(plausibility)
    return ((1 + alpha) * logits - alpha * other).masked_fill(logits < cut, -torch.inf)


CARD = Card(
    family="VCD",
    paper="2311.16922",
    code="https://github.com/DAMO-NLP-SG/VCD",
    license="Apache-2.0",
    test="methods/test_vcd.py",
)
ENTRIES = [Entry("vcd", VCD, CARD("visual contrastive decoding"))]
