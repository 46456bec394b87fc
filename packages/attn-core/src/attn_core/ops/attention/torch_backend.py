"""Attention without stored scores in plain torch: the fused CPU kernel where it fits, else chunks of query rows."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attn_core.registration import register, token_major

from . import reference
from .cpu_flash import empty_result, flash_backward, flash_forward

# Scores held at a time by the chunked path: 2²¹ float32 are 8 MiB, a last-level cache.
CHUNK_SCORES = 2**21
# Tables become extra columns of q and k up to this width, and up to this multiple of the head width.
MAX_AUGMENTED_WIDTH = 256
MAX_AUGMENTED_RATIO = 4


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
    if not _fits_flash(q, bias, key_mask, axis_bias):
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
) -> list[Tensor]:
    _needs_q, _needs_k, _needs_v, needs_bias, *needs_tables = needs
    tensors = [q, k, v, bias, *axis_bias]
    if q.numel() == 0 or v.numel() == 0:
        wanted = [t for t, need in zip(tensors, needs, strict=True) if need and t is not None]
        return [_gradient_of(t, torch.zeros_like(t), i < 3) for i, t in enumerate(wanted)]
    if needs_bias or not _fits_flash(q, bias, key_mask, axis_bias):
        grads = chunked_backward(
            grad_out, grad_lse, out, lse, q, k, v, _full_bias(bias, key_mask), axis_bias, scale, causal, needs_bias
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


def _fits_flash(q: Tensor, bias: Tensor | None, key_mask: Tensor | None, axis_bias: Sequence[Tensor]) -> bool:
    if q.device.type != "cpu" or (bias is not None and key_mask is not None):
        return False
    extra = sum(table.shape[-1] for table in axis_bias)
    return extra == 0 or (q.shape[-1] + extra <= MAX_AUGMENTED_WIDTH and extra <= MAX_AUGMENTED_RATIO * q.shape[-1])


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


# --- chunks of query rows: every argument, any device, bias gradients -------------------------------------------------


def chunk_rows(batch: int, heads: int, keys: int) -> int:
    """Query rows whose scores make one chunk."""
    return max(1, CHUNK_SCORES // max(1, batch * heads * keys))


def _scores(
    rows: slice,
    q: Tensor,
    k: Tensor,
    bias: Sequence[Tensor],
    tables: Sequence[Tensor],
    scale: float,
    causal: str,
    queries: int,
    fixed: tuple[Tensor, float] | None,
) -> Tensor:
    """Scores of some rows in the accumulation dtype: (B, H, rows, M); ``fixed`` = (where, value) overrides logits."""
    s = torch.matmul(_group(q[:, :, rows], k.shape[1]).to(k.dtype) * scale, k.transpose(-2, -1))
    s = s.view(q.shape[0], q.shape[1], -1, k.shape[2])
    for term in bias:
        s = s.add_(_slice_rows(term, rows).to(s.dtype))
    if tables:
        s = s.add_(reference.expand_axis_bias([table[:, :, rows].to(s.dtype) for table in tables]))
    if fixed is not None:
        hidden = s == -math.inf
        s = s.masked_fill_(fixed[0][:, :, rows], fixed[1]).masked_fill_(hidden, -math.inf)
    if causal != "none":
        offset = 0 if causal == "upper_left" else k.shape[2] - queries
        i = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
        s = s.masked_fill_(torch.arange(k.shape[2], device=q.device) > i + offset, -math.inf)
    return s


def chunked_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Sequence[Tensor],
    tables: Sequence[Tensor],
    scale: float,
    causal: str = "none",
    fixed: tuple[Tensor, float] | None = None,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    wide_k, wide_v = k.to(dtype), v.to(dtype)
    out = token_major(q, batch, heads, queries, v.shape[-1])
    lse = q.new_empty(batch, heads, queries, dtype=dtype)
    step = chunk_rows(batch, heads, k.shape[2])
    for start in range(0, queries, step):
        rows = slice(start, min(start + step, queries))
        s = _scores(rows, q, wide_k, bias, tables, scale, causal, queries, fixed)
        p, lse[:, :, rows] = reference.softmax_with_lse(s)
        out[:, :, rows] = torch.matmul(_group(p, k.shape[1]), wide_v).view(batch, heads, -1, v.shape[-1])
    return out, lse


def chunked_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Sequence[Tensor],
    tables: Sequence[Tensor],
    scale: float,
    causal: str = "none",
    needs_bias: bool = False,
    fixed: tuple[Tensor, float] | None = None,
) -> list[Tensor | None]:
    """P = exp(s − lse); dS = P∘(dO·Vᵀ − δ + dlse); gradients of q, k, v, the first bias term and the tables."""
    batch, heads, queries, _ = q.shape
    key_heads, keys = k.shape[1], k.shape[2]
    dtype = lse.dtype
    wide_k, wide_v = k.to(dtype), v.to(dtype)
    dq = token_major(q, *q.shape)
    dk, dv = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    dbias = torch.zeros_like(bias[0], dtype=dtype) if needs_bias else None
    dtables = [torch.zeros_like(table, dtype=dtype) for table in tables]
    shift = torch.einsum("bhic,bhic->bhi", grad_out.to(dtype), out.to(dtype))
    if grad_lse is not None:
        shift = shift - grad_lse
    finite = lse.masked_fill(lse == -math.inf, 0.0)
    step = chunk_rows(batch, heads, keys)
    grid = [table.shape[-1] for table in tables]
    for start in range(0, queries, step):
        rows = slice(start, min(start + step, queries))
        s = _scores(rows, q, wide_k, bias, tables, scale, causal, queries, fixed)
        p = s.sub_(finite[:, :, rows, None]).exp_()
        d_out = _group(grad_out[:, :, rows].to(dtype), key_heads)
        dv += torch.matmul(_group(p, key_heads).transpose(-2, -1), d_out)
        ds = torch.matmul(d_out, wide_v.transpose(-2, -1)).view_as(p)
        ds = ds.sub_(shift[:, :, rows, None]).mul_(p)
        if fixed is not None:
            ds = ds.masked_fill_(fixed[0][:, :, rows], 0.0)
        grouped = _group(ds, key_heads)
        dq[:, :, rows] = torch.matmul(grouped, wide_k).mul_(scale).view(batch, heads, -1, q.shape[-1])
        dk += torch.matmul(grouped.transpose(-2, -1), _group(q[:, :, rows].to(dtype), key_heads)).mul_(scale)
        if dbias is not None:
            target = _slice_rows(dbias, rows)
            target += ds.sum_to_size(target.shape)
        for axis, dtable in enumerate(dtables):
            others = [3 + i for i in range(len(grid)) if i != axis]
            per_cell = ds.unflatten(-1, grid)
            per_cell = per_cell.sum(others) if others else per_cell
            dtable[:, :, rows] += per_cell.sum_to_size(dtable[:, :, rows].shape)
    return [dq, dk, dv, dbias, *dtables]


def _group(x: Tensor, key_heads: int) -> Tensor:
    """(B, H, N, …) → (B, Hk, H/Hk·N, …): the queries of a group share their keys without a copy of the keys."""
    batch, heads, rows, width = x.shape
    return x.reshape(batch, key_heads, heads // key_heads * rows, width)


def _slice_rows(x: Tensor, rows: slice) -> Tensor:
    return x if x.shape[2] == 1 else x[:, :, rows]


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
