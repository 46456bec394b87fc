"""Block attention in plain torch: blocks gathered a cache-sized chunk at a time, or masked when most keys are read.

Memory beyond the results: O(index) and one chunk, whatever the width of the table.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attn_core.kernels.registration import Grads, empty_gradient
from attn_core.ops.attention import torch_backend as dense
from attn_core.ops.attention.chunked import chunked_backward, chunked_forward, row_shift
from attn_core.ops.attention.cpu_flash import empty_result
from attn_core.ops.attention.reference import Arguments as DenseArguments

from .masked import dense_backward, dense_forward, is_dense
from .plan import (
    Chunk,
    Plan,
    chunks,
    gather,
    make_plan,
    put,
    rows_of,
    scatter,
    take,
    token_rows,
    tokens_of,
    weight_rows,
)
from .reference import BLOCK_ATTENTION, Arguments, reference

# Keys of a block up to which its scores are held in full (break-even measured on two AVX-512 cores).
SMALL_KEYS = 512
EXACT = 2**24  # integers below are float32 numbers


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Chunks of blocks, each gathered and attended as one batch; one masked call where nearly all is read anyway."""
    q, k, v = a.q, a.k, a.v
    B, H = q.shape[:2]
    if q.numel() == 0 or v.numel() == 0:
        return empty_result(q, v, a.results)
    plan = make_plan(q, k, a.q_index, a.kv_index, a.table, a.kv_weight)
    if is_dense(plan, a):
        return dense_forward(plan, a)
    Q, K, V = (rows_of(x) for x in (q, k, v))
    out = _rows_like(V, B * a.results * H, plan.q_covered and not a.per_row)
    lse = V.new_full((len(out), 1), -math.inf, dtype=a.accumulator)
    for chunk in chunks(plan, q, k, v):
        qc, kc, vc, _ = gather(plan, chunk, Q, K, V, a.kv_weight)
        bias, tables, factor = _score_terms(plan, chunk, a)
        if factor is None and not _is_small(kc):
            out_c, lse_c = dense.forward(
                DenseArguments(qc, kc, vc, bias, None, None, None, tables, a.scale, "none", ())
            )
        else:
            terms = [] if bias is None else [bias]
            out_c, lse_c = chunked_forward(qc, kc, vc, terms, tables, a.scale, factor=factor)
        at = _result_rows(plan, chunk, a)
        hole = chunk.tokens < 0 if plan.q_holes else None
        put(out, at, out_c, hole)
        put(lse, at, lse_c[..., None], hole)
    return tokens_of(out, B, H), tokens_of(lse, B, H)[..., 0].contiguous()


