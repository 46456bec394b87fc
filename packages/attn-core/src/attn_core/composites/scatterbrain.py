"""Scatterbrain: exact attention on a sparse set of keys, a low-rank estimate on the rest."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attn_core.checks import check_number, check_rank, check_same, check_size, check_values, check_width, fail
from attn_core.ops.block_attention import block_attention

OPERATOR = "scatterbrain"
# What is left of a denominator after the sparse part of the estimate was taken away; rounding may take too much.
LEAST = 1e-24


def scatterbrain(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H M D"],
    v: Float[Tensor, "B H M Dv"],
    projection: Float[Tensor, "F D"],
    q_index: Int[Tensor, "#B #H R I"],
    kv_index: Int[Tensor, "#B #H S J"],
    table: Int[Tensor, "#B #H R K"] | None = None,
    *,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H N Dv"], Float[Tensor, "B H N"]]:
    """Attention to all keys: exp(scale·q_i·k_j) for the keys of the listed blocks, φ(q_i)·φ(k_j) for all others.

    φ are 2F positive random features (Performer's, symmetric) with E[φ(q)·φ(k)] = exp(scale·q·k). Numerator and
    denominator are kept as multiples of exponentials of their own, so neither overflows; the features' sums over
    listed blocks come from one state F×Dv of each key block, never from scores. Memory O((B·H)·(S + R)·F·Dv) beside
    block attention.

    Args:
        projection: rows of the random features, standard normal, orthogonal for less variance.
        q_index, kv_index, table: blocks as in :func:`attn_core.block_attention`. A query stands in one block at most,
            and a key in one listed block at most; a query in no block gets the estimate alone.
        scale: D^−0.5 by default, positive.

    Returns:
        out in the dtype of q; log of the denominator in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Source: Chen et al. 2021 (arXiv 2110.15343), HazyResearch/fly, ``SBBlockSparseAttention`` and
    ``SBPerformerFeatures``; the denominator of the rest is clamped at 1e-24 as there.
    """
    check_rank(OPERATOR, "q", q, "B H N D")
    check_rank(OPERATOR, "k", k, "B H M D")
    check_rank(OPERATOR, "v", v, "B H M Dv")
    check_rank(OPERATOR, "projection", projection, "F D")
    check_width(OPERATOR, "q", q)
    check_number(OPERATOR, "scale", scale, optional=True)
    if scale is not None and scale <= 0:
        fail(OPERATOR, "scale", "must be positive, its root enters the features", scale)
    check_same(OPERATOR, q, {"projection": projection})
    check_size(OPERATOR, "projection", projection, 1, q.shape[3], "the width of q")
    check_size(OPERATOR, "k", k, 1, q.shape[1], "the heads of q")
    check_rank(OPERATOR, "q_index", q_index, "B H R I")
    check_rank(OPERATOR, "kv_index", kv_index, "B H S J")
    check_values(OPERATOR, "q_index", q_index, q.shape[2] - 1, "the tokens of q")
    check_values(OPERATOR, "kv_index", kv_index, k.shape[2] - 1, "the tokens of k")
    if table is not None:
        check_rank(OPERATOR, "table", table, "B H R K")
        check_values(OPERATOR, "table", table, kv_index.shape[2] - 1, "the blocks of kv_index")
    factor: float = q.shape[3] ** -0.5 if scale is None else scale
    sparse, lse = block_attention(q, k, v, q_index, kv_index, table, scale=factor)

    exact = lse.dtype
    with torch.autocast(q.device.type, enabled=False):  # what is left of two large sums needs all digits
        rows = projection.to(exact)
        phi_q, q_log = softmax_features(q.to(exact), rows, factor, per_token=True)
        phi_k, k_log = softmax_features(k.to(exact), rows, factor, per_token=False)
        log_size = (q_log + k_log).squeeze(-1)
        # A further column of ones carries the denominators along.
        wide_v = torch.nn.functional.pad(v.to(exact), (0, 1), value=1.0)
        listed = _listed_sums(phi_q, phi_k, wide_v, q_index, kv_index, table)
        rest = phi_q @ (phi_k.transpose(-2, -1) @ wide_v) - listed
    rest_lse = rest[..., -1].clamp(min=LEAST).log() + log_size
    lse_all = torch.logaddexp(lse, rest_lse)
    out = torch.exp(lse - lse_all).unsqueeze(-1) * sparse.to(exact)
    out = out + torch.exp(log_size - lse_all).unsqueeze(-1) * rest[..., :-1]
    return out.to(sparse.dtype), lse_all


def softmax_features(x: Tensor, projection: Tensor, scale: float, *, per_token: bool) -> tuple[Tensor, Tensor]:
    """Positive features f and log c with E[(c_q f_q)·(c_k f_k)] = exp(scale·q·k), the largest feature being 1.

    Args:
        per_token: one c for each token (queries); otherwise one for each head (keys, whose features are summed).
    """
    projected = x @ projection.T * math.sqrt(scale)
    projected = torch.cat([projected, -projected], dim=-1)
    log = projected - 0.5 * scale * x.square().sum(-1, keepdim=True) - 0.5 * math.log(2 * projection.shape[0])
    if x.shape[2] == 0:
        return log.exp(), log.new_zeros(*log.shape[:2], 0 if per_token else 1, 1)
    size = log.amax(-1, keepdim=True) if per_token else log.amax((-1, -2), keepdim=True)
    return torch.exp(log - size), size


def _listed_sums(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, q_index: Tensor, kv_index: Tensor, table: Tensor | None
) -> Tensor:
    """Σ φ(q_i)·φ(k_j) v_j over the keys j of the blocks that query i reads; 0 for queries in no block."""
    batch, heads, queries, _ = phi_q.shape
    key_state = _gather(phi_k, kv_index).transpose(-2, -1) @ _gather(v, kv_index)  # (B, H, S, F, Dv)
    if table is not None:
        # How often each query block lists each key block: small beside the states.
        blocks = key_state.shape[2]
        named = torch.where(table < 0, blocks, table).long()
        count = v.new_zeros(*table.shape[:3], blocks + 1).scatter_add(-1, named, v.new_ones(named.shape))[..., :-1]
        key_state = (count @ key_state.flatten(3)).unflatten(-1, key_state.shape[3:])
    sums = _gather(phi_q, q_index) @ key_state  # (B, H, R, I, Dv)
    tokens = torch.where(q_index < 0, queries, q_index).long().expand(batch, heads, *q_index.shape[2:]).flatten(2)
    result = sums.new_zeros(batch, heads, queries + 1, sums.shape[-1])
    return result.scatter(2, tokens.unsqueeze(-1).expand(-1, -1, -1, sums.shape[-1]), sums.flatten(2, 3))[:, :, :-1]


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of blocks: (B, H, M, C) and (b, h, S, J) → (B, H, S, J, C), 0 in holes."""
    tokens = index.long().expand(*x.shape[:2], *index.shape[2:])
    rows = torch.nn.functional.pad(x, (0, 0, 0, 1))  # a row of zeros behind the last: where holes point
    tokens = torch.where(tokens < 0, x.shape[2], tokens)
    taken = rows.gather(2, tokens.flatten(2).unsqueeze(-1).expand(-1, -1, -1, x.shape[3]))
    return taken.unflatten(2, tokens.shape[2:])
