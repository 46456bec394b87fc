"""Merge of attention results part by part, without stacking them.

Memory beyond the results: one result in the dtype of lse; for backward nothing but inputs and results is kept.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attn_core.kernels.registration import Grads

from .reference import MERGE_ATTENTION, Arguments, fake, reference

# Numbers of all parts up to which they are stacked: that many cost less to copy than a part's own calls.
SMALL = 2**14


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    if a.tensors[0].numel() * a.parts <= SMALL:
        return _stacked(a)
    outs, lses = a.tensors[: a.parts], a.tensors[a.parts :]
    lse = lses[0].clone(memory_format=torch.contiguous_format)
    for part in lses[1:]:
        lse = torch.logaddexp(lse, part)
    out, _ = fake(a)
    total = out if out.dtype == lse.dtype else torch.empty_like(out, dtype=lse.dtype)
    for i, (part, own) in enumerate(zip(outs, lses, strict=True)):
        weight = _weight(own, lse)
        part = part.to(lse.dtype)
        if bool((weight == 0).any()):  # 0 · inf would be NaN: a part without keys may hold anything
            part = part.masked_fill(weight == 0, 0.0)
        if i == 0:
            torch.mul(part.expand_as(total), weight, out=total)
        else:
            total.addcmul_(part, weight)
    return out if total is out else out.copy_(total), lse


def _stacked(a: Arguments) -> tuple[Tensor, Tensor]:
    outs, lses = torch.stack(list(a.tensors[: a.parts])), a.tensors[a.parts :]
    lse = lses[0] if a.parts > 1 else lses[0].clone(memory_format=torch.contiguous_format)
    for part in lses[1:]:
        lse = torch.logaddexp(lse, part)
    stacked = torch.stack(list(lses))
    weights = torch.exp(stacked - lse.masked_fill(lse == -math.inf, 0.0)).unsqueeze(-1)
    shares = (outs if outs.dtype == lse.dtype else outs.to(lse.dtype)) * weights
    # 0 · inf is no number: a part without keys may hold anything.
    if not math.isfinite(float(shares.sum())):
        shares = shares.masked_fill(weights == 0, 0.0)
    out, _ = fake(a)
    return out.copy_(shares.sum(0)), lse


def backward(grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:
    """w_s = exp(lse_s − lse): do_s = w_s·do;  dlse_s = w_s (do·(o_s − o) + dlse)."""
    (grad_out, grad_lse), (out, lse), (tensors, parts) = grads, kept, a
    assert grad_out is not None
    wide = grad_out.to(lse.dtype)
    gradients: list[Tensor | None] = [None] * len(needs)
    for s, (part, own) in enumerate(zip(tensors[:parts], tensors[parts:], strict=True)):
        if needs[s]:
            gradient = torch.empty(wide.shape, dtype=wide.dtype, device=wide.device)
            gradients[s] = torch.mul(wide, _weight(own, lse), out=gradient).to(part.dtype)
    for s, (part, own) in enumerate(zip(tensors[:parts], tensors[parts:], strict=True)):
        if needs[parts + s]:
            weight = _weight(own, lse).squeeze(-1)
            slope = (wide * (part.to(lse.dtype) - out)).sum(-1)
            if grad_lse is not None:
                slope = slope + grad_lse
            gradients[parts + s] = (slope * weight).masked_fill_(weight == 0, 0.0)
    return gradients


def _weight(own: Tensor, lse: Tensor) -> Tensor:
    return torch.exp(own - lse.masked_fill(lse == -math.inf, 0.0)).unsqueeze(-1)


merge_attention = MERGE_ATTENTION.register("torch", forward, backward, exported=reference)
