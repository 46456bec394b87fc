"""Titans: language models with a memory that learns while it reads, alone or beside attention.

Paper: Behrouz, Zhong, Mirrokni, Titans: Learning to Memorize at Test Time, arXiv 2501.00663. No official code.

Same: the memory of `seq_models.layers.neural_memory` with gates for every token; queries, keys and values pass a causal
depthwise convolution and SiLU, queries and keys are normalized; persistent tokens stand before every sequence; the
four architectures: memory alone (lmm), memory as context (mac), as gate (mag), as layer (mal).
Ours where the paper is silent: GELU between the layers of the memory; ⊗ is norm(m)·σ(norm(y)); θ < ``theta_max``, at
first a tenth of it, α at first 0.02, η 0.9; attention knows positions by ALiBi.
Differs: ``mac`` is strictly causal. In the paper's wording a token sees what its whole segment retrieves, and reads a
memory that has stored its whole segment; here it sees what tokens up to itself retrieve, and reads the memory that has
stored tokens up to itself. Persistent tokens are keys and values of attention and are stored in memories, nothing is
computed behind them.
Numbers are checked in ``test_titans.py``; the state laws there, too.

Shapes: input_ids (B, N) → logits (B, N, V). State per layer: three times the memory's weights, the convolution's last
inputs, and for attention keys and values of one window or segment; constant in the length.
"""

import math
from typing import Any, Literal

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
from seq_models.language.language_model import CausalConfig, CausalLM, CausalModel, causal_entries, register_causal
from seq_models.layers.neural_memory import Memory, apply_memory, chunked_memory, fresh_memory


