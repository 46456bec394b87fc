"""RCMHA: attention with learned tables of relative positions and a short convolution behind every projection.

Paper: Sugiharto, Aradea and Mubarok, RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling,
arXiv 2308.03429. Official: hermansh-id/rcmha, ``rcmha/{attention,model}.py``, Apache-2.0.

One model, four kinds of attention, the paper's comparison: ``"mha"``, ``"mdha"`` (with the convolutions of Primer),
``"rmha"`` (with the tables), ``"rcmha"`` (with both).

Same: queries, keys and values are convolved over three tokens, with one filter for all heads; the relative term is a
table (2P, H, D) of vectors and one (2P, H) of numbers for distances −P … P − 1, not Transformer-XL's sinusoids; all
tables begin at zero. Differs: a token reads itself and the P − 1 tokens before it, and a query is convolved with those
before it, whatever the pieces of the input (officially memory is a piece's end, and queries of a piece begin with
zeros); rows of the table are found by distance, not by its shift of a padded matrix; models without tables get
sinusoids at their embeddings, or they would know no order. The official script (``main.py``) trains labml's attention
without convolutions: the paper's .572 cannot be laid to this layer. **The tables are the model's size**: with the
official P = 4096 they are 6.68 of 7.50 M parameters, beside which the paper's memory of 2.98 GB, down from 3.5, has to
be read. Here P is an option, and as long as what is to be read.
Numbers are checked in ``test_rcmha.py``; the state laws in ``test_every_causal_model.py``.

Shapes: input_ids (B, N) → logits (B, N, V); state per layer: keys and values (B, H, ≤ P − 1, D), and the last two
unconvolved rows of all three (B, H, 2, D).
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from attn_core import attention
from attn_core.catalog import Card
from attn_core.nn import Linear
from seq_models.language.language_model import (
    CausalConfig,
    CausalLM,
    CausalModel,
    Pass,
    causal_entries,
    register_causal,
)

KERNEL = 3  # tokens of a convolution, officially fixed
QUERIES_AT_ONCE = 256  # whose relative terms are held: bounds the memory


@strict
class RCMHAConfig(CausalConfig):
    """Fields of :class:`CausalConfig` and these.

    Args:
        attention: ``"mha"``, ``"mdha"``, ``"rmha"`` or ``"rcmha"``.
        positions: P, the tokens that a token reads, itself included; the tables have 2P rows (officially P = 4096).
        feedforward_size: inner width; None: 2 × hidden_size.
        sinusoids: add sinusoids of the positions to the embeddings; None: where there are no tables.
    """

    model_type = "attn_rcmha"

    attention: Literal["mha", "mdha", "rmha", "rcmha"] = "rcmha"
    positions: int = 256
    feedforward_size: int | None = None
    sinusoids: bool | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.feedforward_size is None:
            self.feedforward_size = 2 * self.hidden_size
        if self.sinusoids is None:
            self.sinusoids = not self.relative
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Raise ValueError for sizes that do not fit."""
        super().check()
        self.require(self.positions >= 1, "positions", "must be at least 1")
        self.require(self.hidden_size % 2 == 0 or not self.sinusoids, "hidden_size", "must be even with sinusoids")

    @property
    def relative(self) -> bool:
        """Whether there are tables of relative positions."""
        return self.attention in ("rmha", "rcmha")

    @property
    def convolved(self) -> bool:
        """Whether projections are convolved."""
        return self.attention in ("mdha", "rcmha")


class Rows(NamedTuple):
    """What a layer keeps: keys and values that may still be read, and the unconvolved rows before the next token."""

    keys: Float[Tensor, "B H T D"]
    values: Float[Tensor, "B H T D"]
    before: tuple[Tensor | None, Tensor | None, Tensor | None]


