"""Seeded cases of ``linear_attention``."""

from typing import Any

import torch
from torch import Tensor

from attn_core import linear_attention
from attn_core.testing.harness import Case, tensor


def _case(
    name: str,
    *,
    batch: int = 2,
    heads: int = 3,
    tokens: int = 11,
    width: int = 4,
    value_width: int = 5,
    decay: bool | float = False,
    state: bool = False,
    positive: bool = False,
    strided: bool = False,
    varied: bool = False,
    **options: Any,
) -> Case:
    """``decay``: True for a different one in each head, or one log-decay for all."""

    def build(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
        exact = torch.float64 if dtype == torch.float64 else torch.float32

        def data(width: int) -> Tensor:
            if strided:
                wide = tensor(dtype, device, batch, tokens, heads, 2 * width, gradient=False)
                return wide[..., ::2].transpose(1, 2).requires_grad_()
            x = tensor(dtype, device, batch, heads, tokens, width, gradient=False)
            return (x.abs() + 0.5 if positive else x).requires_grad_()

        args = [data(width), data(width), tensor(dtype, device, batch, heads, tokens, value_width)]
        kwargs = dict(options)
        if decay is True:
            kwargs["log_decay"] = (-torch.rand(heads, dtype=torch.float64)).to(device, exact).requires_grad_()
        elif decay is not False:
            kwargs["log_decay"] = torch.full((heads,), decay, dtype=exact, device=device).requires_grad_()
        if state:
            kwargs["initial_state"] = tensor(exact, device, batch, heads, width, value_width)
        return args, kwargs

    return Case(linear_attention, name, build, varied)


def cases() -> list[Case]:
    """Decay, state, both directions, normalization, chunks that end anywhere; and nothing at all."""
    case = _case
    return [
        case("plain"),
        case("decay", decay=True),
        case("decay, state, chunks", decay=True, state=True, chunk_size=4, scale=0.5, varied=True),
        case("both ways", causal=False),
        case("both ways, state", causal=False, state=True, chunk_size=4),
        case("both ways, decay", causal=False, decay=True, state=True, chunk_size=4, scale=1.5, varied=True),
        case("normalized", normalize=True, positive=True, eps=1e-6),
        case("normalized, decay, both ways", normalize=True, positive=True, decay=True, causal=False, chunk_size=4,
             eps=0.25, varied=True),
        case("state without decay", state=True, chunk_size=5),
        case("one token", tokens=1, decay=True, state=True),
        case("chunk of one", tokens=5, decay=True, chunk_size=1),
        case("chunks end with the sequence", tokens=12, decay=True, chunk_size=4),
        case("prime length, odd widths", tokens=37, width=7, value_width=3, decay=True, chunk_size=8),
        case("width 1", width=1, value_width=1, decay=True),
        case("batch of one", batch=1, decay=True),
        case("strided", strided=True, decay=True, chunk_size=4),
        case("decay that vanishes within a chunk", decay=-30.0, tokens=20, chunk_size=16),
        case("no scale", scale=0.0, state=True),
        case("no image", batch=0, decay=True),
        case("no token", tokens=0, decay=True, state=True),
    ]  # fmt: skip
