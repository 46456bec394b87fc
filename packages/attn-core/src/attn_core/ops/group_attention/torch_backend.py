"""Grouped attention without stored scores in plain torch: keys sorted by group, chunks of query rows.

Memory beyond the results: O(B·H·N·G + B·Hk·M·(D + Dv)) and one chunk of scores. The sizes of the groups are read on the
host, so on a GPU the call waits for it.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from attn_core.kernels.derived import derived
from attn_core.kernels.registration import Grads, token_major, token_major_copy
from attn_core.ops.attention.chunked import chunk_rows, softmax_with_lse

from .reference import GROUP_ATTENTION, Arguments, fake, reference

# Share of a row below which the logarithm of a group's sum is taken from the group alone.
LEAST_MASS = 1e-20
# Scores up to which keys are not sorted: the calls would cost more than the products with zeros.
SMALL = 2**14


@dataclass
class _Part:
    """The images that share one sorting of the keys."""

    images: slice
    order: Tensor  # tokens that stand in a group, by group, then by number
    sizes: list[int]  # of the groups
    k: Tensor  # (b, Hk, m, D) in that order, accumulation dtype
    v: Tensor

    def until(self, last: int) -> tuple["_Part", Tensor | None]:
        """The keys up to token ``last``, and their places in this part; itself and None if these are all."""
        seen = self.order <= last
        if bool(seen.all()):
            return self, None
        places = seen.nonzero().squeeze(1)
        sizes = [int(part.sum()) for part in seen.split(self.sizes)]
        k, v = (x.index_select(2, places) for x in (self.k, self.v))
        return _Part(self.images, self.order[places], sizes, k, v), places


@dataclass(frozen=True)
class _Sorting:
    """The keys of an image that stand in a group, by group, then by number; and the sizes of the groups."""

    order: Tensor
    sizes: list[int]


def _parts(a: Arguments) -> Iterator[_Part]:
    key = ("group_attention sorting", a.num_groups)
    sortings = derived(key, functools.partial(_sortings, a.num_groups), a.group, a.key_mask)
    for b, own in enumerate(sortings):
        images = slice(None) if len(sortings) == 1 else slice(b, b + 1)
        sorted_k, sorted_v = (x[images].index_select(2, own.order).to(a.accumulator) for x in (a.k, a.v))
        yield _Part(images, own.order, own.sizes, sorted_k, sorted_v)


def _sortings(groups: int, group: Tensor, key_mask: Tensor | None) -> list[_Sorting]:
    """One for each image, or a single one for all."""
    found = []
    for named in _named(groups, group, key_mask).unbind(0):
        counts = torch.bincount(named, minlength=groups + 1).tolist()
        order = torch.argsort(named, stable=True)[: len(named) - counts[groups]]
        found.append(_Sorting(order, counts[:groups]))
    return found


def _named(groups: int, group: Tensor, key_mask: Tensor | None) -> Tensor:
    """(B|1, M) int64: the group of each key, ``groups`` for keys that stand in none or are hidden."""
    hidden = (group < 0) | (group >= groups)
    if key_mask is not None:
        hidden = hidden | ~key_mask
    return torch.where(hidden, groups, group).long()


def _spans(x: Tensor, sizes: Sequence[int]) -> list[tuple[slice, Tensor]]:
    """(groups, their columns of ``x`` as (…, groups, columns)) of each run of equally large groups; no empty ones."""
    spans, start, g = [], 0, 0
    for size, run in groupby(sizes):
        count = len(list(run))
        if size:
            columns = x[..., start : start + count * size]
            spans.append((slice(g, g + count), columns.unflatten(-1, (count, size))))
        start += count * size
        g += count
    return spans


def _scores(part: _Part, rows: slice, a: Arguments) -> Tensor:
    """Scores of some query rows and the sorted keys in the accumulation dtype: (b, H, rows, m)."""
    q = a.q[part.images, :, rows]
    s = torch.matmul(_by_key_head(q.to(part.k.dtype) * a.scale, part.k.shape[1]), part.k.transpose(-2, -1))
    s = s.view(*q.shape[:3], part.k.shape[2])
    if a.bias is not None:
        term = _of(a.bias, part.images, rows)
        s += (term if term.shape[3] == 1 else term.index_select(3, part.order)).to(s.dtype)
    if a.offset is not None:
        i = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
        s.masked_fill_(part.order > i + a.offset, -math.inf)
    return s


def _chunks(q: Tensor, part: _Part) -> Iterator[slice]:
    step = chunk_rows(part.k.shape[0], q.shape[1], part.k.shape[2])
    for start in range(0, q.shape[2], step):
        yield slice(start, min(start + step, q.shape[2]))


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """out and lse of each group; small calls at once, others in chunks of queries, whose memory grows with the keys."""
    found = _unsorted(a) if a.mode == "mass" and a.bias is None and a.causal == "none" else None
    return _by_sorting(a) if found is None else found


@dataclass(frozen=True)
class _Members:
    """Who stands in which group, for each key head of an image or one for all, in the accumulation dtype."""

    ones: Tensor  # (B·Hk, M, G)
    hidden: Tensor  # (B·Hk|1, 1, M): −inf at keys without a group
    empty: Tensor | None  # (B·Hk, 1, G): 1 at groups without a key; None if there are none


def _members(
    groups: int, batch: int, key_heads: int, dtype: torch.dtype, group: Tensor, key_mask: Tensor | None
) -> _Members:
    named = _named(groups, group, key_mask)
    ones = torch.nn.functional.one_hot(named, groups + 1).to(dtype)
    hidden = torch.zeros(named.shape, dtype=dtype, device=named.device).masked_fill_(named == groups, -math.inf)
    empty = (ones[..., :groups].sum(1, keepdim=True) == 0).to(dtype)

    def of_every_head(x: Tensor) -> Tensor:
        return x.expand(batch, *x.shape[1:]).repeat_interleave(key_heads, 0)

    return _Members(
        of_every_head(ones[..., :groups]).contiguous(),
        of_every_head(hidden[:, None]),
        of_every_head(empty) if bool(empty.any()) else None,
    )


def _unsorted(a: Arguments) -> tuple[Tensor, Tensor] | None:
    """The softmax over the keys of all groups in few calls, its sums over groups as a product.

    None if there is more to it: many scores, a row without keys, or a mass whose logarithm would be inexact.
    """
    q, k, v = a.q, a.k, a.v
    batch, heads, queries, _ = q.shape
    key_heads, keys = k.shape[1:3]
    if not 0 < batch * heads * queries * keys <= SMALL or batch * key_heads * keys * a.num_groups > SMALL:
        return None
    if not q.is_cpu or v.shape[3] == 0:
        return None
    dtype = a.accumulator
    sizes = (a.num_groups, batch, key_heads, dtype)
    members = derived(("group_attention members", *sizes), functools.partial(_members, *sizes), a.group, a.key_mask)
    if q.dtype != dtype:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    rows = q.flatten(0, 1) if heads == key_heads else q.reshape(batch * key_heads, -1, q.shape[3])
    s = torch.baddbmm(members.hidden, rows, k.flatten(0, 1).mT, alpha=a.scale)
    p = torch.softmax(s, -1)
    mass = torch.bmm(p, members.ones)
    least = (mass if members.empty is None else mass + members.empty).amin().item()
    if not least >= LEAST_MASS:  # or no number
        return None
    lse = s.amax(-1, True) - p.amax(-1, True).log_()
    out = torch.bmm(p, v.flatten(0, 1)).view(batch, heads, queries, v.shape[3])
    L = mass.log_().add_(lse).view(batch, heads, queries, a.num_groups)
    return token_major_copy(out if out.dtype == a.q.dtype else out.to(a.q.dtype)), L


def _by_sorting(a: Arguments) -> tuple[Tensor, Tensor]:
    out, group_lse = fake(a)
    if out.numel() == 0:  # no value column, or no query: the masses are still asked for
        out.zero_()
    group_lse.fill_(-math.inf)
    offset = a.offset
    for whole in _parts(a):
        for rows in _chunks(a.q, whole):
            part, _ = (whole, None) if offset is None else whole.until(rows.stop - 1 + offset)
            s = _scores(part, rows, a)
            L = group_lse[part.images, :, rows]
            p = _one_softmax(s, part, L, rows, offset) if a.mode == "mass" and s.shape[-1] else None
            if p is None:
                own = None if a.factor is None else _of(a.factor, part.images, rows)
                p = _softmax_of_groups(s, part.sizes, L, own, a.mode)
            product = torch.matmul(_by_key_head(p, a.k.shape[1]), part.v)
            out[part.images, :, rows] = product.view(*s.shape[:3], a.v.shape[-1]).to(out.dtype)
    return out, group_lse


def _one_softmax(s: Tensor, part: _Part, L: Tensor, rows: slice, offset: int | None) -> Tensor | None:
    """Softmax over the keys of all groups; fills ``L`` from its sums over groups.

    None, and ``s`` as it was, if a group has a mass so small that its logarithm would be inexact.
    """
    p, lse = softmax_with_lse(s, True)
    for (groups, span), (_, tokens) in zip(_spans(p, part.sizes), _spans(part.order, part.sizes), strict=True):
        mass = span.sum(-1)
        faint = mass < LEAST_MASS
        if offset is not None:  # except before the first token of a group
            last = torch.arange(rows.start, rows.stop, device=s.device)[:, None] + offset
            faint &= tokens.amin(-1) <= last
        if bool(faint.any()):
            return None
        L[..., groups] = mass.log_().add_(lse.unsqueeze(-1))
    return p


def _softmax_of_groups(s: Tensor, sizes: Sequence[int], L: Tensor, factor: Tensor | None, mode: str) -> Tensor:
    """``s`` overwritten by each group's softmax times its weight; fills ``L``."""
    totals = []
    for groups, span in _spans(s, sizes):
        m = span.amax(-1, keepdim=True)
        m.masked_fill_(m == -math.inf, 0.0)
        total = span.sub_(m).exp_().sum(-1, keepdim=True)
        L[..., groups] = (total.log() + m).squeeze(-1)  # log 0 = −inf in dead groups
        totals.append(total.masked_fill_(total == 0, 1.0))
    W = group_weights(L, factor, mode)
    for (groups, span), total in zip(_spans(s, sizes), totals, strict=True):
        span.mul_(W[..., groups].unsqueeze(-1) / total)
    return s


