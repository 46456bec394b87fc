"""The equation of :func:`attn_core.neighborhood_scores` with gathered windows, and the arguments of its backends."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attn_core.kernels.registration import Definition

from .slots import Windows, all_slots, windows


class Arguments(NamedTuple):
    """q, k (B, H, N, D) with the cells of the grid row-major, rpb (1, H, …); one rule for each axis."""

    q: Tensor
    k: Tensor
    rpb: Tensor | None
    grid: Sequence[int]
    kernel_size: Sequence[int]
    dilation: Sequence[int]
    is_causal: Sequence[bool]
    border: str

    def windows(self) -> Windows:
        """The rules alone."""
        return windows(self.grid, self.kernel_size, self.dilation, self.is_causal, self.border)


def reference(a: Arguments) -> Tensor:
    """s_it = q_i·k_j(i,t) + rpb[(j − i)/dilation + kernel − 1]; −inf, or 0 with zero border, in empty slots."""
    dtype = wide(a.q.dtype)
    key, held, index = (x.to(a.q.device) for x in all_slots(a.windows()))
    s = torch.einsum("bhid,bhitd->bhit", a.q.to(dtype), a.k.to(dtype)[:, :, key])
    if a.rpb is not None:
        s = s + a.rpb.to(dtype).flatten(2)[..., index]
    return s.masked_fill(~held, empty_slot(a.border)).to(a.q.dtype)


def empty_slot(border: str) -> float:
    """What stands in a slot without a key."""
    return 0.0 if border == "zero" else -math.inf


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fake(a: Arguments) -> Tensor:
    """Uninitialized scores (B, H, N, S)."""
    return a.q.new_empty(*a.q.shape[:3], math.prod(a.kernel_size))


NEIGHBORHOOD_SCORES = Definition(
    "neighborhood_scores", Arguments, fake, reference, differentiable=("q", "k", "rpb"), keeps_outputs=False
)
