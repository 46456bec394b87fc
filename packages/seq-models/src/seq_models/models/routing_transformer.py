"""Routing Transformer: tokens attend to the tokens of their cluster; clusters are found by k-means while training.

Paper: Roy et al., Efficient Content-Based Sparse Attention with Routing Transformers, TACL 2021, arXiv 2003.05997.
Official: google-research/google-research, ``routing_transformer/{utils,sparse_transformer}.py`` (TensorFlow 1). Peer:
lucidrains/routing-transformer (pip).

Same: shared queries and keys, balanced clusters of the ``window`` best tokens of each centroid, the mean of a token's
results, commitment loss, moving averages of centroids. ``style="official"``: layer norm without parameters, logits
without 1/√d, results shared by count + 0.01, GEGLU, a linear layer on each head's result. ``style="lucidrains"``: unit
keys, 1/√d, a token sees itself only if it sees nothing else, count + 1e-5, rotary also on values, GELU.

**The published selection leaks the future**: who belongs to a centroid's best tokens depends on the tokens that come
later, so teacher-forced likelihoods are not those of any step-by-step generation (``test_routing_transformer.py`` shows
it). ``selection="topk"`` is that rule, ``"random"`` the paper's ablation (random members); the default,
``selection="causal"``, is ours: a token joins its nearest centroid and reads the members that came before it in its
stretch of ``window`` members and in the stretch before. It is exactly causal and streams with a state of fixed size.

Differs: rotary positions instead of learned relative ones (officially differences of ranks within a cluster, which
depend on the future too); local and routing heads have projections of their own; a centroid without members keeps its
value (officially it drifts, and is multiplied by 1e5 at the first step, as counts start at 0; here at 1).
Numbers are checked in ``test_routing_transformer.py``; the state laws in ``test_every_causal_model.py``.

Shapes: input_ids (B, N) → logits (B, N, V).
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from huggingface_hub.dataclasses import strict
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from attn_core import block_attention
from attn_core.catalog import Card
from attn_core.nn import Linear
from seq_models.language.language_model import CausalConfig, CausalLM, CausalModel, causal_entries, register_causal
from seq_models.layers.rotary import rotate

SELF_LOGIT = -5e4  # of the peer: a query sees itself only when it sees nothing else
LLOYD_STEPS = 10  # of the peer, on its first batch


@strict
class RoutingConfig(CausalConfig):
    """Fields of :class:`CausalConfig` and these.

    Args:
        num_local_heads: heads that attend within ``local_block`` tokens and the block before; the others route.
        first_routing_layer: layers before it have local heads only (PG-19: the last layer alone routes).
        num_clusters: centroids of each routing head.
        window: tokens that a cluster holds.
        selection: ``"causal"`` (ours), ``"topk"`` (published, leaks the future), ``"random"`` (ablation).
        commitment: weight of the distance between tokens and their centroids in the loss.
        feedforward_size: inner width; None: 3 × hidden_size (official), 4 × hidden_size (lucidrains).
    """

    model_type = "attn_routing_transformer"

    num_local_heads: int = 2
    first_routing_layer: int = 0
    num_clusters: int = 8
    window: int = 32
    local_block: int = 32
    selection: Literal["causal", "topk", "random"] = "causal"
    style: Literal["official", "lucidrains"] = "official"
    feedforward_size: int | None = None
    ema_decay: float = 0.999
    commitment: float = 1e-4
    rope_theta: float = 10000.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.feedforward_size is None:
            self.feedforward_size = self.hidden_size * (3 if self.style == "official" else 4)
        if self.selection != "causal":
            self.use_cache = False
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Raise ValueError for sizes that do not fit."""
        super().check()
        for name in ("num_clusters", "window", "local_block"):
            self.require(getattr(self, name) >= 1, name, "must be at least 1")
        inside = 0 <= self.num_local_heads <= self.num_attention_heads
        self.require(inside, "num_local_heads", f"must be in 0…num_attention_heads={self.num_attention_heads}")
        self.require(0 <= self.ema_decay < 1, "ema_decay", "must be at least 0 and below 1")

    def local_heads(self, layer: int) -> int:
        """Local heads of a layer."""
        return self.num_attention_heads if layer < self.first_routing_layer else self.num_local_heads


