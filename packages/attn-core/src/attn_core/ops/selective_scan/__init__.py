"""Selective state-space recurrence (Mamba), from the left or from the right."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from attn_core.checks import (
    DATA_DTYPES,
    check_dtype,
    check_flag,
    check_rank,
    check_same,
    check_size,
    check_tensor,
    remembered,
)
from attn_core.dispatch import Backend, select, under_autocast

from . import torch_backend
from .reference import Arguments, reference

OPERATOR = "selective_scan"
MAX_TRITON_WIDTH = 128


def selective_scan(
    u: Float[Tensor, "B C T"],
    delta: Float[Tensor, "B C T"],
    A: Inexact[Tensor, "C N"],
    B: Inexact[Tensor, "B G N T"] | Inexact[Tensor, "C N"],
    C: Inexact[Tensor, "B G N T"] | Inexact[Tensor, "C N"],
    D: Float[Tensor, " C"] | None = None,
    z: Float[Tensor, "B C T"] | None = None,
    delta_bias: Float[Tensor, " C"] | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: Inexact[Tensor, "B C N"] | None = None,
    reverse: bool = False,
    backend: Backend | None = None,
) -> tuple[Float[Tensor, "B C T"], Inexact[Tensor, "B C N"]]:
    """State-space scan whose step, input and output maps depend on the token; never holds the states of all steps.

    Δ = delta + delta_bias, through softplus if asked; h_t = exp(Δ_t A)∘h_{t−1} + Δ_t B_t u_t;
    y_t = C_t·h_t + D u_t; out_t = y_t·silu(z_t). A is discretized exactly, B by Euler's rule, as Mamba does. With
    ``reverse`` the sequence runs from its end: h_t follows from h_{t+1}. Empty B and T are legal.

    Args:
        delta: in the dtype of u or in float32 (float64 beside float64).
        A: negative for a stable recurrence (values are not checked); A, D, delta_bias and initial_state in float32.
            Complex A stands for conjugate pairs of which one is kept: B, C and the states are complex64 beside it
            (complex128 beside float64), and C_t·h_t is twice its real part. There is no kernel for that: the torch
            backend runs.
        B, C: G groups; C/G consecutive channels share one. In the dtype of u, as z. Either may be the same at every
            step, (C, N) in the dtype of A.
        D: weight of the input in the output, 0 by default.
        z: gate, none by default.
        initial_state: state before the first step (behind the last with ``reverse``), zeros by default.

    Returns:
        out in the dtype of u; the state behind the last step of the walk, in float32 (float64 for float64 inputs);
        both differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit. RuntimeError: the requested backend cannot run.

    Source: Gu and Dao 2023 (arXiv 2312.00752), algorithm 2; https://github.com/state-spaces/mamba,
    ``selective_scan_ref``.
    """
    u, z = under_autocast(u, z)
    B, C = (x if isinstance(x, Tensor) and x.ndim == 2 else under_autocast(x)[0] for x in (B, C))
    _check(delta_softplus, reverse, u, delta, A, B, C, D, z, delta_bias, initial_state)
    run = _implementation(select(OPERATOR, backend, u, lambda: triton_obstacle(A=A)))
    B, C = (x[None, ..., None] if x.ndim == 2 else x for x in (B, C))
    skip, bias = None if D is None else D[None], None if delta_bias is None else delta_bias[None]
    return run(Arguments(u, delta, A.unsqueeze(0), B, C, skip, z, bias, initial_state, delta_softplus, reverse))


def _implementation(backend: Backend) -> Callable[[Arguments], tuple[Tensor, Tensor]]:
    if backend == "triton":  # imported on first use: it costs time, and is absent where triton has no wheels
        from . import triton_backend

        return triton_backend.selective_scan
    return reference if backend == "reference" else torch_backend.selective_scan


def triton_obstacle(*, A: Tensor, **_: Any) -> str | None:
    """Why the Triton kernel cannot take this call (complex numbers, too many state columns), or None."""
    if A.is_complex():
        return f"the kernel is real, got A.dtype={A.dtype}; backend='torch' computes it"
    if A.shape[1] > MAX_TRITON_WIDTH:
        return f"the kernel holds states of width up to {MAX_TRITON_WIDTH}, got {A.shape[1]}"
    return None


@remembered
def _check(
    delta_softplus: bool,
    reverse: bool,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    *rest: Tensor | None,
) -> None:
    for name, tensor in (("u", u), ("delta", delta), ("A", A), ("B", B), ("C", C)):
        check_tensor(OPERATOR, name, tensor)
    check_flag(OPERATOR, "delta_softplus", delta_softplus)
    check_flag(OPERATOR, "reverse", reverse)
    layouts = {"u": "B C T", "delta": "B C T", "A": "C N", "B": "B G N T", "C": "B G N T", "D": "C", "z": "B C T"}
    layouts |= {"delta_bias": "C", "initial_state": "B C N"}
    constant = [name for name, x in (("B", B), ("C", C)) if x.ndim == 2]
    layouts |= dict.fromkeys(constant, "C N")
    tensors = dict(zip(layouts, (u, delta, A, B, C, D, z, *rest), strict=True))
    for name, tensor in tensors.items():
        if tensor is not None:
            check_rank(OPERATOR, name, tensor, layouts[name])
    check_dtype(OPERATOR, "u", u, DATA_DTYPES)
    check_same(OPERATOR, u, tensors, dtype=False, first_name="u")
    exact = torch.float64 if u.dtype == torch.float64 else torch.float32
    state = exact.to_complex() if A.is_complex() else exact
    maps = {} if A.is_complex() else {name: x for name, x in (("B", B), ("C", C)) if name not in constant}
    check_same(OPERATOR, u, {**maps, "z": z}, first_name="u")
    check_dtype(OPERATOR, "delta", delta, tuple({u.dtype: None, exact: None}))
    sizes = {"B": (u.shape[0], "the batch of u"), "C": (u.shape[1], "the channels of u")}
    sizes |= {"T": (u.shape[2], "the steps of u"), "N": (A.shape[1], "the state width of A")}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if name in ("D", "delta_bias"):
            check_dtype(OPERATOR, name, tensor, (exact,))
        elif name in ("A", "initial_state", "B", "C") and name not in maps:
            check_dtype(OPERATOR, name, tensor, (state,))
        for dim, letter in enumerate(layouts[name].split()):
            if letter in sizes:
                check_size(OPERATOR, name, tensor, dim, *sizes[letter])
    if not constant:
        check_size(OPERATOR, "C", C, 1, B.shape[1], "the groups of B")
    for name, x in (("B", B), ("C", C)):
        if name not in constant and (x.shape[1] == 0 or u.shape[1] % x.shape[1]):
            raise ValueError(
                f"{OPERATOR}: the channels of u must be a multiple of the groups of {name}, "
                f"got {u.shape[1]} and {x.shape[1]}"
            )
