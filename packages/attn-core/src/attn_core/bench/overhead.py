"""``python -m attn_core.bench --op OP --overhead``: what a small call costs beside torch's own.

16 tokens, no gradient, one thread: the arithmetic takes next to nothing, so the time is that of the way through Python.
The base is ``scaled_dot_product_attention`` on the same tokens, or ``F.linear``, in the same run, in turns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attn_core

from .timing import in_turns

TOKENS, HEADS, WIDTH = 16, 2, 16
ROUNDS = 40
SECONDS = 0.4
# Largest ratio to the base; "others" for what is not named.
LIMITS = {"linear": 3.0, "attention": 4.0, "block_attention": 10.0, "others": 8.0}


@dataclass(frozen=True)
class Overhead:
    """Microseconds of a call of the operator and of its base."""

    operator: str
    base: str
    own_us: float
    base_us: float

    @property
    def ratio(self) -> float:
        """Time of a call in those of the base."""
        return self.own_us / self.base_us

    @property
    def limit(self) -> float:
        """The largest ratio that the operator may have."""
        return LIMITS.get(self.operator, LIMITS["others"])


def overhead(operator: str, rounds: int = ROUNDS, seconds: float = SECONDS) -> Overhead:
    """Measure one operator."""
    base = "F.linear" if operator == "linear" else "scaled_dot_product_attention"
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        calls = {"own": CALLS[operator](), "base": _base(operator)}
        found = in_turns(calls, rounds=rounds, seconds=seconds, threads=1)
    return Overhead(operator, base, 1e3 * found["own"].ms, 1e3 * found["base"].ms)


def _base(operator: str) -> Callable[[], Any]:
    if operator == "linear":
        x, weight, bias = _tokens_and_weight()
        return lambda: F.linear(x, weight, bias)
    q, k, v = _qkv()
    return lambda: F.scaled_dot_product_attention(q, k, v)


def _qkv(*space: int) -> list[Tensor]:
    return [torch.randn(1, HEADS, *(space or (TOKENS,)), WIDTH) for _ in range(3)]


def _tokens_and_weight() -> list[Tensor]:
    return [torch.randn(TOKENS, 64), torch.randn(64, 64), torch.randn(64)]


def _attention() -> Callable[[], Any]:
    q, k, v = _qkv()
    return lambda: attn_core.attention(q, k, v)


def _group_attention() -> Callable[[], Any]:
    q, k, v = _qkv()
    group = torch.arange(TOKENS)[None] % 2
    return lambda: attn_core.group_attention(q, k, v, group, 2)


def _block_attention() -> Callable[[], Any]:
    q, k, v = _qkv()
    index = attn_core.window_index(4, 4, (2, 2))
    return lambda: attn_core.block_attention(q, k, v, index, index)


def _neighborhood_attention() -> Callable[[], Any]:
    q, k, v = _qkv(4, 4)
    return lambda: attn_core.neighborhood_attention(q, k, v, 3)


def _neighborhood_scores() -> Callable[[], Any]:
    q, k, _ = _qkv(4, 4)
    return lambda: attn_core.neighborhood_scores(q, k, 3)


def _neighborhood_values() -> Callable[[], Any]:
    v = _qkv(4, 4)[0]
    p = torch.rand(1, HEADS, 4, 4, 9)
    return lambda: attn_core.neighborhood_values(p, v, 3)


def _linear_attention() -> Callable[[], Any]:
    q, k, v = _qkv()
    return lambda: attn_core.linear_attention(q, k, v)


def _channel_attention() -> Callable[[], Any]:
    q, k, v = _qkv()
    return lambda: attn_core.channel_attention(q, k, v)


def _additive_attention() -> Callable[[], Any]:
    q, k = torch.randn(1, TOKENS, WIDTH), torch.randn(1, TOKENS, WIDTH)
    w = torch.randn(WIDTH)
    return lambda: attn_core.additive_attention(q, k, w)


def _deformable_attention() -> Callable[[], Any]:
    value = torch.randn(1, TOKENS, HEADS, WIDTH)
    locations, weights = torch.rand(1, TOKENS, HEADS, 1, 4, 2), torch.rand(1, TOKENS, HEADS, 1, 4)
    return lambda: attn_core.deformable_attention(value, [(4, 4)], locations, weights)


def _focal_modulation() -> Callable[[], Any]:
    ctx, gates = torch.randn(1, WIDTH, 4, 4), torch.randn(1, 3, 4, 4)
    weights = [torch.randn(WIDTH, 1, size, size) for size in (3, 5)]
    return lambda: attn_core.focal_modulation(ctx, gates, weights)


def _linear_scan() -> Callable[[], Any]:
    a, b = torch.rand(1, TOKENS, WIDTH), torch.randn(1, TOKENS, WIDTH)
    return lambda: attn_core.linear_scan(a, b)


def _selective_scan() -> Callable[[], Any]:
    u, delta = torch.randn(1, WIDTH, TOKENS), torch.rand(1, WIDTH, TOKENS)
    A = -torch.rand(WIDTH, 4)
    B, C = (torch.randn(1, 1, 4, TOKENS) for _ in range(2))
    return lambda: attn_core.selective_scan(u, delta, A, B, C)


def _merge_attention() -> Callable[[], Any]:
    outs, lses = [_qkv()[0] for _ in range(2)], [torch.randn(1, HEADS, TOKENS) for _ in range(2)]
    return lambda: attn_core.merge_attention(outs, lses)


def _linear() -> Callable[[], Any]:
    x, weight, bias = _tokens_and_weight()
    return lambda: attn_core.linear(x, weight, bias)


CALLS: dict[str, Callable[[], Callable[[], Any]]] = {
    "additive_attention": _additive_attention,
    "attention": _attention,
    "block_attention": _block_attention,
    "channel_attention": _channel_attention,
    "deformable_attention": _deformable_attention,
    "focal_modulation": _focal_modulation,
    "group_attention": _group_attention,
    "linear": _linear,
    "linear_attention": _linear_attention,
    "linear_scan": _linear_scan,
    "merge_attention": _merge_attention,
    "neighborhood_attention": _neighborhood_attention,
    "neighborhood_scores": _neighborhood_scores,
    "neighborhood_values": _neighborhood_values,
    "selective_scan": _selective_scan,
}