def _result_rows(plan: Plan, chunk: Chunk, a: Arguments) -> Tensor:
    """(c, heads, I): the results' rows, those of the queries or one for each entry of ``q_index``."""
    if not a.per_row:
        return chunk.q_rows
    R, I = plan.q_index.shape[1:]
    blocks = torch.arange(chunk.blocks.start, chunk.blocks.stop, device=chunk.groups.device)
    entries = (blocks.repeat(len(chunk.groups) // len(blocks)) * I)[:, None] + torch.arange(I, device=blocks.device)
    return token_rows(plan, chunk.groups, entries, R * I, a.q.shape[1], a.q.shape[1])


def backward(grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:
    """The chunks of the forward pass again; gradients of shared keys are summed in the accumulation dtype."""
    (grad_out, grad_lse), (out, lse) = grads, kept
    assert grad_out is not None
    q, k, v, kv_weight, scale = a.q, a.k, a.v, a.kv_weight, a.scale
    B, H = q.shape[:2]
    if q.numel() == 0 or v.numel() == 0:
        operands = (q, k, v, kv_weight, *a.axis_bias)
        return [None if x is None else empty_gradient(x, i < 3).zero_() for i, x in enumerate(operands)]
    plan = make_plan(q, k, a.q_index, a.kv_index, a.table, kv_weight)
    if is_dense(plan, a):
        return dense_backward(plan, grads, kept, a, needs)
    Q, K, V, dO = (rows_of(x) for x in (q, k, v, grad_out))
    shift, L = (rows_of(x[..., None]) for x in (row_shift(grad_out, grad_lse, out, lse.dtype), lse))
    d_lse = None if grad_lse is None else rows_of(grad_lse[..., None])
    dQ = _rows_like(Q, len(Q), plan.q_covered, a.accumulator)
    dK, dV = (_rows_like(x, len(x), plan.kv_covered, a.accumulator) for x in (K, V))
    dW = None if kv_weight is None else kv_weight.new_zeros(kv_weight.shape, dtype=L.dtype)
    dT = [t.new_zeros(t.shape, dtype=L.dtype) for t in a.axis_bias]
    for chunk in chunks(plan, q, k, v, split_keys=True):
        qc, kc, vc, weight = gather(plan, chunk, Q, K, V, kv_weight)
        bias, tables, factor = _score_terms(plan, chunk, a)
        at = _result_rows(plan, chunk, a)
        hole = chunk.tokens < 0 if plan.q_holes else None
        dO_c, shift_c, L_c = (take(x, at, hole) for x in (dO, shift, L))
        shift_c, L_c = shift_c[..., 0], L_c[..., 0]
        terms = [] if bias is None else [bias]
        all_keys = chunk.slots.stop - chunk.slots.start == plan.table.shape[2]
        if tables and all_keys and q.dtype in dense.NARROW:  # δ of a rounded output is too coarse for sums over cells
            lse_grad = None if d_lse is None else take(d_lse, at, hole)[..., 0]
            found = chunked_backward(
                dO_c, None, L_c, qc, kc, vc, terms, tables, scale, factor=factor, grad_lse=lse_grad
            )
        elif factor is None and not _is_small(kc):
            # The fused kernel computes δ by itself: an output of zeros leaves it to the gradient of lse.
            dense_a = DenseArguments(qc, kc, vc, bias, None, None, None, tables, scale, "none", ())
            wanted = [True, True, True, False, *(True for _ in tables)]
            zeros = torch.zeros_like(dO_c)
            found = dense.backward((dO_c, -shift_c), (zeros, L_c), dense_a, wanted, whole=False)
            found[4:] = [x.sum_to_size(t.shape) for x, t in zip(found[4:], tables, strict=True) if x is not None]
        else:
            found = chunked_backward(dO_c, shift_c, L_c, qc, kc, vc, terms, tables, scale, factor=factor)
        dq, dk, dv, *dt = [x for x in found if x is not None]
        if weight is not None:
            assert dW is not None
            assert kv_weight is not None
            slots = chunk.slots.stop - chunk.slots.start
            plain_k, plain_v = (take(x, chunk.kv_rows) for x in (K, V))
            per_slot = [
                (grad.to(L.dtype) * plain.to(L.dtype)).unflatten(2, (slots, -1)).sum((1, 3, 4))
                for grad, plain in ((dk, plain_k), (dv, plain_v))
            ]
            weight_rows(dW, plan, chunk, kv_weight, add=per_slot[0] + per_slot[1])
            dk, dv = dk * weight, dv * weight
        scatter(dQ, chunk.q_rows, dq, hole, once=plan.q_covered and chunk.slots.start == 0)
        unseen = chunk.keys < 0 if plan.kv_holes else None
        scatter(dK, chunk.kv_rows, dk, unseen, once=plan.kv_covered)
        scatter(dV, chunk.kv_rows, dv, unseen, once=plan.kv_covered)
        for target, piece in zip(dT, dt[-len(dT) :] if dT else (), strict=True):
            scatter(target.view(-1, target.shape[-1]), _table_rows(target, plan, chunk, H), piece, hole)
    token_major = (tokens_of(x.to(q.dtype), B, heads) for x, heads in ((dQ, H), (dK, k.shape[1]), (dV, k.shape[1])))
    return [*token_major, dW, *dT]


def _rows_like(x: Tensor, rows: int, covered: bool, dtype: torch.dtype | None = None) -> Tensor:
    """(rows, D): zeros unless each row will be written, since clearing fresh memory costs as much as a product."""
    return (x.new_empty if covered else x.new_zeros)(rows, x.shape[-1], dtype=dtype or x.dtype)


def _is_small(k: Tensor) -> bool:
    """Whether batched products beat the fused kernel, which starts a product for every block and head."""
    return k.shape[2] <= SMALL_KEYS and k.dtype in (torch.float32, torch.float64)


def _score_terms(plan: Plan, chunk: Chunk, a: Arguments) -> tuple[Tensor | None, list[Tensor], Tensor | None]:
    """What joins the dot products of a chunk: a bias, axis tables over (slot, cells), and a factor of the products.

    Masks are made by arithmetic: comparing and filling cost a CPU many times what it needs to subtract.
    """
    q, causal, self_logit = a.q, a.causal, a.self_logit
    dtype = q.dtype if self_logit is None else a.accumulator
    bias = factor = None
    if causal or self_logit is not None:
        q_at = _positions(a.q_pos, chunk, chunk.tokens, plan, q)
        k_at = _positions(a.k_pos, chunk, chunk.keys, plan, q)
        exact = torch.float32 if max(int(q_at.abs().max()), int(k_at.abs().max())) < EXACT else torch.float64
        q_at, k_at = q_at.to(exact), k_at.to(exact)
        if plan.kv_holes:
            k_at = k_at.masked_fill(chunk.keys < 0, math.inf)  # behind everything
        ahead = (q_at[:, :, None] - k_at[:, None, :]).to(dtype)[:, None]
        if self_logit is not None:
            factor = ahead.abs().clamp_(max=1)  # 0 at the query itself
        if causal:
            bias = _infinite(ahead)
    if plan.kv_holes and not causal:
        bias = _infinite(-(chunk.keys < 0)[:, None, None].to(dtype))
    if factor is not None and self_logit is not None:
        if math.isinf(self_logit):
            own = torch.zeros_like(factor).masked_fill_(factor == 0, self_logit)
        else:
            own = factor.mul(-self_logit).add_(self_logit)
        bias = own if bias is None else own.add_(bias)
    tables = []
    if a.axis_bias:
        slots = chunk.slots.stop - chunk.slots.start
        c, I = chunk.tokens.shape
        if slots > 1:
            tables.append(q.new_zeros(c, 1, I, slots))
        for table in a.axis_bias:
            tables.append(take(table.reshape(-1, table.shape[-1]), _table_rows(table, plan, chunk, q.shape[1])))
    return bias, tables, factor


def _infinite(x: Tensor) -> Tensor:
    """−∞ where ``x`` is negative, else 0, in place."""
    most = torch.finfo(x.dtype).max
    return x.clamp_(-1, 0).mul_(most).mul_(most)


def _positions(positions: Tensor | None, chunk: Chunk, tokens: Tensor, plan: Plan, q: Tensor) -> Tensor:
    if positions is None:
        return tokens
    image = chunk.groups // q.shape[1] if plan.per_head else chunk.groups
    row = image[:, None] if positions.shape[0] > 1 else torch.zeros_like(image)[:, None]
    return positions.long()[row, tokens.clamp(min=0)]


def _table_rows(table: Tensor, plan: Plan, chunk: Chunk, heads: int) -> Tensor:
    """Rows of the chunk's queries in a table (B|1, H|1, N, n) flattened to (·, n): (c, heads of a group or 1, I)."""
    batch, own_heads, N, _ = table.shape
    image = chunk.groups // heads if plan.per_head else chunk.groups
    image = image[:, None, None] if batch > 1 else 0
    if plan.per_head:
        head = (chunk.groups % heads)[:, None, None] if own_heads > 1 else 0
    else:
        head = torch.arange(own_heads, device=table.device)[:, None]
    return (image * own_heads + head) * N + chunk.tokens.clamp(min=0)[:, None]


block_attention = BLOCK_ATTENTION.register("torch", forward, backward, exported=reference)
