"""The equation of :func:`attn_core.neighborhood_values` with gathered windows, and the arguments of its backends."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attn_core.kernels.registration import Definition, token_major
from attn_core.ops.neighborhood_scores.reference import wide
from attn_core.ops.neighborhood_scores.slots import Windows, all_slots, windows


class Arguments(NamedTuple):
    """p (B, H, N, S), v (B, H, N, D) with the cells of the grid row-major; one rule for each axis."""

    p: Tensor
    v: Tensor
    grid: Sequence[int]
    kernel_size: Sequence[int]
    dilation: Sequence[int]
    is_causal: Sequence[bool]
    border: str

    def windows(self) -> Windows:
        """The rules alone."""
        return windows(self.grid, self.kernel_size, self.dilation, self.is_causal, self.border)


def reference(a: Arguments) -> Tensor:
    """o_i = Σ_t p_it v_j(i,t) over the slots that hold a key."""
    dtype = wide(a.v.dtype)
    key, held, _ = (x.to(a.p.device) for x in all_slots(a.windows()))
    p = a.p.to(dtype).masked_fill(~held, 0.0)
    return torch.einsum("bhit,bhitd->bhid", p, a.v.to(dtype)[:, :, key]).to(a.v.dtype)


def fake(a: Arguments) -> Tensor:
    """Uninitialized sums (B, H, N, D), (B, N, H, D) in memory."""
    batch, heads, cells, _ = a.p.shape
    return token_major(a.v, batch, heads, cells, a.v.shape[3])


NEIGHBORHOOD_VALUES = Definition(
    "neighborhood_values",
    Arguments,
    fake,
    reference,
    differentiable=("p", "v"),
    token_major_gradients=("v",),
    keeps_outputs=False,
)