@strict
class TitansConfig(CausalConfig):
    """Fields of :class:`CausalConfig` and these.

    Args:
        architecture: ``"lmm"``, ``"mac"``, ``"mag"``, ``"mal"``.
        memory_depth: linear layers of a memory; 1 is a matrix.
        memory_expansion: inner width of a deep memory over the width of a head.
        chunk_size: tokens whose gradients are taken at the same weights; of ``mac`` the segment's length.
        window: tokens that attention sees, itself included (``mag``, ``mal``).
        num_persistent: learned tokens before every sequence; 0 without attention in ``lmm``.
        conv_size: of the convolutions; 1 is a scale for each channel.
        theta_max: largest step of a memory; 0 switches learning off.
        momentum, forgetting: whether η and α are learned, or 0.
        mlp_size: inner width of the gated feed-forward layer; None: 8/3 of ``hidden_size``, a multiple of 8.
    """

    model_type = "attn_titans"

    architecture: Literal["lmm", "mac", "mag", "mal"] = "mac"
    memory_depth: int = 2
    memory_expansion: int = 2
    chunk_size: int = 16
    window: int = 64
    num_persistent: int = 4
    conv_size: int = 4
    theta_max: float = 0.1
    momentum: bool = True
    forgetting: bool = True
    mlp_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.mlp_size = -(-self.hidden_size // 3) * 8 if self.mlp_size is None else self.mlp_size
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Raise ValueError for sizes that do not fit."""
        super().check()
        for name in ("memory_depth", "memory_expansion", "chunk_size", "window", "conv_size", "mlp_size"):
            self.require(getattr(self, name) >= 1, name, "must be at least 1")
        self.require(self.num_persistent >= 0, "num_persistent", "must not be negative")
        self.require(0 <= self.theta_max < math.inf, "theta_max", "must be finite and not negative")


class CausalConvolution(nn.Module):
    """Depthwise convolution along the sequence, then SiLU.

    Shapes: x (B, N, C), last inputs (B, K−1, C) or None → both again.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(channels, 1, size))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the kernels anew, uniform in ±1/√size."""
        init.uniform_(self.weight, -1 / math.sqrt(self.size), 1 / math.sqrt(self.size))

    def forward(self, x: Float[Tensor, "B N C"], last: Tensor | None) -> tuple[Float[Tensor, "B N C"], Tensor]:
        """SiLU of the convolution over the past; ``last``: the size − 1 inputs before x, returned for the next call."""
        if last is None:
            last = x.new_zeros(x.shape[0], self.size - 1, x.shape[2])
        seen = torch.cat([last, x], dim=1)
        out = F.conv1d(seen.mT, self.weight, groups=x.shape[2]).mT
        return F.silu(out), seen[:, seen.shape[1] - self.size + 1 :]


class NeuralMemory(nn.Module):
    """The memory as a layer: projections, gates, and weights to start from.

    State: (memory, last inputs of the convolutions of keys and values, of queries).
    """

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        size, heads, width = config.hidden_size, config.num_attention_heads, config.head_dim
        self.num_heads, self.chunk = heads, config.chunk_size
        self.theta_max, self.momentum, self.forgetting = config.theta_max, config.momentum, config.forgetting
        self.query = Linear(size, size, bias=False)
        self.key_value = Linear(size, 2 * size, bias=False)
        self.query_conv = CausalConvolution(size, config.conv_size)
        self.key_value_conv = CausalConvolution(2 * size, config.conv_size)
        self.gates = Linear(size, 3 * heads)  # of θ, α, η
        inner = width * config.memory_expansion
        widths = [width, *([inner] * (config.memory_depth - 1)), width]
        # Not a ParameterList: transformers initializes only modules that have parameters of their own.
        self.depth = config.memory_depth
        for number in range(self.depth):
            shape = (heads, widths[number], widths[number + 1])
            self.register_parameter(f"start_{number}", nn.Parameter(torch.empty(shape)))

    @property
    def start(self) -> list[Tensor]:
        """Weights before the first token, layer by layer: (H, I, O)."""
        return [self.get_parameter(f"start_{number}") for number in range(self.depth)]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the memory's start anew, and set the gates' biases, which decide how fast it begins to learn."""
        for weight in self.start:
            init.normal_(weight, std=weight.shape[1] ** -0.5)
        init.copy_(self.gates.bias, torch.tensor([-2.2, -4.0, 2.2]).repeat_interleave(self.num_heads))

    def fresh(self, batch: int, dtype: torch.dtype) -> Memory:
        """The memory before the first token, for every row."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        return fresh_memory(tuple(w.to(exact).expand(batch, -1, -1, -1) for w in self.start))

    def queries(self, x: Float[Tensor, "B N C"], last: Tensor | None) -> tuple[Float[Tensor, "B H N D"], Tensor]:
        """Normalized queries, and what the convolution keeps."""
        q, last = self.query_conv(self.query(x), last)
        return F.normalize(self._heads(q), dim=-1), last  # pyright: ignore[reportReturnType]

    def read(self, memory: Memory, q: Float[Tensor, "B H N D"]) -> Float[Tensor, "B N C"]:
        """What the weights at the start of the chunk answer; nothing is stored."""
        with torch.autocast(q.device.type, enabled=False):
            return apply_memory(memory.anchor, q.to(memory.anchor[0].dtype)).transpose(1, 2).flatten(2).to(q.dtype)

    def forward(
        self, x: Float[Tensor, "B N C"], start: int = 0, state: Any = None
    ) -> tuple[Float[Tensor, "B N C"], Any]:
        """Store x and read it, token by token in effect."""
        memory, kv_last, q_last = (self.fresh(len(x), x.dtype), None, None) if state is None else state
        q, q_last = self.queries(x, q_last)
        kv, kv_last = self.key_value_conv(self.key_value(x), kv_last)
        key, value = kv.chunk(2, dim=-1)
        k, v = F.normalize(self._heads(key), dim=-1), self._heads(value)
        exact = memory.weights[0].dtype
        with torch.autocast(x.device.type, enabled=False):
            gates = torch.sigmoid(self.gates(x.to(self.gates.weight.dtype)).to(exact))
            theta, alpha, eta = gates.unflatten(-1, (3, -1)).permute(2, 0, 3, 1)
            alpha = alpha if self.forgetting else torch.zeros_like(alpha)
            eta = eta if self.momentum else torch.zeros_like(eta)
            y, memory = chunked_memory(
                memory,
                *(t.to(exact) for t in (k, v, q)),
                theta * self.theta_max,  # pyright: ignore[reportCallIssue]
                alpha,  # pyright: ignore[reportCallIssue]
                eta,  # pyright: ignore[reportCallIssue]
                chunk=self.chunk,
                start=start,
            )
        return y.transpose(1, 2).flatten(2).to(x.dtype), (memory, kv_last, q_last)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class WindowAttention(nn.Module):
    """Causal attention to a sliding window and, at no distance, to persistent tokens; ALiBi.

    Shapes: x (B, N, C), prefix (P, C) or (B, P, C). State: keys and values of the last window − 1 tokens.
    """

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.num_heads, self.window = config.num_attention_heads, config.window
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=False)

    def forward(
        self, x: Float[Tensor, "B N C"], prefix: Float[Tensor, "B P C"], state: tuple[Tensor, Tensor] | None
    ) -> tuple[Float[Tensor, "B N C"], tuple[Tensor, Tensor]]:
        """Each token reads the window before it and the fixed ``prefix``; the state holds the last window's k and v."""
        batch, tokens = x.shape[:2]
        q, k, v = self._project(x)
        _, fixed_k, fixed_v = self._project(prefix)
        past = 0 if state is None else state[0].shape[2]
        if state is not None:
            k, v = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
        # Blocks of queries with the keys of their own and the previous block, as images of one batched attention.
        block = min(self.window, tokens)
        blocks = -(-tokens // block)
        reach = self.window - 1
        behind = blocks * block - tokens
        place = torch.arange(blocks, device=x.device)[:, None] * block + torch.arange(block + reach, device=x.device)
        visible = (place >= reach - past) & (place < reach + tokens)
        front = reach - past
        k, v = (F.pad(t, (0, 0, front, behind)).unfold(2, block + reach, block).movedim(-1, 3) for t in (k, v))
        q = F.pad(q, (0, 0, 0, behind)).unflatten(2, (blocks, block))
        kept = fixed_k.shape[2]
        k, v = (
            torch.cat([f[:, :, None].expand(-1, -1, blocks, -1, -1), t], dim=3).transpose(1, 2).flatten(0, 1)
            for f, t in ((fixed_k, k), (fixed_v, v))
        )
        mask = F.pad(visible, (kept, 0), value=True).repeat(batch, 1)
        distance = torch.arange(block, device=x.device)[:, None] + reach - torch.arange(block + reach, device=x.device)
        bias = alibi(distance, self.num_heads, q.dtype).masked_fill((distance < 0) | (distance > reach), -math.inf)
        bias = F.pad(bias, (kept, 0))
        out = attention(q.transpose(1, 2).flatten(0, 1), k, v, bias=bias[None], key_mask=mask)[0]
        out = out.unflatten(0, (batch, blocks)).permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)[:, :tokens]
        return out, self._last(state, x)

    def _last(self, state: tuple[Tensor, Tensor] | None, x: Tensor) -> tuple[Tensor, Tensor]:
        recent = x[:, max(0, x.shape[1] - self.window + 1) :]
        _, k, v = self._project(recent)
        if state is not None:
            k, v = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
        first = max(0, k.shape[2] - self.window + 1)
        return k[:, :, first:], v[:, :, first:]

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v


