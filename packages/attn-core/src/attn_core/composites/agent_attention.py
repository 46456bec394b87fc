"""Agent attention: a few agent tokens collect from all tokens, and all tokens read from the agents."""

from jaxtyping import Bool, Float
from torch import Tensor

from attn_core.checks import check_broadcastable, check_number, check_rank, check_same, check_size, check_width
from attn_core.dispatch import under_autocast
from attn_core.ops.attention import attention

OPERATOR = "agent_attention"


def agent_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hk M D"],
    v: Float[Tensor, "B Hk M Dv"],
    agents: Float[Tensor, "B H A D"],
    *,
    agent_bias: Float[Tensor, "#B #H #A #M"] | None = None,
    query_bias: Float[Tensor, "#B #H #N #A"] | None = None,
    key_mask: Bool[Tensor, "#B M"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H N Dv"]:
    """softmax(scale·q aᵀ + query_bias) · softmax(scale·a kᵀ + agent_bias) v, with A agents a instead of N×M scores.

    Cost O((N + M)·A), memory that of two calls of :func:`attn_core.attention`. The official model pools q to get the
    agents, adds a depth-wise convolution of v to the result, and builds the biases from small interpolated maps; these
    stay in the model.

    Args:
        k, v: Hk heads; H must be a multiple of Hk. Dv may differ from D.
        agents: one set of tokens for every head of q.
        agent_bias, query_bias: broadcastable, differentiable.
        key_mask: True = visible to the agents.
        scale: of both products; D^−0.5 by default.

    Returns:
        out in the dtype of q.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Source: Han et al. 2024 (arXiv 2312.08874), LeapLabTHU/Agent-Attention, ``AgentAttention``.
    """
    q, k, v, agents, agent_bias, query_bias = under_autocast(q, k, v, agents, agent_bias, query_bias)
    check_rank(OPERATOR, "q", q, "B H N D")
    check_rank(OPERATOR, "k", k, "B Hk M D")
    check_rank(OPERATOR, "v", v, "B Hk M Dv")
    check_same(OPERATOR, q, {"k": k, "v": v, "agents": agents, "agent_bias": agent_bias, "query_bias": query_bias})
    check_same(OPERATOR, q, {"key_mask": key_mask}, dtype=False)
    check_width(OPERATOR, "q", q)
    check_number(OPERATOR, "scale", scale, optional=True)
    check_rank(OPERATOR, "agents", agents, "B H A D")
    for dim, meaning in ((0, "the batch of q"), (1, "the heads of q"), (3, "the width of q")):
        check_size(OPERATOR, "agents", agents, dim, q.shape[dim], meaning)
    batch, heads, queries, _ = q.shape
    count, keys = agents.shape[2], k.shape[2]
    if agent_bias is not None:
        check_broadcastable(OPERATOR, "agent_bias", agent_bias, (batch, heads, count, keys), "B H A M")
    if query_bias is not None:
        check_broadcastable(OPERATOR, "query_bias", query_bias, (batch, heads, queries, count), "B H N A")
    collected, _ = attention(agents, k, v, scale=scale, bias=agent_bias, key_mask=key_mask)
    return attention(q, agents, collected, scale=scale, bias=query_bias)[0]
