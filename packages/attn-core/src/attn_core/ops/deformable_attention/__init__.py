"""Multi-scale deformable attention on feature maps, and on feature maps lifted by a depth distribution (DFA3D)."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attn_core.checks import (
    DATA_DTYPES,
    check_dtype,
    check_integer,
    check_rank,
    check_same,
    check_size,
    check_width,
    described,
    fail,
    remembered,
    shape,
)
from attn_core.dispatch import Backend, select, under_autocast

from . import torch_backend
from .reference import Arguments, reference

OPERATOR = "deformable_attention"
MAX_TRITON_WIDTH = 256


def deformable_attention(
    value: Float[Tensor, "B S H D"],
    spatial_shapes: Sequence[tuple[int, int]] | Int[Tensor, "L 2"],
    locations: Float[Tensor, "B N H L P _"],
    weights: Float[Tensor, "B N H L P"],
    depth: Float[Tensor, "B S H Z"] | None = None,
    *,
    backend: Backend | None = None,
) -> Float[Tensor, "B N HD"]:
    """Weighted sum of P bilinear samples from each of L feature maps, without the samples in memory.

    out_i = Σ_l Σ_p weights_ilp · sample_l(locations_ilp). A location is (x, y) in [0, 1] from the outer edge of the
    first cell to that of the last; samples outside read zeros (``grid_sample`` with ``align_corners=False`` and zero
    padding). With ``depth`` a location is (x, y, d), and each of the four cells of a sample is multiplied by its depth
    distribution, read linearly at d: this equals a trilinear sample of value ⊗ depth, which is never built.

    Args:
        value: S = Σ h·w cells of all maps, map after map, each row-major.
        spatial_shapes: (h, w) of each map; a tensor works and costs a synchronization with a GPU.
        locations: float32, whatever the other dtypes (float64 with float64): bfloat16 has too few digits to place a
            sample within a cell.
        weights: any numbers, usually a softmax over (L, P).
        depth: Z bins for every cell and head, usually a softmax over Z.

    Returns:
        (B, N, H·D) in the dtype of value.

    Raises:
        ValueError: shapes, dtypes or devices do not fit. RuntimeError: the requested backend cannot run.

    Source: Zhu et al. 2021 (arXiv 2010.04159), eq. 3, https://github.com/fundamentalvision/Deformable-DETR; depth:
    Li et al. 2023 (arXiv 2307.12972), https://github.com/IDEA-Research/3D-deformable-attention, whose one-stage
    function loses the gradient of x and y in a copy; this one has it.
    """
    value, weights, depth = under_autocast(value, weights, depth)
    shapes = _map_sizes(spatial_shapes)
    _check(value, shapes, locations, weights, depth)
    run = _implementation(select(OPERATOR, backend, value, lambda: triton_obstacle(value=value)))
    return run(Arguments(value, locations, weights, depth, [size for shape in shapes for size in shape]))


def _map_sizes(spatial_shapes: object) -> list[tuple[int, int]]:
    pairs: Any = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    try:
        shapes = [(h, w) for h, w in pairs]
    except (TypeError, ValueError):
        raise TypeError(
            f"{OPERATOR}: spatial_shapes must list the (h, w) of each map, got "
            f"spatial_shapes={described(spatial_shapes)}"
        ) from None
    return shapes


def _implementation(backend: Backend) -> Callable[[Arguments], Tensor]:
    if backend == "triton":  # imported on first use: it costs time, and is absent where triton has no wheels
        from . import triton_backend

        return triton_backend.deformable_attention
    return reference if backend == "reference" else torch_backend.deformable_attention


def triton_obstacle(*, value: Tensor, **_: Any) -> str | None:
    """Why the Triton kernel cannot take this call (too many head columns), or None."""
    if value.shape[-1] > MAX_TRITON_WIDTH:
        return f"the kernel holds head widths up to {MAX_TRITON_WIDTH}, got {value.shape[-1]}"
    return None


@remembered
def _check(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor, depth: Tensor | None
) -> None:
    check_rank(OPERATOR, "value", value, "B S H D")
    check_rank(OPERATOR, "locations", locations, "B N H L P 2")
    check_rank(OPERATOR, "weights", weights, "B N H L P")
    check_dtype(OPERATOR, "value", value, DATA_DTYPES)
    check_width(OPERATOR, "value", value)
    check_same(OPERATOR, value, {"weights": weights, "depth": depth}, first_name="value")
    check_same(OPERATOR, value, {"locations": locations}, dtype=False, first_name="value")
    exact = torch.float64 if value.dtype == torch.float64 else torch.float32
    if locations.dtype != exact:
        name = str(exact).removeprefix("torch.")
        fail(OPERATOR, "locations", f"must be {name} when value is {value.dtype}", locations.dtype)
    for size in itertools.chain(*shapes):
        check_integer(OPERATOR, "spatial_shapes", size, 1)
    if not shapes:
        fail(OPERATOR, "spatial_shapes", "must list the (h, w) of at least one map", shapes)
    batch, cells, heads, _ = value.shape
    if sum(h * w for h, w in shapes) != cells:
        fail(OPERATOR, "spatial_shapes", f"must have {cells} cells, those of value", shapes)
    coordinates = 2 if depth is None else 3
    reason = "x and y" if depth is None else "x, y and the depth"
    check_size(OPERATOR, "locations", locations, 0, batch, "the batch of value")
    check_size(OPERATOR, "locations", locations, 2, heads, "the heads of value")
    check_size(OPERATOR, "locations", locations, 3, len(shapes), "the maps of spatial_shapes")
    check_size(OPERATOR, "locations", locations, 5, coordinates, reason)
    if weights.shape != locations.shape[:-1]:
        raise ValueError(
            f"{OPERATOR}: weights must have the shape of locations without the last dimension "
            f"{shape(locations)[:-1]}, got shape {shape(weights)}"
        )
    if depth is not None:
        check_rank(OPERATOR, "depth", depth, "B S H Z")
        for dim, part in enumerate(("the batch of value", "the cells of value", "the heads of value")):
            check_size(OPERATOR, "depth", depth, dim, value.shape[dim], part)
        if depth.shape[3] < 1:
            raise ValueError(f"{OPERATOR}: depth must have at least one bin, got shape {shape(depth)}")
