"""S2 attention: every head reads the latest blocks of tokens and its own share of the older ones.

Paper: Lin et al., Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads (later
S2-Attention: Hardware-Aware Context Sharding), arXiv 2407.17678. Official: linxihui/dkernel, ``dkernel/utils.py``
(``get_sparse_attn_mask``) and its CUDA operators, MIT License.

The rule is `attn_core.local_stride_table`. Columns are absolute: a block that a head does not read from beyond its
band is read by none of that head's later queries, which is why :class:`ShardedLayer` may forget it.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from attn_core import attention, block_attention, local_stride_table, merge_attention
from seq_models.layers.llama_attention import real_positions

LONG = 1024  # tokens from which a CPU takes chunks of queries with the keys of all heads side by side
CHUNK = 8  # blocks of such a chunk


@dataclass(frozen=True)
class ShardPattern:
    """Which blocks of tokens the heads of a layer read.

    Args:
        block_size: tokens of a block.
        local_blocks: the latest blocks, the own one included, that every head reads.
        vert_stride: of the older blocks a head reads every so-manieth.
        num_dense_heads: the last so many key heads read everything.
        head_step: by how many blocks the columns of neighboring key heads differ; None: the official
            max(1, ⌊vert_stride / num_heads⌋), with **query** heads. 0: all heads alike (official ``homo_head``).
        head_offset: shift of all columns.
    """

    block_size: int = 64
    local_blocks: int = 16
    vert_stride: int = 8
    num_dense_heads: int = 0
    head_step: int | None = None
    head_offset: int = 0

    def __post_init__(self) -> None:
        for name in ("block_size", "local_blocks", "vert_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"ShardPattern: {name} must be at least 1, got {name}={getattr(self, name)}")
        if self.num_dense_heads < 0:
            raise ValueError(f"ShardPattern: num_dense_heads must not be negative, got {self.num_dense_heads}")

    def for_heads(self, num_heads: int, num_kv_heads: int) -> "HeadShards":
        """The pattern of a layer with so many query and key heads."""
        return HeadShards(self, num_heads, num_kv_heads)


@dataclass(frozen=True)
class HeadShards:
    """A :class:`ShardPattern` for the heads of a layer.

    Raises:
        ValueError: more dense heads than key heads, or key heads that do not divide the query heads.
    """

    pattern: ShardPattern
    num_heads: int
    num_kv_heads: int

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"HeadShards: num_heads must be a multiple of num_kv_heads, got {self.num_heads} and "
                f"{self.num_kv_heads}"
            )
        if self.pattern.num_dense_heads > self.num_kv_heads:
            raise ValueError(
                f"HeadShards: num_dense_heads must not exceed the {self.num_kv_heads} key heads, "
                f"got {self.pattern.num_dense_heads}"
            )

    @property
    def step(self) -> int:
        """Blocks by which the columns of neighboring key heads differ."""
        given = self.pattern.head_step
        return max(1, self.pattern.vert_stride // self.num_heads) if given is None else given

    @property
    def sparse(self) -> int:
        """Key heads that do not read everything."""
        return self.num_kv_heads - self.pattern.num_dense_heads

    def first_column(self, head: int) -> int:
        """The first block of a sparse key head's columns; the others follow at ``vert_stride``."""
        return -(head * self.step + self.pattern.head_offset) % self.pattern.vert_stride

    def first_columns(self, device: torch.device | None = None) -> Int[Tensor, " Hs"]:
        """:meth:`first_column` of all sparse key heads."""
        return torch.tensor([self.first_column(head) for head in range(self.sparse)], device=device, dtype=torch.long)

    def reads(
        self, row: Int[Tensor, "*#s"], column: Int[Tensor, "*#s"], head: Int[Tensor, "*#s"]
    ) -> Bool[Tensor, "*s"]:
        """Whether queries of block ``row`` read key block ``column`` ≤ ``row`` in a key head."""
        pattern = self.pattern
        strided = (column + head * self.step + pattern.head_offset) % pattern.vert_stride == 0
        return (column <= row) & (strided | (row - column < pattern.local_blocks) | (head >= self.sparse))

    def table(self, blocks: int, device: torch.device | str | None = None) -> Int[Tensor, "1 H R K"]:
        """The table of :func:`attn_core.block_attention` for so many blocks."""
        return _table(self, blocks).to(device)

    def coverage(self) -> float:
        """Share of the old blocks that at least one head reads: 1 if nothing is lost to the layer as a whole.

        Below 1 where there are fewer heads than ``vert_stride`` and the steps between them jump over columns.
        """
        if self.pattern.num_dense_heads:
            return 1.0
        return len({self.first_column(head) for head in range(self.sparse)}) / self.pattern.vert_stride

    def density(self, tokens: int) -> float:
        """Share of the pairs of a causal layer that are read, in pairs of blocks."""
        blocks = -(-tokens // self.pattern.block_size)
        read = int((self.table(blocks) >= 0).sum())
        return read / (self.num_heads * blocks * (blocks + 1) / 2)

    def kept_tokens(self, tokens: int) -> int:
        """Tokens that the cache of one row keeps, summed over key heads, once ``tokens`` have been seen.

        A sparse head keeps the blocks from ⌊tokens/b⌋ − local + 1 on, and of the ones before its columns.
        """
        block, local, stride = self.pattern.block_size, self.pattern.local_blocks, self.pattern.vert_stride
        old = max(0, tokens // block - local + 1)  # blocks that no head needs for nearness
        columns = [max(0, -((self.first_column(head) - old) // stride)) for head in range(self.sparse)]
        near = tokens - old * block
        return sum(near + count * block for count in columns) + self.pattern.num_dense_heads * tokens

    def block_mask(self, tokens: int, device: torch.device | str | None = None) -> BlockMask:
        """The pattern for ``torch.nn.attention.flex_attention``: blocks in full, and the diagonal under causality."""
        size = self.pattern.block_size
        table = self.table(-(-tokens // size), device)
        row = torch.arange(table.shape[2], device=table.device)[:, None]
        full = torch.where((table >= 0) & (table < row), table, table.shape[2])
        full = full.sort(-1).values
        count = (full < table.shape[2]).sum(-1, dtype=torch.int32)
        diagonal = torch.zeros_like(table)
        diagonal[..., 0] = row[:, 0]
        wide = F.pad(torch.where(full < table.shape[2], full, 0), (0, table.shape[2] - table.shape[3]))
        return BlockMask.from_kv_blocks(
            torch.ones_like(count),
            F.pad(diagonal, (0, table.shape[2] - table.shape[3])).to(torch.int32),
            count,
            wide.to(torch.int32),
            BLOCK_SIZE=(size, size),
            mask_mod=functools.partial(_visible, self),
            seq_lengths=(tokens, tokens),
        )


def _visible(shards: HeadShards, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001  flex_attention's signature
    size, group = shards.pattern.block_size, shards.num_heads // shards.num_kv_heads
    return shards.reads(query // size, key // size, head // group) & (key <= query)


@functools.lru_cache(maxsize=64)
def _table(shards: HeadShards, blocks: int) -> Tensor:
    pattern = shards.pattern
    return local_stride_table(
        blocks,
        pattern.local_blocks,
        pattern.vert_stride,
        shards.num_heads,
        num_kv_heads=shards.num_kv_heads,
        num_dense_heads=pattern.num_dense_heads,
        step=shards.step,
        offset=pattern.head_offset,
    )


@torch.compiler.disable  # its indices follow from numbers; the graph around it goes on behind it
def sharded_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hk M D"],
    v: Float[Tensor, "B Hk M D"],
    shards: HeadShards,
    real: Bool[Tensor, "B M"] | None = None,
    *,
    scale: float | None = None,
) -> Float[Tensor, "B H N D"]:
    """Attention of the last N of M tokens under a pattern; blocks are counted from a row's first real token.

    Args:
        real: False for padding, anywhere; results of padding are 0.
    """
    tokens = k.shape[2]
    if q.shape[2] == tokens >= LONG and q.device.type == "cpu":
        if real is None:
            return _in_chunks(q, k, v, shards, scale)
        # Real tokens to the front, as blocks are counted; what lies behind them is seen by no real query.
        order = (~real).long().argsort(dim=1, stable=True)
        place = order[:, None, :, None]
        front = [x.gather(2, place.expand(-1, x.shape[1], -1, x.shape[3])) for x in (q, k, v)]
        out = _in_chunks(front[0], front[1], front[2], shards, scale)
        out = torch.zeros_like(out).scatter(2, place.expand_as(out), out)
        return out.masked_fill(~real[:, None, :, None], 0.0)
    if real is None:
        real = torch.ones(1, tokens, dtype=torch.bool, device=q.device)
    size, before = shards.pattern.block_size, tokens - q.shape[2]
    position = real_positions(real)
    blocks = -(-max(1, int(position.max()) + 1) // size)
    kv_index = position.new_full((len(real), blocks * size + 1), -1)
    column = torch.arange(tokens, device=q.device).expand_as(position)
    kv_index = kv_index.scatter(1, torch.where(real, position, blocks * size), column)[:, :-1]
    kv_index = kv_index.view(-1, 1, blocks, size)
    q_index = torch.where(kv_index >= before, kv_index - before, -1)
    asked = (q_index >= 0).any(-1).flatten(0, 1).any(0).nonzero()[:, 0]  # blocks with queries
    if len(asked) == 0:
        return torch.zeros_like(q)
    table = shards.table(blocks, q.device)[:, :, asked]
    numbers = torch.arange(tokens, device=q.device)[None]
    out, _ = block_attention(
        q, k, v, q_index[:, :, asked], kv_index, table, causal=True, q_pos=numbers[:, before:], k_pos=numbers,
        scale=scale,
    )  # fmt: skip
    return out


def _in_chunks(q: Tensor, k: Tensor, v: Tensor, shards: HeadShards, scale: float | None) -> Tensor:
    """The same for whole rows on a CPU: for each chunk of queries a dense call over the blocks near to it, masked, and
    one over the columns of each head before those. Half the time of blocks one by one.
    """
    pattern, group = shards.pattern, shards.num_heads // shards.num_kv_heads
    sparse = shards.sparse
    results = []
    if sparse:
        results.append(
            _sparse_chunks(q[:, : sparse * group], k[:, :sparse], v[:, :sparse], shards, group, scale),
        )
    if pattern.num_dense_heads:
        dense = attention(q[:, sparse * group :], k[:, sparse:], v[:, sparse:], scale=scale, causal="upper_left")
        results.append(dense[0])
    return torch.cat(results, 1) if len(results) > 1 else results[0]


def _sparse_chunks(q: Tensor, k: Tensor, v: Tensor, shards: HeadShards, group: int, scale: float | None) -> Tensor:
    size, local, stride = shards.pattern.block_size, shards.pattern.local_blocks, shards.pattern.vert_stride
    heads = k.shape[1]
    chunk, reach = CHUNK * size, (local - 1) * size
    columns = _columns(torch.stack([k, v]), shards)
    pieces = [x.split(chunk, dim=2) for x in (q, k, v)]
    masks: dict[tuple[int, int, int], Tensor] = {}
    results = []
    for number, asked in enumerate(pieces[0]):
        first = number * CHUNK
        behind = min(reach, number * chunk)
        shape = (first % stride, behind, asked.shape[2])
        if shape not in masks:
            near_mask = _near_mask(shards, heads, first, behind // size, asked.shape[2], q)
            masks[shape] = near_mask.repeat_interleave(group, 1)
        parts = [attention(asked, *(_window(x, number, behind) for x in pieces[1:]), bias=masks[shape], scale=scale)]
        counts = [max(0, -((shards.first_column(head) - max(0, first - local + 1)) // stride)) for head in range(heads)]
        most = max(counts)
        if most:
            keys, values = columns[:, :, :, :most].flatten(3, 4)
            lacking = None
            if min(counts) < most:
                count = torch.tensor(counts, device=q.device).repeat_interleave(group)[:, None, None]
                missing = torch.arange(most * size, device=q.device) >= count * size
                lacking = torch.zeros_like(missing, dtype=q.dtype).masked_fill(missing, -math.inf)[None]
            parts.append(attention(asked, keys, values, bias=lacking, scale=scale))
        results.append(merge_attention(*zip(*parts, strict=True))[0] if len(parts) > 1 else parts[0][0])
    return torch.cat(results, 2)


def _window(pieces: tuple[Tensor, ...], number: int, behind: int) -> Tensor:
    """Chunk ``number`` and ``behind`` tokens before it; only the chunks that are needed are touched, so gradients are
    not spread over all tokens again and again.
    """
    chosen, size = [pieces[number]], pieces[0].shape[2]
    while behind > 0:
        number -= 1
        chosen.insert(0, pieces[number][:, :, -min(behind, size) :])
        behind -= size
    return torch.cat(chosen, 2)


def _columns(x: Float[Tensor, "2 B H M D"], shards: HeadShards) -> Float[Tensor, "2 B H S b D"]:
    """Complete blocks that stand in a head's columns, in order; repeated ones where a head has fewer."""
    size = shards.pattern.block_size
    complete = x.shape[3] // size
    blocks = x[:, :, :, : complete * size].unflatten(3, (complete, size))
    count = -(-complete // shards.pattern.vert_stride)
    number = torch.arange(count, device=x.device) * shards.pattern.vert_stride + shards.first_columns(x.device)[:, None]
    head = torch.arange(x.shape[2], device=x.device)[:, None]
    return blocks[:, :, head, number.clamp(max=max(0, complete - 1))]


def _near_mask(shards: HeadShards, heads: int, first: int, blocks: int, queries: int, q: Tensor) -> Tensor:
    """(1, heads, queries, keys): 0 where a query of the chunk from block ``first`` on reads a key near it, else −∞."""
    size = shards.pattern.block_size
    query = torch.arange(first * size, first * size + queries, device=q.device)[:, None]
    key = torch.arange((first - blocks) * size, first * size + queries, device=q.device)
    head = torch.arange(heads, device=q.device)[:, None, None]
    seen = shards.reads(query // size, key // size, head) & (key <= query)
    return torch.zeros(1, *seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -math.inf)


class ShardedLayer(CacheLayerMixin):
    """Keys and values that some later query of their head needs; the others are forgotten.

    Rows and heads keep unequally many tokens: all of them lie behind each other, row by row and head by head, in
    ``keys`` and ``values`` (T, D); ``owner`` (T,) is row·Hk + head, ``position`` (T,) the number among the row's real
    tokens. ``counts`` are the rows' real tokens, ``seen`` all of them with padding.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, shards: HeadShards) -> None:
        super().__init__()
        self.shards = shards
        self.reset()

    def reset(self) -> None:
        """Forget every token."""
        self.seen, self.batch = 0, 0
        self.keys = self.values = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty, for the batch of the first keys."""
        self.batch = key_states.shape[0]
        device = key_states.device
        self.keys, self.values = (
            key_states.new_empty(0, key_states.shape[3]),
            value_states.new_empty(0, value_states.shape[3]),
        )
        self.owner = torch.empty(0, dtype=torch.long, device=device)
        self.position = torch.empty(0, dtype=torch.long, device=device)
        self.counts = torch.zeros(self.batch, dtype=torch.long, device=device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG002  transformers' signature
        """Not possible: heads keep unequally many keys.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "ShardedLayer.update: heads keep unequally many keys, which only S2Attention reads; give a DynamicCache to "
            "models that shard_context did not change"
        )

    def attend(
        self,
        q: Float[Tensor, "B H N D"],
        k: Float[Tensor, "B Hk N D"],
        v: Float[Tensor, "B Hk N D"],
        real: Bool[Tensor, "B N"] | None,
        scale: float,
    ) -> Float[Tensor, "B H N D"]:
        """Results of the new tokens, which join the layer; then what no later query needs leaves it."""
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        if k.shape[0] != self.batch:
            raise ValueError(f"ShardedLayer: the cache holds {self.batch} rows, got {k.shape[0]}")
        given = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device) if real is None else real
        fresh = self.seen == 0
        if fresh:
            out = sharded_attention(q, k, v, self.shards, real, scale=scale)  # pyright: ignore[reportCallIssue]
        self._join(k, v, given)
        if not fresh and q.shape[2] == 1:
            out = self._read(q, given, slice(0, self.batch), scale)
        elif not fresh:  # positions are those of one row
            rows = [self._read(q[row : row + 1], given, slice(row, row + 1), scale) for row in range(self.batch)]
            out = torch.cat(rows)
        self.counts = self.counts + given.sum(1)
        self.seen += k.shape[2]
        self._forget()
        return out  # pyright: ignore[reportPossiblyUnboundVariable]

    def _join(self, k: Tensor, v: Tensor, real: Tensor) -> None:
        heads = k.shape[1]
        row = real.nonzero()[:, 0]
        position = (self.counts[:, None] + real.long().cumsum(1) - 1)[real]
        owner = (row[:, None] * heads + torch.arange(heads, device=k.device)).flatten()
        self.owner = torch.cat([self.owner, owner])
        order = self.owner.argsort(stable=True)  # new tokens come last, and are the latest of their owner
        self.owner = self.owner[order]
        self.position = torch.cat([self.position, position.repeat_interleave(heads)])[order]
        self.keys, self.values = (
            torch.cat([held, new.transpose(1, 2)[real].flatten(0, 1)])[order]  # pyright: ignore[reportArgumentType]
            for held, new in ((self.keys, k), (self.values, v))
        )

    def _read(self, q: Tensor, real: Tensor, rows: slice, scale: float) -> Tensor:
        """Attention of new tokens to what is held, which they are part of: one token of all rows, or those of a row."""
        shards, size = self.shards, self.shards.pattern.block_size
        heads, device = shards.num_kv_heads, q.device
        mine = (self.owner >= rows.start * heads) & (self.owner < rows.stop * heads)
        owner, position = self.owner[mine], self.position[mine]
        name = owner * (int(position.max()) // size + 1 if len(position) else 1) + position // size
        _, block, length = name.unique_consecutive(return_inverse=True, return_counts=True)
        kv_index = block.new_full((len(length), size), -1)
        kv_index[block, position % size] = torch.arange(len(block), device=device)
        last = length.cumsum(0) - 1
        at, number = owner[last], position[last] // size
        asked = real[rows]
        place = self.counts[rows][:, None] + asked.long().cumsum(1) - 1  # (b, n)
        first = place[:, :1] // size
        lines = int((place // size - first).max()) + 1
        width = 1 if lines == 1 and q.shape[2] == 1 else size
        slot = torch.zeros_like(place) if width == 1 else place % size
        column = torch.arange(q.shape[2], device=device).expand_as(place)
        q_index = place.new_full((len(place), lines * width + 1), -1)
        q_index = q_index.scatter(1, torch.where(asked, (place // size - first) * width + slot, lines * width), column)
        q_index = q_index[:, :-1].view(len(place), lines, width)
        line = first + torch.arange(lines, device=device)  # (b, R)
        row = torch.arange(rows.start, rows.stop, device=device)
        head = torch.arange(heads, device=device)
        seen = shards.reads(line[:, None, :, None], number, head[:, None, None])
        seen &= at == (row[:, None] * heads + head)[..., None, None]  # (b, Hk, R, S)
        most = max(1, int(seen.sum(-1).max()))
        listed = torch.where(seen, torch.arange(len(at), device=device), len(at)).sort(-1).values[..., :most]
        table = listed.masked_fill(listed == len(at), -1)
        group = shards.num_heads // heads
        out, _ = block_attention(
            q.flatten(0, 1)[None],
            self.keys[mine][None, None],  # pyright: ignore[reportOptionalSubscript]
            self.values[mine][None, None],  # pyright: ignore[reportOptionalSubscript]
            q_index.repeat_interleave(shards.num_heads, 0)[None],
            kv_index[None, None],
            table.repeat_interleave(group, 1).flatten(0, 1)[None],
            causal=q.shape[2] > 1,
            q_pos=place if q.shape[2] > 1 else None,
            k_pos=position[None] if q.shape[2] > 1 else None,
            scale=scale,
        )
        return out[0].unflatten(0, (len(place), -1))

    def _forget(self) -> None:
        pattern, heads = self.shards.pattern, self.shards.num_kv_heads
        row, head = self.owner // heads, self.owner % heads
        column = self.position // pattern.block_size
        following = self.counts[row] // pattern.block_size  # the block of the next token
        needed = self.shards.reads(following, column, head)
        if not bool(needed.all()):
            self._take(needed.nonzero()[:, 0])

    def _take(self, tokens: Tensor) -> None:
        self.owner, self.position = self.owner[tokens], self.position[tokens]
        self.keys, self.values = self.keys[tokens], self.values[tokens]  # pyright: ignore[reportOptionalSubscript]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was; rows may repeat or be missing."""
        if not self.is_initialized:
            return
        heads = self.shards.num_kv_heads
        source = beam_idx.to(self.owner.device)
        row, token = (source[:, None] == (self.owner // heads)[None]).nonzero(as_tuple=True)
        head = self.owner[token] % heads
        self._take(token)
        self.owner, self.counts, self.batch = row * heads + head, self.counts[source], len(source)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the listed rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        if self.is_initialized:
            self.reorder_cache(torch.arange(self.batch, device=self.owner.device).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: forgotten keys do not come back.

        Raises:
            ValueError: any number but 0.
        """
        if tokens_to_remove:
            raise ValueError(
                f"ShardedLayer.crop: forgotten keys do not come back, got tokens_to_remove={tokens_to_remove}; keep a "
                "copy of the earlier cache, or give the model a DynamicCache"
            )

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask: all tokens seen and the new ones."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def nbytes(self) -> int:
        """Bytes of keys and values: 2·D·(bytes of a number)·:meth:`HeadShards.kept_tokens` of each row."""
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values) if x is not None)


class S2Cache(Cache):
    """What the layers of a model keep: all keys in dense layers, those that are needed in sharded ones.

    Args:
        shards: of each layer; None for dense ones.
    """

    def __init__(self, shards: list[HeadShards | None]) -> None:
        super().__init__(layers=[DynamicLayer() if each is None else ShardedLayer(each) for each in shards])

    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        held = [x for layer in self.layers for x in (layer.keys, layer.values) if x is not None]  # pyright: ignore[reportAttributeAccessIssue]
        return sum(x.numel() * x.element_size() for x in held)
