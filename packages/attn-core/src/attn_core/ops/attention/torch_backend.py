"""Attention without stored scores in plain torch: the fused CPU kernel where it fits, else chunks of query rows.

Memory beyond the results: O(B·H·N·(Dv + Σ n_a)) and one chunk of scores.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attn_core import torch_internals
from attn_core.kernels.registration import Grads, token_major_copy

from .chunked import chunk_rows, chunked_backward, chunked_forward, row_shift, slice_rows
from .cpu_flash import empty_result, flash_backward, flash_forward
from .cut import cut_backward, cut_forward
from .reference import ATTENTION, Arguments, expand_axis_bias, fake, reference

NARROW = (torch.bfloat16, torch.float16)
# Tables become extra columns of q and k up to this width, and up to this multiple of the head width.
MAX_AUGMENTED_WIDTH = 256
MAX_AUGMENTED_RATIO = 4
# With tables, scores in chunks are faster than wider products up to this many keys (measured on two AVX-512 cores).
MAX_CHUNKED_KEYS = 2048
# The fused kernel pads q and k to the width of v: past this ratio scores in chunks cost less.
MAX_VALUE_RATIO = 2
# Chunks of an expanded table beside those of scores: the fused kernel's tiles grow with the number of its queries.
EXPANDED_CHUNKS = 2


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """torch's own flash kernel wherever it computes the same; else chunks of queries."""
    q, k, v = a.q, a.k, a.v
    if a.has_no_pair:
        return empty_result(q, v)
    if a.is_cut:
        return cut_forward(a, forward)
    if _is_bare(a):  # none of what flash_forward mends can happen
        out, lse = torch_internals.flash_cpu(q, k, v, 0.0, False, scale=a.scale)
        return token_major_copy(out), lse.contiguous()
    if a.axis_bias and a.causal == "none" and q.device.type == "cpu":
        return _table_forward(a)
    if not _fits_flash(a):
        out, lse = chunked_forward(q, k, v, _full_bias(a), a.axis_bias, a.scale, a.causal)
        return token_major_copy(out), lse
    mask = key_mask_bias(a.key_mask, q) if a.bias is None else a.bias
    q, k, scale = _augment(a)
    parts = _causal_parts(q.shape[2], k.shape[2], a.causal)
    dead, rest = parts.dead_rows, q[:, :, parts.dead_rows :]
    results = [
        flash_forward(rest, k[:, :, keys], v[:, :, keys], _columns(_rows(mask, dead), keys), scale, is_causal)
        for keys, is_causal in parts.calls
    ]
    out, lse = results[0] if len(results) == 1 else _merge(*results)
    if dead:
        padded, padded_lse = empty_result(q, v)
        padded[:, :, dead:], padded_lse[:, :, dead:] = out, lse
        return padded, padded_lse
    return token_major_copy(out), lse


def backward(
    grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool], whole: bool = True
) -> list[Tensor | None]:
    """``whole=False``: k and v are a part of the keys that the kept results belong to."""
    (grad_out, grad_lse), (out, lse) = grads, kept
    assert grad_out is not None
    needs_bias = needs[3]
    if a.has_no_pair:
        found: list[Tensor | None] = [None if x is None else torch.zeros_like(x) for x in (*a[:4], *a.axis_bias)]
    elif a.is_cut:
        found = cut_backward(grads, kept, a, needs, backward)
    elif needs_bias or not _fits_flash(a):
        shift = None if whole and a.q.dtype in NARROW else row_shift(grad_out, grad_lse, out, lse.dtype)
        found = chunked_backward(
            grad_out, shift, lse, *a[:3], _full_bias(a), a.axis_bias, a.scale, a.causal, needs_bias, grad_lse=grad_lse
        )
    else:
        found = _flash_gradients(grad_out, grad_lse, out, lse, a, any(needs[4:]))
    for position, x in enumerate(a[:3]):
        gradient = found[position]
        assert gradient is not None
        found[position] = token_major_copy(gradient.to(x.dtype))
    return found


def _flash_gradients(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, a: Arguments, needs_tables: bool
) -> list[Tensor | None]:
    width = a.q.shape[-1]
    mask = key_mask_bias(a.key_mask, a.q) if a.bias is None else a.bias
    wide_q, wide_k, wide_scale = _augment(a)
    parts = _causal_parts(a.q.shape[2], a.k.shape[2], a.causal)
    dead = parts.dead_rows
    grad_lse = None if grad_lse is None else grad_lse[:, :, dead:]
    rest = (grad_out[:, :, dead:], grad_lse, out[:, :, dead:], lse[:, :, dead:], wide_q[:, :, dead:])
    dq, dk, dv = None, [], []
    for keys, is_causal in parts.calls:
        part_q, part_k, part_v = flash_backward(
            *rest, wide_k[:, :, keys], a.v[:, :, keys], _columns(_rows(mask, dead), keys), wide_scale, is_causal
        )
        dq = part_q if dq is None else dq + part_q
        dk.append(part_k)
        dv.append(part_v)
    assert dq is not None
    if dead:
        dq = torch.cat([dq.new_zeros(*dq.shape[:2], dead, dq.shape[3]), dq], dim=2)
    grad_k = dk[0] if len(dk) == 1 else torch.cat(dk, dim=2)
    grad_v = dv[0] if len(dv) == 1 else torch.cat(dv, dim=2)
    if not a.axis_bias:
        return [dq, grad_k, grad_v, None]
    # A table's column gradients are Σ_j dS_ij over the keys with that coordinate: the product did the sum.
    pieces = dq[..., width:].split([table.shape[-1] for table in a.axis_bias], -1)
    tables = [piece if needs_tables else None for piece in pieces]
    return [dq[..., :width] * a.scale, grad_k[..., :width], grad_v, None, *tables]


