"""Seeded cases of ``linear``."""

from typing import Any

import torch

from attn_core import linear
from attn_core.testing.harness import Case, tensor


def cases() -> list[Case]:
    """With and without bias and GELU, one vector to many rows; and nothing at all."""

    def case(name: str, *shape: int, out: int = 6, bias: bool = True, varied: bool = False, **options: Any) -> Case:
        def build(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
            args = [tensor(dtype, device, *shape), tensor(dtype, device, out, shape[-1])]
            return [*args, tensor(dtype, device, out)] if bias else args, dict(options)

        return Case(linear, name, build, varied)

    return [
        case("plain", 5, 7, varied=True),
        case("no bias", 5, 7, bias=False),
        case("batch of maps", 2, 3, 4, 8),
        case("gelu", 3, 5, 7, activation="gelu", varied=True),
        case("wide", 9, 130, out=140, activation="gelu"),
        case("many rows", 2100, 64, out=256, activation="gelu"),
        case("one vector", 7),
        case("no row", 0, 7),
    ]
