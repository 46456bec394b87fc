"""VCD: what a noisy image suggests as well is prior, not evidence; its scores are subtracted.

Paper: Leng et al., Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive
Decoding, CVPR 2024, arXiv 2311.16922. Official code: DAMO-NLP-SG/VCD, ``vcd_utils/vcd_add_noise.py``,
``vcd_utils/vcd_sample.py``.

The same: noise schedule and step, (1 + α)z − αz' with the plausibility cut on the main stream's scores. Different: the
noise has a seed of its own; any decoding, not sampling alone. Checked in ``tests/intervention/test_second_stream.py``.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LogitsProcessor

from attn_core.catalog import Card, Entry
from vlm_tools.intervention.method import Method
from vlm_tools.intervention.second_stream import SecondStream, with_pixels

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
        if not 0 <= step < STEPS:
            raise ValueError(f"VCD: step must lie in 0 … {STEPS - 1}, got step={step}")
        if not 0 < plausibility <= 1:
            raise ValueError(f"VCD: plausibility must lie in (0, 1], got plausibility={plausibility}")
        self.alpha = alpha
        self.plausibility = plausibility
        self.step = step
        self.seed = seed

    def logits_processor(self, run: "Run", inputs: Mapping[str, Any]) -> LogitsProcessor:
        """A stream that sees the noisy image."""
        second = with_pixels(inputs, diffuse(inputs["pixel_values"], self.step, seed=self.seed))
        return SecondStream(run, second, lambda z, other: contrast(z, other, self.alpha, self.plausibility))


def diffuse(pixels: Float[Tensor, "*B"], step: int, *, seed: int = 0) -> Float[Tensor, "*B"]:
    """√ᾱ_t·x + √(1 − ᾱ_t)·ε of normalized pixels, with β_t from a sigmoid schedule of 1,000 steps."""
    beta = torch.linspace(-6, 6, STEPS).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
    kept = (1 - beta).cumprod(0)[step]
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed), dtype=pixels.dtype)
    return kept.sqrt() * pixels + (1 - kept).sqrt() * noise.to(pixels.device)


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
