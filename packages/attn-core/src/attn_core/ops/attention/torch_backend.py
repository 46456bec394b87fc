"""Attention without stored scores in plain torch: the fused CPU kernel where it fits, else chunks of query rows."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attn_core.kernels.registration import register, token_major

from . import reference
from .chunked import chunk_rows, chunked_backward, chunked_forward, row_shift, slice_rows
from .cpu_flash import empty_result, flash_backward, flash_forward

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


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    axis_bias: Sequence[Tensor] | None = None,
    key_mask: Tensor | None = None,
    causal: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Extra memory O(B·H·N·(Dv + Σ n_a)) plus one chunk of scores; an exported graph holds the reference instead."""
    if torch.compiler.is_exporting():
        return reference.attention(
            q, k, v, scale=scale, bias=bias, axis_bias=axis_bias, key_mask=key_mask, causal=causal
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _call(q, k, v, bias, key_mask, list(axis_bias or ()), scale, causal or "none")


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    axis_bias: Sequence[Tensor],
    scale: float,
    causal: str,
) -> tuple[Tensor, Tensor]:
    if q.numel() == 0 or v.numel() == 0:
        return empty_result(q, v)
    if axis_bias and causal == "none" and q.device.type == "cpu":
        return _table_forward(q, k, v, _full_bias(bias, key_mask), axis_bias, scale)
    if not _fits_flash(q, k, v.shape[-1], bias, key_mask, axis_bias, scale, causal):
        out, lse = chunked_forward(q, k, v, _full_bias(bias, key_mask), axis_bias, scale, causal)
        return _token_major_copy(out), lse
    mask = key_mask_bias(key_mask, q) if bias is None else bias
    q, k, scale = _augment(q, k, axis_bias, scale)
    parts = _causal_parts(q.shape[2], k.shape[2], causal)
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
    return _token_major_copy(out), lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    axis_bias: Sequence[Tensor],
    scale: float,
    causal: str,
    needs: Sequence[bool],
    whole: bool = True,
) -> list[Tensor]:
    """``whole=False``: k and v are a part of the keys that ``out`` and ``lse`` belong to."""
    _needs_q, _needs_k, _needs_v, needs_bias, *needs_tables = needs
    tensors = [q, k, v, bias, *axis_bias]
    if q.numel() == 0 or v.numel() == 0:
        wanted = [t for t, need in zip(tensors, needs, strict=True) if need and t is not None]
        return [_gradient_of(t, torch.zeros_like(t), i < 3) for i, t in enumerate(wanted)]
    if needs_bias or not _fits_flash(q, k, v.shape[-1], bias, key_mask, axis_bias, scale, causal):
        shift = None if whole and q.dtype in NARROW else row_shift(grad_out, grad_lse, out, lse.dtype)
        terms = _full_bias(bias, key_mask)
        grads = chunked_backward(
            grad_out, shift, lse, q, k, v, terms, axis_bias, scale, causal, needs_bias, grad_lse=grad_lse
        )
        if needs_bias and bias is not None and grads[3] is not None:
            grads[3] = grads[3].sum_to_size(bias.shape)
    else:
        grads = _flash_gradients(
            grad_out, grad_lse, out, lse, q, k, v, bias, key_mask, axis_bias, scale, causal, any(needs_tables)
        )
    return [
        _gradient_of(tensor, grad, position < 3)
        for position, (tensor, grad, need) in enumerate(zip(tensors, grads, needs, strict=True))
        if need and tensor is not None and grad is not None
    ]


def _flash_gradients(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    axis_bias: Sequence[Tensor],
    scale: float,
    causal: str,
    needs_tables: bool,
) -> list[Tensor | None]:
    width = q.shape[-1]
    mask = key_mask_bias(key_mask, q) if bias is None else bias
    folded = bool(axis_bias)
    wide_q, wide_k, wide_scale = _augment(q, k, axis_bias, scale)
    parts = _causal_parts(q.shape[2], k.shape[2], causal)
    dead = parts.dead_rows
    grad_lse = None if grad_lse is None else grad_lse[:, :, dead:]
    rest = (grad_out[:, :, dead:], grad_lse, out[:, :, dead:], lse[:, :, dead:], wide_q[:, :, dead:])
    dq, dk, dv = None, [], []
    for keys, is_causal in parts.calls:
        part_q, part_k, part_v = flash_backward(
            *rest, wide_k[:, :, keys], v[:, :, keys], _columns(_rows(mask, dead), keys), wide_scale, is_causal
        )
        dq = part_q if dq is None else dq + part_q
        dk.append(part_k)
        dv.append(part_v)
    assert dq is not None
    if dead:
        dq = torch.cat([dq.new_zeros(*dq.shape[:2], dead, dq.shape[3]), dq], dim=2)
    grad_k = dk[0] if len(dk) == 1 else torch.cat(dk, dim=2)
    grad_v = dv[0] if len(dv) == 1 else torch.cat(dv, dim=2)
    if not folded:
        return [dq, grad_k, grad_v, None]
    tables: list[Tensor | None] = []
    column = width
    for table in axis_bias:
        # The table's column gradients are Σ_j dS_ij over the keys with that coordinate: the product did the sum.
        piece = dq[..., column : column + table.shape[-1]]
        tables.append(piece.sum_to_size(table.shape) if needs_tables else None)
        column += table.shape[-1]
    return [dq[..., :width] * scale, grad_k[..., :width], grad_v, None, *tables]


