"""Block attention as one masked dense call: the better form when the blocks are small or most keys are read."""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attn_core import torch_internals
from attn_core.kernels.derived import derived
from attn_core.kernels.registration import Grads, token_major_copy
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
# Entries of a mask that is kept between calls: 2¹⁷ float32 are 512 KiB.
KEPT_MASK = 2**17


def is_dense(plan: Plan, a: Arguments) -> bool:
    """Whether one masked call over all keys is cheaper than gathering the listed ones."""
    if plan.per_head or a.per_row or a.causal or a.kv_weight is not None or a.axis_bias or a.self_logit is not None:
        return False
    I, listed = plan.q_index.shape[2], plan.table.shape[2] * plan.kv_index.shape[2]
    if a.q.device.type != "cpu" or a.k.shape[2] > DENSE_MAX_KEYS or listed == 0 or 0 in a.q.shape:
        return False
    return listed * (DENSE_RATIO_SMALL_BLOCKS if I <= SMALL_BLOCK else DENSE_RATIO) >= a.k.shape[2]


class _Mask(NamedTuple):
    """log(times query t may read key u) for a span of images: 0 once, −inf never, log 2 for a block listed twice."""

    images: slice
    bias: Tensor  # (images, 1, N, M)
    is_seen: bool  # every query reads some key


def _masks(plan: Plan, a: Arguments) -> Iterable[_Mask]:
    """Those of small indices that stay are made once."""
    q, M = a.q, a.k.shape[2]
    build = functools.partial(_new_masks, plan, q.shape[2], M, q.dtype, q.device)
    if plan.groups * q.shape[2] * M > KEPT_MASK:
        return build()
    key = ("block_attention masks", plan.groups, q.shape[2], M, q.dtype)
    # The plan was made of these numbers, and is not looked at again for the same.
    return derived(key, lambda *_: tuple(build()), a.q_index, a.kv_index, a.table)


def _new_masks(plan: Plan, N: int, M: int, dtype: torch.dtype, device: torch.device) -> Iterator[_Mask]:
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
        times = torch.zeros(count, R + 1, M + 1, dtype=dtype, device=device)
        times = times.scatter_add_(2, keys, torch.ones(keys.shape, dtype=dtype, device=device))[..., :M]
        times[:, R] = 0
        block_of = tokens.new_full((count, N + 1), R)
        numbers = torch.arange(R, device=device).repeat_interleave(I).expand(count, -1)
        flat = tokens.flatten(1)
        block_of.scatter_(1, flat.where(flat >= 0, N), numbers)
        is_seen = bool((times > 0).any(-1).gather(1, block_of[:, :N]).all())
        if float(times.max()) > 1:
            bias = times.log_()
        else:  # the logarithm of zero is slow
            bias = torch.zeros_like(times).masked_fill_(times == 0, -math.inf)
        yield _Mask(images, bias.gather(1, block_of[:, :N, None].expand(-1, -1, M))[:, None], is_seen)


def dense_forward(plan: Plan, a: Arguments) -> tuple[Tensor, Tensor]:
    """Attention over all keys with a mask of what is listed, once for each group of images of one table."""
    results = [_forward(_of_images(a, mask), mask.is_seen) for mask in _masks(plan, a)]
    if len(results) == 1:
        return results[0]
    out = torch.cat([out.transpose(1, 2) for out, _ in results]).transpose(1, 2)
    return out, torch.cat([lse for _, lse in results])


def _forward(a: DenseArguments, is_seen: bool) -> tuple[Tensor, Tensor]:
    q, k, v = a.q, a.k, a.v
    if is_seen and q.shape[3] == v.shape[3] and q.stride(3) == k.stride(3) == v.stride(3) == 1:
        # Nothing of what flash_forward mends can happen.
        out, lse = torch_internals.flash_cpu(q, k, v, 0.0, False, attn_mask=a.bias, scale=a.scale)
        return token_major_copy(out), lse.contiguous()
    return dense.forward(a)


def dense_backward(
    plan: Plan, grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of q, k and v by the same masked calls; what dense plans exclude has none."""
    parts = []
    for mask in _masks(plan, a):
        incoming = tuple(None if x is None else x[mask.images] for x in grads)
        results = tuple(x[mask.images] for x in kept)
        parts.append(dense.backward(incoming, results, _of_images(a, mask), [*needs[:3], False])[:3])
    whole = [
        found[0] if len(found) == 1 else torch.cat([x.transpose(1, 2) for x in found]).transpose(1, 2)
        for found in zip(*parts, strict=True)
    ]
    return [*whole, None]


def _of_images(a: Arguments, mask: _Mask) -> DenseArguments:
    q, k, v = a.q, a.k, a.v
    if mask.images != slice(0, len(q)):
        q, k, v = (x[mask.images] for x in (q, k, v))
    return DenseArguments(q, k, v, mask.bias, None, None, None, [], a.scale, "none", ())
