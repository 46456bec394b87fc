"""Sums over windows on a GPU: the kernels and launches of :mod:`attn_core.ops.neighborhood_scores`.

This file imports without Triton. No memory beyond the results.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from attn_core.kernels.registration import Grads, empty_gradient
from attn_core.ops.neighborhood_scores.triton_backend import aot_forms, keys_into, scores_into, sums_into

from .reference import NEIGHBORHOOD_VALUES, Arguments, fake


def forward(a: Arguments) -> Tensor:
    """One program for each head and box of cells."""
    out = fake(a)
    return sums_into(out, a.p, a.v, a) if out.numel() else out  # pyright: ignore[reportArgumentType]


def backward(grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:  # noqa: ARG001  the backends' signature
    """dp are scores of the gradient with the values, dv sums over the queries that hold a key."""
    (grad,) = grads
    assert grad is not None
    if grad.numel() == 0:
        return [torch.zeros_like(a.p), torch.zeros_like(a.v)]
    dp = scores_into(empty_gradient(a.p, False), grad, a.v, None, a, 0.0) if needs[0] else None  # pyright: ignore[reportArgumentType]
    dv = keys_into(empty_gradient(a.v, True), a.p, grad, a) if needs[1] else None  # pyright: ignore[reportArgumentType]
    return [dp, dv]


neighborhood_values = NEIGHBORHOOD_VALUES.register("triton", forward, backward)


def aot_cases(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Runs on meta tensors; the forms of the scores, whose kernels these are."""
    for label, form in aot_forms(quick):
        yield label, functools.partial(_aot_run, **{name: x for name, x in form.items() if name != "bias"})


def _aot_run(
    dtype: torch.dtype,
    width: int,
    grid: tuple[int, ...],
    kernel: int,
    dilation: int = 1,
    causal: bool = False,
    border: str = "shifted",
) -> None:
    axes, cells = len(grid), math.prod(grid)
    p = torch.empty(2, 4, cells, kernel**axes, dtype=dtype, device="meta")
    v = torch.empty(2, cells, 4, width, dtype=dtype, device="meta").transpose(1, 2)
    a = Arguments(p, v, list(grid), [kernel] * axes, [dilation] * axes, [causal] * axes, border)
    backward((torch.empty_like(forward(a)),), (), a, [True, True])
