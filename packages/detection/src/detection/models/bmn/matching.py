"""Boundary matching: features of every pair of a start and an end, without a mask of all of them.

The published layer multiplies features (B, C, T) with a dense mask (T, N·T·T), which holds for each pair N bins of a
few interpolated samples, and then folds bins and channels with a convolution. Both are linear, so they change places
here: channels are folded first, at T steps and not at T·T pairs, and each pair then gathers the few steps that its bins
touch (some 95 of N·T at the published size). Neither the mask nor the sampled features exist; pairs whose end is before
their start are not computed. Checked in: ``models/bmn/test_matching.py`` against the dense mask.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Bags(NamedTuple):
    """Which rows of a table each bag sums, and with which weights: entries of bag i from ``starts[i]`` on."""

    rows: Tensor
    weights: Tensor
    starts: Tensor


class Plan(NamedTuple):
    """Bags of pairs over (step, bin) and, for the gradient, of (step, bin) over pairs; start and end of each pair."""

    pairs: Bags
    steps: Bags
    start: Tensor
    end: Tensor


def sample_positions(steps: int, bins: int, per_bin: int, ratio: float) -> Float[Tensor, "T N"]:
    """Where a pair of each length is sampled, in steps from its start, all bins side by side.

    A pair that holds L steps is widened by ratio·(L + 1) on both sides and sampled at even distances, ends included.
    """
    length = torch.arange(1, steps + 1, dtype=torch.float64)[:, None]
    margin = ratio * (length + 1)
    between = max(bins * per_bin - 1, 1)
    return torch.arange(bins * per_bin) * ((length + 2 * margin) / between) - margin


@functools.lru_cache(8)
def plan_matching(
    steps: int, bins: int, per_bin: int, ratio: float, longest: int, dtype: torch.dtype, device: torch.device
) -> Plan:
    """The bags of all pairs of up to ``longest`` steps, counted start by start."""
    start, end = torch.triu_indices(steps, steps)
    kept = end - start < longest
    start, end = start[kept], end[kept]
    places = sample_positions(steps, bins, per_bin, ratio)[end - start] + start[:, None]
    places = places.masked_fill((places > -1) & (places < 0), 0)  # as published: they read the first step alone
    low = places.floor()
    share = places - low
    pair = torch.arange(len(start))[:, None].expand_as(places)
    number = torch.arange(bins).repeat_interleave(per_bin).expand_as(places)
    step = torch.stack([low, low + 1]).long().flatten()
    weight = torch.stack([1 - share, share]).flatten() / per_bin
    inside = (step >= 0) & (step < steps) & (weight > 0)
    row = step * bins + number.repeat(2, 1).flatten()
    key = (pair.repeat(2, 1).flatten() * (steps * bins) + row)[inside]
    key, where = key.unique(return_inverse=True)
    weight = torch.zeros(len(key), dtype=torch.float64).index_add_(0, where, weight[inside])
    pair, row = key // (steps * bins), key % (steps * bins)
    order = (row * len(start) + pair).argsort()

    def bags(owner: Tensor, rows: Tensor, weights: Tensor, count: int) -> Bags:
        starts = torch.searchsorted(owner, torch.arange(count))
        return Bags(rows.int().to(device), weights.to(device, dtype), starts.int().to(device))

    return Plan(
        bags(pair, row, weight, len(start)),
        bags(row[order], pair[order], weight[order], steps * bins),
        start.to(device),
        end.to(device),
    )


class _Gather(torch.autograd.Function):
    """(B, R, C) rows → (B, P, C) bags. Linear, so it keeps nothing but the plan."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, forth: Bags, back: Bags) -> Tensor:
        ctx.forth, ctx.back = forth, back
        found = table.new_empty(len(table), len(forth.starts), table.shape[2])
        for own, rows in zip(found, table, strict=True):
            own.copy_(
                F.embedding_bag(forth.rows, rows, forth.starts, mode="sum", per_sample_weights=forth.weights)
                if len(forth.rows)
                else torch.zeros_like(own)
            )
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Gather.apply(grads[0].contiguous(), ctx.back, ctx.forth), None, None  # pyright: ignore[reportReturnType]


