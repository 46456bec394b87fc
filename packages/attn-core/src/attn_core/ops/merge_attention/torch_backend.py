"""Merge of attention results part by part, without stacking them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attn_core.kernels.registration import register, token_major

from . import reference


def merge_attention(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """Extra memory: one result in the dtype of lse; for backward nothing but inputs and results is kept."""
    if torch.compiler.is_exporting():
        return reference.merge_attention(outs, lses)
    return _call([*outs, *lses], len(outs))


def forward(tensors: Sequence[Tensor], parts: int) -> tuple[Tensor, Tensor]:
    outs, lses = tensors[:parts], tensors[parts:]
    lse = lses[0].clone(memory_format=torch.contiguous_format)
    for part in lses[1:]:
        lse = torch.logaddexp(lse, part)
    out, _ = fake_forward(tensors, parts)
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


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    tensors: Sequence[Tensor],
    parts: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """w_s = exp(lse_s − lse): do_s = w_s·do;  dlse_s = w_s (do·(o_s − o) + dlse)."""
    wide = grad_out.to(lse.dtype)
    gradients: list[Tensor] = []
    for s, (part, own) in enumerate(zip(tensors[:parts], tensors[parts:], strict=True)):
        if needs[s]:
            gradient = torch.empty(wide.shape, dtype=wide.dtype, device=wide.device)
            gradients.append(torch.mul(wide, _weight(own, lse), out=gradient).to(part.dtype))
    for s, (part, own) in enumerate(zip(tensors[:parts], tensors[parts:], strict=True)):
        if needs[parts + s]:
            weight = _weight(own, lse).squeeze(-1)
            slope = (wide * (part.to(lse.dtype) - out)).sum(-1)
            if grad_lse is not None:
                slope = slope + grad_lse
            gradients.append((slope * weight).masked_fill_(weight == 0, 0.0).contiguous())
    return gradients


def _weight(own: Tensor, lse: Tensor) -> Tensor:
    return torch.exp(own - lse.masked_fill(lse == -math.inf, 0.0)).unsqueeze(-1)


def fake_forward(tensors: Sequence[Tensor], parts: int) -> tuple[Tensor, Tensor]:
    first = tensors[0]
    batch, heads, tokens, width = first.shape
    return token_major(first, batch, heads, tokens, width), tensors[parts].new_empty(batch, heads, tokens)


def reference_forward(tensors: Sequence[Tensor], parts: int) -> tuple[Tensor, Tensor]:
    return reference.merge_attention(tensors[:parts], tensors[parts:])


_call = register(
    "merge_attention_torch",
    forward=forward,
    backward=backward,
    fake_forward=fake_forward,
    reference=reference_forward,
    differentiable=("tensors",),
)
