"""Focal modulation in plain torch: a few images at a time, channels-last, maps computed again for the backward pass.

oneDNN's depthwise convolutions are up to 20 times faster in channels-last than in channels-first memory.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core import torch_internals
from attn_core.kernels.registration import Grads

from .reference import FOCAL_MODULATION, Arguments, fake, reference

# Elements of the maps computed together: 2²⁰ float32 are 4 MiB, and the backward pass holds 2L + 3 such maps. A GPU
# needs larger ones to be busy.
CHUNK = 2**20
CHUNK_GPU = 2**25
# Entries of a map's (C, N, N) matrix up to which its product costs less than starting a convolution of oneDNN.
SMALL = 2**14


def focal_modulation(a: Arguments) -> Tensor:
    """Extra memory: maps of a few images in float32, three in the forward pass and 2L + 3 in the backward pass.

    A graph compiled for inference on a CPU holds the convolutions themselves, so that the compiler writes one loop of
    what lies between them.
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and not torch.is_grad_enabled():
        exact = a.ctx.dtype in (torch.float32, torch.float64) and a.ctx.numel() > 0
        if exact and a.ctx.device.type == "cpu":
            return _plain(a)
    return _call(a)


def _plain(a: Arguments) -> Tensor:
    z, gates = (t.permute(0, 3, 1, 2) for t in (a.ctx, a.gates))
    z = z.contiguous(memory_format=torch.channels_last)
    y = torch.zeros_like(z)
    for level, weight in enumerate(a.weights):
        z = F.gelu(_convolve(z, weight[0]))
        y = y + z * gates[:, level : level + 1]
    y = y + F.gelu(z.mean((2, 3), keepdim=True)) * gates[:, len(a.weights) :]
    return (y / (len(a.weights) + 1) if a.normalize else y).permute(0, 2, 3, 1)


def forward(a: Arguments) -> Tensor:
    """Some images at a time, level after level, added up in the result's own memory."""
    ctx, gates, weights, normalize = a
    if _is_small(ctx, weights):
        return _by_matrices(a)
    y = fake(a)
    if y.numel() == 0:
        return y
    for images in _spans(ctx, weights):
        z, g = _map(ctx, images), _map(gates, images)
        in_place = y.dtype == z.dtype
        total = y[images].permute(0, 3, 1, 2) if in_place else torch.empty_like(z)
        total.zero_()
        for level, weight in enumerate(weights):
            z = torch_internals.gelu_(_convolve(z, _kernels(weight, images, z.dtype)))
            total.addcmul_(z, g[:, level : level + 1])
        total.addcmul_(F.gelu(z.mean((2, 3), keepdim=True)), g[:, len(weights) :])
        if normalize:
            total.div_(len(weights) + 1)
        if not in_place:
            y[images] = total.permute(0, 2, 3, 1)
    return y


def _is_small(ctx: Tensor, weights: Sequence[Tensor]) -> bool:
    entries = ctx.numel() * ctx.shape[1] * ctx.shape[2]
    return 0 < entries <= SMALL and ctx.is_cpu and all(weight.shape[0] == 1 for weight in weights)


def _by_matrices(a: Arguments) -> Tensor:
    """The forward pass with each channel's convolution as a product with an N×N matrix; maps are (C, N, B).

    In float64: oneDNN's GELU of float32 takes five times as long to start.
    """
    batch, rows, columns, channels = a.ctx.shape
    cells, levels = rows * columns, len(a.weights)
    z = a.ctx.permute(3, 1, 2, 0).to(torch.float64, memory_format=torch.contiguous_format).view(channels, cells, batch)
    gates = a.gates.permute(3, 1, 2, 0).to(torch.float64, memory_format=torch.contiguous_format)
    gates = gates.view(levels + 1, 1, cells, batch).unbind(0)
    y: Tensor | None = None
    if levels:
        table, nothing = _tap_table(rows, columns, tuple([weight.shape[3] for weight in a.weights]))
        taps = [weight.view(channels, -1) for weight in a.weights]
        taps = torch.cat([*taps, nothing.expand(channels, 1)], 1)  # float64, as the last
        matrices = taps.index_select(1, table).view(channels, levels, cells, cells)
        for matrix, gate in zip(matrices.unbind(1), gates, strict=False):
            z = F.gelu(torch.bmm(matrix, z))
            y = z * gate if y is None else y.addcmul_(z, gate)
    mean = F.gelu(z.mean(1, True))
    y = mean * gates[levels] if y is None else y.addcmul_(mean, gates[levels])
    if a.normalize:
        y.div_(levels + 1)
    y = y.view(channels, rows, columns, batch).permute(3, 1, 2, 0)
    return y.to(a.ctx.dtype, memory_format=torch.contiguous_format).contiguous()


