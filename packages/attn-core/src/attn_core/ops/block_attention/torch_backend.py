"""Block attention in plain torch: blocks gathered a cache-sized chunk at a time, or masked when most keys are read."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attn_core.ops.attention import torch_backend as dense
from attn_core.registration import register, token_major

from . import reference

# Elements of gathered queries, keys, values and scores held at a time: 2²¹ float32 are 8 MiB, a last-level cache.
CHUNK_ELEMENTS = 2**21
# A masked dense call replaces the gather when it computes at most this many times the scores: small query blocks make
# narrow matrix products, which run several times slower (break-even measured on two AVX-512 cores).
DENSE_RATIO = 1.5
DENSE_RATIO_SMALL_BLOCKS = 4.0
SMALL_BLOCK = 8
DENSE_MAX_KEYS = 1024


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
    """Extra memory O(index) plus one chunk, whatever the width of the table; an exported graph holds the reference."""
    if torch.compiler.is_exporting():
        return reference.block_attention(
            q,
            k,
            v,
            q_index,
            kv_index,
            table,
            kv_weight=kv_weight,
            axis_bias=axis_bias,
            causal=causal,
            q_pos=q_pos,
            k_pos=k_pos,
            self_logit=self_logit,
            scale=scale,
            reduce=reduce,
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    per_row = reduce == "mean"
    out, lse = _call(
        q,
        k,
        v,
        q_index,
        kv_index,
        table,
        kv_weight,
        q_pos,
        k_pos,
        list(axis_bias or ()),
        causal,
        self_logit,
        scale,
        per_row,
    )
    if per_row:
        blocks = q_index.shape[2:]
        out, lse = reference.reduce_rows(
            out.unflatten(2, blocks), lse.unflatten(2, blocks), q_index, q.shape[2], reduce
        )
    return out, lse


class Plan(NamedTuple):
    """Indices brought to one form: G groups (images, or images × heads when heads differ) of R blocks."""

    groups: int
    per_head: bool
    q_index: Tensor  # (G|1, R, I)
    kv_index: Tensor  # (G|1, S, J)
    table: Tensor  # (G|1, R, K)
    k_base: Tensor  # (G,) first key row of each group
    q_holes: bool
    kv_holes: bool


class Chunk(NamedTuple):
    groups: Tensor  # (c,) group of each block
    tokens: Tensor  # (c, I) query tokens, −1 for holes
    keys: Tensor  # (c, K·J) key tokens, −1 for holes
    q_rows: Tensor  # (c·I,) rows of the flat queries, holes at some valid row
    kv_rows: Tensor  # (c·K·J,)
    first: int  # number of the chunk's first block among all G·R
    blocks: slice  # the chunk's blocks within their groups


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    kv_index: Tensor,
    table: Tensor | None,
    kv_weight: Tensor | None,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    axis_bias: Sequence[Tensor],
    causal: bool,
    self_logit: float | None,
    scale: float,
    per_row: bool,
) -> tuple[Tensor, Tensor]:
    B, H, N, _ = q.shape
    plan = make_plan(q, k, q_index, kv_index, table, kv_weight)
    if _is_dense(plan, q, k, kv_weight, axis_bias, causal, self_logit, per_row):
        return _dense_forward(plan, q, k, v, scale)
    heads = 1 if plan.per_head else H
    Q, K, V = (_rows_of(x, plan.per_head) for x in (q, k, v))
    R, I = plan.q_index.shape[1:]
    count = plan.groups * (R * I if per_row else N)
    out = V.new_zeros(count, heads, v.shape[-1])
    lse = V.new_full((count, heads), -math.inf, dtype=_accumulator(q.dtype))
    for chunk in _chunks(plan, q, k, v):
        qc, kc, vc, _ = _gather(plan, chunk, Q, K, V, kv_weight)
        bias, tables, fixed = _score_terms(plan, chunk, q, k, axis_bias, q_pos, k_pos, causal, self_logit)
        if fixed is None:
            out_c, lse_c = dense.forward(qc, kc, vc, bias, None, tables, scale, "none")
        else:
            terms = [] if bias is None else [bias]
            out_c, lse_c = dense.chunked_forward(qc, kc, vc, terms, tables, scale, fixed=fixed)
        rows_out = out_c.transpose(1, 2).reshape(-1, heads, v.shape[-1])
        rows_lse = lse_c.transpose(1, 2).reshape(-1, heads)
        if per_row:
            here = slice(chunk.first * I, chunk.first * I + len(rows_out))
            hole = (chunk.tokens < 0).view(-1, 1)
            out[here] = rows_out.masked_fill(hole[..., None], 0.0)
            lse[here] = rows_lse.masked_fill(hole, -math.inf)
        else:
            at, rows_out, rows_lse = _drop_holes(plan, chunk, chunk.q_rows, rows_out, rows_lse)
            out.index_add_(0, at, rows_out)
            lse.index_copy_(0, at, rows_lse)
    return _tokens_of(out, B, H, plan.per_head), _tokens_of(lse[..., None], B, H, plan.per_head)[..., 0].contiguous()


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    kv_index: Tensor,
    table: Tensor | None,
    kv_weight: Tensor | None,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    axis_bias: Sequence[Tensor],
    causal: bool,
    self_logit: float | None,
    scale: float,
    per_row: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    B, H = q.shape[:2]
    plan = make_plan(q, k, q_index, kv_index, table, kv_weight)
    if _is_dense(plan, q, k, kv_weight, axis_bias, causal, self_logit, per_row):
        return _dense_backward(plan, grad_out, grad_lse, out, lse, q, k, v, scale, needs[:3])
    heads = 1 if plan.per_head else H
    Q, K, V = (_rows_of(x, plan.per_head) for x in (q, k, v))
    dO, O = _rows_of(grad_out, plan.per_head), _rows_of(out, plan.per_head)
    L = _rows_of(lse[..., None], plan.per_head)
    dL = None if grad_lse is None else _rows_of(grad_lse[..., None], plan.per_head)
    dQ, dK, dV = (x.new_zeros(x.shape, dtype=_accumulator(x.dtype)) for x in (Q, K, V))
    dW = None if kv_weight is None else kv_weight.new_zeros(kv_weight.shape, dtype=L.dtype)
    dT = [torch.zeros_like(t, dtype=L.dtype) for t in axis_bias]
    I = plan.q_index.shape[2]
    for chunk in _chunks(plan, q, k, v):
        qc, kc, vc, weight = _gather(plan, chunk, Q, K, V, kv_weight)
        bias, tables, fixed = _score_terms(plan, chunk, q, k, axis_bias, q_pos, k_pos, causal, self_logit)
        if per_row:
            at = torch.arange(chunk.first * I, chunk.first * I + chunk.tokens.numel(), device=q.device)
        else:
            at = chunk.q_rows
        hole = (chunk.tokens < 0).view(-1, 1, 1) if plan.q_holes else None
        dO_c, O_c, L_c = (_take(x, at, I, hole) for x in (dO, O, L))
        dL_c = None if dL is None else _take(dL, at, I, hole)[..., 0]
        arguments = (dO_c, dL_c, O_c, L_c[..., 0], qc, kc, vc)
        if fixed is None:
            wanted = [True, True, True, False, *(True for _ in tables)]
            dq, dk, dv, *dt = dense.backward(*arguments, bias, None, tables, scale, "none", wanted)
        else:
            terms = [] if bias is None else [bias]
            grads = dense.chunked_backward(*arguments, terms, tables, scale, fixed=fixed)
            dq, dk, dv, *dt = [grad for grad in grads if grad is not None]
        if weight is not None:
            assert dW is not None
            assert kv_weight is not None
            slots = plan.table.shape[2]
            plain_k, plain_v = (_take(x, chunk.kv_rows, chunk.keys.shape[1], None) for x in (K, V))
            per_slot = [
                (grad.to(L.dtype) * plain.to(L.dtype)).unflatten(2, (slots, -1)).sum((1, 3, 4))
                for grad, plain in ((dk, plain_k), (dv, plain_v))
            ]
            _weight_rows(dW, plan, chunk, kv_weight, add=per_slot[0] + per_slot[1])
            dk, dv = dk * weight, dv * weight
        _scatter(dQ, chunk.q_rows, dq, (chunk.tokens < 0) if plan.q_holes else None)
        unseen = (chunk.keys < 0) if plan.kv_holes else None
        _scatter(dK, chunk.kv_rows, dk, unseen)
        _scatter(dV, chunk.kv_rows, dv, unseen)
        for target, piece in zip(dT, dt[-len(dT) :] if dT else (), strict=True):
            _scatter_table(target, piece, plan, chunk, heads, q)
    grads: list[Tensor | None] = [
        _tokens_of(dQ.to(q.dtype), B, H, plan.per_head),
        _tokens_of(dK.to(k.dtype), B, k.shape[1], plan.per_head),
        _tokens_of(dV.to(v.dtype), B, k.shape[1], plan.per_head),
        None if dW is None or kv_weight is None else dW.to(kv_weight.dtype),
        *(grad.to(t.dtype) for grad, t in zip(dT, axis_bias, strict=True)),
    ]
    return [grad for grad, need in zip(grads, needs, strict=True) if need and grad is not None]


# --- indices ----------------------------------------------------------------------------------------------------------


def make_plan(
    q: Tensor, k: Tensor, q_index: Tensor, kv_index: Tensor, table: Tensor | None, kv_weight: Tensor | None
) -> Plan:
    """Heads share one gather unless an index, the table or the weights differ between them."""
    B, H = q.shape[:2]
    Hk, M = k.shape[1:3]
    if table is None:
        table = torch.arange(q_index.shape[2], device=q.device).view(1, 1, -1, 1)
    per_head = any(x is not None and x.shape[1] > 1 for x in (q_index, kv_index, table, kv_weight))
    groups = B * H if per_head else B

    def grouped(index: Tensor, heads: int) -> Tensor:
        index = index.long()
        if index.shape[:2] == (1, 1):
            return index[0]
        if not per_head:
            return index[:, 0]
        index = index.expand(B, heads, *index.shape[2:])
        return index.repeat_interleave(H // heads, dim=1).flatten(0, 1)

    k_group = torch.arange(groups, device=q.device)
    if per_head:
        k_group = k_group // H * Hk + k_group % H // (H // Hk)
    return Plan(
        groups,
        per_head,
        grouped(q_index, H),
        grouped(kv_index, Hk),
        grouped(table, H),
        k_group * M,
        bool((q_index < 0).any()),
        bool((kv_index < 0).any()) or bool((table < 0).any()),
    )


def _chunks(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Chunk]:
    R, I = plan.q_index.shape[1:]
    J, K = plan.kv_index.shape[2], plan.table.shape[2]
    heads = 1 if plan.per_head else q.shape[1]
    if plan.groups * R * I == 0 or K * J == 0:
        return
    widths = q.shape[-1] + v.shape[-1]
    per_block = heads * (2 * I * widths + K * J * widths + I * K * J)
    count = max(1, CHUNK_ELEMENTS // per_block)
    if count >= R:
        step = max(1, count // R)
        spans = [(g, min(g + step, plan.groups), 0, R) for g in range(0, plan.groups, step)]
    else:
        spans = [(g, g + 1, r, min(r + count, R)) for g in range(plan.groups) for r in range(0, R, count)]
    for g0, g1, r0, r1 in spans:
        groups = torch.arange(g0, g1, device=q.device)

        def part(index: Tensor, g0: int = g0, g1: int = g1, r0: int = r0, r1: int = r1) -> Tensor:
            index = index[g0:g1] if index.shape[0] > 1 else index.expand(g1 - g0, *index.shape[1:])
            return index[:, r0:r1].flatten(0, 1)

        groups = groups.repeat_interleave(r1 - r0)
        tokens, listed = part(plan.q_index), part(plan.table)
        if plan.kv_index.shape[0] == 1:
            keys = plan.kv_index[0][listed.clamp(min=0)]
        else:
            keys = plan.kv_index[groups[:, None], listed.clamp(min=0)]
        if plan.kv_holes:
            keys = keys.masked_fill((listed < 0)[..., None], -1)
        keys = keys.flatten(1)
        q_rows = (tokens.clamp(min=0) + groups[:, None] * q.shape[2]).flatten()
        kv_rows = (keys.clamp(min=0) + plan.k_base[groups][:, None]).flatten()
        yield Chunk(groups, tokens, keys, q_rows, kv_rows, g0 * R + r0, slice(r0, r1))


# --- rows: (B, H, N, D) as (B·N, H, D), or as (B·H·N, 1, D) when each head has its own index --------------------------


def _rows_of(x: Tensor, per_head: bool) -> Tensor:
    if per_head:
        return x.reshape(-1, 1, x.shape[-1])
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[-1])


def _tokens_of(rows: Tensor, batch: int, heads: int, per_head: bool) -> Tensor:
    """Inverse of :func:`_rows_of`, token-major."""
    if per_head:
        return rows.view(batch, heads, -1, rows.shape[-1]).transpose(1, 2).contiguous().transpose(1, 2)
    return rows.view(batch, -1, heads, rows.shape[-1]).transpose(1, 2)


def _take(rows: Tensor, at: Tensor, per_block: int, hole: Tensor | None) -> Tensor:
    """(c, H, per_block, D) of the listed rows, zeros at holes."""
    taken = rows.index_select(0, at)
    if hole is not None:
        taken = taken.masked_fill(hole, 0.0)
    return taken.view(-1, per_block, *rows.shape[1:]).transpose(1, 2)


def _scatter(target: Tensor, at: Tensor, grad: Tensor, hole: Tensor | None) -> None:
    """Add the gradient of gathered blocks (c, H, tokens, D) to the rows they came from."""
    rows = grad.transpose(1, 2).reshape(-1, grad.shape[1], grad.shape[3]).to(target.dtype)
    if hole is not None:
        rows = rows.masked_fill(hole.view(-1, 1, 1), 0.0)
    target.index_add_(0, at, rows)


def _drop_holes(plan: Plan, chunk: Chunk, at: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    if not plan.q_holes:
        return at, *rows
    kept = (chunk.tokens.flatten() >= 0).nonzero()[:, 0]
    return at[kept], *(x[kept] for x in rows)


def _gather(
    plan: Plan, chunk: Chunk, Q: Tensor, K: Tensor, V: Tensor, kv_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Query, key and value blocks of a chunk, and the weight (c, 1, K·J, 1) already multiplied into keys and values."""
    keys = chunk.keys.shape[1]
    qc = _take(Q, chunk.q_rows, chunk.tokens.shape[1], None)
    kc, vc = (_take(x, chunk.kv_rows, keys, None) for x in (K, V))
    if kv_weight is None:
        return qc, kc, vc, None
    weight = _weight_rows(kv_weight, plan, chunk, kv_weight)
    weight = weight.repeat_interleave(keys // weight.shape[1], dim=1)[:, None, :, None]
    return qc, kc * weight, vc * weight, weight


def _weight_rows(target: Tensor, plan: Plan, chunk: Chunk, like: Tensor, add: Tensor | None = None) -> Tensor:
    """The chunk's rows (c, K) of a (b, h, R, K) tensor; ``add`` is accumulated into them."""
    batch, heads, R, _ = like.shape
    index = _table_base(plan, chunk, batch, heads, like) * R
    blocks = torch.arange(chunk.blocks.start, chunk.blocks.stop, device=like.device)
    index = index + blocks.repeat(len(chunk.groups) // len(blocks))
    rows = target.flatten(0, 2)
    if add is not None:
        rows.index_add_(0, index, add.to(rows.dtype))
    return rows[index]


def _table_base(plan: Plan, chunk: Chunk, batch: int, heads: int, like: Tensor) -> Tensor:
    """Number b·heads + h of each chunk block within the leading dimensions of a broadcastable tensor."""
    if not plan.per_head:
        return chunk.groups * heads if batch > 1 else torch.zeros_like(chunk.groups)
    H = plan.groups // max(1, batch) if batch > 1 else heads
    b = chunk.groups // H if batch > 1 else torch.zeros_like(chunk.groups)
    h = chunk.groups % H if heads > 1 else torch.zeros_like(chunk.groups)
    return b * heads + h


# --- scores -----------------------------------------------------------------------------------------------------------


def _score_terms(
    plan: Plan,
    chunk: Chunk,
    q: Tensor,
    k: Tensor,
    axis_bias: Sequence[Tensor],
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    causal: bool,
    self_logit: float | None,
) -> tuple[Tensor | None, list[Tensor], tuple[Tensor, float] | None]:
    """What joins the dot products of a chunk: a mask as bias, axis tables over (slot, cells), overridden logits."""
    hidden = (chunk.keys < 0)[:, None, :] if plan.kv_holes else None
    fixed = None
    if causal or self_logit is not None:
        q_at = _positions(q_pos, chunk, chunk.tokens, plan, q)
        k_at = _positions(k_pos, chunk, chunk.keys, plan, q)
        if causal:
            future = k_at[:, None, :] > q_at[:, :, None]
            hidden = future if hidden is None else hidden | future
        if self_logit is not None:
            fixed = ((k_at[:, None, :] == q_at[:, :, None])[:, None], self_logit)
    bias = None
    if hidden is not None:
        bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -math.inf)[:, None]
    tables = []
    if axis_bias:
        slots = plan.table.shape[2]
        c, I = chunk.tokens.shape
        if slots > 1:
            tables.append(q.new_zeros(c, 1, I, slots))
        for table in axis_bias:
            rows, index = _table_rows(table, plan, chunk, q)
            tables.append(rows.index_select(0, index).view(c, I, -1, table.shape[-1]).transpose(1, 2))
    return bias, tables, fixed


def _positions(positions: Tensor | None, chunk: Chunk, tokens: Tensor, plan: Plan, q: Tensor) -> Tensor:
    if positions is None:
        return tokens
    image = chunk.groups // q.shape[1] if plan.per_head else chunk.groups
    row = image[:, None] if positions.shape[0] > 1 else torch.zeros_like(image)[:, None]
    return positions.long()[row, tokens.clamp(min=0)]


def _table_rows(table: Tensor, plan: Plan, chunk: Chunk, q: Tensor) -> tuple[Tensor, Tensor]:
    """A table (B|1, H|1, N, n) as rows, and the row of each of the chunk's queries: ((·, H|1, n), (c·I,))."""
    batch, heads, N, n = table.shape
    tokens = chunk.tokens.clamp(min=0)
    if plan.per_head:
        H = q.shape[1]
        b = chunk.groups // H if batch > 1 else torch.zeros_like(chunk.groups)
        h = chunk.groups % H if heads > 1 else torch.zeros_like(chunk.groups)
        return table.reshape(-1, 1, n), (tokens + ((b * heads + h) * N)[:, None]).flatten()
    b = chunk.groups if batch > 1 else torch.zeros_like(chunk.groups)
    return table.transpose(1, 2).reshape(-1, heads, n), (tokens + (b * N)[:, None]).flatten()


def _scatter_table(target: Tensor, grad: Tensor, plan: Plan, chunk: Chunk, heads: int, q: Tensor) -> None:
    """Add the gradient (c, H|1, I, n) of gathered table rows to the table."""
    rows, index = _table_rows(target, plan, chunk, q)
    grad = grad.to(target.dtype).transpose(1, 2).reshape(-1, grad.shape[1], grad.shape[3])
    if plan.q_holes:
        grad = grad.masked_fill((chunk.tokens < 0).view(-1, 1, 1), 0.0)
    if rows.data_ptr() == target.data_ptr():
        rows.index_add_(0, index, grad)
    else:  # the rows are a copy of a head-major table
        rows = torch.zeros_like(rows).index_add_(0, index, grad)
        target += rows.view(target.shape[0], target.shape[2], target.shape[1], -1).transpose(1, 2)


# --- masked dense form ------------------------------------------------------------------------------------------------


def _is_dense(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    kv_weight: Tensor | None,
    axis_bias: Sequence[Tensor],
    causal: bool,
    self_logit: float | None,
    per_row: bool,
) -> bool:
    if plan.per_head or per_row or causal or kv_weight is not None or axis_bias or self_logit is not None:
        return False
    I, listed = plan.q_index.shape[2], plan.table.shape[2] * plan.kv_index.shape[2]
    if q.device.type != "cpu" or k.shape[2] > DENSE_MAX_KEYS or listed == 0 or 0 in q.shape:
        return False
    return listed * (DENSE_RATIO_SMALL_BLOCKS if I <= SMALL_BLOCK else DENSE_RATIO) >= k.shape[2]


def _dense_masks(plan: Plan, q: Tensor, k: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """For spans of images, log(times query t may read key u): 0 once, −inf never, log 2 for a block listed twice."""
    N, M = q.shape[2], k.shape[2]
    R, I = plan.q_index.shape[1:]
    step = max(1, CHUNK_ELEMENTS // (N * M))
    for g0 in range(0, plan.groups, step):
        images = slice(g0, min(g0 + step, plan.groups))
        count = images.stop - images.start

        def part(index: Tensor, images: slice = images, count: int = count) -> Tensor:
            return index[images] if index.shape[0] > 1 else index.expand(count, *index.shape[1:])

        blocks, listed, tokens = part(plan.kv_index), part(plan.table), part(plan.q_index)
        # one more block and one more token stand for the holes
        blocks = torch.cat([blocks, blocks.new_full((count, 1, blocks.shape[2]), -1)], dim=1)
        listed = listed.where(listed >= 0, blocks.shape[1] - 1).flatten(1)
        keys = blocks.gather(1, listed[..., None].expand(-1, -1, blocks.shape[2])).view(count, R, -1)
        keys = keys.where(keys >= 0, M)
        times = q.new_zeros(count, R + 1, M + 1).scatter_add_(2, keys, q.new_ones(keys.shape))[..., :M]
        times[:, R] = 0
        block_of = tokens.new_full((count, N + 1), R)
        numbers = torch.arange(R, device=q.device).repeat_interleave(I).expand(count, -1)
        flat = tokens.flatten(1)
        block_of.scatter_(1, flat.where(flat >= 0, N), numbers)
        yield images, times.log_().gather(1, block_of[:, :N, None].expand(-1, -1, M))[:, None]


def _dense_forward(plan: Plan, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    results = [
        dense.forward(q[images], k[images], v[images], mask, None, [], scale, "none")
        for images, mask in _dense_masks(plan, q, k)
    ]
    if len(results) == 1:
        return results[0]
    out = torch.cat([out.transpose(1, 2) for out, _ in results]).transpose(1, 2)
    return out, torch.cat([lse for _, lse in results])


def _dense_backward(
    plan: Plan,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    parts = []
    for images, mask in _dense_masks(plan, q, k):
        lse_part = None if grad_lse is None else grad_lse[images]
        arguments = (grad_out[images], lse_part, out[images], lse[images], q[images], k[images], v[images])
        parts.append(dense.backward(*arguments, mask, None, [], scale, "none", [*needs, False]))
    return [
        grads[0] if len(grads) == 1 else torch.cat([grad.transpose(1, 2) for grad in grads]).transpose(1, 2)
        for grads in zip(*parts, strict=True)
    ]


# --- registration -----------------------------------------------------------------------------------------------------


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    kv_index: Tensor,
    table: Tensor | None,
    kv_weight: Tensor | None,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    axis_bias: Sequence[Tensor],
    causal: bool,
    self_logit: float | None,
    scale: float,
    per_row: bool,
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = q.shape
    rows = q_index.shape[2] * q_index.shape[3] if per_row else tokens
    out = token_major(q, batch, heads, rows, v.shape[-1])
    return out, q.new_empty(batch, heads, rows, dtype=_accumulator(q.dtype))


def reference_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    kv_index: Tensor,
    table: Tensor | None,
    kv_weight: Tensor | None,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    axis_bias: Sequence[Tensor],
    causal: bool,
    self_logit: float | None,
    scale: float,
    per_row: bool,
) -> tuple[Tensor, Tensor]:
    out, lse = reference.rows_attention(
        q, k, v, q_index, kv_index, table, kv_weight, q_pos, k_pos, axis_bias, causal, self_logit, scale
    )
    if per_row:
        return out.flatten(2, 3), lse.flatten(2, 3)
    return reference.reduce_rows(out, lse, q_index, q.shape[2], "set")


_call = register(
    "block_attention_torch",
    forward=forward,
    backward=backward,
    fake_forward=fake_forward,
    reference=reference_forward,
    differentiable=("q", "k", "v", "kv_weight", "axis_bias"),
)
