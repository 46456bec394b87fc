"""Weighted sums over the window of every cell of a grid: attention behind its softmax."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from attn_core.checks import DATA_DTYPES, check_dtype, check_same, check_size, check_tensor, remembered, shape
from attn_core.dispatch import Backend, select, under_autocast
from attn_core.ops.neighborhood_scores import SlotBorder, width_obstacle
from attn_core.ops.neighborhood_scores.slots import check_grid, check_rules

from . import torch_backend
from .reference import Arguments, reference

OPERATOR = "neighborhood_values"


def neighborhood_values(
    p: Float[Tensor, "B H *space S"],
    v: Float[Tensor, "B H *space D"],
    kernel_size: int | Sequence[int],
    *,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    border: SlotBorder = "shifted",
    backend: Backend | None = None,
) -> Float[Tensor, "B H *space D"]:
    """Σ over the S = Π kernel_size slots of a cell's window of p · v, without gathered values.

    Slots are those of :func:`attn_core.neighborhood_scores` with the same rules; what stands in slots without a key is
    not read. Dropout on attention goes between the two. Memory: the result and, on the torch backend, a twelfth of it.

    Args:
        p: weights of the slots, usually a softmax over the last dimension.
        v: the same grid of 1 to 3 axes, any width D.
        kernel_size, dilation, is_causal: one value, or one for each axis.

    Raises:
        ValueError: shapes, dtypes or window parameters do not fit; a shifted window that is larger than the grid.
        RuntimeError: the requested backend cannot run.

    Source: Hassani et al. 2023 (arXiv 2204.07143), eq. 4; https://github.com/SHI-Labs/NATTEN.
    """
    p, v = under_autocast(p, v)
    rules = _check(p, v, kernel_size, dilation, is_causal, border)
    run = _implementation(select(OPERATOR, backend, p, lambda: width_obstacle(v)))
    grid = list(v.shape[2:-1])
    return run(Arguments(p.flatten(2, -2), v.flatten(2, -2), grid, *rules, border)).unflatten(2, grid)


def _implementation(backend: Backend) -> Callable[[Arguments], Tensor]:
    if backend == "triton":  # imported on first use: it costs time, and is absent where triton has no wheels
        from . import triton_backend

        return triton_backend.neighborhood_values
    return reference if backend == "reference" else torch_backend.neighborhood_values


def triton_obstacle(*, v: Tensor, **_: Any) -> str | None:
    """Why the Triton kernel cannot take this call (too many columns), or None."""
    return width_obstacle(v)


@remembered
def _check(
    p: Tensor, v: Tensor, kernel_size: Any, dilation: Any, is_causal: Any, border: str
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    check_grid(OPERATOR, "p", p)
    check_dtype(OPERATOR, "p", p, DATA_DTYPES)
    check_tensor(OPERATOR, "v", v)
    check_same(OPERATOR, p, {"v": v}, first_name="p")
    if v.shape[:-1] != p.shape[:-1]:
        raise ValueError(
            f"{OPERATOR}: v must have the batch, heads and grid of p {shape(p)[:-1]}, got shape {shape(v)}"
        )
    rules = check_rules(OPERATOR, v, kernel_size, dilation, is_causal, border)
    slots = 1
    for size in rules[0]:
        slots *= size
    check_size(OPERATOR, "p", p, p.ndim - 1, slots, "the slots of a window")
    return rules