@functools.lru_cache(maxsize=64)
def _tap_table(rows: int, columns: int, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(L·N·N,): of each level the tap with which a cell reads another, in all kernels side by side; and a 0 (1, 1).

    Where a cell does not read another, it is that 0 behind the last tap.
    """
    row, column = (torch.arange(n, device="cpu") for n in (rows, columns))
    row, column = row.repeat_interleave(columns), column.repeat(rows)
    tables, first, last = [], 0, sum(size**2 for size in sizes)
    for size in sizes:
        down, across = (x - x[:, None] + size // 2 for x in (row, column))
        inside = (down >= 0) & (down < size) & (across >= 0) & (across < size)
        tables.append(torch.where(inside, first + down * size + across, last).flatten())
        first += size**2
    return torch.cat(tables), torch.zeros(1, 1, dtype=torch.float64, device="cpu")


def backward(grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:  # noqa: ARG001  the backends' signature
    """du_l = (dz_l + dy g_l) gelu'(u_l); dz_{l−1} = W_lᵀ ∗ du_l; dg_l = Σ_c dy z_l; dW_l = Σ du_l z_{l−1}, shifted."""
    (grad_y,), (ctx, gates, weights, normalize) = grads, a
    assert grad_y is not None
    needs_ctx, needs_gates, *needs_weights = needs
    levels, (_, height, width, _) = len(weights), ctx.shape
    dctx, dgates = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (ctx, gates))
    dtype = _accumulation(ctx)
    dweights = [torch.zeros_like(weight, dtype=dtype, memory_format=torch.contiguous_format) for weight in weights]
    for images in _spans(ctx, weights) if ctx.numel() else ():
        g, dy = _map(gates, images), _map(grad_y, images)
        if normalize:
            dy = dy / (levels + 1)
        kernels = [_kernels(weight, images, dtype) for weight in weights]
        z, u = [_map(ctx, images)], []
        for kernel in kernels:
            u.append(_convolve(z[-1], kernel))
            z.append(F.gelu(u[-1]))
        mean = z[-1].mean((2, 3), keepdim=True)
        if needs_gates:
            for level in range(levels):
                dgates[images, ..., level] = (dy * z[level + 1]).sum(1)
            dgates[images, ..., levels] = (dy * F.gelu(mean)).sum(1)
        d_mean = torch.ops.aten.gelu_backward((dy * g[:, levels:]).sum((2, 3), keepdim=True), mean)
        dz = (d_mean / (height * width)).expand_as(dy)
        for level in reversed(range(levels)):
            du = torch.ops.aten.gelu_backward(torch.addcmul(dz, dy, g[:, level : level + 1]), u[level])
            if needs_weights[level]:
                own = images if weights[level].shape[0] > 1 else slice(None)
                dweights[level][own] += correlate(du, z[level], kernels[level], kernels[level].shape[-1] // 2)
            if level or needs_ctx:
                # The transposed convolution, as a convolution with the kernel turned around: oneDNN's faster road.
                dz = _convolve(du, kernels[level].flip(2, 3))
        dctx[images] = dz.permute(0, 2, 3, 1)
    return [dctx, dgates, *dweights]


def _accumulation(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _spans(ctx: Tensor, weights: Sequence[Tensor]) -> Iterator[slice]:
    """Images computed together: one where each has kernels of its own, as under vmap."""
    shared = all(weight.shape[0] == 1 for weight in weights)
    chunk = CHUNK if ctx.device.type == "cpu" else CHUNK_GPU
    step = max(1, chunk // ctx[0].numel()) if shared else 1
    step = math.ceil(len(ctx) / math.ceil(len(ctx) / step))  # of equal size
    return (slice(start, min(start + step, len(ctx))) for start in range(0, len(ctx), step))


def _map(t: Tensor, images: slice) -> Tensor:
    """(images, C, Y, X), channels-last and without gaps."""
    return t[images].permute(0, 3, 1, 2).to(_accumulation(t)).contiguous(memory_format=torch.channels_last)


def _kernels(weight: Tensor, images: slice, dtype: torch.dtype) -> Tensor:
    return weight[0 if weight.shape[0] == 1 else images.start].to(dtype)


def _convolve(z: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(z, kernel, padding=kernel.shape[-1] // 2, groups=len(kernel))


def correlate(du: Tensor, z: Tensor, kernel: Tensor, padding: int) -> Tensor:
    """Σ du[…, p]·z[…, p + tap] of every tap: (C, 1, k, k)."""
    pairs = [1, 1], [padding, padding], [1, 1]
    _, gradient, _ = torch.ops.aten.convolution_backward(
        du, z, kernel, None, *pairs, False, [0, 0], len(kernel), [False, True, False]
    )
    return gradient


_call = FOCAL_MODULATION.register("torch", forward, backward, exported=reference)
