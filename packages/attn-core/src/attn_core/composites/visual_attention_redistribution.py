"""Visual attention redistribution (VAR): what attention sinks of a vision-language model hold goes to the image."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attn_core.checks import (
    check_broadcastable,
    check_choice,
    check_dtype,
    check_number,
    check_rank,
    check_same,
    check_size,
    check_tensor,
    check_width,
    fail,
)
from attn_core.ops.attention import attention
from attn_core.ops.group_attention import group_attention

OPERATOR = "visual_attention_redistribution"


def visual_attention_redistribution(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hk M D"],
    v: Float[Tensor, "B Hk M Dv"],
    visual: Bool[Tensor, "#B M"],
    sink: Bool[Tensor, "#B M"],
    *,
    rho: float = 0.5,
    summ: float = 0.2,
    p: float = 0.6,
    query_mask: Bool[Tensor, "#B N"] | None = None,
    scale: float | None = None,
    bias: Float[Tensor, "#B #H #N #M"] | None = None,
    key_mask: Bool[Tensor, "#B M"] | None = None,
    causal: Literal["upper_left", "lower_right"] | None = None,
) -> tuple[Float[Tensor, "B H N Dv"], Bool[Tensor, "B H N"]]:
    """Softmax attention in which heads that look at the image move 1 − p of their sinks' weight to its other tokens.

    With m the share of attention on visual sinks (vs), other visual tokens (v), text sinks (ts) and other tokens (o),
    and n the number of visual tokens, a head is image-centered at a query if m_vs / (m_v + m_vs + 1e-6·n) ≤ rho and
    m_v + m_vs ≥ summ. There the shares become (p·m_vs, m_v + (1 − p)(m_vs + m_ts), p·m_ts, m_o); tokens inside a class
    keep their ratios. Everywhere else, and in images without a visual sink, attention is left alone.

    No N×M map: two passes over the keys, or on the CPU, uncompiled, one pass and one over the tokens of the image and
    the sinks. The choice has no gradient, the shares do.

    Args:
        visual: True at tokens of the image. Hidden keys do not count.
        sink: True at attention sinks of image and text, for example :func:`sink_tokens`.
        rho, summ: thresholds, shares in [0, 1].
        p: share of their weight that sinks keep, in [0, 1].
        query_mask: True where redistribution is allowed (official: queries behind the image); everywhere by default.
        scale, bias, key_mask, causal: as in :func:`attn_core.attention`.

    Returns:
        out in the dtype of q; True where a head's attention was redistributed.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or p lies outside [0, 1].

    Source: Kang et al. 2025 (arXiv 2503.03321), seilk/VisAttnSink, ``HeadFork`` and ``VARProcessor``. The official code
    pairs batch entries and queries wrongly beyond one image, and divides by 0 where every visual token is a sink: such
    queries are left alone here.
    """
    check_rank(OPERATOR, "q", q, "B H N D")
    check_rank(OPERATOR, "k", k, "B Hk M D")
    check_rank(OPERATOR, "v", v, "B Hk M Dv")
    check_width(OPERATOR, "q", q)
    check_tensor(OPERATOR, "visual", visual)
    check_tensor(OPERATOR, "sink", sink)
    check_same(OPERATOR, q, {"bias": bias, "key_mask": key_mask}, dtype=False)
    for name, number in (("rho", rho), ("summ", summ), ("p", p)):
        check_number(OPERATOR, name, number)
    check_number(OPERATOR, "scale", scale, optional=True)
    check_choice(OPERATOR, "causal", causal, (None, "upper_left", "lower_right"))
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    for name, mask, size in (("visual", visual, keys), ("sink", sink, keys), ("query_mask", query_mask, queries)):
        if mask is not None:
            check_same(OPERATOR, q, {name: mask}, dtype=False)
            check_dtype(OPERATOR, name, mask, (torch.bool,))
            check_broadcastable(OPERATOR, name, mask, (batch, size), "B N" if name == "query_mask" else "B M")
            check_size(OPERATOR, name, mask, 1, size, "one flag for each token")
    if not 0 <= p <= 1:
        fail(OPERATOR, "p", "must lie in [0, 1]", p)
    options = {"scale": scale, "bias": bias, "key_mask": key_mask, "causal": causal}
    limits = Limits(rho, summ, p)
    return (_by_parts if _plain_cpu(q) else _by_groups)(q, k, v, visual, sink, limits, query_mask, **options)


class Limits(NamedTuple):
    """As in :func:`visual_attention_redistribution`."""

    rho: float
    summ: float
    p: float


def _plain_cpu(q: Tensor) -> bool:
    """Whether the number of tokens in a class can be read while running, for nothing."""
    return (
        q.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and torch._C._functorch.maybe_current_level() is None  # pyright: ignore[reportAttributeAccessIssue]
    )


def _by_groups(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visual: Tensor,
    sink: Tensor,
    limits: Limits,
    query_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Two passes over the keys, the first without the values."""
    group = 2 * visual.long() + sink.long()  # 0 other, 1 text sink, 2 visual, 3 visual sink
    _, mass = group_attention(q, k, v[..., :0], group, 4, **options)
    dead = mass.isneginf().all(-1, keepdim=True)
    share = mass.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
    other, text_sink, image, image_sink = share.unbind(-1)
    chosen = _chosen(image, image_sink, visual, sink, limits, query_mask, options["key_mask"])
    p = limits.p
    moved = torch.stack([other, p * text_sink, image + (1 - p) * (image_sink + text_sink), p * image_sink], dim=-1)
    weight = torch.where(chosen.unsqueeze(-1), moved, share)
    out, _ = group_attention(q, k, v, group, 4, group_weight=weight, **options)
    return out, chosen


