"""Seeded cases of ``channel_attention``."""

from typing import Any

import torch
from torch import Tensor

from attn_core import channel_attention
from attn_core.testing.harness import Case, tensor


def _case(
    name: str,
    *,
    batch: int = 2,
    heads: int = 3,
    tokens: int = 10,
    channels: int = 8,
    layout: str = "plain",
    varied: bool = False,
    **options: Any,
) -> Case:
    def build(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
        def data() -> Tensor:
            if layout == "projection":  # heads split from a projection
                wide = tensor(dtype, device, batch, tokens, 3, heads, channels, gradient=False)
                return wide[:, :, 1].transpose(1, 2).requires_grad_()
            if layout == "map":  # (B, C, Y, X): tokens innermost
                return tensor(dtype, device, batch, heads, channels, tokens, gradient=False).mT.requires_grad_()
            if layout == "expanded":
                return tensor(dtype, device, 1, heads, tokens, channels).detach().expand(batch, -1, -1, -1)
            if layout == "every second":
                wide = tensor(dtype, device, batch, heads, tokens, 2 * channels, gradient=False)
                return wide[..., ::2].requires_grad_()
            return tensor(dtype, device, batch, heads, tokens, channels)

        return [data(), data(), data()], {"scale": channels**-0.5, **options}

    return Case(channel_attention, name, build, varied)


def cases() -> list[Case]:
    """Sizes, memory layouts, both rules of the scores; and nothing at all."""
    case = _case
    return [
        case("plain", varied=True),
        case("odd width", channels=20, tokens=13),
        case("one channel", channels=1),
        case("one token", tokens=1),
        case("one image", batch=1),
        case("one head", heads=1, channels=24, tokens=37),
        case("more channels than tokens", channels=33, tokens=5),
        case("no scale", scale=0.0),
        case("large logits", scale=30.0, heads=1),
        case("projection", layout="projection", varied=True),
        case("map", layout="map", heads=1),
        case("expanded", layout="expanded"),
        case("every second channel", layout="every second"),
        case("least alike", negate_max=True),
        case("transposed", transpose=True, varied=True),
        case("least alike, transposed", negate_max=True, transpose=True),
        case("no image", batch=0),
        case("no token", tokens=0),
    ]
