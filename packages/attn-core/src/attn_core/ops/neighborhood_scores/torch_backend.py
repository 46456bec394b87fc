"""Window scores in plain torch: dense products of box-shaped tiles, from which the slots are picked.

Memory beyond the result: a twelfth of it for one tile (at least 64 KiB), forward and backward.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_core.kernels.registration import Grads

from .reference import NEIGHBORHOOD_SCORES, Arguments, empty_slot, fake, reference, wide
from .slots import add_to_bias, add_to_keys, bias_of, only_box, scores_into, scores_of, values_into


def forward(a: Arguments) -> Tensor:
    """The slots of all boxes."""
    w, dtype, empty = a.windows(), wide(a.q.dtype), empty_slot(a.border)
    box = only_box(w, a.q, a.q.numel() // max(1, a.q.shape[-1]) * w.slots)
    if box is not None:
        return scores_of(box, a.q.to(dtype), a.k.to(dtype), empty, bias_of(box, a.rpb, dtype)).to(a.q.dtype)
    out = fake(a)
    if out.numel():
        whole, q, k = (x.unflatten(2, w.grid) for x in (out, a.q, a.k))
        scores_into(whole, q, k, w, empty, a.rpb, dtype)
    return out


def backward(grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:  # noqa: ARG001  the backends' signature
    """dq_i = Σ_t g_it k_j;  dk_j = Σ g_it q_i;  drpb = Σ g_it by offset."""
    (grad,) = grads
    assert grad is not None
    dtype, w = wide(a.q.dtype), a.windows()
    needs_q, needs_k, needs_rpb = needs
    dq = torch.zeros(a.q.shape, dtype=dtype, device=a.q.device) if needs_q else None
    dk = torch.zeros(a.k.shape, dtype=dtype, device=a.k.device) if needs_k else None
    drpb = torch.zeros(a.rpb.shape, dtype=dtype, device=a.rpb.device) if needs_rpb and a.rpb is not None else None
    if grad.numel():
        g, q, k = (x.unflatten(2, w.grid) for x in (grad, a.q, a.k))
        if dq is not None:
            values_into(dq.unflatten(2, w.grid), g, k, w, dtype)
        if dk is not None:
            add_to_keys(dk.unflatten(2, w.grid), g, q, w)
        if drpb is not None:
            add_to_bias(drpb.flatten(2), g, w)
    return [dq, dk, drpb]


neighborhood_scores = NEIGHBORHOOD_SCORES.register("torch", forward, backward, exported=reference)