class HeadConvolution(nn.Module):
    """A depth-wise causal convolution over time, the same for all heads.

    Shapes: x (B, H, N, D), the two rows before it (zeros at the start) → the same, and the last two rows of the input.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(head_dim, head_dim, KERNEL, groups=head_dim)

    def forward(
        self, x: Float[Tensor, "B H N D"], before: Float[Tensor, "B H 2 D"] | None
    ) -> tuple[Float[Tensor, "B H N D"], Float[Tensor, "B H 2 D"]]:
        """w_0·x_(t−2) + w_1·x_(t−1) + w_2·x_t + b, channel by channel."""
        whole = F.pad(x, (0, 0, KERNEL - 1, 0)) if before is None else torch.cat([before, x], dim=2)
        out = self.conv(whole.flatten(0, 1).mT).mT.unflatten(0, x.shape[:2])
        return out, whole[:, :, 1 - KERNEL :]


class RelativeConvolutionalAttention(nn.Module):
    """Attention of one layer, of any of the four kinds.

    Shapes: x (B, N, C) → (B, N, C).
    """

    def __init__(self, config: RCMHAConfig) -> None:
        super().__init__()
        self.config = config
        size, heads, width, rows = config.hidden_size, config.num_attention_heads, config.head_dim, 2 * config.positions
        self.query = Linear(size, size, bias=False)
        self.key = Linear(size, size, bias=False)
        self.value = Linear(size, size)
        self.output = Linear(size, size)
        if config.convolved:
            self.query_conv, self.key_conv, self.value_conv = (HeadConvolution(width) for _ in range(3))
        if config.relative:
            self.key_pos_embeddings = nn.Parameter(torch.empty(rows, heads, width))
            self.key_pos_bias = nn.Parameter(torch.empty(rows, heads))
            self.query_pos_bias = nn.Parameter(torch.empty(heads, width))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Tables of zeros."""
        if self.config.relative:
            for table in (self.key_pos_embeddings, self.key_pos_bias, self.query_pos_bias):
                init.zeros_(table)

    def forward(
        self, x: Float[Tensor, "B N C"], state: Rows | None, keep: bool
    ) -> tuple[Float[Tensor, "B N C"], Rows | None]:
        """The tokens after those of ``state``; a new state if ``keep``."""
        heads = self.config.num_attention_heads
        before: list[Any] = [None] * 3 if state is None else list(state.before)
        q, k, v = (layer(x).unflatten(-1, (heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        if self.config.convolved:
            q, before[0] = self.query_conv(q, before[0])
            k, before[1] = self.key_conv(k, before[1])
            v, before[2] = self.value_conv(v, before[2])
        if state is not None:
            k, v = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)
        out = self.output(self.attend(q, k, v).transpose(1, 2).flatten(2))
        if not keep:
            return out, None
        held = min(k.shape[2], self.config.positions - 1)
        keys, values = (t[:, :, t.shape[2] - held :] for t in (k, v))
        return out, Rows(keys, values, (before[0], before[1], before[2]))

    def attend(
        self, q: Float[Tensor, "B H N D"], k: Float[Tensor, "B H M D"], v: Float[Tensor, "B H M D"]
    ) -> Float[Tensor, "B H N D"]:
        """The last N of M tokens read themselves and the P − 1 before:
        s_ij = (⟨q_i + u, k_j⟩ + ⟨q_i, E_(P+j−i)⟩ + b_(P+j−i))/√D.
        """
        reach, scale = self.config.positions, q.shape[-1] ** -0.5
        results, first = [], k.shape[2] - q.shape[2]
        for part in q.split(QUERIES_AT_ONCE, dim=2):
            last = first + part.shape[2]
            span = slice(max(0, first - reach + 1), last)
            query = torch.arange(first, last, device=q.device)[:, None]
            distance = torch.arange(span.start, last, device=q.device) - query
            hidden = (distance > 0) | (distance <= -reach)
            asked = part
            if self.config.relative:
                # Rows of the distances −P + 1 … 0; those ahead are of no use to a causal model.
                rows = slice(max(1, reach + 1 - (last - span.start)), reach + 1)
                table, number = self.key_pos_embeddings[rows], self.key_pos_bias[rows]
                term = torch.einsum("bhnd,rhd->bhnr", part, table) + number.T[:, None]
                place = (reach + distance - rows.start).clamp(0, rows.stop - rows.start - 1)
                bias = scale * term.gather(3, place.expand(*term.shape[:2], -1, -1))
                bias = bias.masked_fill(hidden, -math.inf)
                asked = part + self.query_pos_bias[:, None]
            else:
                bias = torch.zeros_like(distance, dtype=q.dtype).masked_fill(hidden, -math.inf)[None, None]
            results.append(attention(asked, k[:, :, span], v[:, :, span], bias=bias, scale=scale)[0])
            first = last
        return torch.cat(results, 2)


class FeedForward(nn.Module):
    """Linear, ReLU, linear."""

    def __init__(self, config: RCMHAConfig) -> None:
        super().__init__()
        inner = config.feedforward_size or config.hidden_size
        self.layer1 = Linear(config.hidden_size, inner)
        self.layer2 = Linear(inner, config.hidden_size)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """Widened, ReLU, narrowed."""
        return self.layer2(F.relu(self.layer1(x)))


class RCMHALayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: RCMHAConfig) -> None:
        super().__init__()
        self.norm_self_attn = nn.LayerNorm(config.hidden_size)
        self.self_attn = RelativeConvolutionalAttention(config)
        self.norm_ff = nn.LayerNorm(config.hidden_size)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        start: int,  # noqa: ARG002  distances say where a token stands
        state: Rows | None,
        keep: bool,
    ) -> tuple[Float[Tensor, "B N C"], Rows | None, None]:
        """The tokens after attention and feed-forward, the state (None unless ``keep``), and no auxiliary loss."""
        mixed, state = self.self_attn(self.norm_self_attn(x), state, keep)
        x = x + mixed
        return x + self.feed_forward(self.norm_ff(x)), state, None


