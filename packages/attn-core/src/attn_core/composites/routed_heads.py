"""Heads with a gate for each token (mixture of heads): a pair of token and head whose gate is 0 is not computed."""

import torch
from jaxtyping import Float
from torch import Tensor

from attn_core import torch_internals
from attn_core.checks import (
    check_broadcastable,
    check_number,
    check_rank,
    check_same,
    check_size,
    check_width,
    fail,
    shape,
)
from attn_core.dispatch import under_autocast
from attn_core.ops.attention import attention
from attn_core.ops.block_attention import block_attention

OPERATOR = "routed_heads"
# Keys below which one masked call is faster than one call for each head (measured on one AVX-512 core, half the pairs
# off: 1.0 × at 512 keys, 0.7 × at 1,024), and the share of pairs above which there is too little to leave out.
SKIP_KEYS = 768
SKIP_SHARE = 0.85
QUERY_BLOCK = 64  # rows of a query block on accelerators


def routed_heads(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hk M D"],
    v: Float[Tensor, "B Hk M Dv"],
    gates: Float[Tensor, "B N H"],
    *,
    scale: float | None = None,
    bias: Float[Tensor, "#B #H #N #M"] | None = None,
) -> Float[Tensor, "B H N Dv"]:
    """gates[b, n, h] · attention of head h at token n, where a gate of 0 switches the pair (n, h) off.

    What is off has out = 0 and no gradients, that of its gate included: a router's choice is not differentiable. For
    each head the tokens that are on are gathered, attend to all keys, and are put back; nothing is computed for the
    others. Where that would not be faster (few keys, nearly all on) and where a graph is traced, one call computes all
    pairs and the gates mask them: the same numbers.

    Memory: that of :func:`attn_core.attention`, and a copy of the queries that are on.

    Args:
        k, v: Hk heads; H must be a multiple of Hk. Dv may differ from D.
        gates: one for each token and head, in the order of a router's output; differentiable.
        scale: factor of the dot products; D^−0.5 by default.
        bias: broadcastable, differentiable; −inf hides a key.

    Returns:
        out in the dtype of q.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Source: Jin et al. 2024 (arXiv 2410.11842), eq. 4; https://github.com/SkyworkAI/MoH, which computes all pairs.
    """
    q, k, v, gates, bias = under_autocast(q, k, v, gates, bias)
    check_rank(OPERATOR, "q", q, "B H N D")
    check_rank(OPERATOR, "k", k, "B Hk M D")
    check_rank(OPERATOR, "v", v, "B Hk M Dv")
    check_rank(OPERATOR, "gates", gates, "B N H")
    check_same(OPERATOR, q, {"k": k, "v": v, "gates": gates, "bias": bias})
    check_width(OPERATOR, "q", q)
    check_number(OPERATOR, "scale", scale, optional=True)
    batch, heads, queries, _ = q.shape
    for dim, size, meaning in ((0, batch, "the batch of q"), (1, queries, "the tokens of q"), (2, heads, "its heads")):
        check_size(OPERATOR, "gates", gates, dim, size, meaning)
    if k.shape[1] == 0 or heads % k.shape[1]:
        fail(OPERATOR, "k", f"must have heads that divide those of q ({heads})", shape(k))
    if bias is not None:
        check_broadcastable(OPERATOR, "bias", bias, (batch, heads, queries, k.shape[2]), "B H N M")
    if k.shape[2] < SKIP_KEYS or not _has_numbers(q, gates):
        return masked(q, k, v, gates, scale, bias)
    return skipped(q, k, v, gates, scale, bias)


def _has_numbers(q: Tensor, gates: Tensor) -> bool:
    """Whether what is computed may depend on which gates are 0."""
    traced = torch.compiler.is_compiling() or torch_internals.is_watched() or torch_internals.is_transformed()
    return not traced and torch_internals.is_ordinary(q) and torch_internals.is_ordinary(gates)


def masked(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, scale: float | None, bias: Tensor | None) -> Tensor:
    """All pairs, then the gates."""
    gates = gates.masked_fill(gates == 0, 0.0)  # no gradient of a pair that is off
    return attention(q, k, v, scale=scale, bias=bias)[0] * gates.transpose(1, 2)[..., None]


