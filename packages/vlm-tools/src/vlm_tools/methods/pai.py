"""PAI: scores of image tokens grow by a share of their size, and a stream without the image is subtracted.

Paper: Liu et al., Paying More Attention to Image, ECCV 2024, arXiv 2407.21771.
Official code: LALBJ/PAI, ``attention.py`` (``llama_new_forward``), ``CFG.py`` (``CFGLogits``).

The same: s + α·|s| on image tokens of the last row, layers 2 … last; guidance γ(z − z') + z' on log-probabilities
with the cut at 0.1 of the best. Different: batches, beams, any family; the second stream reads the same prompt
without image tokens, under ordinary attention. Since |s| counts, negative scores are raised towards zero: strong α
flattens the image. Checked in ``tests/methods/test_pai.py``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import LogitsProcessor

from attn_core.catalog import Card, Entry
from vlm_tools.intervention.method import AttentionCall, Method, check_number, check_plausibility
from vlm_tools.intervention.second_stream import SecondStream, without_image
from vlm_tools.methods.last_row import with_last_row

if TYPE_CHECKING:
    from vlm_tools.intervention.hooking import Run


class PAI(Method):
    """Paying more attention to the image.

    Args:
        alpha: growth of image scores; 0.2 in the official command line, 0.5 in the paper for LLaVA.
        gamma: guidance against the stream without the image; 1 switches it off.
        plausibility: tokens below this share of the best token's probability are removed, if gamma is not 1.
        layers: layers to change; 2 … last by default.

    Raises:
        ValueError: negative alpha, a plausibility outside (0, 1].
    """

    name = "pai"

    def __init__(
        self,
        alpha: float = 0.5,
        *,
        gamma: float = 1.1,
        plausibility: float = 0.1,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(layers)
        check_number("PAI", "alpha", alpha, "not be negative", lambda value: value >= 0)
        check_number("PAI", "gamma", gamma)
        check_plausibility("PAI", plausibility)
        self.alpha = alpha
        self.gamma = gamma
        self.plausibility = plausibility

    def default_layers(self, count: int) -> Sequence[int]:
        """All but the first two."""
        return range(min(2, count), count)

    def attend(self, call: AttentionCall) -> Float[Tensor, "B N H D"]:
        """Grow the last row's scores of image tokens."""
        return with_last_row(call, lambda scores: grow(scores, call.visual[:, None], self.alpha))

    def logits_processor(self, run: "Run", inputs: Mapping[str, Any]) -> LogitsProcessor | None:
        """Guidance, unless gamma is 1."""
        if self.gamma == 1:
            return None
        return SecondStream(
            run, without_image(run, inputs), lambda z, other: guide(z, other, self.gamma, self.plausibility)
        )


def grow(scores: Float[Tensor, "*B M"], chosen: Bool[Tensor, "*#B M"], factor: float) -> Float[Tensor, "*B M"]:
    """s + factor·|s| at chosen keys; hidden keys (−inf) stay hidden."""
    finite = scores.isfinite() & chosen
    return torch.where(finite, scores + factor * scores.abs(), scores)


def guide(
    logits: Float[Tensor, "B V"], other: Float[Tensor, "B V"], gamma: float, plausibility: float = 0.1
) -> Float[Tensor, "B V"]:
    """γ(z − z') + z' of log-probabilities z (with image) and z' (without), −inf below the plausibility cut."""
    z, without = logits.log_softmax(-1), other.log_softmax(-1)
    cut = z.amax(-1, keepdim=True) + math.log(plausibility)
    return (gamma * (z - without) + without).masked_fill(z < cut, -torch.inf)


CARD = Card(
    family="PAI", paper="2407.21771", code="https://github.com/LALBJ/PAI", license="MIT", test="methods/test_pai.py"
)
ENTRIES = [Entry("pai", PAI, CARD("paying more attention to the image"))]
