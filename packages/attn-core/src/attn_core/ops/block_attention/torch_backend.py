"""Block attention in plain torch: blocks gathered a cache-sized chunk at a time, or masked when most keys are read."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attn_core.ops.attention import torch_backend as dense
from attn_core.ops.attention.cpu_flash import empty_result
from attn_core.registration import empty_gradient, register, token_major

from . import reference
from .masked import dense_backward, dense_forward, is_dense
from .plan import Chunk, Plan, chunks, drop_holes, gather, make_plan, rows_of, scatter, take, tokens_of, weight_rows


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
    if q.numel() == 0 or v.numel() == 0:
        rows = q_index.shape[2] * q_index.shape[3] if per_row else N
        return empty_result(q, v, rows)
    plan = make_plan(q, k, q_index, kv_index, table, kv_weight)
    if is_dense(plan, q, k, kv_weight, axis_bias, causal, self_logit, per_row):
        return dense_forward(plan, q, k, v, scale)
    heads = 1 if plan.per_head else H
    Q, K, V = (rows_of(x, plan.per_head) for x in (q, k, v))
    R, I = plan.q_index.shape[1:]
    count = plan.groups * (R * I if per_row else N)
    out = V.new_zeros(count, heads, v.shape[-1])
    lse = V.new_full((count, heads), -math.inf, dtype=_accumulator(q.dtype))
    for chunk in chunks(plan, q, k, v):
        qc, kc, vc, _ = gather(plan, chunk, Q, K, V, kv_weight)
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
            at, rows_out, rows_lse = drop_holes(plan, chunk, chunk.q_rows, rows_out, rows_lse)
            out.index_add_(0, at, rows_out)
            lse.index_copy_(0, at, rows_lse)
    return tokens_of(out, B, H, plan.per_head), tokens_of(lse[..., None], B, H, plan.per_head)[..., 0].contiguous()


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
    if q.numel() == 0 or v.numel() == 0:
        wanted = [t for t, need in zip((q, k, v, kv_weight, *axis_bias), needs, strict=True) if need and t is not None]
        return [empty_gradient(t, any(t is x for x in (q, k, v))).zero_() for t in wanted]
    plan = make_plan(q, k, q_index, kv_index, table, kv_weight)
    if is_dense(plan, q, k, kv_weight, axis_bias, causal, self_logit, per_row):
        return dense_backward(plan, grad_out, grad_lse, out, lse, q, k, v, scale, needs[:3])
    heads = 1 if plan.per_head else H
    Q, K, V = (rows_of(x, plan.per_head) for x in (q, k, v))
    dO, O = rows_of(grad_out, plan.per_head), rows_of(out, plan.per_head)
    L = rows_of(lse[..., None], plan.per_head)
    dL = None if grad_lse is None else rows_of(grad_lse[..., None], plan.per_head)
    dQ, dK, dV = (x.new_zeros(x.shape, dtype=_accumulator(x.dtype)) for x in (Q, K, V))
    dW = None if kv_weight is None else kv_weight.new_zeros(kv_weight.shape, dtype=L.dtype)
    dT = [torch.zeros_like(t, dtype=L.dtype) for t in axis_bias]
    I = plan.q_index.shape[2]
    for chunk in chunks(plan, q, k, v, split_keys=True):
        qc, kc, vc, weight = gather(plan, chunk, Q, K, V, kv_weight)
        bias, tables, fixed = _score_terms(plan, chunk, q, k, axis_bias, q_pos, k_pos, causal, self_logit)
        if per_row:
            at = torch.arange(chunk.first * I, chunk.first * I + chunk.tokens.numel(), device=q.device)
        else:
            at = chunk.q_rows
        hole = (chunk.tokens < 0).view(-1, 1, 1) if plan.q_holes else None
        dO_c, O_c, L_c = (take(x, at, I, hole) for x in (dO, O, L))
        dL_c = None if dL is None else take(dL, at, I, hole)[..., 0]
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
            slots = chunk.slots.stop - chunk.slots.start
            plain_k, plain_v = (take(x, chunk.kv_rows, chunk.keys.shape[1], None) for x in (K, V))
            per_slot = [
                (grad.to(L.dtype) * plain.to(L.dtype)).unflatten(2, (slots, -1)).sum((1, 3, 4))
                for grad, plain in ((dk, plain_k), (dv, plain_v))
            ]
            weight_rows(dW, plan, chunk, kv_weight, add=per_slot[0] + per_slot[1])
            dk, dv = dk * weight, dv * weight
        scatter(dQ, chunk.q_rows, dq, (chunk.tokens < 0) if plan.q_holes else None)
        unseen = (chunk.keys < 0) if plan.kv_holes else None
        scatter(dK, chunk.kv_rows, dk, unseen)
        scatter(dV, chunk.kv_rows, dv, unseen)
        for target, piece in zip(dT, dt[-len(dT) :] if dT else (), strict=True):
            _scatter_table(target, piece, plan, chunk, heads, q)
    grads: list[Tensor | None] = [
        tokens_of(dQ.to(q.dtype), B, H, plan.per_head),
        tokens_of(dK.to(k.dtype), B, k.shape[1], plan.per_head),
        tokens_of(dV.to(v.dtype), B, k.shape[1], plan.per_head),
        None if dW is None or kv_weight is None else dW.to(kv_weight.dtype),
        *(grad.to(t.dtype) for grad, t in zip(dT, axis_bias, strict=True)),
    ]
    return [grad for grad, need in zip(grads, needs, strict=True) if need and grad is not None]


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
        slots = chunk.slots.stop - chunk.slots.start
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
    token_major_gradients=("q", "k", "v"),
)
