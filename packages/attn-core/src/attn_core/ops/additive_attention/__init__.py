"""Additive (Bahdanau) attention: pointer scores, or pooled values, without the N×M×D tensor."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attn_core.checks import (
    DATA_DTYPES,
    check_broadcastable,
    check_dtype,
    check_rank,
    check_same,
    check_size,
    remembered,
)
from attn_core.dispatch import Backend, select, under_autocast

from . import torch_backend
from .reference import Arguments, reference

OPERATOR = "additive_attention"
MAX_TRITON_WIDTH = 256
# Without tensor cores a wider product is unrolled into more registers than there are.
MAX_TRITON_WIDTH_FLOAT32 = 128


def additive_attention(
    q: Float[Tensor, "B N D"],
    k: Float[Tensor, "B M D"],
    w: Float[Tensor, "D"],
    value: Float[Tensor, "B M E"] | None = None,
    *,
    key_mask: Bool[Tensor, "#B M"] | None = None,
    backend: Backend | None = None,
) -> tuple[Float[Tensor, "B N _"], Float[Tensor, "B N"]]:
    """Attention with the scores s_ij = Σ_d w_d tanh(q_id + k_jd), and a differentiable log-sum-exp.

    Without ``value`` the scores are the result: a Pointer Network's logits, whose log-probabilities are
    ``scores - lse[..., None]``. With it the result is softmax(s)·value, and the N×M scores are not held either.
    q and k are the projected W₁e and W₂d of the paper; one learned query is attention pooling.

    A query that sees no key gets out = 0, lse = −inf and zero gradients. Empty B, N and M are legal.

    Args:
        w: score vector.
        value: what is pooled; E may be any width.
        key_mask: True = visible; hidden scores are −inf.

    Returns:
        scores (B, N, M) or out (B, N, E) in the dtype of q; lse in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices do not fit. RuntimeError: the requested backend cannot run.

    Source: Bahdanau, Cho, Bengio 2015 (arXiv 1409.0473), appendix A.1.2; Vinyals, Fortunato, Jaitly 2015 (Pointer
    Networks, arXiv 1506.03134), eq. 3.
    """
    q, k, w, value = under_autocast(q, k, w, value)
    _check(q, k, w, value, key_mask)
    run = _implementation(select(OPERATOR, backend, q, lambda: triton_obstacle(q=q, value=value)))
    return run(Arguments(q, k, w[None], value, key_mask))


def _implementation(backend: Backend) -> Callable[[Arguments], tuple[Tensor, Tensor]]:
    if backend == "triton":  # imported on first use: it costs time, and is absent where triton has no wheels
        from . import triton_backend

        return triton_backend.additive_attention
    return reference if backend == "reference" else torch_backend.additive_attention


def triton_obstacle(*, q: Tensor, value: Tensor | None, **_: Any) -> str | None:
    """Why the Triton kernel cannot take this call (too many value columns), or None."""
    width = 0 if value is None else value.shape[-1]
    limit = MAX_TRITON_WIDTH_FLOAT32 if q.dtype == torch.float32 else MAX_TRITON_WIDTH
    if width > limit:
        return f"the kernel holds value widths up to {limit} in {str(q.dtype).removeprefix('torch.')}, got {width}"
    return None


@remembered
def _check(q: Tensor, k: Tensor, w: Tensor, value: Tensor | None, key_mask: Tensor | None) -> None:
    check_rank(OPERATOR, "q", q, "B N D")
    check_rank(OPERATOR, "k", k, "B M D")
    check_rank(OPERATOR, "w", w, "D")
    check_dtype(OPERATOR, "q", q, DATA_DTYPES)
    check_same(OPERATOR, q, {"k": k, "w": w, "value": value})
    check_same(OPERATOR, q, {"key_mask": key_mask}, dtype=False)
    check_size(OPERATOR, "k", k, 0, q.shape[0], "the batch of q")
    check_size(OPERATOR, "k", k, 2, q.shape[2], "the width of q")
    check_size(OPERATOR, "w", w, 0, q.shape[2], "the width of q")
    if value is not None:
        check_rank(OPERATOR, "value", value, "B M E")
        check_size(OPERATOR, "value", value, 0, q.shape[0], "the batch of q")
        check_size(OPERATOR, "value", value, 1, k.shape[1], "the tokens of k")
    if key_mask is not None:
        check_dtype(OPERATOR, "key_mask", key_mask, (torch.bool,))
        check_broadcastable(OPERATOR, "key_mask", key_mask, (q.shape[0], k.shape[1]), "B M")
