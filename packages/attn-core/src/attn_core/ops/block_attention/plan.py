"""Block lists and tables brought to one form, cut into chunks, and the rows of tensors that a chunk reads."""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attn_core.kernels.derived import derived

# Elements of gathered queries, keys, values and scores held at a time: 2²⁰ float32 are 4 MiB.
CHUNK_ELEMENTS = 2**20
# Backward takes longer key lists in spans: what it gathers must not grow with the width of the table.
SPAN_ELEMENTS = 2**18


class Plan(NamedTuple):
    """Indices brought to one form: G groups (images, or images × heads when heads differ) of R blocks."""

    groups: int
    per_head: bool
    heads: int  # of queries, of keys and values within a group
    key_heads: int
    q_index: Tensor  # (G|1, R, I)
    kv_index: Tensor  # (G|1, S, J)
    table: Tensor  # (G|1, R, K)
    q_holes: bool
    kv_holes: bool
    q_covered: bool  # each query is listed once, and reads something
    kv_covered: bool  # each key is read by one block of queries, once


class Chunk(NamedTuple):
    groups: Tensor  # (c,) group of each block
    tokens: Tensor  # (c, I) query tokens, −1 for holes
    keys: Tensor  # (c, K·J) key tokens, −1 for holes
    q_rows: Tensor  # (c, heads, I) rows of the flat queries, holes at some valid row
    kv_rows: Tensor  # (c, key heads, K·J)
    blocks: slice  # the chunk's blocks within their groups
    slots: slice  # the columns of the table


def make_plan(
    q: Tensor, k: Tensor, q_index: Tensor, kv_index: Tensor, table: Tensor | None, kv_weight: Tensor | None
) -> Plan:
    """Heads share one gather unless an index, the table or the weights differ between them.

    A plan is made once for index tensors that stay.
    """
    sizes = (
        q.shape[0],
        q.shape[1],
        q.shape[2],
        k.shape[1],
        k.shape[2],
        kv_weight is not None and kv_weight.shape[1] > 1,
    )
    return derived(("block_attention plan", *sizes), functools.partial(_new_plan, *sizes), q_index, kv_index, table)


