"""First-order linear recurrence along a sequence, from the left or from the right."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from attn_core.checks import DATA_DTYPES, check_dtype, check_flag, check_same, check_tensor, fail, remembered, shape
from attn_core.dispatch import Backend, select, under_autocast

from . import torch_backend
from .reference import Arguments, reference

OPERATOR = "linear_scan"


def linear_scan(
    a: Float[Tensor, "#B T *gates"],
    b: Float[Tensor, "B T *features"],
    h0: Float[Tensor, "B *features"] | None = None,
    *,
    reverse: bool = False,
    backend: Backend | None = None,
) -> Float[Tensor, "B T *features"]:
    """h_t = a_t·h_{t−1} + b_t for every feature; h_t = a_t·h_{t+1} + b_t with ``reverse``.

    Gates may have any sign and may be zero: nothing is divided by them, no logarithm is taken. Empty B, T and features
    are legal. Memory: the states, which are also what the gradient needs.

    Args:
        a: gates; dimensions behind the sequence are those of b or 1, and may be left out from the right, so that one
            gate rules many features. In the dtype of b or in float32 (float64 beside float64). In 16 bits a gate near
            1 is a coarse one: 1 − 2⁻⁹ is the last before it.
        h0: state before the first step (behind the last with ``reverse``), zeros by default; dtypes as for a.

    Returns:
        All states, in the dtype of b; computed in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices do not fit. RuntimeError: the requested backend cannot run.

    Source: Martin and Cundy 2018 (arXiv 1709.04057), eq. 5.
    """
    check_flag(OPERATOR, "reverse", reverse)
    check_tensor(OPERATOR, "b", b)
    (b,) = under_autocast(b)
    _check(a, b, h0)
    x = _canonical(a, b, h0, reverse)
    return _implementation(select(OPERATOR, backend, b))(x).view(b.shape)


def _implementation(backend: Backend) -> Callable[[Arguments], Tensor]:
    if backend == "triton":  # imported on first use: it costs time, and is absent where triton has no wheels
        from . import triton_backend

        return triton_backend.linear_scan
    return reference if backend == "reference" else torch_backend.linear_scan


def _canonical(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool) -> Arguments:
    """One number of ``a`` for each of P groups of F features."""
    shape = b.shape[2:]
    own = a.shape[2:]
    while own and own[-1] == 1:
        own = own[:-1]
    if own != shape[: len(own)]:  # ones before the end: a is repeated in memory
        own = shape[: len(own)]
        a = a.reshape(*a.shape[:2], *a.shape[2 : 2 + len(own)]).expand(*a.shape[:2], *own)
    groups, features = math.prod(own), math.prod(shape[len(own) :])
    batch, steps = b.shape[:2]
    flat = None if h0 is None else h0.reshape(batch, groups, features)
    return Arguments(b.reshape(batch, steps, groups, features), a.reshape(a.shape[0], steps, groups), flat, reverse)


@remembered
def _check(a: Tensor, b: Tensor, h0: Tensor | None) -> None:
    if b.ndim < 2:
        raise ValueError(f"{OPERATOR}: b must have at least 2 dimensions (B T …), got shape {shape(b)}")
    check_dtype(OPERATOR, "b", b, DATA_DTYPES)
    check_same(OPERATOR, b, {"a": a, "h0": h0}, dtype=False, first_name="b")
    exact = torch.float64 if b.dtype == torch.float64 else torch.float32
    check_dtype(OPERATOR, "a", a, tuple({b.dtype: None, exact: None}))
    expanded = a.shape + (1,) * (b.ndim - a.ndim)
    fits = all(size in (1, full) for size, full in zip(expanded, b.shape, strict=False))
    if not 2 <= a.ndim <= b.ndim or a.shape[1] != b.shape[1] or not fits:
        fail(OPERATOR, "a", f"must broadcast to b {shape(b)} from the left, with as many steps", shape(a))
    if h0 is not None:
        check_dtype(OPERATOR, "h0", h0, tuple({b.dtype: None, exact: None}))
        if h0.shape != b.shape[:1] + b.shape[2:]:
            fail(OPERATOR, "h0", f"must be of shape {shape(b)[:1] + shape(b)[2:]}, b without its steps", shape(h0))
