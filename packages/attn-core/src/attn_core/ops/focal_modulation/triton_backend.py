"""Focal modulation with one kernel for each level, forward and backward; kernels in ``triton_kernels``.

A level's convolution, GELU and gated sum are one kernel, and so are its transposed convolution, GELU's derivative and
the gate's part of the gradient. The global mean and the gradients of gates and kernels, reductions over whole maps, are
torch's. Imports without Triton. Memory beyond the results: two maps forward; 2L + 3 maps backward, and two in float32
while torch computes a kernel's gradient.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core.kernels.launch import Tile, architecture, broadcast_strides, launch, power_of_two
from attn_core.kernels.registration import Grads

from .reference import FOCAL_MODULATION, Arguments, fake
from .torch_backend import correlate


def forward(a: Arguments) -> Tensor:
    """One kernel for each level, each adds its gated map."""
    ctx, gates, weights, normalize = a
    y = fake(a)
    if y.numel() == 0:
        return y
    z = ctx
    for level, weight in enumerate(weights):
        z = _level(z, weight, gates[..., level], None, y, first=level == 0)
    mean = F.gelu(z.mean((1, 2), keepdim=True, dtype=torch.float32)).to(y.dtype)
    y.addcmul_(mean, gates[..., len(weights) :])
    return y.div_(len(weights) + 1) if normalize else y


def backward(grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:  # noqa: ARG001  the backends' signature
    """The levels' maps again, then one kernel for each level from the last to the first."""
    (grad_y,), (ctx, gates, weights, normalize) = grads, a
    assert grad_y is not None
    needs_ctx, needs_gates, *needs_weights = needs
    if ctx.numel() == 0:
        return [torch.zeros_like(t) for t in (ctx, gates, *weights)]
    levels, scale = len(weights), 1 / (len(weights) + 1) if normalize else 1.0
    z, u = [ctx], []
    for weight in weights:
        u.append(torch.empty_like(ctx, memory_format=torch.contiguous_format))
        z.append(_level(z[-1], weight, None, u[-1], None, first=True))
    mean = z[-1].mean((1, 2), dtype=torch.float32)
    gelu_mean = F.gelu(mean)[:, None, None]
    dgates = None
    if needs_gates:
        maps = [*z[1:], gelu_mean.to(ctx.dtype)]
        dgates = torch.stack([(grad_y * m).sum(-1, dtype=torch.float32) for m in maps], dim=-1).mul_(scale)
    # Over all pixels: dy·gate of the mean.
    pooled = torch.einsum("byxc,byx->bc", grad_y.float(), gates[..., levels].float()).mul_(scale)
    d_mean = torch.ops.aten.gelu_backward(pooled, mean) / (ctx.shape[1] * ctx.shape[2])
    du: Tensor | None = None
    dweights: list[Tensor | None] = [None] * levels
    for level in reversed(range(levels)):
        kernels = weights[level + 1] if du is not None else None
        du = _level_gradient(du, kernels, d_mean, grad_y, gates[..., level], u[level], scale)
        if needs_weights[level]:
            dweights[level] = _kernel_gradient(du, z[level], weights[level])
    dctx = _level_gradient(du, weights[0], d_mean, grad_y, None, None, scale) if needs_ctx else None
    return [dctx, dgates, *dweights]


def _level(
    z: Tensor, weight: Tensor, gate: Tensor | None, u: Tensor | None, total: Tensor | None, *, first: bool
) -> Tensor:
    from .triton_kernels import level_kernel

    out = torch.empty_like(z, memory_format=torch.contiguous_format)
    tile, size = _tile(z), weight.shape[-1]
    weight = weight.contiguous()
    launch(
        level_kernel,
        _programs(z, tile),
        z.device,
        tile,
        *(z, weight, gate, u, out, total, *z.stride(), broadcast_strides(weight)[0]),
        *(*(gate.stride() if gate is not None else (0, 0, 0)), *z.shape[1:]),
        K=size,
        FIRST=first,
        BM=tile.rows,
        BN=tile.columns,
    )
    return out


def _level_gradient(
    du: Tensor | None,
    weight: Tensor | None,
    d_mean: Tensor,
    grad_y: Tensor,
    gate: Tensor | None,
    u: Tensor | None,
    scale: float,
) -> Tensor:
    from .triton_kernels import level_gradient_kernel

    out = torch.empty_like(grad_y, memory_format=torch.contiguous_format)
    tile = _tile(grad_y)
    weight = None if weight is None else weight.contiguous()
    launch(
        level_gradient_kernel,
        _programs(grad_y, tile),
        grad_y.device,
        tile,
        *(du, weight, d_mean, grad_y, gate, u, out, broadcast_strides(weight)[0] if weight is not None else 0),
        *(*grad_y.stride(), *(gate.stride() if gate is not None else (0, 0, 0)), *grad_y.shape[1:], scale),
        K=1 if weight is None else weight.shape[-1],
        BM=tile.rows,
        BN=tile.columns,
    )
    return out


def _kernel_gradient(du: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """torch's, in float32; image by image where each has kernels of its own, as under vmap."""
    size = weight.shape[-1]
    du, z = (t.permute(0, 3, 1, 2).float() for t in (du, z))
    step = len(du) if weight.shape[0] == 1 else 1
    spans = [slice(i, i + step) for i in range(0, len(du), step)]
    parts = [correlate(du[span], z[span], weight[0].float(), size // 2) for span in spans]
    return torch.stack(parts)


def _tile(z: Tensor) -> Tile:
    """Cells of a row × channels; every tile passes ``python -m attn_core.aot``."""
    if architecture(z.device) == "interpreter":
        return Tile(8, 16, 4, 1)
    return Tile(16 if z.shape[2] <= 16 else 32, min(64, power_of_two(z.shape[3], 16)), 4, 1)


def _programs(z: Tensor, tile: Tile) -> int:
    batch, rows, cells, channels = z.shape
    return batch * rows * math.ceil(cells / tile.rows) * math.ceil(channels / tile.columns)


focal_modulation = FOCAL_MODULATION.register("triton", forward, backward)


def aot_cases(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Runs on meta tensors that reach every tile and kernel size of FocalNet."""
    few = [(torch.bfloat16, 56, 96, (3, 5)), (torch.float32, 14, 384, (3, 5))]
    rest = [(torch.float16, 28, 192, (5, 7, 9)), (torch.float32, 56, 30, (3, 5, 7)), (torch.bfloat16, 7, 768, (3, 11))]
    for dtype, side, channels, sizes in few if quick else few + rest:
        label = f"{str(dtype).removeprefix('torch.')} {side}² C{channels} k{'-'.join(map(str, sizes))}"
        yield label, functools.partial(_aot_run, dtype, side, channels, sizes)


def _aot_run(dtype: torch.dtype, side: int, channels: int, sizes: tuple[int, ...]) -> None:
    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    levels = len(sizes)
    projection = meta(2, side, side, 2 * channels + levels + 1)
    ctx, gates = projection[..., channels : 2 * channels], projection[..., 2 * channels :]
    weights = [meta(1, channels, 1, k, k) for k in sizes]
    a = Arguments(ctx, gates, weights, False)
    y = forward(a)
    backward((torch.empty_like(y),), (), a, [True] * (2 + levels))
