"""The equation of :func:`attn_core.merge_attention`, and the arguments of all its backends."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attn_core.kernels.registration import Definition, token_major
from attn_core.ops.attention.reference import softmax_with_lse


class Arguments(NamedTuple):
    """First the outs (B, H, N, Dv) of the parts, then their lses (B, H, N)."""

    tensors: Sequence[Tensor]
    parts: int


def reference(a: Arguments) -> tuple[Tensor, Tensor]:
    """lse = log Σ_s exp lse_s;  out = Σ_s exp(lse_s − lse) out_s."""
    outs, lses = a.tensors[: a.parts], a.tensors[a.parts :]
    o, L = torch.stack(list(outs), dim=-1), torch.stack(list(lses), dim=-1)  # (B, H, N, Dv, S), (B, H, N, S)
    p, lse = softmax_with_lse(L)
    # 0 · inf would be NaN: a part without keys may hold anything.
    o = o.to(L.dtype).masked_fill(L.isneginf().unsqueeze(-2), 0.0)
    return (o * p.unsqueeze(-2)).sum(-1).to(outs[0].dtype), lse


def fake(a: Arguments) -> tuple[Tensor, Tensor]:
    """Uninitialized out (B, H, N, D) and lse (B, H, N)."""
    first = a.tensors[0]
    batch, heads, tokens, width = first.shape
    return token_major(first, batch, heads, tokens, width), a.tensors[a.parts].new_empty(batch, heads, tokens)


MERGE_ATTENTION = Definition("merge_attention", Arguments, fake, reference, differentiable=("tensors",))
