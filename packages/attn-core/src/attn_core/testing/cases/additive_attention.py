"""Seeded cases of ``additive_attention``."""

from typing import Any

import torch
from torch import Tensor

from attn_core import additive_attention
from attn_core.testing.harness import Case, tensor


def _case(
    name: str,
    *,
    batch: int = 2,
    queries: int = 5,
    keys: int = 7,
    width: int = 8,
    value: int | None = None,
    mask: str | None = None,
    size: float = 1.0,
    strided: bool = False,
    varied: bool = False,
) -> Case:
    def build(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
        def data(tokens: int, width: int) -> Tensor:
            if strided:  # token-first memory, every second column
                wide = tensor(dtype, device, tokens, batch, 2 * width, gradient=False)
                return wide[..., ::2].transpose(0, 1).requires_grad_()
            return (tensor(dtype, device, batch, tokens, width, gradient=False) * size).requires_grad_()

        args: list[Any] = [data(queries, width), data(keys, width), tensor(dtype, device, width)]
        if value is not None:
            args.append(data(keys, value))
        if mask is None:
            return args, {}
        visible = torch.rand(1 if mask == "shared" else batch, keys) > 0.4
        if mask == "dead":
            visible[0] = False
        return args, {"key_mask": visible.to(device)}

    return Case(additive_attention, name, build, varied)


def cases() -> list[Case]:
    """Widths, lengths, masks with dead entries, values or bare scores; and nothing at all."""
    case = _case
    return [
        case("scores", varied=True),
        case("value", value=6, varied=True),
        case("odd widths", width=13, value=3, queries=11, keys=17),
        case("width 1", width=1, value=1),
        case("one query", queries=1, value=9),
        case("one key", keys=1, value=4),
        case("one image", batch=1),
        case("several tiles of scores", batch=1, queries=23, keys=29, width=1024),
        case("several tiles of values", batch=1, queries=23, keys=29, width=1024, value=4),
        case("saturated", size=40.0),
        case("strided", strided=True, value=6),
        case("masked scores with a dead entry", mask="dead"),
        case("masked values with a dead entry", mask="dead", value=6, varied=True),
        case("one mask for the batch", mask="shared", value=6),
        case("no entry", batch=0, value=4),
        case("no query", queries=0),
        case("no key", keys=0, value=4),
        case("no key, scores", keys=0),
    ]
