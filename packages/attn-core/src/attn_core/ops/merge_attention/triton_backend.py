"""Merge of attention results with one read of every part; kernels in ``triton_kernels``. Imports without Triton.

Memory beyond the results: nothing for up to eight parts; a float32 copy of the result for more.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from attn_core.kernels.launch import Tile, architecture, launch, power_of_two, unit_stride
from attn_core.kernels.registration import Grads

from .reference import MERGE_ATTENTION, Arguments, fake

# Parts that one kernel reads; each is a pair of arguments.
GROUP = 8


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """A few parts in each launch; the sum is carried from one to the next."""
    from .triton_kernels import merge_kernel

    tensors, parts = a
    out, lse = fake(a)
    batch, heads, tokens, width = out.shape
    tensors = [t.expand(batch, *t.shape[1:]) for t in tensors]  # under vmap a part may have one image for all
    outs, lses = _alike([unit_stride(t) for t in tensors[:parts]]), _alike(tensors[parts:])
    tile = _tile(out)
    carry: Tensor | None = None
    for start in range(0, parts, GROUP):
        last = start + GROUP >= parts
        group, sums = outs[start : start + GROUP], lses[start : start + GROUP]
        # Later parts read what the ones before them left here, each program its own rows.
        earlier = carry
        if not last and carry is None:
            carry = out.new_empty(out.shape, dtype=torch.float32)
        target = out if last else carry
        assert target is not None
        filled = (*group, *group[:1] * (GROUP - len(group)), *sums, *sums[:1] * (GROUP - len(sums)))
        launch(
            merge_kernel,
            math.ceil(lse.numel() / tile.rows),
            out.device,
            tile,
            *(*filled, earlier, None if earlier is None else lse, target, lse, *group[0].stride()[:3]),
            *(*sums[0].stride(), *target.stride()[:3], heads, tokens, lse.numel()),
            D=width,
            PARTS=len(group),
            BM=tile.rows,
            BN=tile.columns,
        )
    return out, lse


def backward(grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:
    """w_s = exp(lse_s − lse): do_s = w_s·do;  dlse_s = w_s (do·(o_s − o) + dlse)."""
    from .triton_kernels import part_gradient_kernel

    (grad_out, grad_lse), (out, lse), (tensors, parts) = grads, kept, a
    assert grad_out is not None
    grad_out, out = unit_stride(grad_out), unit_stride(out)
    tile, rows = _tile(out), lse.numel()
    gradients: list[Tensor | None] = [None] * len(needs)
    for s, (part, own) in enumerate(zip(tensors[:parts], tensors[parts:], strict=True)):
        if not (needs[s] or needs[parts + s]):
            continue
        part, own = (t.expand(len(out), *t.shape[1:]) for t in (unit_stride(part), own))
        d_part = torch.empty_like(part, memory_format=torch.contiguous_format) if needs[s] else None
        d_lse = torch.empty_like(lse) if needs[parts + s] else None
        launch(
            part_gradient_kernel,
            math.ceil(rows / tile.rows),
            out.device,
            tile,
            *(grad_out, grad_lse, out, lse, part, own, d_part, d_lse, *grad_out.stride()[:3], *out.stride()[:3]),
            *(*part.stride()[:3], *own.stride(), *(grad_lse.stride() if grad_lse is not None else (0, 0, 0))),
            *(*out.shape[1:3], rows),
            D=out.shape[3],
            BM=tile.rows,
            BN=tile.columns,
        )
        gradients[s], gradients[parts + s] = d_part, d_lse
    return gradients


def _alike(parts: Sequence[Tensor]) -> list[Tensor]:
    """The parts with one set of strides for all: as they are, which is usual, or copied."""
    if all(part.stride() == parts[0].stride() for part in parts):
        return list(parts)
    return [part.contiguous() for part in parts]


def _tile(out: Tensor) -> Tile:
    """Queries × columns; every tile passes ``python -m attn_core.aot``."""
    if architecture(out.device) == "interpreter":
        return Tile(16, 16, 4, 1)
    return Tile(16, min(128, power_of_two(out.shape[3], 16)), 4, 1)


merge_attention = MERGE_ATTENTION.register("triton", forward, backward)


def aot_cases(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Runs on meta tensors that reach every tile, with and without earlier parts."""
    few = [(torch.bfloat16, 64, 2), (torch.float32, 128, 9)]
    rest = [(torch.float16, 20, 8), (torch.bfloat16, 128, 17), (torch.float32, 256, 3), (torch.float32, 16, 1)]
    for dtype, width, parts in few if quick else few + rest:
        label = f"{str(dtype).removeprefix('torch.')} {width}, {parts} parts"
        yield label, functools.partial(_aot_run, dtype, width, parts)


def _aot_run(dtype: torch.dtype, width: int, parts: int) -> None:
    outs = [torch.empty(2, 777, 4, width, dtype=dtype, device="meta").transpose(1, 2) for _ in range(parts)]
    lses = [torch.empty(2, 4, 777, device="meta") for _ in range(parts)]
    a = Arguments([*outs, *lses], parts)
    out, lse = forward(a)
    backward((torch.empty_like(out), torch.empty_like(lse)), (out, lse), a, [True] * 2 * parts)