def _new_plan(
    B: int,
    H: int,
    N: int,
    Hk: int,
    M: int,
    weights_differ: bool,
    q_index: Tensor,
    kv_index: Tensor,
    given_table: Tensor | None,
) -> Plan:
    if given_table is None:
        table = torch.arange(q_index.shape[2], device=q_index.device).view(1, 1, -1, 1)
    else:
        table = given_table
    per_head = weights_differ or any(x.shape[1] > 1 for x in (q_index, kv_index, table))

    def grouped(index: Tensor, heads: int) -> Tensor:
        index = index.long()
        if index.shape[:2] == (1, 1):
            return index[0]
        if not per_head:
            return index[:, 0]
        index = index.expand(B, heads, *index.shape[2:])
        return index.repeat_interleave(H // heads, dim=1).flatten(0, 1)

    queries, keys, listed = grouped(q_index, H), grouped(kv_index, Hk), grouped(table, H)
    q_holes, kv_holes = bool((q_index < 0).any()), bool((kv_index < 0).any()) or bool((table < 0).any())
    shares = per_head and Hk < H  # several groups add to one key
    kv_covered = not (kv_holes or shares) and _is_permutation(listed, keys.shape[1]) and _is_permutation(keys, M)
    return Plan(
        B * H if per_head else B,
        per_head,
        1 if per_head else H,
        1 if per_head else Hk,
        queries,
        keys,
        listed,
        q_holes,
        kv_holes,
        not q_holes and listed.shape[2] * keys.shape[2] > 0 and _is_permutation(queries, N),
        kv_covered,
    )


def _is_permutation(index: Tensor, length: int) -> bool:
    """Whether each group (G, ·, ·) lists every number below ``length`` once."""
    index = index.flatten(1)
    if index.shape[1] != length:
        return False
    return bool(index.new_zeros(index.shape).scatter_(1, index, 1).all())


def chunks(plan: Plan, q: Tensor, k: Tensor, v: Tensor, *, split_keys: bool = False) -> Iterator[Chunk]:
    """Spans of blocks whose gathered rows and scores fit the cache; with ``split_keys`` also spans of their keys."""
    R, I = plan.q_index.shape[1:]
    J, K = plan.kv_index.shape[2], plan.table.shape[2]
    if plan.groups * R * I == 0 or K * J == 0:
        return
    widths = q.shape[-1] + v.shape[-1]
    per_block = plan.heads * (2 * I * widths + K * J * widths + I * K * J)
    count = max(1, CHUNK_ELEMENTS // per_block)
    if count >= R:
        step = max(1, count // R)
        spans = [(g, min(g + step, plan.groups), 0, R) for g in range(0, plan.groups, step)]
    else:
        count = math.ceil(R / math.ceil(R / count))  # chunks of equal size
        spans = [(g, g + 1, r, min(r + count, R)) for g in range(plan.groups) for r in range(0, R, count)]
    width = max(1, SPAN_ELEMENTS // (plan.heads * J * widths)) if split_keys else K
    for (g0, g1, r0, r1), s0 in itertools.product(spans, range(0, K, width)):
        slots = slice(s0, min(s0 + width, K))
        groups = torch.arange(g0, g1, device=q.device)

        def part(index: Tensor, g0: int = g0, g1: int = g1, r0: int = r0, r1: int = r1) -> Tensor:
            index = index[g0:g1] if index.shape[0] > 1 else index.expand(g1 - g0, *index.shape[1:])
            return index[:, r0:r1].flatten(0, 1)

        groups = groups.repeat_interleave(r1 - r0)
        tokens, listed = part(plan.q_index), part(plan.table)[:, slots]
        blocks = listed.clamp(min=0) if plan.kv_holes else listed
        if plan.kv_index.shape[0] == 1:
            keys = plan.kv_index[0].index_select(0, blocks.flatten()).view(*blocks.shape, J)
        else:
            keys = plan.kv_index[groups[:, None], blocks]
        if plan.kv_holes:
            keys = keys.masked_fill((listed < 0)[..., None], -1)
        keys = keys.flatten(1)
        q_at = tokens.clamp(min=0) if plan.q_holes else tokens
        kv_at = keys.clamp(min=0) if plan.kv_holes else keys
        q_rows = token_rows(plan, groups, q_at, q.shape[2], q.shape[1], q.shape[1])
        kv_rows = token_rows(plan, groups, kv_at, k.shape[2], q.shape[1], k.shape[1])
        yield Chunk(groups, tokens, keys, q_rows, kv_rows, slice(r0, r1), slots)


def token_rows(plan: Plan, groups: Tensor, tokens: Tensor, length: int, heads: int, own_heads: int) -> Tensor:
    """(c, heads of a group, n) numbers of tokens (c, n) among the rows of a tensor with ``own_heads`` heads."""
    if plan.per_head:
        image, head = groups // heads, groups % heads // (heads // own_heads)
        return ((image[:, None] * length + tokens) * own_heads + head[:, None])[:, None]
    rows = (groups[:, None] * length + tokens) * own_heads
    return rows[:, None] + torch.arange(own_heads, device=rows.device)[:, None]


def rows_of(x: Tensor) -> Tensor:
    """(B, H, N, D) → (B·N·H, D): a view where heads were split from one projection."""
    return x.transpose(1, 2).reshape(-1, x.shape[-1])


def tokens_of(rows: Tensor, batch: int, heads: int) -> Tensor:
    """Inverse of :func:`rows_of`, token-major."""
    return rows.view(batch, rows.shape[0] // max(1, batch * heads), heads, rows.shape[-1]).transpose(1, 2)


def take(rows: Tensor, at: Tensor, hole: Tensor | None = None) -> Tensor:
    """(c, heads, n, D) of the rows listed in ``at``, zeros at holes (c, n)."""
    taken = rows.index_select(0, at.flatten()).view(*at.shape, rows.shape[-1])
    return taken if hole is None else taken.masked_fill_(hole[:, None, :, None], 0.0)


def put(target: Tensor, at: Tensor, values: Tensor, hole: Tensor | None) -> None:
    """Write values (c, heads, n, D) to rows that are listed once; holes write nothing."""
    at, values = at.flatten(), values.reshape(-1, values.shape[-1])
    if hole is not None:
        kept = (~hole[:, None].expand(-1, len(at) // hole.numel(), -1)).flatten().nonzero()[:, 0]
        at, values = at[kept], values[kept]
    target.index_copy_(0, at, values)


def scatter(target: Tensor, at: Tensor, grad: Tensor, hole: Tensor | None, *, once: bool = False) -> None:
    """Add the gradient (c, heads, n, D) of gathered rows to the rows they came from; ``once``: no row has another."""
    grad = grad.to(target.dtype)
    if once:
        put(target, at, grad, hole)
    else:
        grad = grad if hole is None else grad.masked_fill(hole[:, None, :, None], 0.0)
        target.index_add_(0, at.flatten(), grad.reshape(-1, grad.shape[-1]))


def gather(
    plan: Plan, chunk: Chunk, Q: Tensor, K: Tensor, V: Tensor, kv_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Query, key and value blocks of a chunk, and the weight (c, 1, K·J, 1) already multiplied into keys and values."""
    qc, kc, vc = take(Q, chunk.q_rows), take(K, chunk.kv_rows), take(V, chunk.kv_rows)
    if kv_weight is None:
        return qc, kc, vc, None
    weight = weight_rows(kv_weight, plan, chunk, kv_weight)
    weight = weight.repeat_interleave(kc.shape[2] // weight.shape[1], dim=1)[:, None, :, None]
    return qc, kc * weight, vc * weight, weight


def weight_rows(target: Tensor, plan: Plan, chunk: Chunk, like: Tensor, add: Tensor | None = None) -> Tensor:
    """The chunk's rows and slots (c, K) of a (b, h, R, K) tensor; ``add`` is accumulated into them."""
    batch, heads, R, _ = like.shape
    index = _table_base(plan, chunk, batch, heads) * R
    blocks = torch.arange(chunk.blocks.start, chunk.blocks.stop, device=like.device)
    index = index + blocks.repeat(len(chunk.groups) // len(blocks))
    rows = target.flatten(0, 2)[:, chunk.slots]
    if add is not None:
        rows.index_add_(0, index, add.to(rows.dtype))
    return rows[index]


def _table_base(plan: Plan, chunk: Chunk, batch: int, heads: int) -> Tensor:
    """Number b·heads + h of each chunk block within the leading dimensions of a broadcastable tensor."""
    if not plan.per_head:
        return chunk.groups * heads if batch > 1 else torch.zeros_like(chunk.groups)
    H = plan.groups // max(1, batch) if batch > 1 else heads
    b = chunk.groups // H if batch > 1 else torch.zeros_like(chunk.groups)
    h = chunk.groups % H if heads > 1 else torch.zeros_like(chunk.groups)
    return b * heads + h
