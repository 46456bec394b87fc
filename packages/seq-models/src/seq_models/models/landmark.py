"""Landmark attention: a landmark token after every block stands for the block, and decides whether it is read.

Paper: Mohtashami and Jaggi, Landmark Attention: Random-Access Infinite Context Length for Transformers, NeurIPS 2023,
arXiv 2305.16300. Official: epfml/landmark-attention, ``lm_benchmark/models/landmark.py`` (the model),
``lm_benchmark/models/caches/mem_cache.py`` (retrieval).

Same: the grouped softmax, landmarks whose values are never read, the GPT-2-like model with rotary positions, the
selection of blocks by their landmarks, and the positions at retrieval (recent blocks keep their distance, older ones
move to the front), so that nothing ever stands further apart than k + 2 blocks.
Differs: users see no landmarks: the model inserts one after every ``block − 1`` tokens and drops its output, in
training, prefill and decoding alike; with retrieval, the tokens of a query's own block are its local context (the
official code takes pieces of any length, here the result does not depend on how the input is split); any number of
blocks (the official code is silently wrong beyond ``max_groups_for_softmax``); batches with padding.
Numbers are checked in ``test_landmark.py``; the state laws in ``test_every_causal_model.py``.

Shapes: input_ids (B, N) → logits (B, N, V); state per layer: keys without position and values (B, H, T, D) of all T
tokens and landmarks so far.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from attn_core import landmark_attention, merge_attention
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
from seq_models.layers.rotary import rotate

QUERIES_AT_ONCE = 64  # of which retrieval gathers keys and values: bounds its memory


@strict
class LandmarkConfig(CausalConfig):
    """Fields of :class:`CausalConfig` and these.

    Args:
        block: tokens of a block with its landmark (official: memory frequency + 1), at least 2.
        landmark_id: the landmark's row of the embedding; None: the last of the vocabulary.
        num_retrieved: blocks that a token reads besides its own, outside training; 0: none; None: all, at
            their true positions.
        training_reads: what a token reads in training: ``"all"`` blocks, as published; the ``"best"`` num_retrieved of
            each head by their landmarks, all blocks at their true positions; or the ``"retrieved"`` ones, as outside
            training. A small model trained on all blocks spreads its attention over more of them than it later reads,
            most of all in the first layer, whose landmarks are all alike.
        retrieval: blocks chosen for each token and head, or for each token by the best of its heads.
        offload: keep the keys and values of the state on the CPU, landmarks excepted, and copy what is retrieved.
    """

    model_type = "attn_landmark"

    block: int = 16
    landmark_id: int | None = None
    num_retrieved: int | None = None
    training_reads: Literal["all", "best", "retrieved"] = "all"
    retrieval: Literal["per_token_and_head", "max_over_heads"] = "per_token_and_head"
    offload: bool = False
    rope_theta: float = 10000.0

    def __post_init__(self, **kwargs: Any) -> None:
        self.landmark_id = self.vocab_size - 1 if self.landmark_id is None else self.landmark_id
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Raise ValueError for sizes that do not fit."""
        super().check()
        self.require(self.block >= 2, "block", "must be at least 2, a token and its landmark")
        inside = 0 <= (self.landmark_id or 0) < self.vocab_size
        self.require(inside, "landmark_id", f"must be in 0…{self.vocab_size - 1}")
        self.require((self.num_retrieved or 0) >= 0, "num_retrieved", "must not be negative")
        for name, unlimited in (("offload", False), ("training_reads", "all")):
            missing = getattr(self, name) != unlimited and self.num_retrieved is None
            self.require(not missing, name, "needs num_retrieved, as all blocks are read")

    @classmethod
    def from_official(cls, fields: Mapping[str, Any]) -> "LandmarkConfig":
        """From the arguments of an ``lm_benchmark`` run (``summary.json`` or ``args``)."""
        missing = [name for name in (*OFFICIAL_FIELDS, "mem_freq") if name not in fields]
        if missing:
            raise ValueError(f"LandmarkConfig.from_official: arguments lack {', '.join(missing)}")
        values = {ours: fields[name] for name, ours in OFFICIAL_FIELDS.items()}
        return cls(**values, block=fields["mem_freq"] + 1)


OFFICIAL_FIELDS = {
    "vocab_size": "vocab_size",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "landmark_id": "landmark_id",
}