def _is_bare(a: Arguments) -> bool:
    """Whether torch's kernel takes the operands as they are: every query sees every key, and all widths are one."""
    q, k, v = a.q, a.k, a.v
    unmasked = a.bias is None and a.key_mask is None and not a.axis_bias and a.causal == "none"
    alike = q.is_cpu and q.shape[3] == v.shape[3] and k.numel() > 0
    return unmasked and alike and q.stride(3) == k.stride(3) == v.stride(3) == 1


def _fits_flash(a: Arguments) -> bool:
    q, tables = a.q, a.axis_bias
    if q.device.type != "cpu" or (a.bias is not None and a.key_mask is not None):
        return False
    if a.causal != "none" and a.scale <= 0:
        return False  # −∞ of hidden scores times the scale would be NaN or +∞
    if a.v.shape[-1] > MAX_VALUE_RATIO * q.shape[-1]:
        return False
    extra = sum(table.shape[-1] for table in tables)
    if extra and a.k.shape[2] <= MAX_CHUNKED_KEYS and q.dtype == torch.float32:
        return False
    if extra and q.dtype in NARROW:
        return False  # scaled queries, tables and each score's gradient would be rounded; sums for a table cancel
    if not all(bool(table.isfinite().all()) for table in tables):
        return False  # 0 · inf would be NaN
    return extra == 0 or (q.shape[-1] + extra <= MAX_AUGMENTED_WIDTH and extra <= MAX_AUGMENTED_RATIO * q.shape[-1])


def _table_forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """The fused kernel on chunks of query rows, whose tables are expanded to a dense bias."""
    bias, tables, queries = _full_bias(a), a.axis_bias, a.q.shape[2]
    batch, heads = (max(t.shape[dim] for t in (*tables, *bias)) for dim in (0, 1))
    step = EXPANDED_CHUNKS * chunk_rows(batch, heads, a.k.shape[2])
    out, lse = fake(a)
    for start in range(0, queries, step):
        rows = slice(start, start + step)
        # Summed in float32 beside 16 bits, which the kernel takes for a mask: a sum of rounded terms would lose more.
        total = expand_axis_bias([table[:, :, rows].to(lse.dtype) for table in tables])
        for term in bias:
            total = total + slice_rows(term, rows).to(total.dtype)
        result = flash_forward(a.q[:, :, rows], a.k, a.v, total, a.scale, False)
        if step >= queries:
            return token_major_copy(result[0]), result[1]
        out[:, :, rows], lse[:, :, rows] = result
    return out, lse


def _augment(a: Arguments) -> tuple[Tensor, Tensor, float]:
    """Axis tables as columns: q gets (T_y, T_x), k the one-hot codes of its coordinates, the dot product adds them."""
    q, k, tables = a.q, a.k, a.axis_bias
    if not tables:
        return q, k, a.scale
    batch, heads, queries, _ = q.shape
    columns = [table.expand(batch, heads, queries, table.shape[-1]) for table in tables]
    codes = []
    for axis, table in enumerate(tables):
        before = math.prod(t.shape[-1] for t in tables[:axis])
        after = math.prod(t.shape[-1] for t in tables[axis + 1 :])
        code = torch.eye(table.shape[-1], dtype=q.dtype, device=q.device)
        codes.append(code.repeat_interleave(after, dim=0).repeat(before, 1))
    code = torch.cat(codes, dim=-1).expand(*k.shape[:3], -1)
    return torch.cat([q * a.scale, *columns], dim=-1), torch.cat([k, code], dim=-1), 1.0


class _causal_parts:
    """Causal attention as calls on key ranges: rows that see nothing, then (keys, causal or full) pairs."""

    def __init__(self, queries: int, keys: int, causal: str) -> None:
        self.dead_rows = 0
        everything = slice(0, keys)
        self.calls = [(everything, causal != "none")]
        if causal == "lower_right" and queries != keys:
            if queries > keys:
                self.dead_rows = queries - keys
            else:
                past = keys - queries
                self.calls = [(slice(0, past), False), (slice(past, keys), True)]


def _merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    (out_a, lse_a), (out_b, lse_b) = first, second
    lse = torch.logaddexp(lse_a, lse_b)
    finite = lse.masked_fill(lse == -math.inf, 0.0)
    weight_a, weight_b = (torch.exp(part - finite).unsqueeze(-1) for part in (lse_a, lse_b))
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse


def key_mask_bias(key_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """(B, 1, 1, M) bias with −inf at hidden keys."""
    if key_mask is None:
        return None
    return torch.zeros(key_mask.shape, dtype=q.dtype, device=q.device).masked_fill(~key_mask, -math.inf)[:, None, None]


def _full_bias(a: Arguments) -> list[Tensor]:
    """Addends of the scores, kept apart so that their sum is only formed chunk by chunk."""
    terms = [] if a.bias is None else [a.bias]
    hidden = key_mask_bias(a.key_mask, a.q)
    return terms if hidden is None else [*terms, hidden]


def _rows(bias: Tensor | None, start: int) -> Tensor | None:
    return bias if bias is None or bias.shape[2] == 1 else bias[:, :, start:]


def _columns(bias: Tensor | None, keys: slice) -> Tensor | None:
    return bias if bias is None or bias.shape[3] == 1 else bias[..., keys]


attention = ATTENTION.register("torch", forward, backward, exported=reference)
