"""Additive attention in plain torch: tiles of queries × keys × D that stay in a core's second-level cache.

tanh(z) = 1 − 2r with r = 1/(1 + e^{2z}), torch's sigmoid of −2z: several times faster on CPUs than its tanh, exact to
the last bits of a float32 sum. So s_ij = Σ_d w_d − 2 Σ_d w_d r, and tanh' = 4r(1 − r). The backward pass computes r
again. Memory beyond the results: q, k and their gradients in float32, two tiles, and with ``value`` a chunk of scores.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attn_core.kernels.registration import Grads
from attn_core.ops.attention.chunked import softmax_with_lse as softmax_with_log
from attn_core.ops.attention.reference import softmax_with_lse

from .reference import ADDITIVE_ATTENTION, Arguments, fake, reference

# Elements of a tile: 2¹⁷ float32 are 512 KiB. The backward pass holds two tiles.
TILE = 2**17
# Scores held at a time when they are not the result.
CHUNK_SCORES = 2**18
# Elements of the whole N×M×D tensor up to which the equation itself is fastest.
SMALL = 2**14


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """At once if small; else by groups of images or tiles of queries, one tile's (n, M, D) in memory at a time."""
    q, value = a.q, a.value
    if q.numel() * a.k.shape[1] <= SMALL and q.numel() and a.k.numel():
        return _at_once(a)
    out, lse = fake(a)
    tiles = _Tiles(a, lse.dtype)
    if tiles.small:
        for images in tiles.groups():
            s = tiles.scores_of_group(images, tiles.sigmoid_of_group(images))
            p, lse[images] = softmax_with_lse(s)
            out[images] = s if value is None else p @ _entries(value, images).to(p.dtype)
        return out, lse
    r = tiles.buffer()
    for b in range(q.shape[0]):
        for rows in tiles.chunks():
            s = lse.new_empty(rows.stop - rows.start, tiles.keys)
            for part, keys in tiles.inside(rows):
                s[_within(part, rows), keys] = tiles.scores(b, tiles.sigmoid(b, part, keys, r), keys)
            p, lse[b, rows] = softmax_with_lse(s)
            out[b, rows] = s if value is None else p @ value[b % value.shape[0]].to(p.dtype)
    return out, lse


def _at_once(a: Arguments) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if a.q.dtype == torch.float64 else torch.float32
    q, k, w = (t if t.dtype == dtype else t.to(dtype) for t in (a.q, a.k, a.w))
    tanh = (q.unsqueeze(2) + k.unsqueeze(1)).tanh_()
    s = tanh @ w[0] if len(w) == 1 else (tanh * w[:, None, None]).sum(-1)
    if a.key_mask is not None:
        s = s.masked_fill_(~a.key_mask[:, None], -math.inf)
    # Not logsumexp: it takes twice the time of the softmax and two maxima.
    p, lse = softmax_with_log(s, may_be_dead=a.key_mask is not None)
    out = s if a.value is None else p @ (a.value if a.value.dtype == dtype else a.value.to(dtype))
    return out if out.dtype == a.q.dtype else out.to(a.q.dtype), lse


