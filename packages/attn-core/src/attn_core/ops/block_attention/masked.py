"""Block attention as one masked dense call: the better form when the blocks are small or most keys are read."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attn_core.kernels.registration import Grads
from attn_core.ops.attention import torch_backend as dense
from attn_core.ops.attention.reference import Arguments as DenseArguments

from .plan import CHUNK_ELEMENTS, Plan
from .reference import Arguments

# A masked dense call replaces the gather when it computes at most this many times the scores: small query blocks make
# narrow matrix products, which run several times slower (break-even measured on two AVX-512 cores).
DENSE_RATIO = 1.5
DENSE_RATIO_SMALL_BLOCKS = 4.0
SMALL_BLOCK = 8
DENSE_MAX_KEYS = 1024


def is_dense(plan: Plan, a: Arguments) -> bool:
    if plan.per_head or a.per_row or a.causal or a.kv_weight is not None or a.axis_bias or a.self_logit is not None:
        return False
    I, listed = plan.q_index.shape[2], plan.table.shape[2] * plan.kv_index.shape[2]
    if a.q.device.type != "cpu" or a.k.shape[2] > DENSE_MAX_KEYS or listed == 0 or 0 in a.q.shape:
        return False
    return listed * (DENSE_RATIO_SMALL_BLOCKS if I <= SMALL_BLOCK else DENSE_RATIO) >= a.k.shape[2]


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


def dense_forward(plan: Plan, a: Arguments) -> tuple[Tensor, Tensor]:
    results = [dense.forward(_of_images(a, images, mask)) for images, mask in _dense_masks(plan, a.q, a.k)]
    if len(results) == 1:
        return results[0]
    out = torch.cat([out.transpose(1, 2) for out, _ in results]).transpose(1, 2)
    return out, torch.cat([lse for _, lse in results])


def dense_backward(
    plan: Plan, grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool]
) -> list[Tensor | None]:
    parts = []
    for images, mask in _dense_masks(plan, a.q, a.k):
        incoming = tuple(None if x is None else x[images] for x in grads)
        results = tuple(x[images] for x in kept)
        parts.append(dense.backward(incoming, results, _of_images(a, images, mask), [*needs[:3], False])[:3])
    whole = [
        found[0] if len(found) == 1 else torch.cat([x.transpose(1, 2) for x in found]).transpose(1, 2)
        for found in zip(*parts, strict=True)
    ]
    return [*whole, None]


def _of_images(a: Arguments, images: slice, mask: Tensor) -> DenseArguments:
    return DenseArguments(a.q[images], a.k[images], a.v[images], mask, None, [], a.scale, "none")
