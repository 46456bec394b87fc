"""Attention by chunks of query rows whose scores fit the cache: every argument, any device, gradients of biases."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attn_core.kernels.registration import token_major

# Scores held at a time: 2²¹ float32 are 8 MiB, a last-level cache.
CHUNK_SCORES = 2**21
# Up to this many columns the product with transposed scores costs a multiple of its transpose.
NARROW = 16


def chunk_rows(batch: int, heads: int, keys: int) -> int:
    """Query rows whose scores make one chunk."""
    return max(1, CHUNK_SCORES // max(1, batch * heads * keys))


def chunked_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Sequence[Tensor],
    tables: Sequence[Tensor],
    scale: float,
    causal: str = "none",
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp.

    Args:
        bias: addends of the scores, broadcastable to (B, H, N, M), kept apart so that their sum is only formed chunk
            by chunk.
        tables: axis tables (B|1, H|1, N, n_a).
        factor: of the scores before a bias is added, (B, 1, N, M): 0 where a bias says it all, else 1.
    """
    batch, heads, queries, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    wide_k, wide_v = (x.to(dtype).contiguous() for x in (k, v))
    out = lse = None
    may_be_dead = bool(bias) or bool(tables) or causal != "none"
    step = chunk_rows(batch, heads, k.shape[2])
    space = _space(wide_k, q, step)
    for start in range(0, queries, step):
        rows = slice(start, min(start + step, queries))
        s = _scores(rows, q, wide_k, bias, tables, scale, causal, queries, factor, space[0])
        p, row_lse = softmax_with_lse(s, may_be_dead, _part(space[1], s.shape))
        row_out = torch.matmul(_group(p, k.shape[1]), wide_v).view(batch, heads, -1, v.shape[-1])
        if step >= queries:
            return row_out.to(q.dtype), row_lse
        if out is None or lse is None:
            out = token_major(q, batch, heads, queries, v.shape[-1])
            lse = q.new_empty(batch, heads, queries, dtype=dtype)
        out[:, :, rows], lse[:, :, rows] = row_out, row_lse
    assert out is not None
    assert lse is not None
    return out, lse