# Whole: what a chunk computes, the next line overwrites in place: parts would hand over a dozen views.
def backward(grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:
    """p = exp(s − L) within a group, d_ig = dO_i·o_ig: dS = p∘(W∘(dO·Vᵀ − d) + dL); without weights and gates d = δ."""
    (grad_out, grad_lse), (out, group_lse) = grads, kept
    assert grad_out is not None
    q, k, v, factor, bias, scale, mode, offset = *a[:3], a.factor, a.bias, a.scale, a.mode, a.offset
    dtype = group_lse.dtype
    dq = token_major(q, *q.shape).zero_()
    dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (k, v))
    dfactor = torch.zeros_like(factor) if factor is not None and needs[3] else None
    dbias = torch.zeros_like(bias, dtype=dtype) if bias is not None and needs[4] else None
    for whole in _parts(a):
        whole_dk, whole_dv = torch.zeros_like(whole.k), torch.zeros_like(whole.v)
        for rows in _chunks(q, whole):
            part, places = (whole, None) if offset is None else whole.until(rows.stop - 1 + offset)
            p = _scores(part, rows, a)
            L = group_lse[part.images, :, rows]
            W = group_weights(L, None if factor is None else _of(factor, part.images, rows), mode)
            incoming = grad_out[part.images, :, rows].to(dtype)
            d_out = _by_key_head(incoming, k.shape[1])
            ds = torch.matmul(d_out, part.v.transpose(-2, -1)).view_as(p)
            finite = L.masked_fill(L.isneginf(), 0.0)
            spans = [
                (groups, x, y)
                for (groups, x), (_, y) in zip(_spans(p, part.sizes), _spans(ds, part.sizes), strict=True)
            ]
            plain = mode == "mass" and grad_lse is None
            if plain:  # one softmax over all groups, whose weights are in it
                lse = torch.logsumexp(L, -1, keepdim=True)
                p.sub_(lse.masked_fill_(lse == -math.inf, 0.0)).exp_()
                ds.sub_((incoming * out[part.images, :, rows]).sum(-1, keepdim=True)).mul_(p)
                spans = []
            for groups, span, _ in spans:
                span.sub_(finite[..., groups].unsqueeze(-1)).exp_()
            if plain:
                d, spread = L, None
            elif mode == "mass":  # the sum of W∘d over the groups is dO_i·out_i, and more is not needed
                d = (incoming * out[part.images, :, rows]).sum(-1, keepdim=True).expand_as(L)
                spread = None
            else:
                d = torch.zeros_like(L)
                for groups, span, gradient in spans:
                    d[..., groups] = (span * gradient).sum(-1)
                spread = d if mode == "weight" else W * (d - (W * d).sum(-1, keepdim=True))
            for groups, span, gradient in spans:
                w, own = W[..., groups].unsqueeze(-1), d[..., groups].unsqueeze(-1)
                gradient.sub_(own)
                if grad_lse is None:
                    gradient.mul_(span.mul_(w))
                else:
                    dL = grad_lse[part.images, :, rows, groups].unsqueeze(-1)
                    gradient.mul_(w).add_(dL).mul_(span)
                    span.mul_(w)
            part_dv = torch.matmul(_by_key_head(p, k.shape[1]).transpose(-2, -1), d_out)
            grouped = _by_key_head(ds, k.shape[1])
            dq[part.images, :, rows] = torch.matmul(grouped, part.k).mul_(scale).view_as(q[part.images, :, rows])
            own_q = _by_key_head(q[part.images, :, rows].to(dtype), k.shape[1])
            part_dk = torch.matmul(grouped.transpose(-2, -1), own_q).mul_(scale)
            for total, own in ((whole_dk, part_dk), (whole_dv, part_dv)):
                if places is None:
                    total += own
                else:
                    total.index_add_(2, places, own)
            if dfactor is not None and spread is not None:
                target = _of(dfactor, part.images, rows)
                target += spread.sum_to_size(target.shape)
            if dbias is not None:
                target = _of(dbias, part.images, rows)
                if target.shape[3] == 1:
                    target += ds.sum_to_size(target.shape)
                else:
                    total = ds.sum_to_size(*target.shape[:3], ds.shape[3])
                    target[..., part.order] += total
        dk[whole.images].index_copy_(2, whole.order, whole_dk)
        dv[whole.images].index_copy_(2, whole.order, whole_dv)
    token_major_grads = (token_major_copy(x) for x in (dq, dk.to(k.dtype), dv.to(v.dtype)))
    return [*token_major_grads, dfactor, dbias]


def group_weights(L: Tensor, factor: Tensor | None, mode: str) -> Tensor:
    """Weight of each group's average, 0 where the group is empty."""
    if mode == "weight":
        assert factor is not None
        return factor.expand_as(L).masked_fill(L.isneginf(), 0.0)
    logits = L if factor is None else factor.expand_as(L).masked_fill(L.isneginf(), -math.inf)
    m = logits.amax(-1, keepdim=True)
    e = torch.exp(logits - m.masked_fill(m == -math.inf, 0.0))
    total = e.sum(-1, keepdim=True)
    return e / total.masked_fill(total == 0, 1.0)


def _of(x: Tensor, images: slice, rows: slice) -> Tensor:
    x = x if x.shape[0] == 1 else x[images]
    return x if x.shape[2] == 1 else x[:, :, rows]


def _by_key_head(x: Tensor, key_heads: int) -> Tensor:
    """(B, H, N, …) → (B, Hk, H/Hk·N, …): queries of a group share their keys without a copy of them."""
    batch, heads, rows, width = x.shape
    return x.reshape(batch, key_heads, heads // key_heads * rows, width)


group_attention = GROUP_ATTENTION.register("torch", forward, backward, exported=reference)
