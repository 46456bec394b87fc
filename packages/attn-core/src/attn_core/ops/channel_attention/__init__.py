"""Attention between channels: a C×C softmax whose logits are sums over all tokens."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attn_core.checks import (
    DATA_DTYPES,
    check_dtype,
    check_flag,
    check_number,
    check_rank,
    check_same,
    check_size,
    remembered,
)
from attn_core.dispatch import Backend, select, under_autocast

from . import torch_backend
from .reference import Arguments, reference

OPERATOR = "channel_attention"
MAX_TRITON_WIDTH = 256
# Without tensor cores a wider product is unrolled into more registers than there are.
MAX_TRITON_WIDTH_FLOAT32 = 128


def channel_attention(
    a: Float[Tensor, "B H N C"],
    b: Float[Tensor, "B H N C"],
    x: Float[Tensor, "B H N C"],
    *,
    scale: float = 1.0,
    negate_max: bool = False,
    transpose: bool = False,
    backend: Backend | None = None,
) -> Float[Tensor, "B H N C"]:
    """Attention whose C×C weights mix channels; of what is computed, those weights alone are kept for backward.

    E = scale·aᵀb, summed over tokens in float32; A = softmax of the rows of E; y = x Aᵀ. Three models differ in their
    operands: DaViT's channel groups are ``channel_attention(k, v, q, scale=D**-0.5)``; DANet's channel attention is
    ``channel_attention(x, x, x, negate_max=True)``; the variant of AGU-Net is
    ``channel_attention(x, x, x, transpose=True)``. A map (B, C, Y, X) is ``map.flatten(2).mT[:, None]``, no copy.

    With N = 0 the result is empty. The result is laid out (B, N, H, C) in memory, so that joining the heads is a view.

    Args:
        a, b: operands of the logits.
        x: what is mixed.
        scale: factor of the logits; 0.0 is legal.
        negate_max: A is the softmax of max_d E_cd − E_cd: channels attend to those least like them.
        transpose: y = x A; then the columns of what multiplies x do not sum to 1.

    Returns:
        y in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices do not fit. RuntimeError: the requested backend cannot run.

    Source: Ding et al. 2022 (DaViT, arXiv 2204.03645), eq. 4, dingmyu/davit; Fu et al. 2019 (DANet, arXiv 1809.02983),
    eq. 3, junfu1115/DANet.
    """
    a, b, x = under_autocast(a, b, x)
    _check(a, b, x, scale, negate_max, transpose)
    run = _implementation(select(OPERATOR, backend, a, lambda: triton_obstacle(a=a)))
    return run(Arguments(a, b, x, scale, negate_max, transpose))


def _implementation(backend: Backend) -> Callable[[Arguments], Tensor]:
    if backend == "triton":  # imported on first use: it costs time, and is absent where triton has no wheels
        from . import triton_backend

        return triton_backend.channel_attention
    return reference if backend == "reference" else torch_backend.channel_attention


def triton_obstacle(*, a: Tensor, **_: Any) -> str | None:
    """Why the Triton kernel cannot take this call (too many channels of a head), or None."""
    limit = MAX_TRITON_WIDTH_FLOAT32 if a.dtype == torch.float32 else MAX_TRITON_WIDTH
    if not 1 <= a.shape[3] <= limit:
        return f"the kernel holds 1 to {limit} channels in {str(a.dtype).removeprefix('torch.')}, got {a.shape[3]}"
    return None


@remembered
def _check(a: Tensor, b: Tensor, x: Tensor, scale: float, negate_max: bool, transpose: bool) -> None:
    check_dtype(OPERATOR, "a", a, DATA_DTYPES)
    check_number(OPERATOR, "scale", scale)
    check_flag(OPERATOR, "negate_max", negate_max)
    check_flag(OPERATOR, "transpose", transpose)
    for name, tensor in (("a", a), ("b", b), ("x", x)):
        check_rank(OPERATOR, name, tensor, "B H N C")
    check_same(OPERATOR, a, {"b": b, "x": x}, first_name="a")
    for name, tensor in (("b", b), ("x", x)):
        for dim, reason in enumerate(("the batch of a", "the heads of a", "the tokens of a", "the channels of a")):
            check_size(OPERATOR, name, tensor, dim, a.shape[dim], reason)
