"""torch's flash attention for CPUs with its traps removed: any value width, lse of dead rows, gradient of lse.

``aten._scaled_dot_product_flash_attention_for_cpu`` is the only fused CPU kernel in torch that returns lse. Called bare
it crashes on empty inputs, silently misreads tensors whose last stride is not 1, refuses Dv ≠ D and reports lse = 0
for rows that see no key (all seen with torch 2.15).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core import torch_internals
from attn_core.kernels.registration import token_major

_forward = torch_internals.flash_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention on a CPU, grouped heads included; N×M scores are never stored.

    Args:
        bias: float, broadcastable to (B, H, N, M); −inf hides a key.
        scale: positive if ``causal``: the kernel hides keys before it scales, and −∞·0 is no number.
        causal: hide keys j > i.
    """
    batch, heads, queries, _ = q.shape
    value_width = v.shape[-1]
    if q.numel() == 0 or v.numel() == 0:
        return empty_result(q, v)
    q, k, v = _same_width(q, k, v)
    out, lse = _forward(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    lse = lse.contiguous()
    # A dead row has lse = 0 or no number at all: only then is it worth reading the whole bias.
    if bias is not None and not bool(((lse != 0) & lse.isfinite()).all()):
        dead = _sees_nothing(bias, queries, causal).expand(batch, heads, queries)
        out, lse = out.masked_fill(dead.unsqueeze(-1), 0.0), lse.masked_fill(dead, -math.inf)
    return out[..., :value_width], lse


def _sees_nothing(bias: Tensor, queries: int, causal: bool) -> Tensor:
    """Queries whose keys the bias hides, all of them or all that causality leaves: broadcastable to (B, H, N)."""
    shown = bias > -math.inf
    dead = ~shown.any(-1)
    if causal:
        first = shown.to(torch.uint8).argmax(-1)
        dead = dead | (first > torch.arange(queries, device=bias.device))
    return dead


def flash_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. ``out`` and ``lse`` may be those of a larger key set of which k, v are a part."""
    if q.numel() == 0 or v.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    width, value_width = q.shape[-1], v.shape[-1]
    if grad_lse is not None:
        # The kernel subtracts δ = Σ_c do_c·o_c from dP, we want δ − dlse: a further column o = −1, do = dlse, v = 0.
        grad_out = torch.cat([grad_out, grad_lse.unsqueeze(-1).to(grad_out.dtype)], dim=-1)
        out = F.pad(out, (0, 1), value=-1.0)
        v = F.pad(v, (0, 1))
    q, k, v, grad_out, out = _same_width(q, k, v, grad_out, out)
    lse = lse.masked_fill(lse == -math.inf, 0.0)
    dq, dk, dv = _backward(grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale)
    return dq[..., :width], dk[..., :width], dv[..., :value_width]


def empty_result(q: Tensor, v: Tensor, queries: int | None = None) -> tuple[Tensor, Tensor]:
    """What every query gets when there is no key (or no query): out = 0, lse = −inf."""
    batch, heads = q.shape[:2]
    queries = q.shape[2] if queries is None else queries
    out = token_major(q, batch, heads, queries, v.shape[-1]).zero_()
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_full((batch, heads, queries), -math.inf, dtype=dtype)


def _same_width(*tensors: Tensor) -> list[Tensor]:
    """Zero columns added up to the widest, last stride 1."""
    width = max(tensor.shape[-1] for tensor in tensors)
    padded = [F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in tensors]
    return [t if t.stride(-1) == 1 else t.contiguous() for t in padded]
