"""Block attention as one masked dense call: the better form when the blocks are small or most keys are read."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attn_core.ops.attention import torch_backend as dense

from .plan import CHUNK_ELEMENTS, Plan

# A masked dense call replaces the gather when it computes at most this many times the scores: small query blocks make
# narrow matrix products, which run several times slower (break-even measured on two AVX-512 cores).
DENSE_RATIO = 1.5
DENSE_RATIO_SMALL_BLOCKS = 4.0
SMALL_BLOCK = 8
DENSE_MAX_KEYS = 1024


def is_dense(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    kv_weight: Tensor | None,
    axis_bias: Sequence[Tensor],
    causal: bool,
    self_logit: float | None,
    per_row: bool,
) -> bool:
    if plan.per_head or per_row or causal or kv_weight is not None or axis_bias or self_logit is not None:
        return False
    I, listed = plan.q_index.shape[2], plan.table.shape[2] * plan.kv_index.shape[2]
    if q.device.type != "cpu" or k.shape[2] > DENSE_MAX_KEYS or listed == 0 or 0 in q.shape:
        return False
    return listed * (DENSE_RATIO_SMALL_BLOCKS if I <= SMALL_BLOCK else DENSE_RATIO) >= k.shape[2]


def _dense_masks(plan: Plan, q: Tensor, k: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """For spans of images, log(times query t may read key u): 0 once, −inf never, log 2 for a block listed twice."""
    N, M = q.shape[2], k.shape[2]
    R, I = plan.q_index.shape[1:]
    step = max(1, CHUNK_ELEMENTS // (N * M))
    for g0 in range(0, plan.groups, step):
        images = slice(g0, min(g0 + step, plan.groups))
        count = images.stop - images.start

        def part(index: Tensor, images: slice = images, count: int = count) -> Tensor:
            return index[images] if index.shape[0] > 1 else index.expand(count, *index.shape[1:])

        blocks, listed, tokens = part(plan.kv_index), part(plan.table), part(plan.q_index)
        # one more block and one more token stand for the holes
        blocks = torch.cat([blocks, blocks.new_full((count, 1, blocks.shape[2]), -1)], dim=1)
        listed = listed.where(listed >= 0, blocks.shape[1] - 1).flatten(1)
        keys = blocks.gather(1, listed[..., None].expand(-1, -1, blocks.shape[2])).view(count, R, -1)
        keys = keys.where(keys >= 0, M)
        times = q.new_zeros(count, R + 1, M + 1).scatter_add_(2, keys, q.new_ones(keys.shape))[..., :M]
        times[:, R] = 0
        block_of = tokens.new_full((count, N + 1), R)
        numbers = torch.arange(R, device=q.device).repeat_interleave(I).expand(count, -1)
        flat = tokens.flatten(1)
        block_of.scatter_(1, flat.where(flat >= 0, N), numbers)
        if float(times.max()) > 1:
            bias = times.log_()
        else:  # the logarithm of zero is slow
            bias = torch.zeros_like(times).masked_fill_(times == 0, -math.inf)
        yield images, bias.gather(1, block_of[:, :N, None].expand(-1, -1, M))[:, None]


def dense_forward(plan: Plan, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    results = [
        dense.forward(q[images], k[images], v[images], mask, None, [], scale, "none")
        for images, mask in _dense_masks(plan, q, k)
    ]
    if len(results) == 1:
        return results[0]
    out = torch.cat([out.transpose(1, 2) for out, _ in results]).transpose(1, 2)
    return out, torch.cat([lse for _, lse in results])


def dense_backward(
    plan: Plan,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    parts = []
    for images, mask in _dense_masks(plan, q, k):
        lse_part = None if grad_lse is None else grad_lse[images]
        arguments = (grad_out[images], lse_part, out[images], lse[images], q[images], k[images], v[images])
        parts.append(dense.backward(*arguments, mask, None, [], scale, "none", [*needs, False]))
    return [
        grads[0] if len(grads) == 1 else torch.cat([grad.transpose(1, 2) for grad in grads]).transpose(1, 2)
        for grads in zip(*parts, strict=True)
    ]
