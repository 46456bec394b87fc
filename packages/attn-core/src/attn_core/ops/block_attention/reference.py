"""The equation of :func:`attn_core.block_attention`, with gathered keys and values and the scores in full."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attn_core.ops.attention.reference import expand_axis_bias, softmax_with_lse


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    kv_index: Tensor,
    table: Tensor | None = None,
    *,
    kv_weight: Tensor | None = None,
    axis_bias: Sequence[Tensor] | None = None,
    causal: bool = False,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    self_logit: float | None = None,
    scale: float | None = None,
    reduce: str = "set",
) -> tuple[Tensor, Tensor]:
    """s = scale·q_t·(w·k_u) + Σ_a T_a[t, coord_a(slot)];  out_t = Σ_u softmax_u(s) w·v_u, u over the listed blocks."""
    out, lse = rows_attention(
        q, k, v, q_index, kv_index, table, kv_weight, q_pos, k_pos, axis_bias, causal, self_logit, scale
    )
    return reduce_rows(out, lse, q_index, q.shape[2], reduce)


def rows_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    kv_index: Tensor,
    table: Tensor | None,
    kv_weight: Tensor | None,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    axis_bias: Sequence[Tensor] | None,
    causal: bool,
    self_logit: float | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """One result for each slot of ``q_index``: out (B, H, R, I, Dv) and lse (B, H, R, I)."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    B, H, N, D = q.shape
    group = H // k.shape[1]
    M = k.shape[2]
    R, I = q_index.shape[2:]
    J = kv_index.shape[3]
    t = q_index.long().expand(B, H, R, I)
    blocks = kv_index.long().expand(B, k.shape[1], *kv_index.shape[2:]).repeat_interleave(group, dim=1)
    if table is None:
        table = torch.arange(R, device=q.device).view(1, 1, R, 1)
    c = table.long().expand(B, H, R, table.shape[3])
    K = c.shape[3]
    u = _take(blocks, c.flatten(2)).view(B, H, R, K, J).masked_fill((c < 0)[..., None], -1)

    Q = _take(q.to(dtype), t.flatten(2)).view(B, H, R, I, D)
    gathered_k = _take(k.to(dtype).repeat_interleave(group, dim=1), u.flatten(2)).view(B, H, R, K, J, D)
    gathered_v = _take(v.to(dtype).repeat_interleave(group, dim=1), u.flatten(2)).view(B, H, R, K, J, v.shape[-1])
    if kv_weight is not None:
        w = kv_weight.to(dtype).expand(B, H, R, K)[..., None, None]
        gathered_k, gathered_v = w * gathered_k, w * gathered_v
    s = torch.einsum("bhrid,bhrcjd->bhricj", Q, gathered_k) * (D**-0.5 if scale is None else scale)
    if axis_bias:
        # (B|1, H|1, N, J) → the row of each query, the same for every table slot
        bias = expand_axis_bias([x.to(dtype) for x in axis_bias]).expand(B, H, N, J)
        s = s + _take(bias, t.flatten(2)).view(B, H, R, I, 1, J)
    q_at = torch.arange(N, device=q.device)[None] if q_pos is None else q_pos.long()
    k_at = torch.arange(M, device=q.device)[None] if k_pos is None else k_pos.long()
    q_at = _take(q_at.expand(B, N)[:, None, :, None].expand(B, H, N, 1), t.flatten(2)).view(B, H, R, I, 1, 1)
    k_at = _take(k_at.expand(B, M)[:, None, :, None].expand(B, H, M, 1), u.flatten(2)).view(B, H, R, 1, K, J)
    if self_logit is not None:
        s = s.masked_fill(q_at == k_at, self_logit)
    visible = (u >= 0)[:, :, :, None] & (t >= 0)[..., None, None]
    if causal:
        visible = visible & (k_at <= q_at)
    p, lse = softmax_with_lse(s.masked_fill(~visible, -math.inf).flatten(-2))
    return torch.einsum("bhrim,bhrmd->bhrid", p, gathered_v.flatten(3, 4)).to(q.dtype), lse


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x[b, h, index[b, h, i]] for x (B, H, N, D); holes (−1) read zeros."""
    padded = torch.cat([x, x.new_zeros(*x.shape[:2], 1, x.shape[3])], dim=2)
    index = torch.where(index < 0, x.shape[2], index)
    return torch.gather(padded, 2, index[..., None].expand(-1, -1, -1, x.shape[3]))


def reduce_rows(out: Tensor, lse: Tensor, q_index: Tensor, tokens: int, reduce: str) -> tuple[Tensor, Tensor]:
    """Bring one result per block slot to one per token: the slot's own (``"set"``) or the mean over its slots."""
    B, H, R, I, width = out.shape
    index = q_index.long().expand(B, H, R, I).flatten(2)
    index = torch.where(index < 0, tokens, index)
    count = lse.new_zeros(B, H, tokens + 1).scatter_add(2, index, lse.new_ones(index.shape))
    total = out.new_zeros(B, H, tokens + 1, width).scatter_add(
        2, index[..., None].expand(-1, -1, -1, width), out.flatten(2, 3)
    )
    token_lse = lse.new_full((B, H, tokens + 1), -math.inf).scatter(2, index, lse.flatten(2))
    if reduce == "mean":
        total = total / count.clamp(min=1)[..., None].to(total.dtype)
        token_lse = token_lse.masked_fill(count != 1, -math.inf)
    return total[:, :, :tokens], token_lse[:, :, :tokens]