class SegmentAttention(nn.Module):
    """Attention of a segment to persistent tokens, to what the memory retrieved for its tokens, and to its tokens.

    Shapes: x, retrieved (B, n, C), n tokens of one segment. State: keys and values of its earlier tokens, retrieved
    ones first in each pair.
    """

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, retrieved: Tensor, prefix: Tensor, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Float[Tensor, "B N C"], tuple[Tensor, Tensor]]:
        """Each token reads the segment so far, what memory ``retrieved`` for it, and the fixed ``prefix``."""
        tokens = x.shape[1]
        q, k, v = self._project(x)
        _, memory_k, memory_v = self._project(retrieved)
        _, fixed_k, fixed_v = self._project(prefix)
        k, v = torch.stack([memory_k, k], dim=3), torch.stack([memory_v, v], dim=3)  # (B, H, n, 2, D)
        if state is not None:
            k, v = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
        total = k.shape[2]
        distance = (torch.arange(total - tokens, total)[:, None] - torch.arange(total)).to(x.device)
        bias = alibi(distance, self.num_heads, q.dtype).masked_fill(distance < 0, -math.inf)
        bias = F.pad(bias.repeat_interleave(2, dim=-1), (fixed_k.shape[2], 0))
        keys, values = torch.cat([fixed_k, k.flatten(2, 3)], dim=2), torch.cat([fixed_v, v.flatten(2, 3)], dim=2)
        out = attention(q, keys, values, bias=bias[None])[0]
        return out.transpose(1, 2).flatten(2), (k, v)

    _project = WindowAttention._project


def alibi(distance: Tensor, num_heads: int, dtype: torch.dtype) -> Float[Tensor, "H N M"]:
    """−slope·distance with slopes 2^(−8(h+1)/H). Source: Press et al. 2022 (arXiv 2108.12409)."""
    slope = torch.tensor([2.0 ** (-8 * (head + 1) / num_heads) for head in range(num_heads)], dtype=torch.float64)
    return (-slope.to(distance.device)[:, None, None] * distance).to(dtype)


