"""Cases at the sizes of published models, for tests and measurements on a GPU."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_core import (
    additive_attention,
    attention,
    block_attention,
    channel_attention,
    focal_modulation,
    group_attention,
    halo_index,
    linear_attention,
    linear_scan,
    neighborhood_attention,
    selective_scan,
    topk_route,
    window_index,
)

from .harness import Case

Inputs = tuple[list[Any], dict[str, Any]]


def _data(*shape: int, dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(shape, dtype=torch.float64, device="cpu")  # the same numbers on every device
    return drawn.to(torch.get_default_device(), dtype).requires_grad_()


def _heads(batch: int, tokens: int, count: int, width: int, dtype: torch.dtype) -> Tensor:
    """Heads split from a projection, as models hand them over."""
    return _data(batch, tokens, count, width, dtype=dtype).detach().transpose(1, 2).requires_grad_()


def _real(operator: Callable[..., Any], name: str, build: Callable[[torch.dtype], Inputs]) -> Case:
    def inputs(dtype: torch.dtype, device: str) -> Inputs:
        with torch.device(device):
            return build(dtype)

    return Case(operator, name, inputs)


def _plain(dtype: torch.dtype, width: int, **options: Any) -> Inputs:
    return [
        _heads(2, 777, 4, width, dtype),
        _heads(2, 1031, 2, width, dtype),
        _heads(2, 1031, 2, width, dtype),
    ], options


def _box_bias(dtype: torch.dtype) -> Inputs:
    tables = [_data(2, 4, 300, 50, dtype=dtype), _data(2, 1, 300, 84, dtype=dtype)]
    return [_heads(2, n, 4, 32, dtype) for n in (300, 4200, 4200)], {"axis_bias": tables}


def _volume(dtype: torch.dtype) -> Inputs:
    tables = [_data(1, 2, 512, n, dtype=dtype) for n in (8, 10, 12)]
    return [_heads(1, n, 2, 32, dtype) for n in (512, 960, 960)], {"axis_bias": tables}


def _relative_bias(dtype: torch.dtype) -> Inputs:
    return [_heads(16, 196, 4, 32, dtype) for _ in range(3)], {"bias": _data(1, 4, 196, 196, dtype=dtype)}


def _biformer(dtype: torch.dtype, side: int, topk: int, soft: bool) -> Inputs:
    tokens = window_index(side, side, (side // 7, side // 7))
    q, k, v = (_heads(2, side * side, 4, 32, dtype) for _ in range(3))
    regions = torch.randn(2, 2, 49, 128)
    table, weight = topk_route(regions[0], regions[1], topk)
    return [q, k, v, tokens, tokens, table], {"kv_weight": weight.to(dtype).requires_grad_()} if soft else {}


def _halo(dtype: torch.dtype) -> Inputs:
    indices = [window_index(32, 32, (8, 8)), halo_index(32, 32, (8, 8), (3, 3))]
    tables = [_data(2, 4, 1024, 14, dtype=dtype) for _ in range(2)]
    return [*(_heads(2, 1024, 4, 32, dtype) for _ in range(3)), *indices], {"axis_bias": tables}


def _prompt(dtype: torch.dtype, weighted: bool) -> Inputs:
    """Four classes of tokens, as in the redistribution of a vision-language model."""
    group = torch.randint(0, 4, (1, 1031))
    options: dict[str, Any] = {"causal": "lower_right"}
    if weighted:
        options["group_weight"] = _data(2, 4, 777, 4, dtype=torch.float32)
    return [*_plain(dtype, 128)[0], group, 4], options


def _channel_groups(dtype: torch.dtype, tokens: int, count: int, width: int) -> Inputs:
    return [_heads(2, tokens, count, width, dtype) for _ in range(3)], {"scale": tokens**-0.5}


def _pointer(dtype: torch.dtype, value: int | None) -> Inputs:
    args = [_data(2, 200, 128, dtype=dtype), _data(2, 333, 128, dtype=dtype)]
    args.append((_data(128, dtype=dtype).detach() / 8).requires_grad_())
    options = {"key_mask": torch.rand(2, 333) > 0.3}
    return [*args, _data(2, 333, value, dtype=dtype)] if value else args, options


def _neighborhood(dtype: torch.dtype, grid: tuple[int, ...], kernel: int, **options: Any) -> Inputs:
    maps = (_heads(2, math.prod(grid), 4, 32, dtype).detach().unflatten(2, grid) for _ in range(3))
    return [*(x.requires_grad_() for x in maps), kernel], options


def _retention(dtype: torch.dtype, width: int, *, state: bool = False, **options: Any) -> Inputs:
    decay = -torch.tensor([0.5, 0.05, 0.005, 0.0]) if options.get("causal", True) else None
    start = {"initial_state": _data(2, 4, width, width, dtype=torch.float32)} if state else {}
    args = [(_heads(2, 777, 4, width, dtype).detach() / width**0.5).requires_grad_() for _ in range(3)]
    return args, {"log_decay": decay, **start, **options}


def _gated(dtype: torch.dtype, gates: tuple[int, ...], features: tuple[int, ...]) -> Inputs:
    return [torch.rand(2, 500, *gates).requires_grad_(), _data(2, 500, *features, dtype=dtype)], {}


def _state_space(dtype: torch.dtype, channels: int, width: int, **options: Any) -> Inputs:
    decay = -torch.arange(1.0, width + 1).repeat(channels, 1)
    args = [_data(2, channels, 784, dtype=dtype), (torch.randn(2, channels, 784) - 3).requires_grad_()]
    args += [decay.requires_grad_(), *(_data(2, 2, width, 784, dtype=dtype) for _ in range(2))]
    return args, {"z": _data(2, channels, 784, dtype=dtype), "delta_softplus": True, **options}


def _focal(dtype: torch.dtype, side: int, channels: int) -> Inputs:
    projection = _data(2, channels + 4, side, side, dtype=dtype).detach()
    weights = [(_data(channels, 1, k, k, dtype=dtype).detach() / k).requires_grad_() for k in (3, 5, 7)]
    return [*(t.clone().requires_grad_() for t in projection.split((channels, 4), 1)), weights], {}


def real_cases() -> list[Case]:
    """Calls as the published models make them, at their sizes; for a GPU, an interpreter would take hours."""
    return [
        *(_real(attention, f"width {w}", lambda dtype, w=w: _plain(dtype, w)) for w in (20, 32, 64, 80, 128, 256)),
        _real(attention, "causal", lambda dtype: _plain(dtype, 64, causal="lower_right")),
        _real(attention, "box bias", _box_bias),
        _real(attention, "volume", _volume),
        _real(attention, "relative bias", _relative_bias),
        _real(block_attention, "stage 1", lambda dtype: _biformer(dtype, 56, 1, False)),
        _real(block_attention, "stage 2", lambda dtype: _biformer(dtype, 28, 4, False)),
        _real(block_attention, "stage 3, soft", lambda dtype: _biformer(dtype, 14, 16, True)),
        _real(block_attention, "halo", _halo),
        _real(group_attention, "masses of a prompt", lambda dtype: _prompt(dtype, False)),
        _real(group_attention, "redistributed prompt", lambda dtype: _prompt(dtype, True)),
        _real(channel_attention, "stage 1", lambda dtype: _channel_groups(dtype, 3136, 3, 32)),
        _real(channel_attention, "wide", lambda dtype: _channel_groups(dtype, 1000, 1, 128)),
        _real(additive_attention, "pointer", lambda dtype: _pointer(dtype, None)),
        _real(additive_attention, "pooled", lambda dtype: _pointer(dtype, 96)),
        _real(neighborhood_attention, "image", lambda dtype: _neighborhood(dtype, (28, 30), 7, dilation=2)),
        _real(neighborhood_attention, "causal", lambda dtype: _neighborhood(dtype, (1000,), 127, is_causal=True)),
        _real(neighborhood_attention, "volume", lambda dtype: _neighborhood(dtype, (7, 10, 12), 5, border="truncated")),
        _real(linear_attention, "lightning", lambda dtype: _retention(dtype, 128, state=True)),
        _real(linear_attention, "both ways", lambda dtype: _retention(dtype, 40, causal=False, scale=1 / 777)),
        _real(linear_scan, "own gates", lambda dtype: _gated(dtype, (300,), (300,))),
        _real(linear_scan, "weights", lambda dtype: _gated(dtype, (), (32, 32))),
        _real(selective_scan, "stage 2", lambda dtype: _state_space(dtype, 192, 16)),
        _real(selective_scan, "from the right", lambda dtype: _state_space(dtype, 36, 24, reverse=True)),
        _real(focal_modulation, "stage 1", lambda dtype: _focal(dtype, 56, 96)),
    ]
