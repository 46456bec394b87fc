"""Neighborhood attention over sequences, images and volumes: dilation, stride, causal axes, relative bias."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from attn_core.checks import (
    DATA_DTYPES,
    check_choice,
    check_dtype,
    check_flag,
    check_integer,
    check_number,
    check_same,
    check_size,
    check_tensor,
    check_width,
    default_scale,
    fail,
    remembered,
    shape,
)
from attn_core.dispatch import Backend, select, under_autocast

from . import torch_backend
from .reference import Arguments, reference
from .windows import per_axis

OPERATOR = "neighborhood_attention"
Border = Literal["shifted", "truncated"]
MAX_TRITON_WIDTH = 256
# Without tensor cores a wider product is unrolled into more registers than there are (seen by the ahead-of-time gate).
MAX_TRITON_WIDTH_FLOAT32 = 64


def neighborhood_attention(
    q: Float[Tensor, "B H *space D"],
    k: Float[Tensor, "B H *space D"],
    v: Float[Tensor, "B H *space Dv"],
    kernel_size: int | Sequence[int],
    *,
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    rpb: Float[Tensor, "H *R"] | None = None,
    border: Border = "shifted",
    backend: Backend | None = None,
) -> tuple[Float[Tensor, "B H *space Dv"], Float[Tensor, "B H *space"]]:
    """Softmax attention of every cell of a 1-D, 2-D or 3-D grid to the kernel_size window around it.

    Along one axis a cell i sees cells of its own residue modulo the dilation. Let p = i // dilation, n the number of
    cells of that residue and l = kernel_size // 2. Without stride the window starts at p − l and holds kernel_size
    cells; an even one looks one cell further back. With a stride s all cells of a group of s share the window of the
    group's middle. On a causal axis the window ends at p (with a stride it starts at that of the group's last cell).
    A cell is seen if every axis lets it be seen.

    Where a window leaves the grid, ``border="shifted"`` moves it back inside, so that every query sees equally many
    keys; ``border="truncated"`` drops the cells outside. Causal windows always are truncated.

    Args:
        q, k, v: the same grid of 1 to 3 axes, each at least one cell; Dv may differ from D.
        kernel_size, dilation, stride, is_causal: one value, or one for each axis.
        scale: factor of the dot products; D^−0.5 by default. 0.0 is legal.
        rpb: bias (H, 2·kernel_size_0 − 1, …), added at index (key − query) / dilation + kernel_size − 1 along each
            axis; differentiable; needs stride 1.

    Returns:
        out in the dtype of q; lse = log Σ_j exp s_ij in float32 (float64 for float64 inputs), natural logarithm.

    Raises:
        ValueError: shapes, dtypes, devices or window parameters do not fit; a shifted window that is larger than the
            grid (kernel_size · dilation > length). RuntimeError: the requested backend cannot run.

    Source: Hassani et al. 2023 (arXiv 2204.07143), eq. 2–4; dilation arXiv 2209.15001; stride arXiv 2504.16922;
    https://github.com/SHI-Labs/NATTEN.
    """
    q, k, v, rpb = under_autocast(q, k, v, rpb)
    rules = _check(q, k, v, kernel_size, dilation, stride, is_causal, scale, rpb, border)
    run = _implementation(select(OPERATOR, backend, q, lambda: triton_obstacle(q=q, v=v)))
    grid = q.shape[2:-1]
    scale = default_scale(q) if scale is None else scale
    bias = None if rpb is None else rpb[None]
    q, k, v = (x.flatten(2, -2) for x in (q, k, v))
    out, lse = run(Arguments(q, k, v, bias, list(grid), *rules, scale, border))
    # Views: Tensor.unflatten takes three times as long.
    return out.view(*lse.shape[:2], *grid, v.shape[-1]), lse.view(*lse.shape[:2], *grid)


def _implementation(backend: Backend) -> Callable[[Arguments], tuple[Tensor, Tensor]]:
    if backend == "triton":  # imported on first use: it costs time, and is absent where triton has no wheels
        from . import triton_backend

        return triton_backend.neighborhood_attention
    return reference if backend == "reference" else torch_backend.neighborhood_attention


def triton_obstacle(*, q: Tensor, v: Tensor, **_: Any) -> str | None:
    """Why the Triton kernel cannot take this call (too many head columns), or None."""
    width = max(q.shape[-1], v.shape[-1])
    limit = MAX_TRITON_WIDTH_FLOAT32 if q.dtype == torch.float32 else MAX_TRITON_WIDTH
    if width > limit:
        return f"the kernel holds head widths up to {limit} in {str(q.dtype).removeprefix('torch.')}, got {width}"
    return None


@remembered
def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int],
    stride: int | Sequence[int],
    is_causal: bool | Sequence[bool],
    scale: float | None,
    rpb: Tensor | None,
    border: str,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """The window parameters, one for each axis."""
    for argument, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(OPERATOR, argument, tensor)
    check_number(OPERATOR, "scale", scale, optional=True)
    if q.ndim not in (4, 5, 6):
        raise ValueError(f"{OPERATOR}: q must have 4, 5 or 6 dimensions (B H *space D), got shape {shape(q)}")
    check_dtype(OPERATOR, "q", q, DATA_DTYPES)
    check_width(OPERATOR, "q", q)
    check_same(OPERATOR, q, {"k": k, "v": v, "rpb": rpb})
    grid = q.shape[2:-1]
    for argument, tensor in (("k", k), ("v", v)):
        if tensor.ndim != q.ndim:
            raise ValueError(f"{OPERATOR}: {argument} must have the dimensions of q, got shape {shape(tensor)}")
        for dim, part in enumerate(("the batch of q", "the heads of q", *["the grid of q"] * len(grid))):
            check_size(OPERATOR, argument, tensor, dim, q.shape[dim], part)
    check_size(OPERATOR, "k", k, q.ndim - 1, q.shape[-1], "the width of q")
    check_choice(OPERATOR, "border", border, get_args(Border))
    given = {"kernel_size": kernel_size, "dilation": dilation, "stride": stride, "is_causal": is_causal}
    rules: dict[str, tuple[Any, ...]] = {}
    for argument, value in given.items():
        rules[argument] = per_axis(value, len(grid))
        if len(rules[argument]) != len(grid):
            fail(OPERATOR, argument, f"must be one value or one for each of the {len(grid)} axes", value)
        for item in rules[argument]:
            if argument == "is_causal":
                check_flag(OPERATOR, argument, item)
            else:
                check_integer(OPERATOR, argument, item, 1)
    kernel, dilated, strided, causal = rules.values()
    for axis, length in enumerate(grid):
        if length < 1:
            raise ValueError(f"{OPERATOR}: q must have at least one cell along every axis, got shape {shape(q)}")
        if strided[axis] > kernel[axis]:
            fail(OPERATOR, "stride", f"must not exceed kernel_size={kernel[axis]} along axis {axis}", strided[axis])
        if border == "shifted" and kernel[axis] * dilated[axis] > length:
            raise ValueError(
                f"{OPERATOR}: kernel_size · dilation must not exceed the {length} cells of axis {axis} with "
                f"border='shifted', got kernel_size={kernel[axis]} and dilation={dilated[axis]}; "
                f"use kernel_size<={length // dilated[axis]}, or border='truncated'"
            )
    if rpb is not None:
        expected = (q.shape[1], *(2 * size - 1 for size in kernel))
        if rpb.shape != expected:
            raise ValueError(f"{OPERATOR}: rpb must have shape {expected} (H, 2·kernel_size − 1), got {shape(rpb)}")
        if max(strided) > 1:
            fail(OPERATOR, "stride", "must be 1 when rpb is given", stride)
    return kernel, dilated, strided, causal