class TitansLayer(GradientCheckpointingLayer):
    """Mixer of the architecture and gated feed-forward layer, each with pre-norm and residual."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.architecture, self.chunk = config.architecture, config.chunk_size
        self.num_persistent = config.num_persistent
        self.mixer_norm, self.mlp_norm = nn.RMSNorm(size), nn.RMSNorm(size)
        self.memory = NeuralMemory(config)
        if config.architecture == "mac":
            self.attention: nn.Module | None = SegmentAttention(config)
        else:
            self.attention = None if config.architecture == "lmm" else WindowAttention(config)
        if config.architecture != "mal":
            self.memory_norm = nn.RMSNorm(size)
            self.gate_norm = nn.RMSNorm(size)
        self.gate = Linear(size, size, bias=False) if config.architecture == "lmm" else None
        self.persistent = nn.Parameter(torch.empty(config.num_persistent, size))
        self.out = Linear(size, size, bias=False)
        self.up = Linear(size, 2 * (config.mlp_size or size), bias=False)
        self.down = Linear(config.mlp_size or size, size, bias=False)

    def forward(
        self, x: Float[Tensor, "B N C"], start: int, state: Any, keep: bool
    ) -> tuple[Float[Tensor, "B N C"], Any, None]:
        """The tokens after mixer and gated MLP, the state (None unless ``keep``), and no auxiliary loss."""
        mixed, state = self._mix(self.mixer_norm(x), start, state)
        x = x + self.out(mixed)
        gate, value = self.up(self.mlp_norm(x)).chunk(2, dim=-1)
        x = x + self.down(F.silu(gate) * value)
        return x, state if keep else None, None

    def _mix(self, x: Tensor, start: int, state: Any) -> tuple[Tensor, Any]:
        prefix = self.persistent.to(x.dtype).expand(len(x), -1, -1)
        if self.architecture == "mac":
            return self._segments(x, prefix, start, state)
        if state is None:
            # The memory reads the persistent tokens once, before the first token.
            stored = self.memory(prefix, 0, None) if self.num_persistent else (prefix, None)
            state = (stored[1], stored[0], None)
        memory_state, before, window_state = state
        m, memory_state = self.memory(x, start + self.num_persistent, memory_state)
        if self.architecture == "lmm":
            return self._gated(m, self.gate(x) if self.gate is not None else x), (memory_state, before, None)
        attend: Any = self.attention
        if self.architecture == "mag":
            y, window_state = attend(x, prefix, window_state)
            return self._gated(m, y), (memory_state, before, window_state)
        y, window_state = attend(m, before, window_state)
        return y, (memory_state, before, window_state)

    def _segments(self, x: Tensor, prefix: Tensor, start: int, state: Any) -> tuple[Tensor, Any]:
        attend: Any = self.attention
        memory_state, q_last, segment_state = (None, None, None) if state is None else state
        queries, q_last = self.memory.queries(x, q_last)
        if memory_state is None:
            memory_state = (self.memory.fresh(len(x), x.dtype), None, None)
        parts, done = [], 0
        while done < x.shape[1]:
            phase = (start + done) % self.chunk
            if phase == 0:
                segment_state = None
                memory = memory_state[0]
                memory_state = (memory._replace(anchor=memory.weights), *memory_state[1:])
            part = slice(done, min(x.shape[1], done + self.chunk - phase))
            retrieved = self.memory.read(memory_state[0], queries[:, :, part])
            y, segment_state = attend(x[:, part], retrieved, prefix, segment_state)
            m, memory_state = self.memory(y, start + done, memory_state)
            parts.append(self._gated(m, y))
            done = part.stop
        return torch.cat(parts, dim=1), (memory_state, q_last, segment_state)

    def _gated(self, memory: Tensor, y: Tensor) -> Tensor:
        return self.memory_norm(memory) * torch.sigmoid(self.gate_norm(y))


class TitansModel(CausalModel):
    """The stack without a head."""

    config_class = TitansConfig
    config: TitansConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    _no_split_modules = ["TitansLayer"]  # noqa: RUF012  transformers' own form

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([TitansLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TitansLayer):
            init.normal_(module.persistent, std=self.config.initializer_range)
        elif isinstance(module, NeuralMemory | CausalConvolution):
            module.reset_parameters()


class TitansForCausalLM(CausalLM):
    """Titans with a head over the vocabulary."""

    config_class = TitansConfig
    backbone_class = TitansModel


register_causal(TitansConfig, TitansModel, TitansForCausalLM)

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "chunk_size": 4, "window": 5}
VARIANTS: dict[str, dict[str, Any]] = {
    # The paper states of its 340 M models the size, the vocabulary and the training length, neither width nor depth.
    # Width 1024 with heads of 64 channels is assumed; the depth is the one that comes nearest to 340 M parameters.
    **{
        f"titans_{architecture}_340m": {
            "vocab_size": 32000,
            "hidden_size": 1024,
            "num_hidden_layers": 22 if architecture == "lmm" else 19,
            "num_attention_heads": 16,
            "window": 512,
            "architecture": architecture,
        }
        for architecture in ("lmm", "mac", "mag", "mal")
    },
    **{
        f"test_titans_{architecture}": {**_SMALL, "architecture": architecture}
        for architecture in ("lmm", "mac", "mag", "mal")
    },
}

CARD = Card(family="Titans", paper="2501.00663", code="", license="", test="models/test_titans.py")
ENTRIES = causal_entries(TitansForCausalLM, VARIANTS, CARD)