def softmax_with_lse(s: Tensor, may_be_dead: bool, space: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax, into ``space`` if given, and log-sum-exp of the last dimension, of at least one entry.

    The largest probability is at least 1/M, so its logarithm loses nothing, and saves a second pass of exponentials.
    """
    top = s.amax(-1)
    p = torch.softmax(s, -1) if space is None else torch.softmax(s, -1, out=space)
    lse = top - p.amax(-1).log_()
    if may_be_dead:
        dead = top == -math.inf
        if bool(dead.any()):
            p.masked_fill_(dead.unsqueeze(-1), 0.0)
            lse.masked_fill_(dead, -math.inf)
    return p, lse


def row_shift(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, dtype: torch.dtype) -> Tensor:
    """δ − dlse, what the softmax subtracts from the gradient of each query's scores; δ = Σ_c do_c·o_c."""
    shift = torch.linalg.vecdot(grad_out.to(dtype), out.to(dtype))
    return shift if grad_lse is None else shift - grad_lse


def chunked_backward(
    grad_out: Tensor,
    shift: Tensor | None,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Sequence[Tensor],
    tables: Sequence[Tensor],
    scale: float,
    causal: str = "none",
    needs_bias: bool = False,
    factor: Tensor | None = None,
    grad_lse: Tensor | None = None,
) -> list[Tensor | None]:
    """P = exp(s − lse); dS = P∘(dO·Vᵀ − shift); gradients of q, k, v, the first bias term and the tables.

    Args:
        shift: :func:`row_shift`, (B, H, N); None where the output was rounded to 16 bits, and δ had better be Σ_j P∘dP.
        grad_lse: wanted without ``shift``.
        factor: as in :func:`chunked_forward`; not beside ``needs_bias``.
    """
    batch, heads, queries, _ = q.shape
    key_heads, keys = k.shape[1], k.shape[2]
    dtype = lse.dtype
    wide_k, wide_v = (x.to(dtype).contiguous() for x in (k, v))
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    dbias = torch.zeros_like(bias[0], dtype=dtype) if needs_bias else None
    dtables = [torch.empty_like(table, dtype=dtype) for table in tables]
    code = _cells([table.shape[-1] for table in tables], wide_k)
    finite = lse.masked_fill(lse == -math.inf, 0.0)
    step = chunk_rows(batch, heads, keys)
    space = _space(wide_k, q, step)
    for start in range(0, queries, step):
        rows = slice(start, min(start + step, queries))
        p = _scores(rows, q, wide_k, bias, tables, scale, causal, queries, factor, space[0], finite).exp_()
        d_out = _group(grad_out[:, :, rows].to(dtype), key_heads)
        dv = _accumulate(dv, _over_rows(_group(p, key_heads), d_out))
        start_of = None if shift is None else shift[:, :, rows, None].neg()
        ds = _product(d_out, wide_v, 1.0, start_of, space[1]).view_as(p)
        if shift is None:
            delta = torch.linalg.vecdot(p, ds)
            ds.sub_((delta if grad_lse is None else delta - grad_lse[:, :, rows])[..., None])
        ds.mul_(p)
        if factor is not None:
            ds = ds.mul_(factor[:, :, rows])
        grouped = _group(ds, key_heads)
        row_dq = torch.matmul(grouped, wide_k).mul_(scale).view(batch, heads, -1, q.shape[-1])
        if step >= queries:
            dq = row_dq
        else:
            dq = token_major(q, *q.shape) if dq is None else dq
            dq[:, :, rows] = row_dq
        dk = _accumulate(dk, _over_rows(grouped, _group(q[:, :, rows].to(dtype), key_heads)))
        if dbias is not None:
            target = slice_rows(dbias, rows)
            target += ds.sum_to_size(target.shape)
        if code is not None:  # Σ_j dS_ij over the keys of each cell of an axis, as one product
            pieces = (ds.view(-1, keys) @ code).view(*ds.shape[:3], -1).split([t.shape[-1] for t in tables], -1)
            for dtable, piece in zip(dtables, pieces, strict=True):
                dtable[:, :, rows] = piece.sum_to_size(dtable[:, :, rows].shape)
    dk = torch.zeros_like(wide_k) if dk is None else dk.mul_(scale).contiguous()
    dq = torch.zeros_like(q) if dq is None else dq
    return [dq, dk, torch.zeros_like(wide_v) if dv is None else dv.contiguous(), dbias, *dtables]


def _scores(
    rows: slice,
    q: Tensor,
    k: Tensor,
    bias: Sequence[Tensor],
    tables: Sequence[Tensor],
    scale: float,
    causal: str,
    queries: int,
    factor: Tensor | None,
    space: Tensor,
    minus: Tensor | None = None,
) -> Tensor:
    """Scores of some rows in the accumulation dtype, less one number for each query, in ``space``: (B, H, rows, M)."""
    minus = None if minus is None else minus[:, :, rows]
    plain = not (bias or tables or factor is not None or causal != "none")
    start = None if minus is None or not plain else minus.neg()[..., None]
    s = _product(_group(q[:, :, rows], k.shape[1]).to(k.dtype), k, scale, start, space)
    s = s.view(q.shape[0], q.shape[1], -1, k.shape[2])
    grid = s.unflatten(-1, [table.shape[-1] for table in tables]) if tables else s
    for axis, table in enumerate(tables):
        others = (1,) * axis, (1,) * (len(tables) - 1 - axis)
        grid.add_(table[:, :, rows].to(s.dtype).unflatten(-1, (*others[0], -1, *others[1])))
    if factor is not None:
        if all(bool(table.isfinite().all()) for table in tables):
            s = s.mul_(factor[:, :, rows])
        else:  # −∞·0 would be NaN where a table hides a key and the factor is 0
            s = s.masked_fill_(factor[:, :, rows] == 0, 0.0)
    for term in bias:
        s = s.add_(slice_rows(term, rows).to(s.dtype))
    if causal != "none":
        offset = 0 if causal == "upper_left" else k.shape[2] - queries
        i = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
        s = s.masked_fill_(torch.arange(k.shape[2], device=q.device) > i + offset, -math.inf)
    return s if minus is None or plain else s.sub_(minus[..., None])


def _space(k: Tensor, q: Tensor, step: int) -> Tensor:
    """Room for two chunks of scores, which all chunks use: fresh memory costs as much as a product."""
    return k.new_empty(2, q.shape[0] * q.shape[1] * min(step, q.shape[2]) * k.shape[2])


def _part(space: Tensor, shape: Sequence[int]) -> Tensor:
    return space[: math.prod(shape)].view(shape)


def _product(a: Tensor, b: Tensor, scale: float, start: Tensor | None, space: Tensor) -> Tensor:
    """start + scale·a·bᵀ of (B, Hk, n, D) and (B, Hk, M, D), in ``space``: (B·Hk, n, M).

    ``start`` is (B, H, N, 1) with N·H = n·Hk.
    """
    a, b = a.flatten(0, 1), b.flatten(0, 1).transpose(1, 2)
    out = _part(space, (*a.shape[:2], b.shape[2]))
    if start is None:
        return torch.bmm(a * scale, b, out=out)
    return torch.baddbmm(start.reshape(*a.shape[:2], 1), a, b, alpha=scale, out=out)


def _over_rows(weights: Tensor, x: Tensor) -> Tensor:
    """Weightsᵀ·x of (…, n, M) and (…, n, D): (…, M, D)."""
    if x.shape[-1] <= NARROW:
        return torch.matmul(x.transpose(-2, -1), weights).transpose(-2, -1)
    return torch.matmul(weights.transpose(-2, -1), x)


def _cells(grid: Sequence[int], like: Tensor) -> Tensor | None:
    """(M, Σ n_a): for each axis the one-hot code of every key's coordinate; None without axes."""
    if not grid:
        return None
    keys = torch.arange(math.prod(grid), device=like.device)
    codes = []
    for axis, size in enumerate(grid):
        coordinate = keys // math.prod(grid[axis + 1 :]) % size
        codes.append(torch.nn.functional.one_hot(coordinate, size))
    return torch.cat(codes, dim=-1).to(like.dtype)


def _accumulate(total: Tensor | None, piece: Tensor) -> Tensor:
    return piece if total is None else total.add_(piece)


def _group(x: Tensor, key_heads: int) -> Tensor:
    """(B, H, N, …) → (B, Hk, H/Hk·N, …): the queries of a group share their keys without a copy of the keys."""
    batch, heads, rows, width = x.shape
    return x.reshape(batch, key_heads, heads // key_heads * rows, width)


def slice_rows(x: Tensor, rows: slice) -> Tensor:
    """The queries ``rows`` of x (B, H, N, …); x itself where one row stands for all."""
    return x if x.shape[2] == 1 else x[:, :, rows]
