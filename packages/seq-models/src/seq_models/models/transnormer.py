"""TransNormerLLM: lightning attention, linear attention with a decay for each head, in a gated transformer.

Papers: Qin et al., TransNormerLLM, arXiv 2307.14995; Lightning Attention-2, arXiv 2401.04658; Various Lengths, Constant
Speed, ICML 2024, arXiv 2405.17381. Official: the modeling code that ships with the checkpoints
OpenNLPLab/TransNormerLLM-{385M,1B,7B}, and OpenNLPLab/lightning-attention (operator, ``examples/module/tnl_attn.py``).

Same: parameters and their names, so released state dicts load as they are; slopes, their share per layer, LRPE, norms
without parameters, gates. Both published mixers: ``style="tnl"`` (the checkpoints) and ``style="example"`` (the
operator's repository: SiLU on values too, LayerNorm, low-rank gate).
Differs: the number of tokens seen belongs to the state (officially an attribute of the layer that counts calls, so that
two streams disturb each other and a piece of several tokens is rotated as one); one code path for training, prefill and
decoding, linear in the length, instead of an N×N mask; a single layer does not divide by zero.
Numbers are checked in ``test_transnormer.py``; the state laws in ``test_every_causal_model.py``.

Shapes: input_ids (B, N) → logits (B, N, V); state per layer (B, H, D, Dv) float32, whatever the length.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from attn_core import linear_attention
from attn_core.catalog import Card
from attn_core.nn import Linear
from seq_models.language.language_model import CausalConfig, CausalLM, CausalModel, causal_entries, register_causal


@strict
class TransNormerConfig(CausalConfig):
    """Fields of :class:`CausalConfig`, with the official names in :meth:`from_official`, and these.

    Args:
        mixer_size: channels of all heads together (official ``hidden_dim``); None: ``hidden_size``.
        glu_size: inner width of the gated linear unit; None: that of the 385M checkpoint, scaled (2.75 × hidden_size).
        lrpe_layers: 1 for layers whose queries and keys are rotated; None: the first layer only.
        style: ``"tnl"`` as in the checkpoints, ``"example"`` as in the operator's repository.
        scale_embedding: multiply embeddings by √hidden_size.
    """

    model_type = "attn_transnormer"

    mixer_size: int | None = None
    glu_size: int | None = None
    lrpe_layers: list[int] | None = None
    style: Literal["tnl", "example"] = "tnl"
    scale_embedding: bool = True
    use_bias: bool = False
    eps: float = 1e-6

    def __post_init__(self, **kwargs: Any) -> None:
        self.mixer_size = self.hidden_size if self.mixer_size is None else self.mixer_size
        self.glu_size = self.hidden_size * 11 // 4 if self.glu_size is None else self.glu_size
        if self.lrpe_layers is None:
            self.lrpe_layers = [int(layer == 0) for layer in range(self.num_hidden_layers)]
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Raise ValueError for sizes that do not fit."""
        super().check()
        heads, layers = self.num_attention_heads, self.num_hidden_layers
        size, rotated = self.mixer_size or 0, self.lrpe_layers or []
        self.require(size % heads == 0 and size > 0, "mixer_size", f"must be a multiple of num_attention_heads={heads}")
        self.require(
            len(rotated) == layers and set(rotated) <= {0, 1},
            "lrpe_layers",
            f"must say 0 or 1 for each of num_hidden_layers={layers}",
        )
        known = self.style == "tnl" or size == self.hidden_size
        self.require(known, "mixer_size", "must be hidden_size with style='example'")

    @property
    def head_dim(self) -> int:
        """Width of a head before LRPE doubles it."""
        return (self.mixer_size or self.hidden_size) // self.num_attention_heads

    @classmethod
    def from_official(cls, fields: Mapping[str, Any]) -> "TransNormerConfig":
        """From the ``config.json`` of a released checkpoint.

        Raises:
            ValueError: a norm or activation that no released checkpoint has, or a field that is missing.
        """
        for name, value in (("norm_type", "simplermsnorm"), ("linear_act_fun", "silu")):
            if fields.get(name, value) != value:
                raise ValueError(f"TransNormerConfig.from_official: {name} must be {value!r}, got {fields[name]!r}")
        missing = [name for name in OFFICIAL_FIELDS if name not in fields]
        if missing:
            raise ValueError(f"TransNormerConfig.from_official: config lacks {', '.join(missing)}")
        values = {ours: fields[name] for name, ours in OFFICIAL_FIELDS.items()}
        if values["glu_size"] == -1:
            values["glu_size"] = values["hidden_size"]
        # With an empty list every layer does what ``linear_use_lrpe`` says.
        every = [int(fields.get("linear_use_lrpe", False))] * values["num_hidden_layers"]
        rotated = [int(use) for use in fields.get("linear_use_lrpe_list", ())] or every
        return cls(
            **values,
            lrpe_layers=rotated,
            scale_embedding=not fields.get("no_scale_embedding", False),
            use_bias=fields.get("bias", False),
            initializer_range=fields.get("init_std", 0.02),
            tie_word_embeddings=fields.get("tie_word_embeddings", True),
            **{name: fields[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id") if name in fields},
        )


OFFICIAL_FIELDS = {
    "vocab_size": "vocab_size",
    "decoder_embed_dim": "hidden_size",
    "decoder_layers": "num_hidden_layers",
    "decoder_attention_heads": "num_attention_heads",
    "hidden_dim": "mixer_size",
    "glu_dim": "glu_size",
}


def slopes(num_heads: int) -> list[float]:
    """Decay rates γ of the heads, those of ALiBi: 2^(−8(h+1)/H) for a power of two, otherwise the rates of the power
    of two below, followed by every second one of twice that many.
    """
    power = 2 ** (num_heads.bit_length() - 1)
    first = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    return first + [2.0 ** (-8 * (2 * head + 1) / (2 * power)) for head in range(num_heads - power)]


def layer_share(layer: int, num_layers: int) -> float:
    """What the decay rates of a layer are multiplied by: 1 in the first, almost nothing in the last."""
    return 1 - layer / max(1, num_layers - 1) + 1e-5


def simple_rms_norm(x: Float[Tensor, "*batch C"], eps: float = 1e-6) -> Float[Tensor, "*batch C"]:
    """x / √(mean x² + eps), without parameters; in float32 at least."""
    exact = x if x.dtype == torch.float64 else x.float()
    return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class SimpleRMSNorm(nn.Module):
    """:func:`simple_rms_norm` as a module without parameters."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        """Each vector divided by its root mean square; no weight."""
        return simple_rms_norm(x, self.eps)


class LinearizedRelativePosition(nn.Module):
    """LRPE: (x cos θm ‖ x sin θm), so that products of queries and keys depend on the difference of positions.

    Shapes: x (B, H, N, D) → (B, H, N, 2D). θ is learned, one angle for each channel of each head.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.empty(num_heads, 1, head_dim))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """θ_j = 10000^(−2j/(H·D)) over the channels of all heads in order."""
        channels = self.theta.numel()
        exponent = torch.arange(channels, dtype=torch.float64) * (-2 / channels)
        init.copy_(self.theta, (10000.0**exponent).view_as(self.theta))

    def forward(self, x: Float[Tensor, "B H N D"], start: int) -> Float[Tensor, "B H N 2*D"]:
        """Tokens from position ``start`` on, turned by their position: cosines first, then sines."""
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        position = torch.arange(start, start + x.shape[2], device=x.device, dtype=exact)
        angle = self.theta.to(exact) * position[:, None]
        return torch.cat([x * angle.cos().to(x.dtype), x * angle.sin().to(x.dtype)], dim=-1)


class LightningMixer(nn.Module):
    """Gated lightning attention of the released checkpoints.

    Shapes: x (B, N, C) → (B, N, C); state (B, H, D or 2D, D) in float32 (float64 for float64 x).
    """

    def __init__(self, config: TransNormerConfig, layer: int) -> None:
        super().__init__()
        self.num_heads, self.eps = config.num_attention_heads, config.eps
        self.share = layer_share(layer, config.num_hidden_layers)
        size = config.mixer_size or config.hidden_size
        self.qkvu_proj = Linear(config.hidden_size, 4 * size, bias=config.use_bias)
        self.out_proj = Linear(size, config.hidden_size, bias=config.use_bias)
        rotated = bool(config.lrpe_layers and config.lrpe_layers[layer])
        self.lrpe = LinearizedRelativePosition(config.num_attention_heads, config.head_dim) if rotated else None

    def forward(
        self, x: Float[Tensor, "B N C"], start: int = 0, state: Tensor | None = None
    ) -> tuple[Float[Tensor, "B N C"], Tensor]:
        """Gated linear attention with decay; the state (B, H, D, D) sums what came before ``start``."""
        query, key, value, gate = self.qkvu_proj(x).chunk(4, dim=-1)
        q, k, v = (_heads(t, self.num_heads) for t in (F.silu(query), F.silu(key), value))
        if self.lrpe is not None:
            q, k = self.lrpe(q, start), self.lrpe(k, start)
        out, state = lightning_attention(q, k, v, self.share, state)
        out = simple_rms_norm(out.transpose(1, 2).flatten(2), self.eps)
        return self.out_proj(gate * out), state


class ExampleMixer(nn.Module):
    """``TnlAttention`` of the operator's repository: SiLU on values too, LayerNorm, low-rank sigmoid gate, no LRPE.

    Shapes: as :class:`LightningMixer`.
    """

    def __init__(self, config: TransNormerConfig, layer: int) -> None:
        super().__init__()
        size, bias = config.hidden_size, config.use_bias
        self.num_heads = config.num_attention_heads
        self.share = layer_share(layer, config.num_hidden_layers)
        self.q_proj = Linear(size, size, bias=bias)
        self.k_proj = Linear(size, size, bias=bias)
        self.v_proj = Linear(size, size, bias=bias)
        self.o_proj = Linear(size, size, bias=bias)
        self.norm = nn.LayerNorm(size)
        self.output_gate = nn.Sequential(
            Linear(size, config.head_dim, bias=bias), Linear(config.head_dim, size, bias=bias)
        )

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        start: int = 0,  # noqa: ARG002  as LightningMixer
        state: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B N C"], Tensor]:
        """As :class:`LightningMixer`, with the norm and gate of the authors' example code."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (_heads(F.silu(projection(x)), self.num_heads) for projection in projections)
        out, state = lightning_attention(q, k, v, self.share, state)
        out = self.norm(out.transpose(1, 2).flatten(2))
        return self.o_proj(out * torch.sigmoid(self.output_gate(x))), state


def lightning_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N Dv"],
    share: float = 1.0,
    state: Float[Tensor, "B H D Dv"] | None = None,
) -> tuple[Float[Tensor, "B H N Dv"], Float[Tensor, "B H D Dv"]]:
    """o_t = q_tᵀ KV_t with KV_t = e^(−γ·share) KV_(t−1) + k_t v_tᵀ: no scale, no denominator."""
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    log_decay = torch.tensor([-share * slope for slope in slopes(q.shape[1])], dtype=exact, device=q.device)
    return linear_attention(q, k, v, log_decay=log_decay, initial_state=state)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class SimpleGatedUnit(nn.Module):
    """SGLU: l3(l1(x) ⊙ l2(x)), without a nonlinearity."""

    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.glu_size or config.hidden_size
        self.l1 = Linear(size, inner, bias=config.use_bias)
        self.l2 = Linear(size, inner, bias=config.use_bias)
        self.l3 = Linear(inner, size, bias=config.use_bias)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """The product of two projections, projected back; no activation."""
        return self.l3(self.l1(x) * self.l2(x))


class TransNormerLayer(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + SGLU(norm(x))."""

    def __init__(self, config: TransNormerConfig, layer: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.token_mixer = (LightningMixer if config.style == "tnl" else ExampleMixer)(config, layer)
        self.channel_mixer = SimpleGatedUnit(config)

    def forward(
        self, x: Float[Tensor, "B N C"], start: int, state: Tensor | None, keep: bool
    ) -> tuple[Float[Tensor, "B N C"], Tensor | None, None]:
        """The tokens after both mixers, the state (None unless ``keep``), and no auxiliary loss."""
        mixed, state = self.token_mixer(simple_rms_norm(x, self.eps), start, state)
        x = x + mixed
        x = x + self.channel_mixer(simple_rms_norm(x, self.eps))
        return x, state if keep else None, None


class TransNormerModel(CausalModel):
    """The stack without a head."""

    config_class = TransNormerConfig
    config: TransNormerConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    _no_split_modules = ["TransNormerLayer"]  # noqa: RUF012  transformers' own form

    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([TransNormerLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = SimpleRMSNorm(config.eps)
        self.embed_scale = math.sqrt(config.hidden_size) if config.scale_embedding else 1.0
        self.post_init()

    def enter(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """Embeddings times √C if the config says ``scale_embedding``."""
        return x * self.embed_scale

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LinearizedRelativePosition):
            module.reset_parameters()


class TransNormerForCausalLM(CausalLM):
    """TransNormerLLM with its head; released weights have our names: `seq_models.load_official`."""

    config_class = TransNormerConfig
    backbone_class = TransNormerModel


register_causal(TransNormerConfig, TransNormerModel, TransNormerForCausalLM)

VARIANTS: dict[str, dict[str, Any]] = {
    "transnormer_385m": {
        "vocab_size": 64000,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "glu_size": 2816,
    },
    "transnormer_bytes": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6},
    "test_transnormer": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "test_transnormer_example": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "style": "example",
    },
}

CARD = Card(
    family="TransNormerLLM",
    paper="2307.14995",
    code="https://github.com/OpenNLPLab/TransnormerLLM",
    license="Apache-2.0",
    test="models/test_transnormer.py",
)
ENTRIES = causal_entries(TransNormerForCausalLM, VARIANTS, CARD)
