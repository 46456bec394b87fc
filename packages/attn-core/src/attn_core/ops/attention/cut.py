"""Attention whose queries see ranges of keys (packed sequences, windows) as calls on parts in which they see all.

Sequences are calls of their own. A window is cut into blocks of queries with the keys that any of them sees, and a
dense mask of the few that some of them do not. Memory beyond the results: that of one part.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attn_core.kernels.registration import Grads

from .chunked import chunk_rows, slice_rows
from .cpu_flash import empty_result
from .reference import Arguments, key_ranges

# Queries of a block: the wider the window, the less a wide block computes in vain beside it.
FEWEST_ROWS, MOST_ROWS = 64, 256

Forward = Callable[[Arguments], tuple[Tensor, Tensor]]
Backward = Callable[[Grads, tuple[Tensor, ...], Arguments, Sequence[bool]], list[Tensor | None]]


class Part(NamedTuple):
    """Queries ``rows`` and keys ``keys``; of these pairs causality hides some, or those where ``seen`` is False.

    seen: (1|B, rows, keys).
    """

    rows: slice
    keys: slice
    causal: str = "none"
    seen: Tensor | None = None

    def of(self, a: Arguments) -> Arguments:
        """The arguments of this part alone; what ``seen`` hides is −inf in the bias."""
        bias = None if a.bias is None else block(a.bias, self.rows, self.keys)
        if self.seen is not None:
            hidden = torch.zeros(self.seen.shape, dtype=a.q.dtype, device=a.q.device)
            hidden = hidden.masked_fill_(~self.seen, -torch.inf)[:, None]
            bias = hidden if bias is None else bias + hidden
        return a._replace(
            q=a.q[:, :, self.rows],
            k=a.k[:, :, self.keys],
            v=a.v[:, :, self.keys],
            bias=bias,
            key_mask=None if a.key_mask is None else columns(a.key_mask, self.keys),
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            axis_bias=[table[:, :, self.rows] for table in a.axis_bias],
            causal=self.causal,
            window_size=(),
        )


def parts(a: Arguments) -> Iterator[Part]:
    """All pairs of a query and a key that it sees, each in one part."""
    sequences = _sequences(a)
    if a.axis_bias or sequences is None:  # a grid has no ranges of keys
        yield from _rows_of_all(a)
        return
    for rows, own in sequences:
        n, m = rows.stop - rows.start, own.stop - own.start
        if not n or not m:
            continue
        if not a.window_size:
            yield Part(rows, own, a.causal)
            continue
        for part in _blocks(n, m, a):
            yield part._replace(rows=_moved(part.rows, rows.start), keys=_moved(part.keys, own.start))


def _sequences(a: Arguments) -> list[tuple[slice, slice]] | None:
    """Rows and keys of each; None where images differ, which only ``vmap`` brings about."""
    if a.cu_seqlens_q is None or a.cu_seqlens_k is None:
        return [(slice(0, a.q.shape[2]), slice(0, a.k.shape[2]))]
    ends = [x.tolist() for x in (a.cu_seqlens_q, a.cu_seqlens_k)]
    if any(other != own[0] for own in ends for other in own):
        return None
    spans = [[slice(*pair) for pair in zip(own[0], own[0][1:], strict=False)] for own in ends]
    return list(zip(*spans, strict=True))


def _blocks(queries: int, keys: int, a: Arguments) -> Iterator[Part]:
    """Blocks of one sequence with a window."""
    left, right = a.window_size
    right = 0 if a.causal != "none" else right
    offset = 0 if a.causal == "upper_left" else keys - queries
    if left < 0 or right < 0:
        size = chunk_rows(a.q.shape[0], a.q.shape[1], keys)
    else:
        size = left + right + 1
    size = min(max(size, FEWEST_ROWS), MOST_ROWS)
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        low = 0 if left < 0 else max(0, start + offset - left)
        high = keys if right < 0 else min(keys, stop + offset + right)
        if low >= high:
            continue
        diagonal = torch.arange(start + offset, stop + offset, device=a.q.device)[:, None]
        j = torch.arange(low, high, device=a.q.device)
        seen = torch.ones(stop - start, high - low, dtype=torch.bool, device=a.q.device)
        if left >= 0:
            seen &= j >= diagonal - left
        if right >= 0:
            seen &= j <= diagonal + right
        yield Part(slice(start, stop), slice(low, high), "none", seen[None])


def _rows_of_all(a: Arguments) -> Iterator[Part]:
    """Chunks of queries beside all keys, by their ranges."""
    first, end = key_ranges(a)
    keys = a.k.shape[2]
    j = torch.arange(keys, device=a.q.device)
    step = chunk_rows(a.q.shape[0], a.q.shape[1], keys)
    for start in range(0, a.q.shape[2], step):
        rows = slice(start, min(start + step, a.q.shape[2]))
        yield Part(rows, slice(0, keys), "none", (first[:, rows, None] <= j) & (j < end[:, rows, None]))


def cut_forward(a: Arguments, forward: Forward) -> tuple[Tensor, Tensor]:
    """``forward`` of every part; queries that are in none see no key."""
    out, lse = empty_result(a.q, a.v)
    for part in parts(a):
        out[:, :, part.rows], lse[:, :, part.rows] = forward(part.of(a))
    return out, lse


def cut_backward(
    grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool], backward: Backward
) -> list[Tensor | None]:
    """``backward`` of every part, summed in the accumulation dtype."""
    (grad_out, grad_lse), (out, lse) = grads, kept
    assert grad_out is not None
    dtype = a.accumulator
    totals = [None if x is None else torch.zeros_like(x, dtype=dtype) for x in (*a[:4], *a.axis_bias)]
    if not needs[3]:
        totals[3] = None
    dq, dk, dv, dbias, *tables = totals
    for part in parts(a):
        own, rows = part.of(a), part.rows
        incoming = grad_out[:, :, rows], None if grad_lse is None else grad_lse[:, :, rows]
        found = backward(incoming, (out[:, :, rows], lse[:, :, rows]), own, needs)
        targets = [slice_rows(dq, rows), dk[:, :, part.keys], dv[:, :, part.keys]]  # pyright: ignore[reportArgumentType, reportOptionalSubscript]
        targets += [None if dbias is None else block(dbias, rows, part.keys)]
        targets += [None if table is None else table[:, :, rows] for table in tables]
        for target, gradient in zip(targets, found, strict=True):
            if target is not None and gradient is not None:
                target += gradient.sum_to_size(target.shape)
    return totals


def block(x: Tensor, rows: slice, keys: slice) -> Tensor:
    """Entries of x (…, N|1, M|1)."""
    return columns(slice_rows(x, rows), keys)


def columns(x: Tensor, keys: slice) -> Tensor:
    """Entries of x (…, M|1)."""
    return x if x.shape[-1] == 1 else x[..., keys]


def _moved(part: slice, start: int) -> slice:
    return slice(part.start + start, part.stop + start)
