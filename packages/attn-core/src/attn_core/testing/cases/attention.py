"""Seeded cases of ``attention``."""

from typing import Any

import torch
from torch import Tensor

from attn_core import attention
from attn_core.testing.harness import Case, tensor


def _case(
    name: str,
    *,
    batch: int = 2,
    heads: int = 4,
    key_heads: int = 2,
    queries: int = 7,
    keys: int = 12,
    width: int = 8,
    value_width: int = 8,
    bias: tuple[int, int, int, int] | None = None,
    grid: tuple[int, ...] = (),
    mask: bool = False,
    starts: tuple[tuple[int, ...], ...] = (),
    strided: bool = False,
    varied: bool = False,
    **options: Any,
) -> Case:
    def build(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
        def data(heads: int, tokens: int, width: int) -> Tensor:
            if strided:  # heads split from a wide projection, every second column
                wide = tensor(dtype, device, batch, tokens, heads, 2 * width, gradient=False)
                return wide[..., ::2].transpose(1, 2).requires_grad_()
            return tensor(dtype, device, batch, heads, tokens, width)

        kwargs = dict(options)
        if bias is not None:
            kwargs["bias"] = tensor(dtype, device, *bias)
        if grid:
            leading = [(batch, 1), (1, heads), (batch, heads)]
            kwargs["axis_bias"] = [
                tensor(dtype, device, *leading[axis % 3], queries, size) for axis, size in enumerate(grid)
            ]
        if mask:
            visible = torch.rand(batch, keys) > 0.4
            visible[0] = False
            kwargs["key_mask"] = visible.to(device)
        for name, bounds in zip(("cu_seqlens_q", "cu_seqlens_k"), starts, strict=False):
            kwargs[name] = torch.tensor(bounds, dtype=torch.int32, device=device)
        return [data(heads, queries, width), data(key_heads, keys, width), data(key_heads, keys, value_width)], kwargs

    return Case(attention, name, build, varied)


def cases() -> list[Case]:
    """Widths, lengths, causality, every form of bias, grouped keys, dead images; and nothing at all."""
    case = _case
    return [
        case("plain", varied=True),
        case("wide value", value_width=11),
        case("narrow value", value_width=3),
        case("width 1", width=1, value_width=1),
        case("odd width", width=20, value_width=20),
        case("one query", queries=1),
        case("one key", keys=1),
        case("prime lengths", queries=31, keys=37),
        case("no scale", scale=0.0),
        case("strided", strided=True),
        case("causal upper left", causal="upper_left"),
        case("causal lower right, more keys", causal="lower_right"),
        case("causal lower right, more queries", queries=17, causal="lower_right", varied=True),
        case("dense bias", bias=(2, 4, 7, 12)),
        case("bias of keys", bias=(2, 1, 1, 12), causal="lower_right"),
        case("bias of heads", bias=(1, 4, 1, 1)),
        case("axis bias", grid=(3, 4)),
        case("three axes", grid=(2, 3, 2), causal="upper_left"),
        case("axis bias wider than the head", grid=(1, 12), width=2),
        case("key mask with a dead image", mask=True),
        case(
            "everything", mask=True, bias=(1, 4, 7, 12), grid=(4, 3), causal="lower_right", value_width=5, varied=True
        ),
        case("window", queries=17, window_size=(3, 1)),
        case("window of the past, more keys", keys=21, causal="lower_right", window_size=(4, -1), bias=(1, 4, 7, 21)),
        case("window that leaves rows without a key", queries=17, keys=5, causal="upper_left", window_size=(2, 0)),
        case("packed", queries=12, starts=((0, 5, 6, 12),)),
        case(
            "packed, everything",
            queries=13,
            # a sequence without queries, one without keys, and a token behind the last
            starts=((0, 4, 4, 7, 12), (0, 5, 8, 8, 11)),
            mask=True,
            bias=(2, 1, 13, 12),
            grid=(4, 3),
            causal="lower_right",
            window_size=(2, 0),
            value_width=5,
            varied=True,
        ),
        case("packed, no sequence", starts=((0,), (0,))),
        case("no image", batch=0),
        case("no query", queries=0),
        case("no key", keys=0),
    ]
