"""Rank-augmented linear attention (RALA): keys weighted by what the mean query asks for."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from attn_core.checks import check_number, check_rank, check_same, check_size, check_width, fail, shape
from attn_core.ops.linear_attention import linear_attention

OPERATOR = "rank_augmented_attention"


def rank_augmented_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N Dv"],
    *,
    sin: Float[Tensor, "N D"] | None = None,
    cos: Float[Tensor, "N D"] | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> Float[Tensor, "B H N Dv"]:
    """Linear attention of elu + 1 features whose keys are weighted before they are summed into the D×Dv product.

    φ = elu + 1; w = N·softmax_j(scale·mean(φ(q))·φ(k_j)); k' = w∘φ(k);
    out_i = rot(φ(q_i))·(Σ_j rot(k'_j) v_jᵀ)/N ÷ (φ(q_i)·mean(k') + eps). The denominator is that of the features before
    rotation, as in the official code. The output gate and the depth-wise convolution stay in the model.

    Args:
        sin, cos: angles of the rotation of feature pairs (2m, 2m+1), both or none; D must be even.
        scale: of the logits of w; D^−0.5 by default.

    Returns:
        out in the dtype of q (under autocast in its dtype).

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Source: Fan et al. 2024 (arXiv 2411.07635), eqs. 5 to 8; qhfan/RALA, ``GateLinearAttentionNoSilu``.
    """
    check_rank(OPERATOR, "q", q, "B H N D")
    check_rank(OPERATOR, "k", k, "B H N D")
    check_rank(OPERATOR, "v", v, "B H N Dv")
    check_size(OPERATOR, "k", k, 2, q.shape[2], "the tokens of q")
    check_width(OPERATOR, "q", q)
    check_number(OPERATOR, "scale", scale, optional=True)
    check_number(OPERATOR, "eps", eps)
    check_same(OPERATOR, q, {"sin": sin, "cos": cos}, dtype=False)
    tokens, width = q.shape[2:]
    factor: float = width**-0.5 if scale is None else scale
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    features_q, features_k = (F.elu(x.to(dtype)) + 1 for x in (q, k))
    logits = factor * torch.einsum("bhd,bhnd->bhn", features_q.mean(2), features_k)
    features_k = features_k * (tokens * logits.softmax(-1)).unsqueeze(-1)
    denominator = torch.einsum("bhnd,bhd->bhn", features_q, features_k.mean(2)) + eps
    if (sin is None) != (cos is None):
        fail(OPERATOR, "sin", "must be given with cos and cos with sin", None if sin is None else shape(sin))
    if sin is not None and cos is not None:
        for name, angles in (("sin", sin), ("cos", cos)):
            if shape(angles) != (tokens, width) or width % 2:
                fail(OPERATOR, name, f"must be of shape {(tokens, width)} with an even width", shape(angles))
        features_q, features_k = (rotated(x, sin.to(dtype), cos.to(dtype)) for x in (features_q, features_k))
    # An exported graph holds numbers as they were, so there the number of tokens must divide a tensor.
    share, v = (1.0, v / tokens) if torch.compiler.is_exporting() else (1 / max(tokens, 1), v)
    out, _ = linear_attention(features_q.to(q.dtype), features_k.to(q.dtype), v, causal=False, scale=share)
    return (out.to(dtype) / denominator.unsqueeze(-1)).to(out.dtype)


def rotated(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """(x_0, x_1, …) → (x_0 cos − x_1 sin, x_1 cos + x_0 sin, …)."""
    even, odd = x[..., ::2], x[..., 1::2]
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin
