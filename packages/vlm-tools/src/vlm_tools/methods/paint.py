"""PAINT: image tokens that the vision tower finds locally or globally important get more attention.

Paper: Arif et al., Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model,
arXiv 2501.12206 (v3: PAINT). Official code: hasanar1f/llava-hallunication-fix, ``modPAI/attention.py`` and the token
choice in its vision tower.

The same: local tokens are the upper quarter by attention of the class token in the first vision layer, summary tokens
the outliers (beyond Q3 + 1.5 IQR) in the second to last one, taken out of the local ones; s + α·|s| and s + β·|s| on
the last row, layers 2 … last; PAI's guidance. Different: the released "spatial" tokens rank sums that are all 1 and
are left out; the paper's head-specific strength is not in the released code; `head_weights=True` is our reading of it
(a head's visual mass over the layer's mean, clipped to [0, 2]). Vision towers without a class token whose patches are
the image tokens (all but Llava's) are scored by the text: attention of the last prompt row on each image token in the
first decoder layer (local) and in the second (summary). Checked in ``tests/methods/test_pai.py``.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import LogitsProcessor

from attn_core.catalog import Card, Entry
from vlm_tools.intervention.method import AttentionCall, Method, check_number, check_share, check_switch
from vlm_tools.methods.last_row import last_row_scores, with_last_row
from vlm_tools.methods.pai import PAI

if TYPE_CHECKING:
    from vlm_tools.intervention.hooking import Run


class PAINT(Method):
    """Selective growth of image scores.

    Args:
        alpha: growth at local tokens.
        beta: growth at summary tokens.
        local_share: share of image tokens that are local.
        gamma: guidance as in `PAI`.
        head_weights: scale alpha and beta by the head's visual mass over the layer's mean.
        layers: layers to change; 2 … last by default.

    Raises:
        ValueError: negative growth, a share outside [0, 1].
    """

    name = "paint"

    def __init__(
        self,
        alpha: float = 0.7,
        beta: float = 0.4,
        *,
        local_share: float = 0.25,
        gamma: float = 1.1,
        head_weights: bool = False,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(layers)
        for name, value in (("alpha", alpha), ("beta", beta)):
            check_number("PAINT", name, value, "not be negative", lambda strength: strength >= 0)
        check_number("PAINT", "gamma", gamma)
        check_switch("PAINT", "head_weights", head_weights)
        check_share("PAINT", "local_share", local_share)
        self.alpha = alpha
        self.beta = beta
        self.local_share = local_share
        self.gamma = gamma
        self.head_weights = head_weights
        self._run: Run | None = None
        self._edited: frozenset[int] = frozenset()
        self._scores: dict[str, Tensor] = {}

    def default_layers(self, count: int) -> Sequence[int]:
        """All but the first two."""
        return range(min(2, count), count)

    def chosen_layers(self, count: int) -> frozenset[int]:
        """The edited ones, and the first two, which are only looked at."""
        self._edited = super().chosen_layers(count)
        return self._edited | {0, min(1, count - 1)}

    def bind(self, run: "Run") -> None:
        """Remember the model, whose vision tower is asked at the first layer."""
        self._run = run
        self._scores = {}

    def attend(self, call: AttentionCall) -> Float[Tensor, "B N H D"]:
        """Choose tokens in the prompt's first layers, edit in the others."""
        if call.prefill and call.layer <= 1:
            self._look(call)
        if call.layer not in self._edited:
            return call.plain()
        local, summary = self._tokens(call)

        def edit(scores: Tensor) -> Tensor:
            strength = self.alpha * local[:, None].to(scores.dtype) + self.beta * summary[:, None].to(scores.dtype)
            if self.head_weights:
                mass = scores.softmax(-1).masked_fill(~call.visual[:, None], 0.0).sum(-1, keepdim=True)
                strength = strength * (mass / mass.mean(1, keepdim=True).clamp_min(1e-9)).clamp(0, 2)
            return torch.where(scores.isfinite(), scores + strength * scores.abs(), scores)

        return with_last_row(call, edit)

    def _look(self, call: AttentionCall) -> None:
        assert self._run is not None
        if call.layer == 0:
            self._scores = {}
        if call.layer == 0 and self._run.adapter.has_class_token(self._run.model):
            pixels = self._run.prompt.get("pixel_values")
            if pixels is not None:
                local, summary = class_attention(self._run.model, pixels)
                self._scores = {"local": local, "summary": summary, "of_image": call.visual}
        if "of_image" not in self._scores:
            found = last_row_scores(call).softmax(-1).sum(1)
            self._scores["local" if call.layer == 0 else "summary"] = found

    def _tokens(self, call: AttentionCall) -> tuple[Bool[Tensor, "B M"], Bool[Tensor, "B M"]]:
        if "local" not in call.state:
            masks = [torch.zeros_like(call.visual), torch.zeros_like(call.visual)]
            for row, visual in enumerate(call.visual):
                places = visual.nonzero().flatten()
                local, summary = (
                    self._scores[name][row * len(self._scores[name]) // len(call.visual)]
                    for name in ("local", "summary")
                )
                if "of_image" not in self._scores:
                    local, summary = (
                        torch.nn.functional.pad(x, (0, max(0, len(visual) - len(x))))[places] for x in (local, summary)
                    )
                for mask, chosen in zip(masks, choose_tokens(local, summary, self.local_share), strict=True):
                    mask[row, places[chosen]] = True
            call.state["local"], call.state["summary"] = masks
        return call.align(call.state["local"]), call.align(call.state["summary"])

    def logits_processor(self, run: "Run", inputs: Mapping[str, Any]) -> LogitsProcessor | None:
        """PAI's guidance."""
        return PAI(0.0, gamma=self.gamma).logits_processor(run, inputs)


def choose_tokens(
    local: Float[Tensor, " T"], summary: Float[Tensor, " T"], local_share: float = 0.25
) -> tuple[Bool[Tensor, " T"], Bool[Tensor, " T"]]:
    """Local and summary tokens of one image by their scores; a summary token is not local.

    Args:
        local: attention of the class token in the first vision layer, summed over heads.
        summary: the same in the second to last vision layer.
        local_share: share of tokens that are local.
    """
    count = len(local)
    low, high = summary.float().quantile(0.25), summary.float().quantile(0.75)
    outliers = int((summary > high + 1.5 * (high - low)).sum())
    is_summary = torch.zeros(count, dtype=torch.bool, device=local.device)
    is_summary[summary.topk(outliers).indices] = True
    is_local = torch.zeros_like(is_summary)
    is_local[local.topk(int(count * local_share)).indices] = True
    return is_local & ~is_summary, is_summary


def class_attention(model: Any, pixels: Float[Tensor, "B C Y X"]) -> list[Float[Tensor, "B T"]]:
    """Attention of the class token on the patches, summed over heads: first and second to last vision layer."""
    found: list[Tensor] = []
    layers = [module for module in model.model.vision_tower.modules() if hasattr(module, "q_proj")]
    first, penultimate = layers[0], layers[max(len(layers) - 2, 0)]

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        batch, tokens, _ = hidden.shape
        q, k = (
            project(hidden[:, :rows]).view(batch, rows, module.num_heads, -1).transpose(1, 2)
            for project, rows in ((module.q_proj, 1), (module.k_proj, tokens))
        )
        share = (q.float() @ k.float().transpose(-2, -1) * module.scale).softmax(-1)
        found.append(share[:, :, 0, 1:].sum(1))

    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in (first, penultimate)]
    try:
        with torch.no_grad():
            model.model.vision_tower(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return found


CARD = Card(
    family="PAINT",
    paper="2501.12206",
    code="https://github.com/hasanar1f/llava-hallunication-fix",
    license="",
    test="methods/test_paint.py",
)
ENTRIES = [Entry("paint", PAINT, CARD("selective growth of image scores"))]