def skipped(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, scale: float | None, bias: Tensor | None) -> Tensor:
    """The leading heads that are on at every token in one call, of the others the pairs that are on."""
    group = q.shape[1] // k.shape[1]
    on = (gates != 0).transpose(1, 2)
    if int(on.sum()) >= SKIP_SHARE * on.numel():  # also where there are no pairs
        return masked(q, k, v, gates, scale, bias)
    everywhere = on.all(2).all(0).tolist()
    always = everywhere.index(False) // group * group
    parts = []
    for span in (slice(0, always), slice(always, None)):
        keys = slice(span.start // group, None if span.stop is None else span.stop // group)
        own_bias = bias if bias is None or bias.shape[1] == 1 else bias[:, span]
        part = (q[:, span], k[:, keys], v[:, keys], gates[:, :, span], scale, own_bias)
        if span.stop is not None:
            parts += [masked(*part)] if always else []
        elif q.device.type == "cpu" or bias is not None:
            parts.append(one_by_one(*part, on[:, span]))
        else:
            parts.append(in_blocks(*part[:5], on[:, span]))
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, scale: float | None, bias: Tensor | None, on: Tensor
) -> Tensor:
    """Gathers the rows that are on, attends with one call for each image and head, and puts them back."""
    batch, heads, tokens, width = q.shape
    group = heads // k.shape[1]
    image, head, token = on.nonzero().unbind(1)
    rows = (image * tokens + token) * heads + head  # in memory heads lie beside each other
    taken = q.transpose(1, 2).reshape(-1, width).index_select(0, rows)
    counts = on.sum(2).flatten().tolist()
    spread = None if bias is None else bias.expand(batch, heads, tokens, k.shape[2])
    outs = []
    keys, values = (x.flatten(0, 1).unbind(0) for x in (k, v))
    for place, (part, own) in enumerate(zip(taken.split(counts), token.split(counts), strict=True)):
        if not counts[place]:
            continue
        b, h = divmod(place, heads)
        at = b * k.shape[1] + h // group
        own_bias = None if spread is None else spread[b, h, own][None, None]
        found, _ = attention(part[None, None], keys[at][None, None], values[at][None, None], scale=scale, bias=own_bias)
        outs.append(found[0, 0])
    flat = gates.reshape(-1).index_select(0, rows)[:, None]
    found = torch.cat(outs) * flat if outs else q.new_zeros(0, v.shape[3]) * flat
    out = found.new_zeros(batch * tokens * heads, v.shape[3]).index_copy(0, rows, found)
    return out.view(batch, tokens, heads, v.shape[3]).transpose(1, 2)


def in_blocks(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, scale: float | None, on: Tensor) -> Tensor:
    """One call for all heads: the rows that are on, in blocks of ``QUERY_BLOCK``, each listing the keys of its head."""
    batch, heads, tokens, _ = q.shape
    key_heads, keys = k.shape[1], k.shape[2]
    counts = on.sum(2).flatten()
    blocks = (counts + QUERY_BLOCK - 1) // QUERY_BLOCK
    flat = on.flatten().nonzero()[:, 0]
    pair = flat // tokens  # image and head
    first_row, first_block = (x.cumsum(0) - x for x in (counts, blocks))
    place = torch.arange(len(flat), device=q.device) - first_row[pair] + first_block[pair] * QUERY_BLOCK
    q_index = flat.new_full((int(blocks.sum()) * QUERY_BLOCK,), -1).index_copy(0, place, flat)
    kv_index = torch.arange(batch * key_heads * keys, device=q.device).view(1, 1, batch * key_heads, keys)
    of_pair = torch.arange(batch * heads, device=q.device) // (heads // key_heads)
    table = torch.repeat_interleave(of_pair, blocks).view(1, 1, -1, 1)
    q_rows, k_rows, v_rows = (x.reshape(1, 1, -1, x.shape[3]) for x in (q, k, v))
    out, _ = block_attention(q_rows, k_rows, v_rows, q_index.view(1, 1, -1, QUERY_BLOCK), kv_index, table, scale=scale)
    gates = gates.masked_fill(gates == 0, 0.0)
    return out.view(batch, heads, tokens, v.shape[3]) * gates.transpose(1, 2)[..., None]
