"""Sums over windows in plain torch: slots spread over box-shaped tiles of keys, then dense products.

Memory beyond the result: a twelfth of it for one tile (at least 64 KiB), forward and backward.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_core.kernels.registration import Grads, token_major
from attn_core.ops.neighborhood_scores.reference import wide
from attn_core.ops.neighborhood_scores.slots import add_to_keys, only_box, scores_into, spread, values_into

from .reference import NEIGHBORHOOD_VALUES, Arguments, fake, reference


def forward(a: Arguments) -> Tensor:
    """The sums of all boxes."""
    w, dtype = a.windows(), wide(a.v.dtype)
    out = fake(a)
    box = only_box(w, a.v, a.v.numel())
    if box is not None:
        out.copy_(spread(a.p.to(dtype), box) @ a.v.to(dtype))
    elif out.numel():
        whole, p, v = (x.unflatten(2, w.grid) for x in (out, a.p, a.v))
        values_into(whole, p, v, w, dtype)
    return out


def backward(grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:  # noqa: ARG001  the backends' signature
    """dp_it = do_i·v_j;  dv_j = Σ p_it do_i."""
    (grad,) = grads
    assert grad is not None
    dtype, w = wide(a.v.dtype), a.windows()
    dp = torch.zeros(a.p.shape, dtype=a.p.dtype, device=a.p.device) if needs[0] else None
    dv = token_major(a.v, *a.v.shape).to(dtype).zero_() if needs[1] else None
    if grad.numel():
        g, p, v = (x.unflatten(2, w.grid) for x in (grad, a.p, a.v))
        if dp is not None:
            scores_into(dp.unflatten(2, w.grid), g, v, w, 0.0, None, dtype)
        if dv is not None:
            add_to_keys(dv.unflatten(2, w.grid), p, g, w)
    return [dp, dv]


neighborhood_values = NEIGHBORHOOD_VALUES.register("torch", forward, backward, exported=reference)
