"""Scores of every cell of a grid with the cells of its window, one for each slot: attention before its softmax."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from attn_core.checks import DATA_DTYPES, check_dtype, check_same, check_tensor, remembered, shape
from attn_core.dispatch import Backend, select, under_autocast

from . import torch_backend
from .reference import Arguments, reference
from .slots import check_grid, check_rules

OPERATOR = "neighborhood_scores"
SlotBorder = Literal["shifted", "truncated", "zero"]
MAX_TRITON_WIDTH = 256
# Without tensor cores a wider product is unrolled into more registers than there are (seen by the ahead-of-time gate).
MAX_TRITON_WIDTH_FLOAT32 = 128


def neighborhood_scores(
    q: Float[Tensor, "B H *space D"],
    k: Float[Tensor, "B H *space D"],
    kernel_size: int | Sequence[int],
    *,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    rpb: Float[Tensor, "H *R"] | None = None,
    border: SlotBorder = "shifted",
    backend: Backend | None = None,
) -> Float[Tensor, "B H *space S"]:
    """Dot products of every cell of a 1-D, 2-D or 3-D grid with the S = Π kernel_size cells of its window.

    Windows are those of :func:`attn_core.neighborhood_attention`; its softmax of ``q·k`` over the slots, then
    :func:`attn_core.neighborhood_values`, give the same. Slots are row-major. Along one axis a shifted window lists
    the keys it holds in order, and a causal one too: slots behind the query's own cell are −inf. With
    ``border="truncated"`` or ``"zero"`` slot t is the cell t − kernel_size // 2 steps of the dilation away, and slots
    outside the grid hold −inf or 0; ``"zero"`` is the local correlation of two feature maps.
    Memory: the result and, on the torch backend, a twelfth of it.

    Args:
        q, k: the same grid of 1 to 3 axes. No scale: multiply it into q.
        kernel_size, dilation, is_causal: one value, or one for each axis.
        rpb: bias (H, 2·kernel_size_0 − 1, …), added at index (key − query) / dilation + kernel_size − 1.

    Raises:
        ValueError: shapes, dtypes or window parameters do not fit; a shifted window that is larger than the grid.
        RuntimeError: the requested backend cannot run.

    Source: Hassani et al. 2023 (arXiv 2204.07143), eq. 2; https://github.com/SHI-Labs/NATTEN.
    """
    q, k, rpb = under_autocast(q, k, rpb)
    rules = _check(q, k, kernel_size, dilation, is_causal, rpb, border)
    run = _implementation(select(OPERATOR, backend, q, lambda: width_obstacle(q)))
    grid = list(q.shape[2:-1])
    bias = None if rpb is None else rpb[None]
    scores = run(Arguments(q.flatten(2, -2), k.flatten(2, -2), bias, grid, *rules, border))
    return scores.unflatten(2, grid)


def _implementation(backend: Backend) -> Callable[[Arguments], Tensor]:
    if backend == "triton":  # imported on first use: it costs time, and is absent where triton has no wheels
        from . import triton_backend

        return triton_backend.neighborhood_scores
    return reference if backend == "reference" else torch_backend.neighborhood_scores


def triton_obstacle(*, q: Tensor, **_: Any) -> str | None:
    """Why the Triton kernel cannot take this call (too many columns), or None."""
    return width_obstacle(q)


def width_obstacle(x: Tensor) -> str | None:
    """The same for what the kernels multiply, x (…, D)."""
    limit = MAX_TRITON_WIDTH_FLOAT32 if x.dtype == torch.float32 else MAX_TRITON_WIDTH
    if x.shape[-1] > limit:
        kind = str(x.dtype).removeprefix("torch.")
        return f"the kernel holds widths up to {limit} in {kind}, got {x.shape[-1]}"
    return None


@remembered
def _check(
    q: Tensor, k: Tensor, kernel_size: Any, dilation: Any, is_causal: Any, rpb: Tensor | None, border: str
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    check_grid(OPERATOR, "q", q)
    check_dtype(OPERATOR, "q", q, DATA_DTYPES)
    check_tensor(OPERATOR, "k", k)
    check_same(OPERATOR, q, {"k": k, "rpb": rpb})
    if k.shape != q.shape:
        raise ValueError(f"{OPERATOR}: k must have the shape of q {shape(q)}, got shape {shape(k)}")
    rules = check_rules(OPERATOR, q, kernel_size, dilation, is_causal, border)
    if rpb is not None:
        expected = (q.shape[1], *(2 * size - 1 for size in rules[0]))
        if rpb.shape != expected:
            raise ValueError(f"{OPERATOR}: rpb must have shape {expected} (H, 2·kernel_size − 1), got {shape(rpb)}")
    return rules
