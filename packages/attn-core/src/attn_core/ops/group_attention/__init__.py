"""Softmax attention over groups of keys: the mass of every group, and weights or gates that change it."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attn_core.checks import (
    DATA_DTYPES,
    INDEX_DTYPES,
    check_broadcastable,
    check_choice,
    check_dtype,
    check_integer,
    check_number,
    check_rank,
    check_same,
    check_size,
    check_width,
    default_scale,
    remembered,
)
from attn_core.dispatch import Backend, select, under_autocast

from . import torch_backend
from .reference import Arguments, reference

OPERATOR = "group_attention"
MAX_TRITON_WIDTH = 256
# Without tensor cores a wider product is unrolled into more registers than there are (seen by the ahead-of-time gate).
MAX_TRITON_WIDTH_FLOAT32 = 128


def group_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hk M D"],
    v: Float[Tensor, "B Hk M Dv"],
    group: Int[Tensor, "#B M"],
    num_groups: int,
    *,
    group_weight: Float[Tensor, "#B #H #N G"] | None = None,
    group_gate: Float[Tensor, "#B #H #N G"] | None = None,
    scale: float | None = None,
    bias: Float[Tensor, "#B #H #N #M"] | None = None,
    key_mask: Bool[Tensor, "#B M"] | None = None,
    causal: Literal["upper_left", "lower_right"] | None = None,
    backend: Backend | None = None,
) -> tuple[Float[Tensor, "B H N Dv"], Float[Tensor, "B H N G"]]:
    """Attention with one softmax for each group of keys, and the groups' masses; it never holds the N×M scores.

    With s_ij = scale·q_i·k_j + bias_ij and group g(j): L_ig = log Σ_{g(j)=g} exp s_ij, the average of group g is
    o_ig = Σ_{g(j)=g} exp(s_ij − L_ig) v_j, and

    - by default out_i = Σ_g softmax_g(L_i) o_ig, the softmax over all keys that stand in a group;
    - with ``group_weight`` w, out_i = Σ_g w_ig o_ig, not renormalized;
    - with ``group_gate`` a, out_i = Σ_g softmax_g(a_i) o_ig over the groups that are not empty.

    The share of group g in ordinary attention is exp(L_ig − logsumexp_g L_i). A query that sees no key of a group gets
    L_ig = −inf and nothing from it; one that sees no key at all gets out = 0 and zero gradients.

    Args:
        k, v: Hk heads; H must be a multiple of Hk (grouped queries). Dv may differ from D.
        group: 0 … num_groups − 1, any other number hides the key (−1 by convention).
        num_groups: G, any number; keys of a group need not be neighbors.
        group_weight, group_gate: float32 (float64 for float64 inputs), differentiable, at most one of them. A gate of
            −inf closes its group.
        scale: factor of the dot products; D^−0.5 by default. 0.0 is legal.
        bias: broadcastable, differentiable; −inf hides a key.
        key_mask: True = visible.
        causal: ``"upper_left"`` hides j > i, ``"lower_right"`` hides j > i + M − N.

    Returns:
        out in the dtype of q; L in float32 (float64 for float64 inputs), natural logarithm, differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit. RuntimeError: the requested backend cannot run.

    Source: Mohtashami and Jaggi 2023 (arXiv 2305.16300), grouped softmax, epfml/landmark-attention; Kang et al. 2025
    (arXiv 2503.03321), masses that are redistributed, seilk/VisAttnSink.
    """
    q, k, v, bias = under_autocast(q, k, v, bias)
    _check(q, k, v, group, num_groups, group_weight, group_gate, scale, bias, key_mask, causal)
    run = _implementation(select(OPERATOR, backend, q, lambda: triton_obstacle(q=q, v=v)))
    factor = group_gate if group_weight is None else group_weight
    mode = "weight" if group_weight is not None else "mass" if group_gate is None else "gate"
    scale = default_scale(q) if scale is None else scale
    return run(Arguments(q, k, v, group, factor, bias, key_mask, num_groups, scale, causal or "none", mode))


def _implementation(backend: Backend) -> Callable[[Arguments], tuple[Tensor, Tensor]]:
    if backend == "triton":  # imported on first use: it costs time, and is absent where triton has no wheels
        from . import triton_backend

        return triton_backend.group_attention
    return reference if backend == "reference" else torch_backend.group_attention


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
    group: Tensor,
    num_groups: int,
    group_weight: Tensor | None,
    group_gate: Tensor | None,
    scale: float | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    causal: str | None,
) -> None:
    check_rank(OPERATOR, "q", q, "B H N D")
    check_rank(OPERATOR, "k", k, "B Hk M D")
    check_rank(OPERATOR, "v", v, "B Hk M Dv")
    check_dtype(OPERATOR, "q", q, DATA_DTYPES)
    check_width(OPERATOR, "q", q)
    check_number(OPERATOR, "scale", scale, optional=True)
    check_same(OPERATOR, q, {"k": k, "v": v, "bias": bias})
    factors = {"group_weight": group_weight, "group_gate": group_gate}
    check_same(OPERATOR, q, {"group": group, "key_mask": key_mask, **factors}, dtype=False)
    batch, heads, queries, width = q.shape
    key_heads, keys = k.shape[1], k.shape[2]
    check_size(OPERATOR, "k", k, 0, batch, "the batch of q")
    check_size(OPERATOR, "k", k, 3, width, "the width of q")
    check_size(OPERATOR, "v", v, 0, batch, "the batch of q")
    check_size(OPERATOR, "v", v, 1, key_heads, "the heads of k")
    check_size(OPERATOR, "v", v, 2, keys, "the tokens of k")
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"{OPERATOR}: the heads of q must be a multiple of those of k, got {heads} and {key_heads}")
    check_dtype(OPERATOR, "group", group, INDEX_DTYPES)
    check_broadcastable(OPERATOR, "group", group, (batch, keys), "B M")
    check_size(OPERATOR, "group", group, 1, keys, "one group for each key")
    check_integer(OPERATOR, "num_groups", num_groups, 1)
    if group_weight is not None and group_gate is not None:
        raise ValueError(f"{OPERATOR}: group_gate must be None when group_weight is given, got both")
    for name, factor in factors.items():
        if factor is not None:
            check_dtype(OPERATOR, name, factor, (torch.float64 if q.dtype == torch.float64 else torch.float32,))
            check_broadcastable(OPERATOR, name, factor, (batch, heads, queries, num_groups), "B H N G")
            check_size(OPERATOR, name, factor, 3, num_groups, "num_groups")
    check_choice(OPERATOR, "causal", causal, (None, "upper_left", "lower_right"))
    if bias is not None:
        check_broadcastable(OPERATOR, "bias", bias, (batch, heads, queries, keys), "B H N M")
    if key_mask is not None:
        check_dtype(OPERATOR, "key_mask", key_mask, (torch.bool,))
        check_broadcastable(OPERATOR, "key_mask", key_mask, (batch, keys), "B M")
        check_size(OPERATOR, "key_mask", key_mask, 1, keys, "the tokens of k")
