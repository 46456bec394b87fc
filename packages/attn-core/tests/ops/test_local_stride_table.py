"""local_stride_table: the rule block by block, its use, and every message."""

from typing import Any

import pytest
import torch

from attn_core import attention, block_attention, local_stride_table, window_index
from attn_core.testing import relative_error


def dense(table: torch.Tensor, blocks: int) -> torch.Tensor:
    """(H, R, S) booleans; each block is listed once at most."""
    counts = torch.zeros(*table.shape[1:3], blocks + 1, dtype=torch.int64)
    counts.scatter_add_(2, torch.where(table[0] < 0, blocks, table[0]).long(), torch.ones_like(table[0]).long())
    assert int(counts[..., :blocks].max()) <= 1
    return counts[..., :blocks] > 0


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 4), (4, 1), (2, 2)])
@pytest.mark.parametrize(("local", "stride", "offset", "step"), [(1, 4, 0, None), (3, 16, 2, 3), (2, 1, 0, None)])
@pytest.mark.parametrize("dense_heads", [0, 1])
def test_causal_table_follows_the_rule(
    heads: int, kv_heads: int, local: int, stride: int, offset: int, step: int | None, dense_heads: int
) -> None:
    blocks = 13
    table = local_stride_table(
        blocks,
        local,
        stride,
        heads,
        num_kv_heads=kv_heads,
        num_dense_heads=dense_heads,
        step=step,
        offset=offset,
    )
    seen = dense(table, blocks)
    shift = max(1, stride // heads) if step is None else step
    for head in range(heads):
        h = head // (heads // kv_heads)
        for r in range(blocks):
            for c in range(blocks):
                expected = r - c < local or (c + h * shift + offset) % stride == 0 or h >= kv_heads - dense_heads
                assert bool(seen[head, r, c]) == (c <= r and expected)


def test_bidirectional_table_counts_from_the_border_of_the_band() -> None:
    seen = dense(local_stride_table(12, 3, 4, 2, causal=False), 12)
    for r in range(12):
        for c in range(12):
            distance = abs(r - c)
            assert bool(seen[0, r, c]) == (distance < 3 or (distance - 2) % 4 == 0)
    assert torch.equal(seen[0], seen[1])
    assert bool(dense(local_stride_table(12, 3, 4, 2, num_dense_heads=2, causal=False), 12).all())


def test_rows_are_ascending_and_padded_behind() -> None:
    table = local_stride_table(9, 2, 3, 3)
    assert table.dtype == torch.int32
    for row in table.flatten(0, 2).tolist():
        listed = [c for c in row if c >= 0]
        assert row == sorted(listed) + [-1] * (len(row) - len(listed))


def test_block_attention_over_the_table_is_masked_attention() -> None:
    blocks, size = 5, 4
    q, k, v = (torch.randn(2, 4, blocks * size, 8, dtype=torch.float64) for _ in range(3))
    table, index = local_stride_table(blocks, 1, 3, 4), window_index(1, blocks * size, (1, size))
    seen = dense(table, blocks).repeat_interleave(size, 1).repeat_interleave(size, 2).tril()
    bias = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)[None]
    actual = block_attention(q, k, v, index, index, table, causal=True)
    for a, b in zip(actual, attention(q, k, v, bias=bias), strict=True):
        assert relative_error(a, b) <= 1e-10


def test_no_block_gives_an_empty_table_on_the_device_asked_for() -> None:
    assert local_stride_table(0, 1, 2, 3).shape == (1, 3, 0, 0)
    assert local_stride_table(4, 1, 2, 3, device="meta").device.type == "meta"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": -1}, "local_stride_table: blocks must be at least 0, got blocks=-1"),
        ({"local": 0}, "local must be at least 1, got local=0"),
        ({"stride": 0}, "stride must be at least 1, got stride=0"),
        ({"num_heads": 0}, "num_heads must be at least 1, got num_heads=0"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1, got num_kv_heads=0"),
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"num_dense_heads": -1}, "num_dense_heads must be at least 0, got num_dense_heads=-1"),
        ({"num_dense_heads": 5}, "num_dense_heads must not exceed the 4 key heads, got num_dense_heads=5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_numbers_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        local_stride_table(**{"blocks": 4, "local": 1, "stride": 2, "num_heads": 4, **changes})
