"""Seeded cases of ``group_attention``."""

from typing import Any

import torch
from torch import Tensor

from attn_core import group_attention
from attn_core.testing.harness import Case, tensor


def _case(
    name: str,
    *,
    batch: int = 2,
    heads: int = 4,
    key_heads: int = 2,
    queries: int = 5,
    keys: int = 12,
    width: int = 8,
    value_width: int = 8,
    groups: int = 3,
    group_batch: int = 1,
    even: bool = False,
    weight: tuple[int, int, int] | None = None,
    gate: tuple[int, int, int] | None = None,
    closed: bool = False,
    bias: tuple[int, int, int, int] | None = None,
    mask: bool = False,
    strided: bool = False,
    varied: bool = False,
    **options: Any,
) -> Case:
    def build(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
        def data(heads: int, tokens: int, width: int) -> Tensor:
            if strided:
                wide = tensor(dtype, device, batch, tokens, heads, 2 * width, gradient=False)
                return wide[..., ::2].transpose(1, 2).requires_grad_()
            return tensor(dtype, device, batch, heads, tokens, width)

        exact = torch.float64 if dtype == torch.float64 else torch.float32
        kwargs = dict(options)
        group = torch.randint(-1, groups, (group_batch, keys))
        if even:
            group = (torch.arange(keys) // (keys // groups)).expand(group_batch, keys)
        if weight is not None:
            kwargs["group_weight"] = tensor(exact, device, *weight, groups)
        if gate is not None:
            logits = tensor(exact, device, *gate, groups)
            if closed:
                logits = logits.detach()
                logits[..., 0] = -torch.inf
            kwargs["group_gate"] = logits
        if bias is not None:
            kwargs["bias"] = tensor(dtype, device, *bias)
        if mask:
            visible = torch.rand(batch, keys) > 0.4
            visible[0] = False
            kwargs["key_mask"] = visible.to(device)
        args = [data(heads, queries, width), data(key_heads, keys, width), data(key_heads, keys, value_width)]
        return [*args, group.to(device), groups], kwargs

    return Case(group_attention, name, build, varied)


def cases() -> list[Case]:
    """Groupings, weights, gates, causality, biases, dead images; and nothing at all."""
    case = _case
    return [
        case("plain"),
        case("equal groups", even=True),
        case("one group", groups=1),
        case("more groups than keys", groups=17, group_batch=2),
        case("groups of each image", group_batch=2, varied=True),
        case("wide value", value_width=11),
        case("odd width", width=5, value_width=3),
        case("prime lengths", queries=31, keys=37, groups=5),
        case("one query", queries=1),
        case("one image", batch=1),
        case("no scale", scale=0.0),
        case("strided", strided=True),
        case("weight", weight=(2, 4, 5), varied=True),
        case("weight of heads", weight=(1, 4, 1), causal="upper_left"),
        case("gate", gate=(2, 4, 5)),
        case("gate of queries", gate=(1, 1, 5), causal="lower_right", keys=7),
        case("closed gate", gate=(2, 1, 5), closed=True),
        case("causal upper left", causal="upper_left"),
        case("causal lower right, more queries", queries=17, causal="lower_right"),
        case("dense bias", bias=(2, 4, 5, 12)),
        case("bias of keys", bias=(1, 1, 1, 12), gate=(2, 4, 5)),
        case("bias of queries", bias=(1, 4, 5, 1), weight=(2, 4, 5)),
        case("key mask with a dead image", mask=True),
        case(
            "everything",
            mask=True,
            bias=(1, 4, 5, 12),
            gate=(1, 4, 5),
            causal="lower_right",
            value_width=5,
            group_batch=2,
            varied=True,
        ),
        case("no image", batch=0),
        case("no query", queries=0),
        case("no key", keys=0),
    ]
