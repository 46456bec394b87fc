"""Gaussian adaptive transformer for text: causal attention, and features of each token that weigh themselves.

Paper: Ioannides, Chadha and Elkins, Gaussian Adaptive Attention is All You Need, arXiv 2401.11143. Official:
gioannides/Gaussian-Adaptive-Attention, ``GaussianBlock.py``; the paper's experiments, on features of frozen encoders,
were not released.

The blocks are the paper's (`attn_core.nn.gaussian_attention`). The network around them is **ours**: published
blocks weigh the time axis, which is not causal, and along the features they join no two tokens, so a language model
needs attention beside them. A layer is x + attention(norm(x)), x + Gaussian attention over features of norm(x),
x + feed-forward(norm(x)); with ``num_gaussians=0`` it is a plain Transformer, the peer.
Numbers are checked in ``test_gaussian.py``; the state laws in ``test_every_causal_model.py``.

Shapes: input_ids (B, N) → logits (B, N, V); state per layer: keys and values (B, H, T, D) of all T tokens.
"""

from typing import Any, NamedTuple

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
from attn_core.nn.gaussian_attention import GaussianAttention
from seq_models.language.language_model import CausalConfig, CausalLM, CausalModel, causal_entries, register_causal
from seq_models.layers.rotary import rotate


@strict
class GaussianConfig(CausalConfig):
    """Fields of :class:`CausalConfig` and these.

    Args:
        gaussian_heads: chunks of the features, at most hidden_size.
        num_gaussians: Gaussians of a chunk; 0: no Gaussian attention.
        feedforward_size: inner width; None: 4 × hidden_size.
    """

    model_type = "attn_gaussian"

    gaussian_heads: int = 4
    num_gaussians: int = 2
    feedforward_size: int | None = None
    rope_theta: float = 10000.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.feedforward_size is None:
            self.feedforward_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Raise ValueError for sizes that do not fit."""
        super().check()
        self.require(self.num_gaussians >= 0, "num_gaussians", "must not be negative")
        inside = 1 <= self.gaussian_heads <= self.hidden_size
        self.require(inside, "gaussian_heads", f"must be in 1…hidden_size={self.hidden_size}")


class Tokens(NamedTuple):
    """Keys, turned by their positions, and values of all tokens so far."""

    keys: Float[Tensor, "B H T D"]
    values: Float[Tensor, "B H T D"]


class GaussianLayer(GradientCheckpointingLayer):
    """Attention over tokens, Gaussian attention over features, feed-forward, each behind a norm and with a residual."""

    def __init__(self, config: GaussianConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.feedforward_size or config.hidden_size
        self.num_heads, self.rope_theta = config.num_attention_heads, config.rope_theta
        self.attention_norm = nn.LayerNorm(size)
        self.attention_qkv = Linear(size, 3 * size, bias=False)
        self.attention_out = Linear(size, size, bias=False)
        if config.num_gaussians:
            self.gaussian_norm = nn.LayerNorm(size)
            self.gaussian = GaussianAttention(-1, config.gaussian_heads, config.num_gaussians, causal=True)
        self.feedforward_norm = nn.LayerNorm(size)
        self.w1 = Linear(size, inner, bias=False)
        self.w2 = Linear(inner, size, bias=False)

    def forward(
        self, x: Float[Tensor, "B N C"], start: int, state: Tokens | None, keep: bool
    ) -> tuple[Float[Tensor, "B N C"], Tokens | None, None]:
        """The tokens after all three, the state (None unless ``keep``), and no auxiliary loss."""
        q, k, v = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for t in self.attention_qkv(self.attention_norm(x)).chunk(3, dim=-1)
        )
        position = torch.arange(start, start + x.shape[1], device=x.device)
        q, k = rotate(q, position, self.rope_theta), rotate(k, position, self.rope_theta)
        if state is not None:
            k, v = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)
        mixed, _ = attention(q, k, v, causal="lower_right")
        x = x + self.attention_out(mixed.transpose(1, 2).flatten(2))
        if hasattr(self, "gaussian"):
            x = x + self.gaussian(self.gaussian_norm(x))
        x = x + self.w2(F.gelu(self.w1(self.feedforward_norm(x))))
        return x, Tokens(k, v) if keep else None, None


class GaussianModel(CausalModel):
    """The stack without a head."""

    config_class = GaussianConfig
    config: GaussianConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    _no_split_modules = ["GaussianLayer"]  # noqa: RUF012  transformers' own form

    def __init__(self, config: GaussianConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([GaussianLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GaussianAttention):  # as the layer starts; transformers skips what a checkpoint holds
            init.zeros_(module.mean_offsets)
            init.normal_(module.c)
            init.copy_(module.c, module.c.exp())


class GaussianForCausalLM(CausalLM):
    """Gaussian adaptive transformer with its head."""

    config_class = GaussianConfig
    backbone_class = GaussianModel


register_causal(GaussianConfig, GaussianModel, GaussianForCausalLM)

VARIANTS: dict[str, dict[str, Any]] = {
    "gaussian_bytes": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6},
    "test_gaussian": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "gaussian_heads": 3},
}

CARD = Card(
    family="Gaussian adaptive attention",
    paper="2401.11143",
    code="https://github.com/gioannides/Gaussian-Adaptive-Attention",
    license="Apache-2.0",
    test="models/test_gaussian.py",
)
ENTRIES = causal_entries(GaussianForCausalLM, VARIANTS, CARD)