class Memory(NamedTuple):
    """What a layer keeps: all tokens and landmarks; ``landmarks`` are the keys of the complete blocks again.

    Keys carry no position. With ``offload`` keys and values are on the CPU.
    """

    keys: Float[Tensor, "B H T D"]
    values: Float[Tensor, "B H T D"]
    landmarks: Float[Tensor, "B H T//L D"]


class LandmarkAttention(nn.Module):
    """Multi-head attention with landmarks.

    Shapes: x (B, N, C) → (B, N, C), N tokens and landmarks, the first of them number ``start``.
    """

    def __init__(self, config: LandmarkConfig) -> None:
        super().__init__()
        self.config = config
        self.c_attn = Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.c_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, x: Float[Tensor, "B N C"], start: int, state: Memory | None, keep: bool
    ) -> tuple[Float[Tensor, "B N C"], Memory | None]:
        """Tokens from position ``start`` on, after those of ``state``; the state grows only if ``keep``."""
        config = self.config
        length, theta = config.block, config.rope_theta
        q, k, v = (
            t.unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1)
        )
        reads = config.training_reads if self.training else "retrieved"
        limit = None if reads == "all" else config.num_retrieved
        position = torch.arange(start, start + x.shape[1], device=x.device)
        if state is None and limit is None:
            out, _ = landmark_attention(rotate(q, position, theta), rotate(k, position, theta), v, length)
            memory = self._memory(None, k, v) if keep else None
        else:
            memory = self._memory(state, k, v)
            parts = [
                self._read_in_place(part, at, memory, limit)
                if limit is None or reads == "best"
                else self._retrieve(part, at, memory, limit)
                for part, at in zip(q.split(QUERIES_AT_ONCE, 2), position.split(QUERIES_AT_ONCE), strict=True)
            ]
            out = torch.cat(parts, dim=2)
        return self.c_proj(out.transpose(1, 2).flatten(2)), memory if keep else None

    def _memory(self, state: Memory | None, k: Tensor, v: Tensor) -> Memory:
        """The state with the new tokens."""
        length = self.config.block
        before = 0 if state is None else state.keys.shape[2]
        first = (length - 1 - before) % length
        landmarks = k[:, :, first::length]
        if self.config.offload:
            k, v = k.cpu(), v.cpu()
        if state is None:
            return Memory(k, v, landmarks)
        return Memory(
            torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2), torch.cat([state.landmarks, landmarks], 2)
        )

    def _own_block(self, q: Tensor, position: Tensor, memory: Memory, base: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax over the earlier tokens of a query's own block, landmark excepted; block b begins at ``base[b]``."""
        length, total = self.config.block, memory.keys.shape[2]
        number = position // length
        first, last = int(number[0]), int(number[-1])
        span = slice(first * length, min((last + 1) * length, total))
        k, v = memory.keys[:, :, span].to(q.device), memory.values[:, :, span].to(q.device)
        token = torch.arange(span.start, span.stop, device=q.device)
        k = rotate(k, base[token // length] + token % length, self.config.rope_theta)
        scores = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        seen = (token[None] // length == number[:, None]) & (token[None] <= position[:, None])
        scores = scores.masked_fill(~(seen & (token % length != length - 1)), -torch.inf)
        return torch.matmul(scores.softmax(-1), v), scores.logsumexp(-1)

    def _read_in_place(self, q: Tensor, position: Tensor, memory: Memory, limit: int | None) -> Tensor:
        """Grouped softmax over earlier blocks at their true positions: over all of them, equal to the pass over the
        whole sequence, or over the ``limit`` whose landmarks a query scores highest.
        """
        config, length = self.config, self.config.block
        scale = q.shape[-1] ** -0.5
        q = rotate(q, position, config.rope_theta)
        blocks = memory.landmarks.shape[2]
        base = torch.arange(blocks + 1, device=q.device) * length
        own, lse = self._own_block(q, position, memory, base)
        complete = min(int(position[-1]) // length, blocks)
        if complete == 0:
            return own
        token = torch.arange(complete * length, device=q.device)
        k = rotate(memory.keys[:, :, : complete * length], token, config.rope_theta)
        scores = (torch.matmul(q, k.transpose(-1, -2)) * scale).unflatten(-1, (complete, length))
        ahead = torch.arange(complete, device=q.device) >= (position // length)[:, None]
        gate = scores[..., -1].masked_fill(ahead, -torch.inf)
        if limit is not None and limit < complete:
            rest = gate.topk(complete - limit, dim=-1, largest=False).indices
            gate = gate.scatter(-1, rest, -torch.inf)
        weight = torch.cat([gate, lse[..., None]], dim=-1).softmax(-1)
        share = scores[..., :-1].softmax(-1) * weight[..., :-1, None]
        v = memory.values[:, :, : complete * length].unflatten(2, (complete, length))[..., :-1, :]
        past = torch.matmul(share.flatten(-2), v.flatten(2, 3))
        return past + own * weight[..., -1:]

    def _retrieve(self, q: Tensor, position: Tensor, memory: Memory, limit: int) -> Tensor:
        """Grouped softmax over a query's own block and the blocks whose landmarks it scores highest.

        With k blocks to retrieve and b blocks before a query, its own block begins at min(b, k + 1)·L. For the choice,
        the landmarks of the last k blocks stand at their true distance and all older ones in the first block; the
        chosen blocks, in order of time, stand at r·L, r = 0…k − 1, one block later if they are among the last k.
        """
        config, length = self.config, self.config.block
        theta, scale = config.rope_theta, q.shape[-1] ** -0.5
        number = position // length
        blocks = memory.landmarks.shape[2]
        base = torch.arange(blocks + 1, device=q.device).clamp(max=limit + 1) * length
        at = base[number] + position % length
        own, lse = self._own_block(rotate(q, at, theta), position, memory, base)
        before = min(int(number[-1]), blocks)
        if before == 0 or limit == 0:
            return own
        # Queries as seen from the k + 1 places r·L where a block may begin: keys then turn by their place in the block.
        place = torch.arange(limit + 1, device=q.device)
        seen = rotate(q[..., None, :].expand(*q.shape[:3], limit + 1, -1), at[:, None] - place * length, theta)
        # Where landmark j stands for a query with b blocks before it: at true distance if j ≥ b − k, else in front.
        j, b = torch.arange(before, device=q.device), number[:, None]
        stands = torch.where(j >= b - limit, j - (b - limit - 1).clamp(min=0), 0).clamp(max=limit)
        landmark = rotate(memory.landmarks[:, :, :before], stands.new_full((before,), length - 1), theta)
        scores = torch.matmul(seen.flatten(2, 3), landmark.mT).unflatten(2, (-1, limit + 1)) * scale
        scores = scores.gather(3, stands[:, None].expand(*scores.shape[:3], 1, before)).squeeze(3)
        # Landmarks of the first layer are equal where their positions are: within 1/1024 nat the later block is chosen,
        # not what rounding prefers.
        chance = scores.masked_fill(j >= b, -torch.inf).log_softmax(-1).nan_to_num(-torch.inf, neginf=-torch.inf)
        if config.retrieval == "max_over_heads":
            chance = chance.amax(1, keepdim=True).expand_as(scores)
        ranking = (chance.double().clamp(min=-1e6).masked_fill(j >= b, -1e7) * 1024).round().long() * before + j
        count = min(limit, before)
        chosen = ranking.topk(count, dim=-1).indices
        # In order of time; where fewer blocks exist than may be read, those ahead come last and are shut.
        chosen = chosen.sort(-1).values
        open_ = chosen < b
        recent = chosen >= b - limit
        order = torch.arange(count, device=q.device)
        # With at most k blocks before it, a query reads all of them where they are: block j at j·L (the official code
        # moves them one block too far, onto the query's own, in that case alone).
        slot = torch.where(b <= limit, chosen, order + (recent & (b > limit)).long()).clamp(max=limit)
        keys, values = self._gather(memory, chosen, q)
        keys = rotate(keys, torch.arange(length, device=q.device), theta)
        seen = seen.gather(3, slot[..., None].expand(*slot.shape, q.shape[-1]))
        logits = torch.einsum("bhncd,bhncld->bhncl", seen, keys) * scale
        read = torch.einsum("bhncl,bhncld->bhncd", logits[..., :-1].softmax(-1), values[..., :-1, :])
        gate = logits[..., -1].masked_fill(~open_, -torch.inf)
        parts = [*read.unbind(-2), own]
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        return merge_attention(parts, [*gate.to(exact).unbind(-1), lse.to(exact)])[0]

    def _gather(self, memory: Memory, chosen: Int[Tensor, "B H N K"], q: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, N, K, L, D) of the chosen blocks, on the device of q."""
        length, device = self.config.block, memory.keys.device
        B, H = chosen.shape[:2]
        rows = torch.arange(B, device=device)[:, None, None, None], torch.arange(H, device=device)[:, None, None]
        blocks = chosen.to(device).clamp(max=memory.landmarks.shape[2] - 1)

        def take(x: Tensor) -> Tensor:
            whole = x[:, :, : memory.landmarks.shape[2] * length].unflatten(2, (-1, length))
            return whole[(*rows, blocks)].to(q.device)

        return take(memory.keys), take(memory.values)


class LandmarkMLP(nn.Module):
    """Linear, GELU, linear, four times as wide inside."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.c_fc = Linear(size, 4 * size, bias=False)  # GELU apart: what LoRA adds to the layer comes before it
        self.c_proj = Linear(4 * size, size, bias=False)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """Widened four times, GELU, narrowed."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class LandmarkLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: LandmarkConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, bias=False)
        self.attn = LandmarkAttention(config)
        self.ln_2 = nn.LayerNorm(config.hidden_size, bias=False)
        self.mlp = LandmarkMLP(config.hidden_size)

    def forward(
        self, x: Float[Tensor, "B N C"], start: int, state: Memory | None, keep: bool
    ) -> tuple[Float[Tensor, "B N C"], Memory | None, None]:
        """The tokens after attention and MLP, the state (None unless ``keep``), and no auxiliary loss."""
        mixed, state = self.attn(self.ln_1(x), start, state, keep)
        x = x + mixed
        return x + self.mlp(self.ln_2(x)), state, None


class LandmarkModel(CausalModel):
    """The stack without a head. It inserts the landmarks and drops their outputs."""

    config_class = LandmarkConfig
    config: LandmarkConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    _no_split_modules = ["LandmarkLayer"]  # noqa: RUF012  transformers' own form

    def __init__(self, config: LandmarkConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([LandmarkLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.post_init()

    def run(self, x: Float[Tensor, "B N C"], start: int, state: Any, *, keep: bool, all_layers: bool = False) -> Pass:
        """As the base class, for the tokens with a landmark after every ``block − 1`` of them."""
        content = self.config.block - 1
        batch, tokens, size = x.shape
        seen, now = start // content, (start + tokens) // content  # landmarks
        order = torch.arange(start, start + tokens, device=x.device)
        place = order + order // content - (start + seen)  # of each token among tokens and landmarks
        landmark = self.embed_tokens(place.new_tensor(self.config.landmark_id))  # a call: adapters may change it
        mixed = landmark.expand(batch, tokens + now - seen, size).to(x.dtype).index_copy(1, place, x)
        result = super().run(mixed, start + seen, state, keep=keep, all_layers=all_layers)
        layers = tuple(layer[:, place] for layer in result.layers)
        return result._replace(hidden=result.hidden[:, place], layers=layers)


class LandmarkForCausalLM(CausalLM):
    """Landmark attention with its head; `seq_models.load_official` reads ``lm_benchmark`` checkpoints."""

    config_class = LandmarkConfig
    backbone_class = LandmarkModel


register_causal(LandmarkConfig, LandmarkModel, LandmarkForCausalLM)

# Our names → those of an ``lm_benchmark`` checkpoint, whose causal masks and frequencies are computed here.
KEY_MAP = {
    "lm_benchmark": (
        (r"^model\.embed_tokens\.", "transformer.wte."),
        (r"^model\.layers\.", "transformer.h."),
        (r"^model\.norm\.", "transformer.ln_f."),
    )
}
COMPUTED = (".attn.bias", "transformer.wpe.freqs")


VARIANTS: dict[str, dict[str, Any]] = {
    "landmark_pg19": {  # lm_benchmark's defaults: GPT-2's vocabulary, a landmark after every 50 tokens
        "vocab_size": 50304,
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "block": 51,
        "landmark_id": 50260,
    },
    "landmark_passkey": {  # bytes and a landmark: the recipe of that name
        "vocab_size": 257,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.06,
        "block": 16,
        "num_retrieved": 2,
        "training_reads": "best",
    },
    "test_landmark": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "block": 5},
    "test_landmark_retrieval": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "block": 4,
        "num_retrieved": 2,
    },
}

CARD = Card(
    family="Landmark attention",
    paper="2305.16300",
    code="https://github.com/epfml/landmark-attention",
    license="Apache-2.0",
    test="models/test_landmark.py",
)
ENTRIES = causal_entries(LandmarkForCausalLM, VARIANTS, CARD)