def _fits_flash(
    q: Tensor,
    k: Tensor,
    v_width: int,
    bias: Tensor | None,
    key_mask: Tensor | None,
    axis_bias: Sequence[Tensor],
    scale: float,
    causal: str,
) -> bool:
    if q.device.type != "cpu" or (bias is not None and key_mask is not None):
        return False
    if causal != "none" and scale <= 0:
        return False  # −∞ of hidden scores times the scale would be NaN or +∞
    if v_width > MAX_VALUE_RATIO * q.shape[-1]:
        return False
    extra = sum(table.shape[-1] for table in axis_bias)
    if extra and k.shape[2] <= MAX_CHUNKED_KEYS and q.dtype == torch.float32:
        return False
    if extra and q.dtype in NARROW:
        return False  # scaled queries, tables and each score's gradient would be rounded; sums for a table cancel
    if not all(bool(table.isfinite().all()) for table in axis_bias):
        return False  # 0 · inf would be NaN
    return extra == 0 or (q.shape[-1] + extra <= MAX_AUGMENTED_WIDTH and extra <= MAX_AUGMENTED_RATIO * q.shape[-1])


def _table_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Sequence[Tensor], tables: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """The fused kernel on chunks of query rows, whose tables are expanded to a dense bias."""
    queries = q.shape[2]
    batch, heads = (max(t.shape[dim] for t in (*tables, *bias)) for dim in (0, 1))
    step = EXPANDED_CHUNKS * chunk_rows(batch, heads, k.shape[2])
    out, lse = fake_forward(q, k, v, None, None, [], scale, "none")
    for start in range(0, queries, step):
        rows = slice(start, start + step)
        # Summed in float32 beside 16 bits, which the kernel takes for a mask: a sum of rounded terms would lose more.
        total = reference.expand_axis_bias([table[:, :, rows].to(lse.dtype) for table in tables])
        for term in bias:
            total = total + slice_rows(term, rows).to(total.dtype)
        result = flash_forward(q[:, :, rows], k, v, total, scale, False)
        if step >= queries:
            return _token_major_copy(result[0]), result[1]
        out[:, :, rows], lse[:, :, rows] = result
    return out, lse


def _augment(q: Tensor, k: Tensor, tables: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor, float]:
    """Axis tables as columns: q gets (T_y, T_x), k the one-hot codes of its coordinates, the dot product adds them."""
    if not tables:
        return q, k, scale
    batch, heads, queries, _ = q.shape
    columns = [table.expand(batch, heads, queries, table.shape[-1]) for table in tables]
    codes = []
    for axis, table in enumerate(tables):
        before = math.prod(t.shape[-1] for t in tables[:axis])
        after = math.prod(t.shape[-1] for t in tables[axis + 1 :])
        code = torch.eye(table.shape[-1], dtype=q.dtype, device=q.device)
        codes.append(code.repeat_interleave(after, dim=0).repeat(before, 1))
    code = torch.cat(codes, dim=-1).expand(*k.shape[:3], -1)
    return torch.cat([q * scale, *columns], dim=-1), torch.cat([k, code], dim=-1), 1.0


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


def _full_bias(bias: Tensor | None, key_mask: Tensor | None) -> list[Tensor]:
    """Addends of the scores, kept apart so that their sum is only formed chunk by chunk."""
    terms = [] if bias is None else [bias]
    if key_mask is not None:
        terms.append(
            torch.zeros(key_mask.shape, device=key_mask.device).masked_fill(~key_mask, -math.inf)[:, None, None]
        )
    return terms


def _rows(bias: Tensor | None, start: int) -> Tensor | None:
    return bias if bias is None or bias.shape[2] == 1 else bias[:, :, start:]


def _columns(bias: Tensor | None, keys: slice) -> Tensor | None:
    return bias if bias is None or bias.shape[3] == 1 else bias[..., keys]


def _gradient_of(tensor: Tensor, grad: Tensor, per_token: bool) -> Tensor:
    """The gradient in the dtype and memory layout that the fake implementation promises."""
    if per_token:
        return _token_major_copy(grad.to(tensor.dtype))
    return grad.to(tensor.dtype).contiguous()


def _token_major_copy(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    axis_bias: Sequence[Tensor],
    scale: float,
    causal: str,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(batch, heads, queries, dtype=dtype)
    return token_major(q, batch, heads, queries, v.shape[-1]), lse


def reference_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    axis_bias: Sequence[Tensor],
    scale: float,
    causal: str,
) -> tuple[Tensor, Tensor]:
    return reference.attention(
        q,
        k,
        v,
        scale=scale,
        bias=bias,
        axis_bias=axis_bias,
        key_mask=key_mask,
        causal=None if causal == "none" else causal,
    )


_call = register(
    "attention_torch",
    forward=forward,
    backward=backward,
    fake_forward=fake_forward,
    reference=reference_forward,
    differentiable=("q", "k", "v", "bias", "axis_bias"),
    token_major_gradients=("q", "k", "v"),
)