class Centroids(nn.Module):
    """k-means of the tokens of each head, by moving averages.

    Args:
        style: ``"official"`` averages counts and sums of points; ``"lucidrains"`` unit means, after ten Lloyd steps on
            the first batch.

    Shapes: points (B, H, N, D) → scores (B, H, N, K).
    """

    means: Tensor
    count: Tensor
    started: Tensor

    def __init__(self, num_heads: int, clusters: int, dim: int, decay: float, style: str) -> None:
        super().__init__()
        self.decay, self.style = decay, style
        self.register_buffer("means", torch.empty(num_heads, clusters, dim))
        self.register_buffer("count", torch.empty(num_heads, clusters))
        self.register_buffer("started", torch.empty((), dtype=torch.bool))
        self.before_step: Tensor | None = None  # what gradient checkpointing's second pass must see again

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal centroids, normalized as the points are; counts of one."""
        init.normal_(self.means)
        init.copy_(self.means, self.normalized(self.means))
        init.ones_(self.count)
        init.zeros_(self.started)

    def normalized(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Layer norm without parameters (on a sphere of radius √D), or unit vectors."""
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) if self.style == "official" else F.normalize(x, dim=-1)

    def forward(self, points: Float[Tensor, "B H N D"]) -> Float[Tensor, "B H N K"]:
        """Products of points and centroids; no gradient."""
        with torch.no_grad():
            if self.training and self.style == "lucidrains" and not self.started:
                self._start(points)
            return torch.einsum("bhnd,hkd->bhnk", points, self.current().to(points.dtype))

    def current(self) -> Float[Tensor, "H K D"]:
        """The centroids; in gradient checkpointing's second pass those that the first one saw."""
        return self.before_step if self.before_step is not None and _recomputing() else self.means

    @torch.no_grad()
    def update(self, points: Float[Tensor, "B H N D"], nearest: Int[Tensor, "B H N"]) -> None:
        """Move centroids towards their tokens, those of all processes; without tokens a centroid stays where it is."""
        self.before_step = self.means.clone()
        members, sums = self._gathered(points, nearest)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(members)
            dist.all_reduce(sums)
        alive = members > 0
        if self.style == "official":
            count = torch.lerp(members, self.count, self.decay)
            moved = torch.lerp(sums, self.means * self.count[..., None], self.decay) / count[..., None]
            self.count.copy_(torch.where(alive, count, self.count))
            self.means.copy_(torch.where(alive[..., None], moved, self.means))
        else:
            mean = torch.where(alive[..., None], F.normalize(sums, dim=-1), self.means)
            self.means.lerp_(mean, 1 - self.decay)

    def _gathered(self, points: Tensor, nearest: Tensor) -> tuple[Tensor, Tensor]:
        """Members (H, K) and their sums (H, K, D)."""
        heads, clusters, width = self.means.shape
        index = nearest.transpose(0, 1).flatten(1)
        members = self.count.new_zeros(heads, clusters).scatter_add_(
            1, index, torch.ones_like(index, dtype=self.count.dtype)
        )
        flat = points.to(self.means.dtype).transpose(0, 1).flatten(1, 2)
        sums = self.means.new_zeros(heads, clusters, width)
        return members, sums.scatter_add_(1, index[..., None].expand(-1, -1, width), flat)

    def _start(self, points: Tensor) -> None:
        flat = points.transpose(0, 1).flatten(1, 2)
        clusters, total = self.means.shape[1], flat.shape[1]
        chosen = torch.randperm(total)[:clusters] if total >= clusters else torch.randint(0, total, (clusters,))
        self.means.copy_(flat[:, chosen.to(flat.device)])
        for _ in range(LLOYD_STEPS):
            nearest = torch.einsum("bhnd,hkd->bhnk", points, self.means.to(points.dtype)).argmax(-1)
            members, sums = self._gathered(points, nearest)
            self.means.copy_(torch.where(members[..., None] > 0, F.normalize(sums, dim=-1), self.means))
        self.started.fill_(True)


class ClusterMemory(NamedTuple):
    """The latest members of each cluster, one or two stretches of ``window``, and how many there have been."""

    keys: Float[Tensor, "B H K 2*w D"]
    values: Float[Tensor, "B H K 2*w D"]
    count: Int[Tensor, "B H K"]  # pyright: ignore[reportIncompatibleMethodOverride]


class LocalMemory(NamedTuple):
    """Keys and values of the current block of tokens and the one before."""

    keys: Float[Tensor, "B H T D"]
    values: Float[Tensor, "B H T D"]


