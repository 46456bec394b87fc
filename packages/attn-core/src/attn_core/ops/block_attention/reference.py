"""The equation of :func:`attn_core.block_attention`, with gathered keys and values and the scores in full.

The arguments of all its backends are here too.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attn_core.kernels.registration import Definition, token_major
from attn_core.ops.attention.reference import expand_axis_bias, softmax_with_lse


class Arguments(NamedTuple):
    """As the public function's; ``per_row`` asks for a result of every entry of q_index, to be averaged by tokens."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_index: Tensor
    kv_index: Tensor
    table: Tensor | None
    kv_weight: Tensor | None
    q_pos: Tensor | None
    k_pos: Tensor | None
    axis_bias: Sequence[Tensor]
    causal: bool
    self_logit: float | None
    scale: float
    per_row: bool

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of sums and of lse: float64 for float64 operands, else float32."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def results(self) -> int:
        """Rows of the result: tokens, or entries of q_index."""
        return self.q_index.shape[2] * self.q_index.shape[3] if self.per_row else self.q.shape[2]


def reference(a: Arguments) -> tuple[Tensor, Tensor]:
    """s = scale·q_t·(w·k_u) + Σ_a T_a[t, coord_a(slot)];  out_t = Σ_u softmax_u(s) w·v_u, u over the listed blocks."""
    dtype = a.accumulator
    B, H, N, D = a.q.shape
    group = H // a.k.shape[1]
    M = a.k.shape[2]
    R, I = a.q_index.shape[2:]
    J = a.kv_index.shape[3]
    t = a.q_index.long().expand(B, H, R, I)
    blocks = a.kv_index.long().expand(B, a.k.shape[1], *a.kv_index.shape[2:]).repeat_interleave(group, dim=1)
    table = torch.arange(R, device=a.q.device).view(1, 1, R, 1) if a.table is None else a.table
    c = table.long().expand(B, H, R, table.shape[3])
    K = c.shape[3]
    u = _take(blocks, c.flatten(2)).view(B, H, R, K, J).masked_fill((c < 0)[..., None], -1)

    Q = _take(a.q.to(dtype), t.flatten(2)).view(B, H, R, I, D)
    keys, values = (
        _take(x.to(dtype).repeat_interleave(group, dim=1), u.flatten(2)).view(B, H, R, K, J, x.shape[-1])
        for x in (a.k, a.v)
    )
    if a.kv_weight is not None:
        w = a.kv_weight.to(dtype).expand(B, H, R, K)[..., None, None]
        keys, values = w * keys, w * values
    s = torch.einsum("bhrid,bhrcjd->bhricj", Q, keys) * a.scale
    if a.axis_bias:
        # (B|1, H|1, N, J) → the row of each query, the same for every table slot
        bias = expand_axis_bias([x.to(dtype) for x in a.axis_bias]).expand(B, H, N, J)
        s = s + _take(bias, t.flatten(2)).view(B, H, R, I, 1, J)
    q_at = torch.arange(N, device=a.q.device)[None] if a.q_pos is None else a.q_pos.long()
    k_at = torch.arange(M, device=a.q.device)[None] if a.k_pos is None else a.k_pos.long()
    q_at = _take(q_at.expand(B, N)[:, None, :, None].expand(B, H, N, 1), t.flatten(2)).view(B, H, R, I, 1, 1)
    k_at = _take(k_at.expand(B, M)[:, None, :, None].expand(B, H, M, 1), u.flatten(2)).view(B, H, R, 1, K, J)
    if a.self_logit is not None:
        s = s.masked_fill(q_at == k_at, a.self_logit)
    visible = (u >= 0)[:, :, :, None] & (t >= 0)[..., None, None]
    if a.causal:
        visible = visible & (k_at <= q_at)
    p, lse = softmax_with_lse(s.masked_fill(~visible, -math.inf).flatten(-2))
    out = torch.einsum("bhrim,bhrmd->bhrid", p, values.flatten(3, 4)).to(a.q.dtype).flatten(2, 3)
    return (out, lse.flatten(2)) if a.per_row else reduce_rows(out, lse.flatten(2), a.q_index, N, mean=False)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x[b, h, index[b, h, i]] for x (B, H, N, D); holes (−1) read zeros."""
    padded = torch.cat([x, x.new_zeros(*x.shape[:2], 1, x.shape[3])], dim=2)
    index = torch.where(index < 0, x.shape[2], index)
    return torch.gather(padded, 2, index[..., None].expand(-1, -1, -1, x.shape[3]))


def reduce_rows(out: Tensor, lse: Tensor, q_index: Tensor, tokens: int, *, mean: bool) -> tuple[Tensor, Tensor]:
    """Bring one result per entry of ``q_index`` to one per token: its only one, or the mean over its entries."""
    B, H, _, width = out.shape
    index = q_index.long().expand(B, H, *q_index.shape[2:]).flatten(2)
    index = torch.where(index < 0, tokens, index)
    count = lse.new_zeros(B, H, tokens + 1).scatter_add(2, index, lse.new_ones(index.shape))
    total = out.new_zeros(B, H, tokens + 1, width).scatter_add(2, index[..., None].expand(-1, -1, -1, width), out)
    token_lse = lse.new_full((B, H, tokens + 1), -math.inf).scatter(2, index, lse)
    if mean:
        total = total / count.clamp(min=1)[..., None].to(total.dtype)
        token_lse = token_lse.masked_fill(count != 1, -math.inf)
    return total[:, :, :tokens], token_lse[:, :, :tokens]


def fake(a: Arguments) -> tuple[Tensor, Tensor]:
    """Uninitialized out (B, H, results, D_v) and lse (B, H, results)."""
    batch, heads = a.q.shape[:2]
    out = token_major(a.q, batch, heads, a.results, a.v.shape[-1])
    return out, a.q.new_empty(batch, heads, a.results, dtype=a.accumulator)


BLOCK_ATTENTION = Definition(
    "block_attention",
    Arguments,
    fake,
    reference,
    differentiable=("q", "k", "v", "kv_weight", "axis_bias"),
    token_major_gradients=("q", "k", "v"),
)
