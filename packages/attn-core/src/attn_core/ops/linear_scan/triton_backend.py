"""Linear scan on a GPU: one kernel for states and for their gradient. This file imports without Triton."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from attn_core.kernels.launch import Tile, launch, power_of_two, unit_stride
from attn_core.kernels.registration import Grads

from .reference import LINEAR_SCAN, Arguments, fake
from .torch_backend import gradients_of

STEPS, FEATURES = 32, 64


def forward(x: Arguments) -> Tensor:
    """Memory: the states."""
    return _scan(x.a, x.b, x.h0, fake(x), x.reverse)


def backward(grads: Grads, kept: tuple[Tensor, ...], x: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:
    """g_t = dh_t + a_{t+1} g_{t+1} by the kernel; memory: g in float32."""
    (grad,), (h,) = grads, kept
    assert grad is not None
    g = torch.empty(x.b.shape, dtype=torch.float32, device=x.b.device)
    _scan(x.a, grad, None, g, not x.reverse, previous=True)
    return gradients_of(g, h, x, needs)


def _scan(a: Tensor, b: Tensor, start: Tensor | None, out: Tensor, reverse: bool, *, previous: bool = False) -> Tensor:
    from .triton_kernel import scan_kernel

    batch, steps, groups, features = b.shape
    if out.numel() == 0:
        return out
    if b.stride()[2:] != (features, 1):
        b = b.contiguous()
    a = unit_stride(a)
    own = features == 1
    columns = min(FEATURES, power_of_two(groups if own else features))
    blocks = math.ceil(groups / columns) if own else groups * math.ceil(features / columns)
    launch(
        scan_kernel,
        batch * blocks,
        b.device,
        Tile(STEPS, columns, 4, 1),
        *(a, b, None if start is None else start.contiguous(), out, 0 if a.shape[0] == 1 else a.stride(0)),
        *(a.stride(1), *b.stride()[:2], steps, groups, features, math.ceil(steps / STEPS)),
        BM=STEPS,
        BN=columns,
        OWN=own,
        PREVIOUS=previous,
        REVERSE=reverse,
    )
    return out


linear_scan = LINEAR_SCAN.register("triton", forward, backward)


def aot_cases(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Runs on meta tensors: a gate for each feature, and one for many."""
    few = [(torch.bfloat16, 512, 1), (torch.float32, 2, 4096)]
    rest = [(torch.float32, 512, 1), (torch.float16, 8, 16), (torch.float32, 7, 1)]
    for dtype, groups, features in few if quick else few + rest:
        label = f"{str(dtype).removeprefix('torch.')} {groups}×{features}"
        yield label, functools.partial(_aot_run, dtype, groups, features)


def _aot_run(dtype: torch.dtype, groups: int, features: int, steps: int = 1024) -> None:
    b = torch.empty(2, steps, groups, features, dtype=dtype, device="meta")
    a = torch.empty(2, steps, groups, device="meta")
    x = Arguments(b, a, torch.empty(2, groups, features, device="meta"), False)
    h = forward(x)
    backward((torch.empty_like(h),), (h,), x, (True, True, True))