def routed_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N D"],
    scores: Float[Tensor, "B H N K"],
    window: int,
    *,
    scale: float,
    self_logit: float | None = None,
    eps: float = 0.0,
) -> Float[Tensor, "B H N D"]:
    """The published rule: each of K clusters takes its ``window`` best tokens and attends causally within them.

    A token in c clusters gets the sum of its results over c + ``eps``, one in none gets 0. Cost O(N·window·K).
    """
    best = scores.topk(min(window, scores.shape[2]), dim=2).indices.transpose(2, 3)
    index = best.sort(-1).values.int()
    out, _ = block_attention(q, k, v, index, index, causal=True, scale=scale, self_logit=self_logit, reduce="mean")
    count = out.new_zeros(out.shape[:3])
    count.scatter_add_(2, best.flatten(2), count.new_ones(()).expand(best.flatten(2).shape))
    return out * (count / (count + eps).clamp(min=1e-12))[..., None]


def causal_routed_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N D"],
    nearest: Int[Tensor, "B H N"],
    clusters: int,
    window: int,
    *,
    scale: float,
    self_logit: float | None = None,
    state: ClusterMemory | None = None,
    keep: bool = False,
) -> tuple[Float[Tensor, "B H N D"], ClusterMemory | None]:
    """Each token attends to the members of its cluster up to itself, in its stretch of ``window`` and the one before.

    The members of a cluster, in order of time, form stretches of ``window``: with window 3 and members a b c d e f g,
    d reads a b c d, f reads a b c d e f, g reads d e f g. What came later decides nothing.
    """
    B, H, N, _ = q.shape
    held = 0 if state is None else clusters * 2 * window
    count = nearest.new_zeros(B, H, clusters) if state is None else state.count
    first = (count // window - 1).clamp(min=0)  # the first stretch that is still held
    own = F.one_hot(nearest, clusters)
    rank = (own.cumsum(2) - 1 + count[:, :, None]).gather(3, nearest[..., None])[..., 0]
    after = count + own.sum(2)
    stretches = -(-(after - first * window) // window)
    offset = stretches.cumsum(-1) - stretches
    rows = (N + held + clusters * (window - 1)) // window
    # One cell for each member of each stretch: which entry it is, of those held followed by the new ones.
    cell = (offset - first).gather(2, nearest.flatten(2)) * window + rank
    cells, entries = [cell], [torch.arange(held, held + N, device=q.device).expand(B, H, N)]
    keys, values = k, v
    if state is not None:
        slot = torch.arange(2 * window, device=q.device)
        taken = first[..., None] * window + slot < count[..., None]
        place = torch.where(taken, offset[..., None] * window + slot, rows * window)
        cells.insert(0, place.flatten(2))
        entries.insert(0, torch.arange(held, device=q.device).expand(B, H, held))
        keys = torch.cat([state.keys.flatten(2, 3), k], dim=2)
        values = torch.cat([state.values.flatten(2, 3), v], dim=2)
    table = nearest.new_full((B, H, rows * window + 1), -1)
    table = table.scatter(2, torch.cat(cells, 2), torch.cat(entries, 2))[..., :-1].unflatten(2, (rows, window))
    number = torch.arange(rows, device=q.device)
    begins = (offset[..., None] == number).logical_and((stretches > 0)[..., None]).any(2)
    before = torch.where(begins, -1, number - 1)
    out, _ = block_attention(
        q,
        keys,
        values,
        (table - held).clamp(min=-1),
        table,
        torch.stack([before, number.expand_as(before)], dim=-1),
        causal=True,
        q_pos=torch.arange(N, device=q.device)[None],
        k_pos=torch.cat([number.new_full((held,), -1), torch.arange(N, device=q.device)])[None],
        self_logit=self_logit,
        scale=scale,
    )
    if not keep:
        return out, None
    latest = (after // window - 1).clamp(min=0)
    row = (offset + latest - first)[..., None] + torch.arange(2, device=q.device)
    ends = (offset + stretches)[..., None]
    held_rows = torch.where(row < ends, row, 0).flatten(2)
    chosen = table.gather(2, held_rows[..., None].expand(-1, -1, -1, window)).clamp(min=0).flatten(2)
    chosen = chosen[..., None].expand(-1, -1, -1, q.shape[-1])
    size = (B, H, clusters, 2 * window, q.shape[-1])
    return out, ClusterMemory(keys.gather(2, chosen).view(size), values.gather(2, chosen).view(size), after)


def local_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N D"],
    block: int,
    start: int,
    state: LocalMemory | None = None,
    *,
    keep: bool = False,
) -> tuple[Float[Tensor, "B H N D"], LocalMemory | None]:
    """Causal attention to the tokens of the own block and the one before; blocks begin at multiples of ``block``."""
    tokens = q.shape[2]
    held = 0 if state is None else state.keys.shape[2]
    keys = k if state is None else torch.cat([state.keys, k], dim=2)
    values = v if state is None else torch.cat([state.values, v], dim=2)
    rows = -(-(held + tokens) // block)
    entry = torch.arange(rows * block, device=q.device).view(1, 1, rows, block)
    entry = entry.masked_fill(entry >= held + tokens, -1)
    number = torch.arange(rows, device=q.device)
    position = torch.arange(held + tokens, device=q.device)[None]
    out, _ = block_attention(
        q,
        keys,
        values,
        (entry - held).clamp(min=-1),
        entry,
        torch.stack([number - 1, number], dim=-1)[None, None],
        causal=True,
        q_pos=position[:, held:],
        k_pos=position,
    )
    if not keep:
        return out, None
    end = start + tokens
    length = end - max(end // block - 1, 0) * block  # the current block and the one before
    return out, LocalMemory(keys[:, :, -length:], values[:, :, -length:])


class RoutingAttention(nn.Module):
    """Local heads and routing heads side by side.

    Shapes: x (B, N, C) → (B, N, C), and the commitment loss (0 without routing heads).
    """

    def __init__(self, config: RoutingConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        width, size = config.head_dim, config.hidden_size
        self.local_heads = config.local_heads(layer)
        self.routing_heads = config.num_attention_heads - self.local_heads
        if self.local_heads:
            self.local_to_qkv = Linear(size, 3 * self.local_heads * width, bias=config.style == "lucidrains")
        if self.routing_heads:
            self.to_q = Linear(size, self.routing_heads * width, bias=False)
            self.to_v = Linear(size, self.routing_heads * width, bias=False)
            self.centroids = Centroids(self.routing_heads, config.num_clusters, width, config.ema_decay, config.style)
        self.heads_talk = Linear(width, width, bias=False) if config.style == "official" else None
        self.to_out = Linear(size, size, bias=False)

    def forward(
        self, x: Float[Tensor, "B N C"], start: int = 0, state: Any = None, keep: bool = False
    ) -> tuple[Float[Tensor, "B N C"], Any, Float[Tensor, ""] | None]:
        """Local and routed heads, joined; the last result is the routing loss (None outside training)."""
        config = self.config
        if config.selection != "causal" and (keep or state is not None):
            raise ValueError(
                f"RoutingConfig: selection={config.selection!r} chooses among all tokens and has no state, got "
                "use_cache=True; set selection='causal' to generate, or use_cache=False"
            )
        position = torch.arange(start, start + x.shape[1], device=x.device)
        local_state, routing_state = (None, None) if state is None else state
        results, loss = [], None
        if self.local_heads:
            q, k, v = (self._heads(t) for t in self.local_to_qkv(x).chunk(3, dim=-1))
            q, k = rotate(q, position, config.rope_theta), rotate(k, position, config.rope_theta)
            out, local_state = local_attention(q, k, v, config.local_block, start, local_state, keep=keep)
            results.append(out)
        if self.routing_heads:
            out, routing_state, loss = self._route(x, position, routing_state, keep)
            results.append(out)
        out = torch.cat(results, dim=1)
        if self.heads_talk is not None:
            out = self.heads_talk(out)
        return self.to_out(out.transpose(1, 2).flatten(2)), (local_state, routing_state) if keep else None, loss

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def _route(
        self, x: Tensor, position: Tensor, state: ClusterMemory | None, keep: bool
    ) -> tuple[Tensor, Any, Tensor | None]:
        config, centroids = self.config, self.centroids
        q, v = self._heads(self.to_q(x)), self._heads(self.to_v(x))
        if config.style == "official":
            points = centroids.normalized(q)
            q = k = rotate(points, position, config.rope_theta)
            scale, self_logit, eps = 1.0, None, 1e-2
        else:
            q, v = rotate(q, position, config.rope_theta), rotate(v, position, config.rope_theta)
            points = k = centroids.normalized(q)
            scale, self_logit, eps = config.head_dim**-0.5, SELF_LOGIT, 1e-5
        scores = centroids(points)
        nearest = scores.argmax(-1)
        loss = None
        if self.training:
            loss = self._commitment(points, nearest)
            if not _recomputing():
                centroids.update(points, nearest)
        if config.selection == "causal":
            out, state = causal_routed_attention(
                q, k, v, nearest, config.num_clusters, config.window,
                scale=scale, self_logit=self_logit, state=state, keep=keep,
            )  # fmt: skip
            return out, state, loss
        if config.selection == "random":
            scores = torch.rand_like(scores)
        out = routed_attention(q, k, v, scores, config.window, scale=scale, self_logit=self_logit, eps=eps)
        return out, None, loss

    def _commitment(self, points: Tensor, nearest: Tensor) -> Tensor:
        """β·mean (x − μ)² to the nearest centroid; officially once for queries and once for the equal keys."""
        means = self.centroids.current().to(points.dtype)
        target = means.expand(len(points), -1, -1, -1).gather(
            2, nearest[..., None].expand(-1, -1, -1, points.shape[-1])
        )
        times = 2 if self.config.style == "official" else 1
        return times * self.config.commitment * F.mse_loss(points, target)


def _recomputing() -> bool:
    """Whether this forward pass is gradient checkpointing's second one: centroids move once a step."""
    return torch._C._current_graph_task_id() != -1


class GatedFeedForward(nn.Module):
    """GEGLU without biases (official), or linear, GELU, linear (lucidrains)."""

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.feedforward_size or config.hidden_size
        gated = config.style == "official"
        self.w1 = Linear(size, inner, bias=not gated)  # GELU apart: what LoRA adds to the layer comes before it
        self.gate = Linear(size, inner, bias=False) if gated else None
        self.w2 = Linear(inner, size, bias=not gated)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """GELU, or the gated form if the layer has a gate."""
        inner = self.w1(x)
        return self.w2(F.gelu(inner) if self.gate is None else F.gelu(inner, approximate="tanh") * self.gate(x))


class RoutingLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: RoutingConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.attention = RoutingAttention(config, layer)
        self.feedforward_norm = nn.LayerNorm(config.hidden_size)
        self.feedforward = GatedFeedForward(config)

    def forward(
        self, x: Float[Tensor, "B N C"], start: int, state: Any, keep: bool
    ) -> tuple[Float[Tensor, "B N C"], Any, Float[Tensor, ""] | None]:
        """The tokens after attention and feed-forward, the state, and the routing loss."""
        mixed, state, loss = self.attention(self.attention_norm(x), start, state, keep)
        x = x + mixed
        return x + self.feedforward(self.feedforward_norm(x)), state, loss


class RoutingModel(CausalModel):
    """The stack without a head."""

    config_class = RoutingConfig
    config: RoutingConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    _no_split_modules = ["RoutingLayer"]  # noqa: RUF012  transformers' own form

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([RoutingLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Centroids):
            module.reset_parameters()


class RoutingForCausalLM(CausalLM):
    """Routing Transformer with its head."""

    config_class = RoutingConfig
    backbone_class = RoutingModel


register_causal(RoutingConfig, RoutingModel, RoutingForCausalLM)

VARIANTS: dict[str, dict[str, Any]] = {
    "routing_enwik8_8k": {
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_local_heads": 4,
        "num_clusters": 16,
        "window": 512,
        "local_block": 256,
    },
    "routing_enwik8_12k": {
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_local_heads": 4,
        "num_clusters": 48,
        "window": 256,
        "local_block": 128,
    },
    "routing_pg19": {
        "vocab_size": 98304,
        "hidden_size": 1032,
        "feedforward_size": 4096,
        "num_hidden_layers": 22,
        "num_attention_heads": 8,
        "num_local_heads": 6,
        "first_routing_layer": 21,
        "num_clusters": 16,
        "window": 512,
        "local_block": 256,
    },
    "routing_bytes": {
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_local_heads": 3,
    },
    "test_routing": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_local_heads": 2,
        "num_clusters": 3,
        "window": 3,
        "local_block": 4,
    },
    "test_routing_lucidrains": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_local_heads": 1,
        "num_clusters": 3,
        "window": 4,
        "local_block": 4,
        "style": "lucidrains",
    },
}

CARD = Card(
    family="Routing Transformer",
    paper="2003.05997",
    code="https://github.com/google-research/google-research/tree/master/routing_transformer",
    license="Apache-2.0",
    test="models/test_routing_transformer.py",
)
ENTRIES = causal_entries(RoutingForCausalLM, VARIANTS, CARD)
