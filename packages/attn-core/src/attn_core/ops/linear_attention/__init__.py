"""Linear attention with a decay for each head: causal or bidirectional, normalized or not, with a state."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attn_core.checks import (
    DATA_DTYPES,
    check_dtype,
    check_flag,
    check_integer,
    check_number,
    check_rank,
    check_same,
    check_size,
    check_width,
    remembered,
)
from attn_core.dispatch import Backend, select, under_autocast

from . import torch_backend
from .reference import Arguments, reference

OPERATOR = "linear_attention"
MAX_TRITON_WIDTH = 256


def linear_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H M D"],
    v: Float[Tensor, "B H M Dv"],
    *,
    log_decay: Float[Tensor, " H"] | None = None,
    causal: bool = True,
    scale: float = 1.0,
    normalize: bool = False,
    eps: float = 0.0,
    initial_state: Float[Tensor, "B H D Dv"] | None = None,
    chunk_size: int | None = None,
    backend: Backend | None = None,
) -> tuple[Float[Tensor, "B H N Dv"], Float[Tensor, "B H D Dv"]]:
    """Attention without softmax, in time linear in the number of tokens, chunk by chunk around a D×Dv state.

    out_i = scale·Σ_j λ^|i−j| (q_i·k_j) v_j, over j ≤ i if causal, with λ = exp(log_decay) of the head (1 by default),
    plus scale·λ^(i+1)·q_iᵀS_0 if there is an initial state. ``normalize`` divides by scale·Σ_j λ^|i−j| q_i·k_j + eps.
    The state is S_M = λ^M S_0 + Σ_j λ^(M−1−j) k_j v_jᵀ: a sequence may be given in pieces, the state of one being the
    initial state of the next. Without causality there may be more or fewer keys than queries (cross attention).

    Feature maps, rotations and gates are the caller's. Lightning attention is ``log_decay=-slopes`` with the slopes of
    ALiBi. Empty B, N and M are legal.

    Args:
        log_decay: ≤ 0 and finite (values are not checked), in float32, or float64 beside float64; differentiable.
        normalize: not with ``initial_state``, which lacks the denominator: give v a column of ones instead, its output
            is the denominator and stays in the state.
        initial_state: in the dtype of ``log_decay``, differentiable.
        chunk_size: tokens of a chunk, a trade of speed alone; chosen by the backend by default.

    Returns:
        out in the dtype of q; state in float32 (float64 for float64 inputs); both differentiable.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit. RuntimeError: the requested backend cannot run.

    Source: Katharopoulos et al. 2020 (arXiv 2006.16236), eqs. 4 and 9; decay and chunks: Qin et al. 2024 (arXiv
    2401.04658), Lightning Attention-2, https://github.com/OpenNLPLab/lightning-attention.
    """
    q, k, v = under_autocast(q, k, v)
    _check(q, k, v, log_decay, initial_state, causal, scale, normalize, eps, chunk_size)
    run = _implementation(select(OPERATOR, backend, q, lambda: triton_obstacle(q=q, v=v)))
    decay = None if log_decay is None else log_decay[None]
    options = (causal, float(scale), normalize, float(eps), chunk_size or 0)
    return run(Arguments(q, k, v, decay, initial_state, *options))


def _implementation(backend: Backend) -> Callable[[Arguments], tuple[Tensor, Tensor]]:
    if backend == "triton":  # imported on first use: it costs time, and is absent where triton has no wheels
        from . import triton_backend

        return triton_backend.linear_attention
    return reference if backend == "reference" else torch_backend.linear_attention


def triton_obstacle(*, q: Tensor, v: Tensor, **_: Any) -> str | None:
    """Why the Triton kernel cannot take this call (too many head columns), or None."""
    width = max(q.shape[-1], v.shape[-1])
    if width > MAX_TRITON_WIDTH:
        return f"the kernel takes head widths up to {MAX_TRITON_WIDTH}, got {width}"
    return None


@remembered
def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    causal: bool,
    scale: float,
    normalize: bool,
    eps: float,
    chunk_size: int | None,
) -> None:
    check_flag(OPERATOR, "causal", causal)
    check_flag(OPERATOR, "normalize", normalize)
    check_number(OPERATOR, "scale", scale)
    check_number(OPERATOR, "eps", eps)
    check_rank(OPERATOR, "q", q, "B H N D")
    check_rank(OPERATOR, "k", k, "B H M D")
    check_rank(OPERATOR, "v", v, "B H M Dv")
    check_dtype(OPERATOR, "q", q, DATA_DTYPES)
    check_width(OPERATOR, "q", q)
    check_same(OPERATOR, q, {"k": k, "v": v})
    check_same(OPERATOR, q, {"log_decay": log_decay, "initial_state": initial_state}, dtype=False)
    batch, heads, _, width = q.shape
    for name, tensor in (("k", k), ("v", v)):
        for dim, what in enumerate(("batch", "heads")):
            check_size(OPERATOR, name, tensor, dim, q.shape[dim], f"the {what} of q")
    if causal:
        check_size(OPERATOR, "k", k, 2, q.shape[2], "the tokens of q, since causal=True")
    check_size(OPERATOR, "v", v, 2, k.shape[2], "the tokens of k")
    check_size(OPERATOR, "k", k, 3, width, "the width of q")
    exact = (torch.float64 if q.dtype == torch.float64 else torch.float32,)
    if log_decay is not None:
        check_dtype(OPERATOR, "log_decay", log_decay, exact)
        check_rank(OPERATOR, "log_decay", log_decay, "H")
        check_size(OPERATOR, "log_decay", log_decay, 0, heads, "the heads of q")
    if initial_state is not None:
        check_dtype(OPERATOR, "initial_state", initial_state, exact)
        check_rank(OPERATOR, "initial_state", initial_state, "B H D Dv")
        for dim, (size, what) in enumerate(
            ((batch, "batch of q"), (heads, "heads of q"), (width, "width of q"), (v.shape[3], "width of v"))
        ):
            check_size(OPERATOR, "initial_state", initial_state, dim, size, f"the {what}")
        if normalize:
            raise ValueError(
                f"{OPERATOR}: normalize must be False with initial_state, which lacks the denominator, "
                "got normalize=True; give v a column of ones and divide by its output"
            )
    if chunk_size is not None:
        check_integer(OPERATOR, "chunk_size", chunk_size, 1)
