"""Focal modulation: gated sums over a stack of depthwise convolutions and the global mean."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from attn_core.checks import (
    DATA_DTYPES,
    check_dtype,
    check_flag,
    check_rank,
    check_same,
    check_size,
    check_tensor_list,
    remembered,
    shape,
)
from attn_core.dispatch import Backend, select, under_autocast

from . import torch_backend
from .reference import Arguments, reference

OPERATOR = "focal_modulation"


def focal_modulation(
    ctx: Float[Tensor, "B C Y X"],
    gates: Float[Tensor, "B _ Y X"],
    weights: Sequence[Float[Tensor, "C 1 _ _"]],
    *,
    normalize: bool = False,
    backend: Backend | None = None,
) -> Float[Tensor, "B C Y X"]:
    """Context gathered from L growing neighborhoods and the whole map; the L maps in between are not kept.

    z_0 = ctx; z_l = GELU(W_l ∗ z_{l−1}), depthwise, zero-padded, with the exact (erf) GELU;
    y = Σ_l z_l·gates_l + GELU(mean of z_L)·gates_{L+1}. What surrounds it in FocalNet (the projection that gives query,
    ctx and gates, the 1×1 map h, query·h(y)) stays in the model.

    Any strides are read; computation and the result are channels-last in memory, so a slice of a (B, Y, X, C)
    projection, permuted, is the fast input.

    Args:
        gates: L + 1 channels, one for each level and one for the mean.
        weights: L depthwise kernels of odd size. With none, the mean alone is left.
        normalize: divide by L + 1.

    Returns:
        y in the dtype of ctx.

    Raises:
        ValueError: shapes, dtypes or devices do not fit. RuntimeError: the requested backend cannot run.

    Source: Yang et al. 2022 (FocalNet, arXiv 2203.11926), eq. 4–6; microsoft/FocalNet, classification/focalnet.py.
    """
    if not isinstance(weights, (list, tuple)):
        check_tensor_list(OPERATOR, "weights", weights, "one for each level")
    ctx, gates, *weights = under_autocast(ctx, gates, *weights)
    _check(ctx, gates, weights, normalize)
    run = _implementation(select(OPERATOR, backend, ctx, lambda: triton_obstacle(weights=weights)))
    kernels = [weight.unsqueeze(0) for weight in weights]
    y = run(Arguments(ctx.permute(0, 2, 3, 1), gates.permute(0, 2, 3, 1), kernels, normalize))
    return y.permute(0, 3, 1, 2)


def _implementation(backend: Backend) -> Callable[[Arguments], Tensor]:
    if backend == "triton":  # imported on first use: it costs time, and is absent where triton has no wheels
        from . import triton_backend

        return triton_backend.focal_modulation
    return reference if backend == "reference" else torch_backend.focal_modulation


def triton_obstacle(*, weights: Sequence[Tensor], **_: Any) -> str | None:
    """Why the Triton kernel cannot take this call (there is no level), or None."""
    return None if weights else "the kernel needs at least one level, got no weights"


@remembered
def _check(ctx: Tensor, gates: Tensor, weights: Sequence[Tensor], normalize: bool) -> None:
    check_tensor_list(OPERATOR, "weights", weights, "one for each level")
    check_flag(OPERATOR, "normalize", normalize)
    check_rank(OPERATOR, "ctx", ctx, "B C Y X")
    check_rank(OPERATOR, "gates", gates, "B L Y X")
    check_dtype(OPERATOR, "ctx", ctx, DATA_DTYPES)
    named = {f"weights[{i}]": weight for i, weight in enumerate(weights)}
    check_same(OPERATOR, ctx, {"gates": gates, **named}, first_name="ctx")
    for dim, reason in ((0, "the batch of ctx"), (2, "the rows of ctx"), (3, "the columns of ctx")):
        check_size(OPERATOR, "gates", gates, dim, ctx.shape[dim], reason)
    check_size(OPERATOR, "gates", gates, 1, len(weights) + 1, "one for each of weights and one for the mean")
    for name, weight in named.items():
        check_rank(OPERATOR, name, weight, "C 1 k k")
        check_size(OPERATOR, name, weight, 0, ctx.shape[1], "the channels of ctx")
        check_size(OPERATOR, name, weight, 1, 1, "a depthwise kernel")
        if weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
            raise ValueError(f"{OPERATOR}: {name} must be a square kernel of odd size, got shape {shape(weight)}")
