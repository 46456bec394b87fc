"""Landmark attention: earlier blocks of tokens are weighted by one landmark token each."""

import torch
from jaxtyping import Float
from torch import Tensor

from attn_core.checks import check_integer, check_number, check_rank, check_size, check_width, fail
from attn_core.ops.block_attention import block_attention
from attn_core.ops.group_attention import group_attention
from attn_core.ops.merge_attention import merge_attention

OPERATOR = "landmark_attention"


def landmark_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hk N D"],
    v: Float[Tensor, "B Hk N Dv"],
    block: int,
    *,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H N Dv"], Float[Tensor, "B H N"]]:
    """Causal attention in which the last token of every ``block`` tokens is a landmark, the gate of its block.

    With s_ij = scale·q_i·k_j, a query softmaxes over the earlier tokens of its own block and the landmarks of the
    blocks before; what a landmark gets is shared among its block's other tokens by a softmax of their own::

        t t t L | t t t L | t t q        the query sees the two t before it and both L; each L hands on to its three t

    The value of a landmark is never read. A landmark as a query sees the tokens of its block, not itself. Equal to
    the grouped softmax of the official code; memory O(B·H·N·N/block) for the masses of blocks.

    Args:
        k, v: Hk heads; H must be a multiple of Hk (grouped queries).
        block: tokens of a block with its landmark (official: memory frequency + 1), at least 2. The last block may be
            shorter, and then has no landmark.

    Returns:
        out in the dtype of q; log-sum-exp of the first softmax, −inf where a query sees nothing (never with block ≥ 2).

    Raises:
        ValueError: ``block`` is too small, or shapes, dtypes or devices do not fit.

    Source: Mohtashami and Jaggi 2023 (arXiv 2305.16300), epfml/landmark-attention, ``landmark_grouped_softmax``.
    """
    check_rank(OPERATOR, "q", q, "B H N D")
    check_rank(OPERATOR, "k", k, "B Hk N D")
    check_size(OPERATOR, "k", k, 2, q.shape[2], "the tokens of q")
    check_rank(OPERATOR, "v", v, "B Hk N Dv")
    check_width(OPERATOR, "q", q)
    check_number(OPERATOR, "scale", scale, optional=True)
    check_integer(OPERATOR, "block", block)
    if block < 2:
        fail(OPERATOR, "block", "must be at least 2, a token and its landmark", block)
    factor: float = q.shape[3] ** -0.5 if scale is None else scale
    heads, tokens = q.shape[1], q.shape[2]
    position = torch.arange(tokens, device=q.device, dtype=torch.int32)
    number, slot = position // block, position % block
    rows = torch.arange(0, -(-tokens // block) * block, device=q.device, dtype=torch.int32).view(1, 1, -1, block)
    rows = rows.masked_fill(rows >= tokens, -1)
    own = block_attention(q, k, v, rows, rows[..., : block - 1], causal=True, scale=factor)
    complete = tokens // block
    if complete == 0:
        return own
    group = number.masked_fill((slot == block - 1) | (number >= complete), -1)[None]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    landmarks = k[:, :, block - 1 :: block].to(exact).repeat_interleave(heads // k.shape[1], dim=1)
    with torch.autocast(q.device.type, enabled=False):  # gates are exact, whatever the tokens are
        gate = torch.matmul(q.to(exact) * factor, landmarks.transpose(-2, -1))
    ahead = torch.arange(complete, device=q.device) >= number[:, None]  # a query's own block and those after it
    gate = gate.masked_fill(ahead, -torch.inf)
    past, _ = group_attention(q, k, v, group, complete, group_gate=gate, causal="upper_left", scale=factor)
    # Without a block before it, a query's gates are all closed: their log-sum-exp has no gradient there.
    shut = ahead.all(-1)
    lse = gate.masked_fill(shut[:, None], 0.0).logsumexp(-1).masked_fill(shut, -torch.inf)
    return merge_attention([past, own[0]], [lse, own[1]])
