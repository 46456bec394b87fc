"""The equation of :func:`attn_core.deformable_attention`, one map and one corner at a time, and its arguments."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attn_core.kernels.registration import Definition


class Arguments(NamedTuple):
    """As the public function's; shapes are h and w of each map in turn. Under vmap an argument may have one entry."""

    value: Tensor
    locations: Tensor
    weights: Tensor
    depth: Tensor | None
    shapes: Sequence[int]

    def maps(self) -> list[tuple[int, int]]:
        """(h, w) of each map."""
        return list(zip(self.shapes[::2], self.shapes[1::2], strict=True))


def reference(a: Arguments) -> Tensor:
    """out = Σ_l Σ_p A · Σ_corners w_c · s_c · V_c;  s_c = depth of the corner's cell, linear in d (1 without depth)."""
    value, locations, weights, depth, _ = a
    V, A, X = value.to(locations.dtype), weights.to(locations.dtype), locations
    B, _, H, D = value.shape
    N = locations.shape[1]
    out = X.new_zeros(B, N, H, D)
    start = 0
    for level, (h, w) in enumerate(a.maps()):
        cells = slice(start, start + h * w)
        start += h * w
        x, y = X[:, :, :, level, :, 0] * w - 0.5, X[:, :, :, level, :, 1] * h - 0.5
        for corner_y in (0, 1):
            for corner_x in (0, 1):
                wy, row = _tap(y, corner_y, h)
                wx, column = _tap(x, corner_x, w)
                cell = row * w + column  # (B, N, H, P)
                sample = wy * wx * A[:, :, :, level]
                if depth is not None:
                    bins = _at(depth[:, cells].to(X.dtype), cell)
                    d = X[:, :, :, level, :, 2] * depth.shape[3] - 0.5
                    near, far = _tap(d, 0, depth.shape[3]), _tap(d, 1, depth.shape[3])
                    taps = [t * bins.gather(-1, z.unsqueeze(-1)).squeeze(-1) for t, z in (near, far)]
                    sample = sample * (taps[0] + taps[1])
                out = out + (sample.unsqueeze(-1) * _at(V[:, cells], cell)).sum(3)
    return out.flatten(2).to(value.dtype)


def _tap(position: Tensor, side: int, size: int) -> tuple[Tensor, Tensor]:
    """Linear weight and index of the cell before (0) or after (1) a position; outside cells weigh 0."""
    position = torch.where((position > -1) & (position < size), position, -2.0)
    before = position.detach().floor()
    index = before + side
    weight = position - before if side else 1 - (position - before)
    inside = (index >= 0) & (index < size)
    return weight * inside, torch.where(inside, index, 0).long()


def _at(maps: Tensor, cell: Tensor) -> Tensor:
    """maps (B, S, H, C) at cell (B, N, H, P): (B, N, H, P, C)."""
    B, N, H, P = cell.shape
    rows = cell.transpose(1, 2).flatten(2).unsqueeze(-1)
    picked = maps.transpose(1, 2).gather(2, rows.expand(B, H, N * P, maps.shape[3]))
    return picked.unflatten(2, (N, P)).transpose(1, 2)


def fake(a: Arguments) -> Tensor:
    """Uninitialized result (B, N, H·D)."""
    value = a.value
    return value.new_empty(value.shape[0], a.locations.shape[1], value.shape[2] * value.shape[3])


DEFORMABLE_ATTENTION = Definition(
    "deformable_attention",
    Arguments,
    fake,
    reference,
    differentiable=("value", "locations", "weights", "depth"),
    keeps_outputs=False,
)