def _by_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visual: Tensor,
    sink: Tensor,
    limits: Limits,
    query_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Ordinary attention, and attention over the tokens of each class that gives or takes, gathered.

    out' = out + (1 − p)·((m_vs + m_ts)·out_v − m_vs·out_vs − m_ts·out_ts), with the shares m_g = exp(lse_g − lse).
    """
    out, lse = attention(q, k, v, **options)
    key_mask = options["key_mask"]
    shown = torch.ones_like(visual) if key_mask is None else key_mask
    if not bool((visual & sink & shown).any()):
        return out, torch.zeros_like(lse, dtype=torch.bool)
    lse = lse.masked_fill(lse == -math.inf, 0.0)  # a query that sees nothing sees nothing of a class either
    image, image_sink, text_sink = (
        _class(q, k, v, member & shown, lse, options["scale"], options["bias"], options["causal"])
        for member in (visual & ~sink, visual & sink, ~visual & sink)
    )
    chosen = _chosen(image.share, image_sink.share, visual, sink, limits, query_mask, key_mask)
    given, taken = (torch.where(chosen, (1 - limits.p) * part.share, 0.0) for part in (image_sink, text_sink))
    moved = (given + taken)[..., None] * image.out
    moved = moved - given[..., None] * image_sink.out - taken[..., None] * text_sink.out
    return out + moved.to(out.dtype), chosen


class Class(NamedTuple):
    """Attention over the tokens of a class alone, and their share in the attention over all."""

    out: Float[Tensor, "B H N Dv"]
    share: Float[Tensor, "B H N"]


def _class(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    member: Tensor,
    lse: Tensor,
    scale: float | None,
    bias: Tensor | None,
    causal: str | None,
) -> Class:
    member = member.expand(q.shape[0], -1)
    count = int(member.sum(1).max()) if member.numel() else 0
    index = member.byte().argsort(dim=1, descending=True, stable=True)[:, :count]
    inside = member.gather(1, index)
    k, v = (x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v))
    if bias is not None:
        bias = bias.expand(q.shape[0], -1, -1, member.shape[1])
        bias = bias.gather(3, index[:, None, None].expand(-1, bias.shape[1], bias.shape[2], -1))
    if causal is not None:
        first = 0 if causal == "upper_left" else member.shape[1] - q.shape[2]
        last = torch.arange(first, first + q.shape[2], device=q.device)
        ahead = index[:, None] > last[:, None]
        if bool(ahead.any()):
            bias = q.new_zeros(()) if bias is None else bias
            bias = torch.where(ahead[:, None], -math.inf, bias)
    mask = None if bool(inside.all()) else inside
    out, part = attention(q, k, v, scale=scale, bias=bias, key_mask=mask)
    return Class(out, (part - lse).exp())


def _chosen(
    image: Tensor,
    image_sink: Tensor,
    visual: Tensor,
    sink: Tensor,
    limits: Limits,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
) -> Bool[Tensor, "B H N"]:
    """Where a head looks at the image, and not at its sinks alone."""
    shown = visual if key_mask is None else visual & key_mask
    count = shown.sum(-1).view(-1, 1, 1)
    total = image + image_sink
    chosen = (image_sink / (total + 1e-6 * count) <= limits.rho) & (total >= limits.summ) & (image > 0)
    chosen = chosen & (shown & sink).any(-1).view(-1, 1, 1)
    return chosen if query_mask is None else chosen & query_mask[:, None]


def sink_tokens(
    hidden: Float[Tensor, "B N C"], dims: Sequence[int], *, tau: float = 20.0, eps: float = 1e-6
) -> Bool[Tensor, "B N"]:
    """Tokens whose root-mean-square-normalized hidden state exceeds ``tau`` in size in one of the sink dimensions.

    Args:
        hidden: states before a layer. dims: sink dimensions of the model (Llama-2-7B: 1415 and 2533).

    Raises:
        ValueError: ``dims`` is empty or names a dimension that does not exist.

    Source: seilk/VisAttnSink, ``DimProspector``.
    """
    check_rank("sink_tokens", "hidden", hidden, "B N C")
    if not dims or min(dims) < 0 or max(dims) >= hidden.shape[2]:
        fail("sink_tokens", "dims", f"must name dimensions 0…{hidden.shape[2] - 1}, at least one", list(dims))
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normalized[..., list(dims)].abs().amax(-1) > tau
