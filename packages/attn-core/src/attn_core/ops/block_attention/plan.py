"""Block lists and tables brought to one form, cut into chunks, and the rows of tensors that a chunk reads."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of gathered queries, keys, values and scores held at a time: 2²¹ float32 are 8 MiB, a last-level cache.
CHUNK_ELEMENTS = 2**21
# Backward takes longer key lists in spans: what it gathers must not grow with the width of the table.
SPAN_ELEMENTS = 2**18


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
    slots: slice  # the columns of the table


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


def chunks(plan: Plan, q: Tensor, k: Tensor, v: Tensor, *, split_keys: bool = False) -> Iterator[Chunk]:
    """Spans of blocks whose gathered rows and scores fit the cache; with ``split_keys`` also spans of their keys."""
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
    width = max(1, SPAN_ELEMENTS // (heads * J * widths)) if split_keys else K
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
        q_rows = (q_at + groups[:, None] * q.shape[2]).flatten()
        kv_rows = (kv_at + plan.k_base[groups][:, None]).flatten()
        yield Chunk(groups, tokens, keys, q_rows, kv_rows, g0 * R + r0, slice(r0, r1), slots)


def rows_of(x: Tensor, per_head: bool) -> Tensor:
    if per_head:
        return x.reshape(-1, 1, x.shape[-1])
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[-1])


def tokens_of(rows: Tensor, batch: int, heads: int, per_head: bool) -> Tensor:
    """Inverse of :func:`rows_of`, token-major."""
    if per_head:
        return (
            rows.view(batch, heads, rows.shape[0] // max(1, batch * heads), rows.shape[-1])
            .transpose(1, 2)
            .contiguous()
            .transpose(1, 2)
        )
    return rows.view(batch, -1, heads, rows.shape[-1]).transpose(1, 2)


def take(rows: Tensor, at: Tensor, per_block: int, hole: Tensor | None) -> Tensor:
    """(c, H, per_block, D) of the listed rows, zeros at holes."""
    taken = rows.index_select(0, at)
    if hole is not None:
        taken = taken.masked_fill(hole, 0.0)
    return taken.view(-1, per_block, *rows.shape[1:]).transpose(1, 2)


def scatter(target: Tensor, at: Tensor, grad: Tensor, hole: Tensor | None) -> None:
    """Add the gradient of gathered blocks (c, H, tokens, D) to the rows they came from."""
    rows = grad.transpose(1, 2).reshape(-1, grad.shape[1], grad.shape[3]).to(target.dtype)
    if hole is not None:
        rows = rows.masked_fill(hole.view(-1, 1, 1), 0.0)
    target.index_add_(0, at, rows)


def drop_holes(plan: Plan, chunk: Chunk, at: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    if not plan.q_holes:
        return at, *rows
    kept = (chunk.tokens.flatten() >= 0).nonzero()[:, 0]
    return at[kept], *(x[kept] for x in rows)


def gather(
    plan: Plan, chunk: Chunk, Q: Tensor, K: Tensor, V: Tensor, kv_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Query, key and value blocks of a chunk, and the weight (c, 1, K·J, 1) already multiplied into keys and values."""
    keys = chunk.keys.shape[1]
    qc = take(Q, chunk.q_rows, chunk.tokens.shape[1], None)
    kc, vc = (take(x, chunk.kv_rows, keys, None) for x in (K, V))
    if kv_weight is None:
        return qc, kc, vc, None
    weight = weight_rows(kv_weight, plan, chunk, kv_weight)
    weight = weight.repeat_interleave(keys // weight.shape[1], dim=1)[:, None, :, None]
    return qc, kc * weight, vc * weight, weight


def weight_rows(target: Tensor, plan: Plan, chunk: Chunk, like: Tensor, add: Tensor | None = None) -> Tensor:
    """The chunk's rows and slots (c, K) of a (b, h, R, K) tensor; ``add`` is accumulated into them."""
    batch, heads, R, _ = like.shape
    index = _table_base(plan, chunk, batch, heads, like) * R
    blocks = torch.arange(chunk.blocks.start, chunk.blocks.stop, device=like.device)
    index = index + blocks.repeat(len(chunk.groups) // len(blocks))
    rows = target.flatten(0, 2)[:, chunk.slots]
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
