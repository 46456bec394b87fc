"""Scatterbrain for text: exact attention to the latest tokens, a low-rank estimate of attention to all before them.

Paper: Chen, Dao, Winsor, Song, Rudra and Ré, Scatterbrain: Unifying Sparse and Low-rank Attention Approximation,
NeurIPS 2021, arXiv 2110.15343. Official: HazyResearch/fly,
``src/models/attention/{sblocal_attention,feature_maps_sb}.py``, Apache-2.0, whose causal path needs a CUDA extension
and has no window.

Same: weights exp(q·k/√D) where the support is, φ(q)·φ(k) elsewhere, with symmetric positive random features over
orthogonal directions, so every weight is estimated without bias (their ratio, the output, is not). Here the support is
the last ``window`` tokens, and what is estimated are the tokens before: nothing has to be subtracted, and their sum is
a state of fixed size that streams. Differs: features are scaled by bounds of their own, not by maxima over keys that a
causal model has not seen; the projection is drawn once and has one shape (official checkpoints do not load before the
first call); ``support`` leaves one part out, for the peers of the comparison. `attn_core.scatterbrain` is the operator
for all keys. Numbers are checked in ``test_scatterbrain.py``; the state laws in ``test_every_causal_model.py``.

Shapes: input_ids (B, N) → logits (B, N, V); state per layer: keys and values (B, H, ≤ window − 1, D), and sums
(B, H, F, D + 1).
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

from attn_core import attention, linear_attention, merge_attention
from attn_core.catalog import Card
from attn_core.nn import Linear
from seq_models.language.language_model import CausalConfig, CausalLM, CausalModel, causal_entries, register_causal
from seq_models.layers.rotary import rotate

QUERIES_AT_ONCE = 256  # that share one piece of keys: bounds the memory


@strict
class ScatterbrainConfig(CausalConfig):
    """Fields of :class:`CausalConfig` and these.

    Args:
        window: tokens that are read exactly, the own one included.
        num_features: random features of a head, even; the official default is ⌊D·ln D⌋.
        support: ``"both"``; ``"sparse"``: the window alone; ``"low_rank"``: the estimate alone, of the window too.
        feedforward_size: inner width; None: 4 × hidden_size.
    """

    model_type = "attn_scatterbrain"

    window: int = 32
    num_features: int = 32
    support: Literal["both", "sparse", "low_rank"] = "both"
    feedforward_size: int | None = None
    rope_theta: float = 10000.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.feedforward_size is None:
            self.feedforward_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Raise ValueError for sizes that do not fit."""
        super().check()
        self.require(self.window >= 1, "window", "must be at least 1")
        self.require(self.num_features >= 2 and self.num_features % 2 == 0, "num_features", "must be even, at least 2")


class Stream(NamedTuple):
    """The tokens that the next one reads exactly, and the sums of features of all before them."""

    keys: Float[Tensor, "B H T D"]
    values: Float[Tensor, "B H T D"]
    sums: Float[Tensor, "B H F D+1"] | None


