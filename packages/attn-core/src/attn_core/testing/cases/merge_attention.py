"""Seeded cases of ``merge_attention``."""

from typing import Any

import torch

from attn_core import merge_attention
from attn_core.testing.harness import Case, tensor


def _case(
    name: str,
    *,
    parts: int = 3,
    batch: int = 2,
    heads: int = 3,
    tokens: int = 5,
    width: int = 8,
    dead: bool = False,
    listed: bool = False,
    strided: bool = False,
    far: float = 1.0,
    varied: bool = False,
) -> Case:
    def build(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        outs = tensor(dtype, device, parts, batch, heads, tokens, width)
        if strided:
            wide = tensor(dtype, device, parts, batch, tokens, heads, 2 * width, gradient=False)
            outs = wide[..., ::2].transpose(2, 3).requires_grad_()
        lses = tensor(exact, device, parts, batch, heads, tokens, gradient=False) * far
        if dead:
            lses[:, :, 0] = -torch.inf  # no key in any part
            lses[0, :, 1] = -torch.inf
        lses.requires_grad_()
        if listed:
            split = [[part.detach().requires_grad_() for part in x] for x in (outs, lses)]
            return [*split], {}
        return [outs, lses], {}

    return Case(merge_attention, name, build, varied)


def cases() -> list[Case]:
    """One to eight parts, stacked or listed, with dead queries; and nothing at all."""
    case = _case
    return [
        case("plain", varied=True),
        case("one part", parts=1),
        case("two parts", parts=2),
        case("eight parts", parts=8, varied=True),
        case("dead queries", dead=True),
        case("list of parts", listed=True, dead=True),
        case("strided", strided=True),
        case("odd width", width=7, tokens=11),
        case("width 1", width=1),
        case("one image, one token", batch=1, tokens=1),
        case("masses far apart", far=300.0),
        case("no image", batch=0),
        case("no token", tokens=0),
        case("no column", width=0),
    ]
