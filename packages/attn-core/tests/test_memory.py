"""What is never materialized: peak memory by allocator events, forward and backward of the torch backend."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from attn_core import (
    additive_attention,
    attention,
    block_attention,
    channel_attention,
    deformable_attention,
    focal_modulation,
    group_attention,
    linear_attention,
    linear_scan,
    neighborhood_attention,
    selective_scan,
    topk_route,
    window_index,
)
from attn_core.testing import peak_memory, tensor


def _peak(build: Callable[[int], Callable[[], tuple[torch.Tensor, ...]]], length: int) -> int:
    call = build(length)

    def step() -> None:
        outputs = call()
        torch.autograd.backward([out.sum() for out in outputs])

    step()  # first calls allocate caches
    return peak_memory(step)


def _attention(length: int, **options: object) -> Callable[[], tuple[torch.Tensor, ...]]:
    q, k, v = (tensor(torch.float32, "cpu", 1, 4, length, 16) for _ in range(3))
    return lambda: attention(q, k, v, **options)  # pyright: ignore[reportArgumentType]


def _axis_bias(length: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    tables = [tensor(torch.float32, "cpu", 1, 4, length, size) for size in (length // 32, 32)]
    return _attention(length, axis_bias=tables)


def _wide_axis_bias(length: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Too wide for extra columns: the chunked path."""
    tables = [tensor(torch.float32, "cpu", 1, 1, length, size) for size in (length // 512, 512)]
    return _attention(length, axis_bias=tables)


def _bias_of_keys(length: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    return _attention(length, bias=tensor(torch.float32, "cpu", 1, 1, 1, length))


def _wide_value(length: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    q, k = (tensor(torch.float32, "cpu", 1, 4, length, 16) for _ in range(2))
    v = tensor(torch.float32, "cpu", 1, 4, length, 64)
    return lambda: attention(q, k, v)


def _windows(length: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    q, k, v = (tensor(torch.float32, "cpu", 1, 4, length, 16) for _ in range(3))
    index = window_index(length // 32, 32, (8, 8))
    return lambda: block_attention(q, k, v, index, index)


def _groups(length: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    q, k, v = (tensor(torch.float32, "cpu", 1, 4, length, 16) for _ in range(3))
    group = (torch.arange(length) % 8)[None]
    return lambda: group_attention(q, k, v, group, 8, causal="upper_left")


def _neighborhoods(length: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    q, k, v = (tensor(torch.float32, "cpu", 1, 4, length // 32, 32, 16) for _ in range(3))
    rpb = tensor(torch.float32, "cpu", 4, 13, 13)
    return lambda: neighborhood_attention(q, k, v, 7, rpb=rpb)


def _deformable(length: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    maps = ((length // 32, 32), (length // 64, 16))
    value = tensor(torch.float32, "cpu", 1, sum(h * w for h, w in maps), 4, 16)
    locations = torch.rand(1, length, 4, 2, 4, 2).requires_grad_()
    weights = tensor(torch.float32, "cpu", 1, length, 4, 2, 4)
    return lambda: (deformable_attention(value, maps, locations, weights),)


def _channels(length: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    a, b, x = (tensor(torch.float32, "cpu", 1, 4, length, 16) for _ in range(3))
    return lambda: (channel_attention(a, b, x),)


def _additive(length: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    q, k, value = (tensor(torch.float32, "cpu", 1, length, 16) for _ in range(3))
    w = tensor(torch.float32, "cpu", 16)
    return lambda: additive_attention(q, k, w, value)


def _focal(length: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    ctx, gates = (tensor(torch.float32, "cpu", 1, channels, length // 32, 32) for channels in (16, 3))
    weights = [tensor(torch.float32, "cpu", 16, 1, k, k) for k in (3, 5)]
    return lambda: (focal_modulation(ctx, gates, weights),)


def _linear_attention(length: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    q, k, v = (tensor(torch.float32, "cpu", 1, 4, length, 16) for _ in range(3))
    decay = torch.full((4,), -0.1, requires_grad=True)
    return lambda: linear_attention(q, k, v, log_decay=decay)


def _linear_scan(length: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    b = tensor(torch.float32, "cpu", 2, length, 16, 8)
    return lambda: (linear_scan(torch.rand(2, length, 16), b),)


def _selective_scan(length: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    u, delta = tensor(torch.float32, "cpu", 1, 64, length), torch.rand(1, 64, length)
    B, C = (tensor(torch.float32, "cpu", 1, 1, 16, length) for _ in range(2))
    return lambda: selective_scan(u, delta, -torch.rand(64, 16), B, C)


CASES = [
    _attention,
    _axis_bias,
    _wide_axis_bias,
    _bias_of_keys,
    _wide_value,
    _windows,
    _groups,
    _neighborhoods,
    _deformable,
    _channels,
    _additive,
    _focal,
    _linear_attention,
    _linear_scan,
    _selective_scan,
]


LONGEST = (_additive, _axis_bias, _groups, _wide_axis_bias, _wide_value)  # with the slow tests


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(build, id=build.__name__.strip("_"), marks=pytest.mark.slow if build in LONGEST else ())
        for build in CASES
    ],
)
def test_doubling_the_length_at_most_doubles_the_peak(
    build: Callable[[int], Callable[[], tuple[torch.Tensor, ...]]],
) -> None:
    # Long enough that the constant chunk of scores is not what grows; a scan holds none.
    length = 512 if build is _selective_scan else 2048
    short, long = _peak(build, length), _peak(build, 2 * length)
    assert long <= 2.2 * short, f"{short / 2**20:.1f} MiB → {long / 2**20:.1f} MiB"


def test_the_measure_sees_the_scores_of_torchs_attention_with_a_learnable_bias() -> None:
    """Were this not to fail for SDPA, the test above would prove nothing."""

    def build(length: int) -> Callable[[], tuple[torch.Tensor, ...]]:
        q, k, v = (tensor(torch.float32, "cpu", 1, 4, length, 16) for _ in range(3))
        bias = tensor(torch.float32, "cpu", 1, 1, 1, length)
        return lambda: (F.scaled_dot_product_attention(q, k, v, attn_mask=bias),)

    assert _peak(build, 2048) > 3 * _peak(build, 1024)


def test_routed_attention_does_not_grow_with_top_k() -> None:
    """64 regions of 64 tokens: 16 times the keys, the same peak within a tenth of q, k, v and out."""
    side, width = 64, 64
    q, k, v = (tensor(torch.float32, "cpu", 1, 4, side * side, width // 4) for _ in range(3))
    index = window_index(side, side, (8, 8))

    def routed(topk: int) -> Callable[[], tuple[torch.Tensor, ...]]:
        table, _ = topk_route(torch.randn(1, 64, 8), torch.randn(1, 64, 8), topk)
        return lambda: block_attention(q, k, v, index, index, table)

    one, sixteen = _peak(lambda _: routed(1), 0), _peak(lambda _: routed(16), 0)
    chunk = 2**21 * 4 * 3  # gathered operands, their gradients and scores of one chunk
    assert sixteen <= one + max(chunk, 0.1 * 4 * side * side * width * 4)


def test_selective_scan_holds_a_fraction_of_its_states() -> None:
    """1 × 64 × 16 states of 4096 steps would be 16 MiB."""
    assert _peak(_selective_scan, 4096) < 64 * 16 * 4096 * 4