# Whole: tiles and groups add to the same four sums.
def backward(grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:  # noqa: ARG001  the backends' signature
    """ds_ij = p_ij (do_i·v_j − do_i·o_i + dlse_i), or dscore_ij + p_ij dlse_i; dz = 4 ds_ij w r(1 − r)."""
    (grad_out, grad_lse), (out, lse), (q, k, w, value, _) = grads, kept, a
    assert grad_out is not None
    batch, dtype = q.shape[0], lse.dtype
    dq, dk, dw = (lse.new_zeros(batch, *t.shape[1:]) for t in (q, k, w))
    dvalue = None if value is None else lse.new_zeros(batch, *value.shape[1:])
    tiles = _Tiles(a, dtype)
    # Scores of a row without keys are −inf: any finite number gives p = exp(s − lse) = 0.
    finite = lse.masked_fill(lse == -math.inf, 0.0)
    if tiles.small:
        for images in tiles.groups():
            d_out = grad_out[images].to(dtype)
            shift = 0.0 if grad_lse is None else grad_lse[images, :, None]
            r = tiles.sigmoid_of_group(images)
            if value is None:
                ds = d_out if tiles.hidden is None else d_out.masked_fill(tiles.hidden[images, None], 0.0)
            else:
                ds = d_out @ _entries(value, images).to(dtype).mT
            if value is not None or grad_lse is not None:
                p = tiles.scores_of_group(images, r).sub_(finite[images, :, None]).exp_()
                if value is not None:  # Σ_j p·ds equals do·o before o was rounded
                    shift = shift - torch.linalg.vecdot(p, ds).unsqueeze(-1)
                ds = (ds + shift) * p if value is not None else torch.addcmul(ds, p, shift)  # pyright: ignore[reportArgumentType]
                if dvalue is not None:
                    dvalue[images] = p.mT @ d_out
            dw[images] = ds.sum((1, 2))[:, None] - 2 * (ds.flatten(1)[:, None] @ r.flatten(1, 2)).squeeze(1)
            slope = torch.addcmul(r, r, r, value=-1.0).mul_(ds[..., None])
            dq[images], dk[images] = slope.sum(2), slope.sum(1)
    r_buffer, slope_buffer = tiles.buffer(), tiles.buffer()
    for b in range(0 if tiles.small else batch):
        for rows in tiles.chunks():
            d_out = grad_out[b, rows].to(dtype)
            shift = lse.new_zeros(len(d_out), 1) if grad_lse is None else grad_lse[b, rows, None]
            if value is not None:
                shift = shift - (d_out * out[b, rows].to(dtype)).sum(-1, keepdim=True)
                d_scores = d_out @ value[b % value.shape[0]].to(dtype).t()
                weights = torch.empty_like(d_scores)
            else:
                d_scores = tiles.hide(d_out, b, 0.0)
                weights = None
            for part, keys in tiles.inside(rows):
                at = _within(part, rows)
                ds = d_scores[at, keys]
                r = tiles.sigmoid(b, part, keys, r_buffer)
                if weights is not None:
                    p = weights[at, keys] = tiles.scores(b, r, keys).sub_(finite[b, part, None]).exp_()
                    ds = (ds + shift[at]).mul_(p)
                elif grad_lse is not None:
                    p = tiles.scores(b, r, keys).sub_(finite[b, part, None]).exp_()
                    ds = torch.addcmul(ds, p, shift[at])
                # Σ ds·tanh = Σ ds − 2 Σ ds·r
                dw[b] += ds.sum() - 2 * torch.mv(r.view(-1, r.shape[-1]).t(), ds.reshape(-1))
                slope = torch.addcmul(r, r, r, value=-1.0, out=slope_buffer[: r.numel()].view_as(r))
                # Sums of a product in cache: the batched products of thin matrices take twice the time.
                slope.mul_(ds[..., None])
                dq[b, part] += slope.sum(1)
                dk[b, keys] += slope.sum(0)
            if dvalue is not None and weights is not None:
                dvalue[b].addmm_(weights.t(), d_out)
    dq.mul_(4 * w.to(dtype)[:, None])
    dk.mul_(4 * w.to(dtype)[:, None])
    return [dq, dk, dw, dvalue]


class _Tiles:
    """Walks the queries × keys rectangle and computes what both passes need of a tile."""

    def __init__(self, a: Arguments, dtype: torch.dtype) -> None:
        q, k, w, _, key_mask = a
        self.queries, self.keys, self.width = q.shape[1], k.shape[1], q.shape[2]
        self.q, self.k = (x.to(dtype).mul(-2.0).expand(q.shape[0], -1, -1) for x in (q, k))
        self.w = w.to(dtype).expand(q.shape[0], -1)
        self.total = self.w.sum(-1)
        self.hidden = None if key_mask is None else ~key_mask.expand(q.shape[0], -1)
        pairs = max(1, TILE // max(1, self.width))
        # Square where both sides are long: each query and key is then read, and its gradient added to, least often.
        self.tile_keys = max(1, min(self.keys, max(math.isqrt(pairs), pairs // max(1, self.queries))))
        self.tile_rows = max(1, min(self.queries, pairs // self.tile_keys))

        # Several entries of the batch share a tile where one would leave most of it empty.
        self.entry = max(1, self.queries * self.keys * self.width)
        self.small = 2 * self.entry <= TILE

    def groups(self) -> Iterator[slice]:
        """Spans of the batch whose rectangles fill a tile together."""
        return _spans(0, len(self.q), max(1, TILE // self.entry))

    def sigmoid_of_group(self, images: slice) -> Tensor:
        """r (images, queries, keys, D)."""
        return (self.q[images, :, None] + self.k[images, None]).sigmoid_()

    def scores_of_group(self, images: slice, r: Tensor) -> Tensor:
        s = (r.flatten(1, 2) @ self.w[images, :, None]).view(r.shape[:3])
        s = s.mul_(-2.0).add_(self.total[images, None, None])
        return s if self.hidden is None else s.masked_fill_(self.hidden[images, None], -math.inf)

    def buffer(self) -> Tensor:
        return self.q.new_empty(self.tile_rows * self.tile_keys * self.width)

    def chunks(self) -> Iterator[slice]:
        """Spans of queries whose scores are held together."""
        step = max(self.tile_rows, CHUNK_SCORES // max(1, self.keys))
        return _spans(0, self.queries, step)

    def inside(self, rows: slice) -> Iterator[tuple[slice, slice]]:
        for part in _spans(rows.start, rows.stop, self.tile_rows):
            for keys in _spans(0, self.keys, self.tile_keys):
                yield part, keys

    def sigmoid(self, b: int, rows: slice, keys: slice, buffer: Tensor) -> Tensor:
        """r (rows, keys, D) in ``buffer``."""
        shape = (rows.stop - rows.start, keys.stop - keys.start, self.width)
        r = buffer[: math.prod(shape)].view(shape)
        return torch.add(self.q[b, rows, None], self.k[b, None, keys], out=r).sigmoid_()

    def scores(self, b: int, r: Tensor, keys: slice) -> Tensor:
        s = torch.mv(r.view(-1, self.width), self.w[b]).mul_(-2.0).add_(self.total[b]).view(r.shape[:2])
        return s if self.hidden is None else s.masked_fill_(self.hidden[b, keys], -math.inf)

    def hide(self, scores: Tensor, b: int, fill: float) -> Tensor:
        return scores if self.hidden is None else scores.masked_fill(self.hidden[b], fill)


def _spans(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, stop)) for i in range(start, stop, step))


def _entries(x: Tensor, images: slice) -> Tensor:
    """Entries of the batch; under vmap x may have a single one for all."""
    return x if len(x) == 1 else x[images]


def _within(part: slice, rows: slice) -> slice:
    return slice(part.start - rows.start, part.stop - rows.start)


additive_attention = ADDITIVE_ATTENTION.register("torch", forward, backward, exported=reference)
