"""The equation of :func:`attn_core.attention`, with the N×M scores in full, and the arguments of all its backends."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attn_core.kernels.registration import Definition, token_major


class Arguments(NamedTuple):
    """As the public function's; causal is "none", "upper_left" or "lower_right".

    cu_seqlens_* (1, S + 1), under vmap (B, S + 1); window_size is empty or (left, right), of which −1 is open.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    key_mask: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    axis_bias: Sequence[Tensor]
    scale: float
    causal: str
    window_size: Sequence[int]

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of sums and of lse: float64 for float64 operands, else float32."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def is_cut(self) -> bool:
        """Whether sequences or a window hide keys, beside what causality does."""
        return self.cu_seqlens_q is not None or bool(self.window_size)

    @property
    def has_no_pair(self) -> bool:
        """Whether no query meets a key, or the values have no column."""
        return self.q.numel() == 0 or self.v.numel() == 0


def reference(a: Arguments) -> tuple[Tensor, Tensor]:
    """s_ij = scale·q_i·k_j + bias_ij + Σ_a T_a[i, coord_a(j)];  out = softmax(s) v;  lse = log Σ_j exp s_ij."""
    q, k, v = a.q, a.k, a.v
    Q, K, V = q.to(a.accumulator), *(x.to(a.accumulator).repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = torch.einsum("bhid,bhjd->bhij", Q, K) * a.scale
    if a.bias is not None:
        s = s + a.bias.to(s.dtype)
    if a.axis_bias:
        s = s + expand_axis_bias([table.to(s.dtype) for table in a.axis_bias])
    visible = torch.ones(s.shape[-2:], dtype=torch.bool, device=q.device)
    if a.is_cut:
        first, end = (bound[:, None, :, None] for bound in key_ranges(a))
        j = torch.arange(k.shape[2], device=q.device)
        visible = (first <= j) & (j < end)
    elif a.causal != "none":
        visible = visible.tril(0 if a.causal == "upper_left" else k.shape[2] - q.shape[2])
    if a.key_mask is not None:
        visible = visible & a.key_mask[:, None, None, :]
    p, lse = softmax_with_lse(s.masked_fill(~visible, -math.inf))
    return torch.einsum("bhij,bhjd->bhid", p, V).to(q.dtype), lse


def key_ranges(a: Arguments) -> tuple[Tensor, Tensor]:
    """First key, and one behind the last, that each query may see by its place alone: (1|B, N), int64.

    Neither of them moves back from one query to the next: sequences, causality and windows go one way.
    """
    queries, keys = a.q.shape[2], a.k.shape[2]
    i = torch.arange(queries, device=a.q.device)[None]
    if a.cu_seqlens_q is None or a.cu_seqlens_k is None:
        begin, stop = torch.zeros_like(i), torch.full_like(i, keys)
        diagonal = i if a.causal == "upper_left" else i + (keys - queries)
    else:
        starts, key_starts = a.cu_seqlens_q.long(), a.cu_seqlens_k.long()
        # Sequences that ended before query i; all of them behind the last, where begin = stop.
        own = torch.searchsorted(starts[:, 1:].contiguous(), i.expand(starts.shape[0], -1).contiguous(), right=True)
        following = (own + 1).clamp(max=starts.shape[1] - 1)
        begin, stop = key_starts.gather(1, own), key_starts.gather(1, following)
        if a.causal == "upper_left":
            diagonal = i - starts.gather(1, own) + begin
        else:
            diagonal = i - starts.gather(1, following) + stop
    left, right = a.window_size or (-1, -1)
    if a.causal != "none":
        right = 0
    first = begin if left < 0 else torch.clamp(diagonal - left, begin, stop)
    end = stop if right < 0 else torch.clamp(diagonal + right + 1, begin, stop)
    return first, end


def fake(a: Arguments) -> tuple[Tensor, Tensor]:
    """Uninitialized out (B, H, N, D_v) and lse (B, H, N)."""
    batch, heads, queries, _ = a.q.shape
    out = token_major(a.q, batch, heads, queries, a.v.shape[-1])
    return out, a.q.new_empty(batch, heads, queries, dtype=a.accumulator)


def expand_axis_bias(tables: Sequence[Tensor]) -> Tensor:
    """Σ_a T_a[…, coord_a(j)] over the row-major grid of the tables' last dimensions: (…, Π n_a)."""
    total = tables[0]
    for table in tables[1:]:
        total = (total.unsqueeze(-1) + table.unsqueeze(-2)).flatten(-2)
    return total


def softmax_with_lse(s: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and log-sum-exp of the last dimension; a row of −inf alone gives 0, −inf and zero gradients."""
    if s.shape[-1] == 0:
        return s, s.new_full(s.shape[:-1], -math.inf)
    # The maximum cancels from both results, so it carries no gradient.
    m = s.detach().amax(-1, keepdim=True)
    m = m.masked_fill(m == -math.inf, 0.0)
    e = torch.exp(s - m)
    total = e.sum(-1, keepdim=True)
    dead = total == 0
    total = total.masked_fill(dead, 1.0)
    return e / total, (total.log() + m).masked_fill(dead, -math.inf).squeeze(-1)


ATTENTION = Definition(
    "attention",
    Arguments,
    fake,
    reference,
    differentiable=("q", "k", "v", "bias", "axis_bias"),
    token_major_gradients=("q", "k", "v"),
)
