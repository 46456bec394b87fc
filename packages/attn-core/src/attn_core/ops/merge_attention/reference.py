"""The equation of :func:`attn_core.merge_attention`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_core.ops.attention.reference import softmax_with_lse


def merge_attention(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """lse = log Σ_s exp lse_s;  out = Σ_s exp(lse_s − lse) out_s."""
    o, L = torch.stack(list(outs), dim=-1), torch.stack(list(lses), dim=-1)  # (B, H, N, Dv, S), (B, H, N, S)
    p, lse = softmax_with_lse(L)
    # 0 · inf would be NaN: a part without keys may hold anything.
    o = o.to(L.dtype).masked_fill(L.isneginf().unsqueeze(-2), 0.0)
    return (o * p.unsqueeze(-2)).sum(-1).to(outs[0].dtype), lse