class BoundaryMatching(nn.Module):
    """Boundary matching and the convolution over its bins, together: (B, C, T) → (B, P, O), one row for each pair.

    Args:
        channels, out_channels: C and O.
        steps: T.
        bins, per_bin: bins of a pair, and samples that each averages.
        ratio: by how much of its length plus one a pair is widened on either side.
        longest: most steps of a pair; None allows all.

    Attributes:
        weight: (N, O, C), the published convolution's with its bins first, so that no step copies it. bias: (O,).

    Raises: ValueError for sizes below 1, a negative ratio, a longest pair that does not fit; for features of another
        shape.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        steps: int = 100,
        *,
        bins: int = 32,
        per_bin: int = 3,
        ratio: float = 0.5,
        longest: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "out_channels": out_channels, "steps": steps, "bins": bins, "per_bin": per_bin}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"BoundaryMatching: {name} must be at least 1, got {name}={value}")
        if not 0 <= ratio < math.inf:
            raise ValueError(f"BoundaryMatching: ratio must be at least 0, got ratio={ratio}")
        longest = steps if longest is None else longest
        if not 1 <= longest <= steps:
            raise ValueError(f"BoundaryMatching: longest must be 1…{steps}, the steps, got longest={longest}")
        self.channels, self.steps, self.longest = channels, steps, longest
        self.sampling = (bins, per_bin, float(ratio))
        self.weight = nn.Parameter(torch.empty(bins, out_channels, channels))
        self.bias = nn.Parameter(torch.empty(out_channels))
        bound = (channels * bins) ** -0.5  # as torch's convolutions begin
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def plan(self, dtype: torch.dtype, device: torch.device) -> Plan:
        """The bags of this layer, shared by all layers of its sizes."""
        return plan_matching(self.steps, *self.sampling, self.longest, dtype, device)

    def forward(self, x: Float[Tensor, "B C T"]) -> Float[Tensor, "B P O"]:
        """A vector for each pair, in the order of `plan`."""
        if x.ndim != 3 or x.shape[1:] != (self.channels, self.steps):
            raise ValueError(
                f"BoundaryMatching: features must be (B, {self.channels}, {self.steps}), got {tuple(x.shape)}"
            )
        bins = self.sampling[0]
        folded = F.linear(x.mT, self.weight.flatten(0, 1)).view(len(x), self.steps * bins, self.weight.shape[1])
        wide = torch.promote_types(folded.dtype, torch.float32)  # bags are summed in no less
        plan = self.plan(wide, x.device)
        if torch.compiler.is_compiling():  # graphs know no bags: the same sums as a product
            found = _matrix(plan, self.steps * bins) @ folded.to(wide)
        else:
            found = _Gather.apply(folded.to(wide), plan.pairs, plan.steps)
        return (found + self.bias).to(folded.dtype)  # pyright: ignore[reportOperatorIssue]

    def sample(self, x: Float[Tensor, "B C T"]) -> Float[Tensor, "B C N P"]:
        """What the published layer samples, before its convolution; for those who want to look at it."""
        bins = self.sampling[0]
        plan = self.plan(x.dtype, x.device)
        owner = torch.repeat_interleave(
            torch.arange(len(plan.start), device=x.device),
            torch.diff(plan.pairs.starts, append=plan.pairs.starts.new_tensor([len(plan.pairs.rows)])),
        )
        step, number = plan.pairs.rows.long() // bins, plan.pairs.rows.long() % bins
        found = x.new_zeros(*x.shape[:2], bins * len(plan.start))
        found.index_add_(2, number * len(plan.start) + owner, x[..., step] * plan.pairs.weights)
        return found.unflatten(2, (bins, -1))


def _matrix(plan: Plan, rows: int) -> Float[Tensor, "P R"]:
    """The bags as a dense matrix."""
    lengths = torch.diff(plan.pairs.starts, append=plan.pairs.starts.new_tensor([len(plan.pairs.rows)]))
    owner = torch.repeat_interleave(
        torch.arange(len(plan.start), device=lengths.device), lengths, output_size=len(plan.pairs.rows)
    )
    found = plan.pairs.weights.new_zeros(len(plan.start) * rows)
    return found.index_put((owner * rows + plan.pairs.rows,), plan.pairs.weights).view(-1, rows)
