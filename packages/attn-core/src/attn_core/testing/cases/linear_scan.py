"""Seeded cases of ``linear_scan``."""

from typing import Any

import torch

from attn_core import linear_scan
from attn_core.testing.harness import Case, tensor


def _case(
    name: str,
    *,
    batch: int = 2,
    steps: int = 11,
    gates: tuple[int, ...] = (5,),
    features: tuple[int, ...] = (5,),
    gate_batch: int | None = None,
    signed: bool = False,
    state: bool = False,
    strided: bool = False,
    exact: bool = True,
    varied: bool = False,
    **options: Any,
) -> Case:
    """``exact``: gates in float32 whatever the dtype of the terms."""

    def build(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        kind = wide if exact else dtype
        a = torch.rand(gate_batch or batch, steps, *gates, dtype=torch.float64)
        a = a * 2 - 1 if signed else a
        b = tensor(dtype, device, batch, steps, *features, gradient=False)
        if strided:  # the steps last in memory
            b = tensor(dtype, device, batch, *features, 2 * steps, gradient=False)[..., ::2].movedim(-1, 1)
        h0 = [tensor(wide, device, batch, *features)] if state else []
        return [a.to(device, kind).requires_grad_(), b.requires_grad_(), *h0], dict(options)

    return Case(linear_scan, name, build, varied)


def cases() -> list[Case]:
    """Gates of each feature to one for all, both directions, states, chunks and a rest; and nothing at all."""
    case = _case
    return [
        case("plain", varied=True),
        case("from the right, state", reverse=True, state=True, varied=True),
        case("one gate for all features", gates=(), features=(3, 2), state=True, varied=True),
        case("a gate for each head", gates=(3,), features=(3, 2, 2), state=True),
        case("gates with ones at the end", gates=(3, 1), features=(3, 4)),
        case("gates with ones in front", gates=(1, 4), features=(3, 4), reverse=True),
        case("gates of one image", gate_batch=1, state=True, reverse=True),
        case("no features", gates=(), features=()),
        case("signed gates", signed=True, state=True),
        case("gates in the dtype of the terms", exact=False, state=True),
        case("chunks and a rest", steps=75, batch=1, features=(3,), gates=(3,), state=True),
        case("chunks and a rest, from the right", steps=77, batch=2, features=(3, 2), gates=(3,), reverse=True),
        case("one step", steps=1, state=True),
        case("strided", strided=True, reverse=True, state=True),
        case("no image", batch=0, state=True),
        case("no step", steps=0, state=True),
    ]