class RandomDirections(nn.Module):
    """Frozen directions of the random features of a layer, and the features themselves.

    Args:
        num_features: 2F for F directions, each with both signs.
    """

    projection: Tensor

    def __init__(self, num_features: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("projection", torch.empty(num_features // 2, dim))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthogonal in groups of D, with the lengths of normal vectors."""
        rows, dim = self.projection.shape
        drawn = torch.empty(-(-rows // dim), dim, dim)
        init.normal_(drawn)
        directions = torch.linalg.qr(drawn)[0].mT.flatten(0, 1)[:rows]
        lengths = torch.empty(rows, dim)
        init.normal_(lengths)
        init.copy_(self.projection, directions * lengths.norm(dim=1, keepdim=True))

    def log_features(self, x: Float[Tensor, "B H N D"]) -> tuple[Float[Tensor, "B H N F"], Float[Tensor, " F"]]:
        """log φ(x) with E[φ(q)·φ(k)] = exp(q·k/√D), and the largest value that each feature can have for any x.

        log φ_r = p_r·y − ‖y‖²/2 − log(√2F), y = x/D^¼, is at most ‖p_r‖²/2 − log(√2F).
        """
        p = self.projection.to(x.dtype)
        p = torch.cat([p, -p])
        y = x * x.shape[-1] ** -0.25
        constant = 0.5 * math.log(len(p))
        return y @ p.T - 0.5 * y.square().sum(-1, keepdim=True) - constant, 0.5 * p.square().sum(1) - constant


class ScatterbrainAttention(nn.Module):
    """Causal attention of one layer.

    Shapes: x (B, N, C) → (B, N, C).
    """

    def __init__(self, config: ScatterbrainConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.output = Linear(config.hidden_size, config.hidden_size, bias=False)
        self.directions = RandomDirections(config.num_features, config.head_dim)

    def forward(
        self, x: Float[Tensor, "B N C"], start: int, state: Stream | None, keep: bool
    ) -> tuple[Float[Tensor, "B N C"], Stream | None]:
        """Tokens from position ``start`` on, after those of ``state``."""
        config = self.config
        q, k, v = (
            t.unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1)
        )
        position = torch.arange(start, start + x.shape[1], device=x.device)
        q, k = rotate(q, position, config.rope_theta), rotate(k, position, config.rope_theta)
        out, state = self.attend(q, k, v, state)
        return self.output(out.transpose(1, 2).flatten(2)), state if keep else None

    def attend(
        self,
        q: Float[Tensor, "B H N D"],
        k: Float[Tensor, "B H N D"],
        v: Float[Tensor, "B H N D"],
        state: Stream | None = None,
    ) -> tuple[Float[Tensor, "B H N D"], Stream]:
        """Results of N tokens, and the state behind them."""
        window = 0 if self.config.support == "low_rank" else self.config.window
        if state is not None:
            k, v = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)
        parts = []
        if window:
            parts.append(self._near(q, k, v, window))
        sums = None
        if self.config.support != "sparse":
            far, sums = self._far(q, k, v, window, None if state is None else state.sums)
            parts.append(far)
        held = min(k.shape[2], max(0, window - 1))
        kept = [t[:, :, t.shape[2] - held :] for t in (k, v)]
        outs, lses = zip(*parts, strict=True)
        exact = outs[-1].dtype  # sums of features are kept in float32
        out = merge_attention([part.to(exact) for part in outs], list(lses))[0] if len(parts) > 1 else outs[0]
        return out.to(q.dtype), Stream(kept[0], kept[1], sums)

    def _near(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """Softmax over the last ``window`` tokens up to each of the last N, and its logarithm."""
        outs, lses, first = [], [], k.shape[2] - q.shape[2]
        for part in q.split(QUERIES_AT_ONCE, dim=2):
            last = first + part.shape[2]
            low = max(0, first - window + 1)
            distance = torch.arange(low, last, device=q.device) - torch.arange(first, last, device=q.device)[:, None]
            hidden = (distance > 0) | (distance <= -window)
            bias = torch.zeros_like(distance, dtype=q.dtype).masked_fill(hidden, -math.inf)
            out, lse = attention(part, k[:, :, low:last], v[:, :, low:last], bias=bias[None, None])
            outs.append(out)
            lses.append(lse)
            first = last
        return torch.cat(outs, 2), torch.cat(lses, 2)

    def _far(
        self, q: Tensor, k: Tensor, v: Tensor, window: int, sums: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The estimate over the tokens that are ``window`` and more before each of the last N, and its logarithm.

        Keys come ``window`` late to a causal linear attention; the last step, of no query, is the next token's.
        """
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        q, k, v = (t.to(exact) for t in (q, k, v))
        tokens = q.shape[2]
        late = k.shape[2] - tokens - window + torch.arange(tokens + (window > 0), device=q.device)
        there = (late >= 0)[:, None]
        delayed = late.clamp(min=0)
        log_k, most = self.directions.log_features(k[:, :, delayed])
        phi_k = (log_k - most).exp() * there
        log_q, _ = self.directions.log_features(F.pad(q, (0, 0, 0, len(late) - tokens)))
        log_q = log_q + most
        size = log_q.amax(-1, keepdim=True)
        wide = F.pad(v[:, :, delayed], (0, 1), value=1.0)
        out, sums = linear_attention((log_q - size).exp(), phi_k, wide, causal=True, initial_state=sums)
        out, size = out[:, :, :tokens], size[:, :, :tokens, 0]
        mass = out[..., -1]
        seen = mass > 0
        safe = torch.where(seen, mass, 1.0)
        lse = torch.where(seen, safe.log() + size, -math.inf)
        return (out[..., :-1] / safe[..., None], lse), sums


class ScatterbrainLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: ScatterbrainConfig) -> None:
        super().__init__()
        inner = config.feedforward_size or config.hidden_size
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.attention = ScatterbrainAttention(config)
        self.feedforward_norm = nn.LayerNorm(config.hidden_size)
        self.w1 = Linear(config.hidden_size, inner, bias=False)
        self.w2 = Linear(inner, config.hidden_size, bias=False)

    def forward(
        self, x: Float[Tensor, "B N C"], start: int, state: Stream | None, keep: bool
    ) -> tuple[Float[Tensor, "B N C"], Stream | None, None]:
        """The tokens after attention and feed-forward, the state (None unless ``keep``), and no auxiliary loss."""
        mixed, state = self.attention(self.attention_norm(x), start, state, keep)
        x = x + mixed
        return x + self.w2(F.gelu(self.w1(self.feedforward_norm(x)))), state, None


class ScatterbrainModel(CausalModel):
    """The stack without a head."""

    config_class = ScatterbrainConfig
    config: ScatterbrainConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    _no_split_modules = ["ScatterbrainLayer"]  # noqa: RUF012  transformers' own form

    def __init__(self, config: ScatterbrainConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([ScatterbrainLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RandomDirections):
            module.reset_parameters()


class ScatterbrainForCausalLM(CausalLM):
    """Scatterbrain with its head."""

    config_class = ScatterbrainConfig
    backbone_class = ScatterbrainModel


register_causal(ScatterbrainConfig, ScatterbrainModel, ScatterbrainForCausalLM)

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "window": 4, "num_features": 6}
VARIANTS: dict[str, dict[str, Any]] = {
    "scatterbrain_bytes": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6},
    "test_scatterbrain": TINY,
    "test_scatterbrain_low_rank": {**TINY, "support": "low_rank"},
}

CARD = Card(
    family="Scatterbrain",
    paper="2110.15343",
    code="https://github.com/HazyResearch/fly",
    license="Apache-2.0",
    test="models/test_scatterbrain.py",
)
ENTRIES = causal_entries(ScatterbrainForCausalLM, VARIANTS, CARD)
