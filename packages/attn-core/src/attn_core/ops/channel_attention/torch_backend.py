"""Channel attention in plain torch: matrix products of one image at a time, read through the heads' strides.

Memory beyond the result: the weights (B, H, C, C) in float32; with 16-bit inputs also one image's operands in float32.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attn_core.kernels.registration import Grads, empty_gradient

from .reference import CHANNEL_ATTENTION, Arguments, fake, reference

# Elements up to which an image is too little work for a call of its own (measured on two AVX-512 cores).
SMALL_IMAGE = 2**17


def forward(problem: Arguments) -> tuple[Tensor, Tensor]:
    """y and the weights A (B, H, C, C), some images at a time."""
    a, b, x, scale, negate_max, transpose = problem
    y, A = fake(problem)
    for images in _spans(a):
        a_i, b_i, x_i = (_heads(t, images, A.dtype, a.shape[0]) for t in (a, b, x))
        # The maximum that negate_max adds to a row cancels in its softmax.
        E = _product(a_i.mT, b_i)
        factor = -scale if negate_max else scale
        E = torch.softmax(E if factor == 1.0 else E.mul_(factor), dim=-1, out=A[images].flatten(0, 1))
        _store(y[images], x_i, E if transpose else E.mT)
    return y, A


def backward(grads: Grads, kept: tuple[Tensor, ...], problem: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:
    """dA = dyᵀx; dE = A∘(dA − Σ_d dA∘A); da = scale·b dEᵀ; db = scale·a dE; dx = dy A."""
    (grad_y,), (A,), (a, b, x, scale, negate_max, transpose) = grads, kept, problem
    assert grad_y is not None
    batch = A.shape[0]
    found = [
        empty_gradient(t.expand(batch, *t.shape[1:]), True) if need else None
        for t, need in zip((a, b, x), needs, strict=True)
    ]
    da, db, dx = found
    for images in _spans(A):
        a_i, b_i, x_i, dy = (_heads(t, images, A.dtype, batch) for t in (a, b, x, grad_y))
        A_i = A[images].flatten(0, 1)
        if dx is not None:
            _store(dx[images], dy, A_i.mT if transpose else A_i)
        if da is None and db is None:
            continue
        dA = _product(x_i.mT, dy) if transpose else _product(dy.mT, x_i)
        dE = dA.sub_((dA * A_i).sum(-1, keepdim=True)).mul_(A_i).mul_(-scale if negate_max else scale)
        if da is not None:
            _store(da[images], b_i, dE.mT)
        if db is not None:
            _store(db[images], a_i, dE)
    return found


def _spans(t: Tensor) -> Iterator[slice]:
    """One image at a time on a CPU, where its heads are then a view and stay in cache, unless it is small."""
    size = t[:1].numel()
    step = 1 if t.device.type == "cpu" and size > SMALL_IMAGE else max(1, t.shape[0])
    return (slice(start, start + step) for start in range(0, t.shape[0], step))


def _heads(t: Tensor, images: slice, dtype: torch.dtype, batch: int) -> Tensor:
    """(images·H, N, C) in the accumulation dtype: sums of 16-bit products over thousands of tokens overflow."""
    if t.shape[0] != batch:
        t = t.expand(batch, *t.shape[1:])
    if images.stop - images.start < batch:
        t = t[images]
    t = t.flatten(0, 1)
    return t if t.dtype == dtype else t.to(dtype)


def _product(left: Tensor, right: Tensor) -> Tensor:
    # One large product: the batched routine is slower (145 against 93 ms at N = 4096, C = 512).
    return torch.mm(left[0], right[0])[None] if left.shape[0] == 1 else torch.bmm(left, right)


def _store(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Write ``left @ right`` to ``target`` (images, H, N, C), without a copy where the products may write there."""
    if target.shape[0] != 1 or target.dtype != left.dtype:
        target.copy_(_product(left, right).view(target.shape))
    elif left.shape[0] == 1:
        torch.mm(left[0], right[0], out=target[0, 0])
    else:
        torch.bmm(left, right, out=target[0])


channel_attention = CHANNEL_ATTENTION.register("torch", forward, backward, exported=reference)
