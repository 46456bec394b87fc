"""Merge of attention results part by part, without stacking them.

Memory beyond the results: the logarithms of all parts, one result in the dtype of lse; for backward nothing but inputs
and results is kept.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attn_core.kernels.registration import Grads, token_major_copy

from .reference import MERGE_ATTENTION, Arguments, reference


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """out and lse; weights by one softmax over the parts, their outputs added one after another."""
    outs, lses = a.tensors[: a.parts], a.tensors[a.parts :]
    batch = len(outs[0])
    if any(len(part) != batch for part in lses):  # under vmap a part may have one image for all
        lses = [part.expand(batch, *part.shape[1:]) for part in lses]
    stacked = torch.stack(list(lses))
    weights = torch.softmax(stacked, 0)
    lse = torch.logaddexp(*lses) if a.parts == 2 else stacked.amax(0).sub_(weights.amax(0).log_())
    total = None
    for part, weight in zip(outs, weights.unsqueeze(-1).unbind(0), strict=True):
        if total is None:
            total = torch.mul(part, weight)  # in the dtype of lse
        else:
            total.addcmul_(part if part.dtype == total.dtype else part.to(total.dtype), weight)
    assert total is not None
    if not math.isfinite(total.sum().item()):
        total, lse = _with_dead_parts(outs, lses)
    return token_major_copy(total if total.dtype == outs[0].dtype else total.to(outs[0].dtype)), lse


def _with_dead_parts(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The same where a part without keys may hold anything, and no part may have one: 0 · inf would be NaN."""
    lse = lses[0].clone(memory_format=torch.contiguous_format)
    for part in lses[1:]:
        lse = torch.logaddexp(lse, part)
    total = torch.zeros(outs[0].shape, dtype=lse.dtype, device=lse.device)
    for part, own in zip(outs, lses, strict=True):
        weight = _weight(own, lse)
        total.addcmul_(part.to(lse.dtype).masked_fill(weight == 0, 0.0), weight)
    return total, lse


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
