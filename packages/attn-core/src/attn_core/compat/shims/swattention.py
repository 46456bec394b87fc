"""swattention (TransNeXt): windows truncated at the border, (B, heads, H·W, d), raw forward and backward functions."""

import torch
from torch import Tensor

from attn_core import neighborhood_scores, neighborhood_values
from attn_core.ops.neighborhood_scores.slots import Windows, all_slots

from .recompute import gradients


def _scores(q: Tensor, k: Tensor, height: int, width: int, kernel_size: int) -> Tensor:
    q, k = (x.unflatten(2, (height, width)) for x in (q, k))
    return neighborhood_scores(q, k, kernel_size, border="truncated").flatten(2, 3)


def _values(attn: Tensor, v: Tensor, height: int, width: int, kernel_size: int) -> Tensor:
    attn, v = (x.unflatten(2, (height, width)) for x in (attn, v))
    return neighborhood_values(attn, v, kernel_size, border="truncated").flatten(2, 3)


def qk_forward(query: Tensor, key: Tensor, height: int, width: int, kernel_size: int, cuda_threads: int) -> Tensor:
    """(B, heads, H·W, K²): −inf outside the map."""
    with torch.no_grad():
        return _scores(query, key, height, width, kernel_size)


def qk_backward(
    d_attn_weight: Tensor, query: Tensor, key: Tensor, height: int, width: int, kernel_size: int, cuda_threads: int
) -> list[Tensor | None]:
    """[d_query, d_key]."""
    return gradients(lambda q, k: _scores(q, k, height, width, kernel_size), (query, key), (d_attn_weight,))


def qk_rpb_forward(
    query: Tensor, key: Tensor, rpb: Tensor, height: int, width: int, kernel_size: int, cuda_threads: int
) -> Tensor:
    """With a bias (heads, K²) for each slot."""
    with torch.no_grad():
        return _scores(query, key, height, width, kernel_size) + rpb[:, None].to(query.dtype)


def qk_rpb_backward(
    d_attn_weight: Tensor, query: Tensor, key: Tensor, height: int, width: int, kernel_size: int, cuda_threads: int
) -> list[Tensor | None]:
    """[d_query, d_key, d_rpb]; slots outside the map count for nothing."""
    found = qk_backward(d_attn_weight, query, key, height, width, kernel_size, cuda_threads)
    rules = Windows((height, width), (kernel_size, kernel_size), (1, 1), (False, False), "truncated")
    _, held, _ = all_slots(rules)
    inside = d_attn_weight.masked_fill(~held.to(d_attn_weight.device), 0.0)
    return [*found, inside.sum((0, 2))]


def av_forward(
    attn_weight: Tensor, value: Tensor, height: int, width: int, kernel_size: int, cuda_threads: int
) -> Tensor:
    """(B, heads, H·W, d)."""
    with torch.no_grad():
        return _values(attn_weight, value, height, width, kernel_size)


def av_backward(
    d_output: Tensor,
    attn_weight: Tensor,
    value: Tensor,
    height: int,
    width: int,
    kernel_size: int,
    cuda_threads: int,
) -> list[Tensor | None]:
    """[d_attn_weight, d_value]."""
    return gradients(lambda a, v: _values(a, v, height, width, kernel_size), (attn_weight, value), (d_output,))