class RCMHAModel(CausalModel):
    """The stack without a head."""

    config_class = RCMHAConfig
    config: RCMHAConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    _no_split_modules = ["RCMHALayer"]  # noqa: RUF012  transformers' own form

    def __init__(self, config: RCMHAConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([RCMHALayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def run(self, x: Float[Tensor, "B N C"], start: int, state: Any, *, keep: bool, all_layers: bool = False) -> Pass:
        """As the base class, with sinusoids on what the first layer gets if the config says so."""
        if self.config.sinusoids:
            x = x + sinusoids(start, x)
        return super().run(x, start, state, keep=keep, all_layers=all_layers)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RelativeConvolutionalAttention):
            module.reset_parameters()


def sinusoids(start: int, x: Float[Tensor, "B N C"]) -> Float[Tensor, "N C"]:
    """sin and cos of position·10000^(−2i/C), interleaved (Vaswani et al. 2017), for the tokens of x."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    frequency = 10000.0 ** (-torch.arange(0, x.shape[2], 2, device=x.device, dtype=exact) / x.shape[2])
    angle = torch.arange(start, start + x.shape[1], device=x.device, dtype=exact)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2).to(x.dtype)


class RCMHAForCausalLM(CausalLM):
    """RCMHA and its siblings with their head, which has a bias."""

    config_class = RCMHAConfig
    backbone_class = RCMHAModel

    def __init__(self, config: RCMHAConfig) -> None:
        super().__init__(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.post_init()


register_causal(RCMHAConfig, RCMHAModel, RCMHAForCausalLM)

# Our names → those of a state dict of the official AutoregressiveModel.
KEY_MAP = {
    "rcmha": (
        (r"^model\.embed_tokens\.", "src_embed."),
        (r"^lm_head\.", "generator."),
        (r"^model\.", "transformer."),
        (r"\.(query|key|value)_conv\.", r".\1.1."),
        (r"\.(query|key|value)\.(weight|bias)$", r".\1.0.linear.\2"),
    )
}

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "positions": 7}
VARIANTS: dict[str, dict[str, Any]] = {
    "rcmha_shakespeare": {  # the official config: 65 characters, tables for 4,096 distances either way
        "vocab_size": 65,
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "positions": 4096,
    },
    "rcmha_bytes": {
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "feedforward_size": 768,
        "positions": 128,
    },
    "test_rcmha": TINY,
    "test_rcmha_mha": {**TINY, "attention": "mha"},
    "test_rcmha_mdha": {**TINY, "attention": "mdha"},
    "test_rcmha_rmha": {**TINY, "attention": "rmha"},
}

CARD = Card(
    family="RCMHA",
    paper="2308.03429",
    code="https://github.com/hermansh-id/rcmha",
    license="Apache-2.0",
    test="models/test_rcmha.py",
)
ENTRIES = causal_entries(RCMHAForCausalLM, VARIANTS, CARD)
