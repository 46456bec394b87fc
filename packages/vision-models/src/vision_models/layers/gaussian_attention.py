"""GAAM: weights from Gaussians around the mean of an axis, computed in log space.

Paper: Ioannides, Chadha, Elkins, Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across
Multiple Modalities, arXiv 2401.11143. Official code: gioannides/Gaussian-Adaptive-Attention,
``gaussian_adaptive_attention/GaussianBlock.py``.

The same: every number where the official code does not underflow, with its weights through :func:`from_official`:
heads are chunks *along the normalized axis* (the last takes the rest), the Gaussians are multiplied and not added, the
variance is unbiased, and a masked place passes unweighted but counts as zero in mean and variance and as itself in the
sum of weights.

What differs: a product of Gaussians of one variable is a Gaussian, so its logarithm is one parabola in x however many
there are, and dividing by the sum is a softmax. Nothing under- or overflows: where the official weights are all 0
(narrow Gaussians) ours still sum to 1. Chunks of one place, NaN there for want of a second, get the weight 1. The
official ``eps`` lands in the unused argument of another name; here it is that of the variance.
``masked_statistics=True`` leaves masked places out of mean, variance and sum.

Numbers are checked in ``tests/layers/test_gaussian_attention.py`` against loops over heads and Gaussians.
Any shape → same.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from attn_core.catalog import Card, Entry

NARROWEST = 1e-12  # squared width of a Gaussian: beyond it 1/c² leaves float32


class GaussianAttention(nn.Module):
    """The input times its weights, which sum to 1 in each head. Any shape → same.

    Args:
        axis: along which heads, statistics and weights are.
        num_heads: chunks of that axis; at most its length.
        num_gaussians: in the product of each head.
        padding_value: elements equal to it pass as they are; None masks nothing.
        masked_statistics: leave them out of mean, variance and sum, too; the official code does not.
        eps: added to the variance.

    Raises: ValueError: numbers that are not positive; at the call, an axis that is not there or too short.
    """

    def __init__(
        self,
        axis: int = 1,
        num_heads: int = 4,
        num_gaussians: int = 2,
        *,
        padding_value: float | None = None,
        masked_statistics: bool = False,
        eps: float = 1e-8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, given in (("num_heads", num_heads), ("num_gaussians", num_gaussians)):
            if given < 1:
                raise ValueError(f"GaussianAttention: {name} must be positive, got {name}={given}")
        self.axis = axis
        self.num_heads = num_heads
        self.padding_value = padding_value
        self.masked_statistics = masked_statistics
        self.eps = eps
        self.mean_offsets = nn.Parameter(torch.zeros(num_heads, num_gaussians, **dd))
        self.c = nn.Parameter(torch.randn(num_heads, num_gaussians, **dd).exp())

    def forward(self, x: Tensor) -> Tensor:
        """Any shape → same."""
        weights = self.weights(x)
        out = x * weights.to(x.dtype)
        return out if self.padding_value is None else torch.where(x != self.padding_value, out, x)

    def weights(self, x: Tensor) -> Tensor:
        """What each element is multiplied by, of the shape of ``x``; float32 at least."""
        if not -x.ndim <= self.axis < x.ndim:
            raise ValueError(f"GaussianAttention: there is no axis={self.axis} in an input of shape {tuple(x.shape)}")
        x = x.movedim(self.axis, -1)
        length = x.shape[-1] // self.num_heads
        if length == 0:
            raise ValueError(f"GaussianAttention: num_heads={self.num_heads} exceeds the {x.shape[-1]} places of axis "
                             f"{self.axis}; use num_heads<={x.shape[-1]}")  # fmt: skip
        equal = self.num_heads if x.shape[-1] % self.num_heads == 0 else self.num_heads - 1
        chunks = [self._of_heads(x[..., : equal * length].unflatten(-1, (equal, length)), slice(equal))]
        if equal < self.num_heads:  # the last head is longer
            chunks.append(self._of_heads(x[..., None, equal * length :], slice(equal, None)))
        return torch.cat([chunk.flatten(-2) for chunk in chunks], -1).movedim(-1, self.axis)

    def _of_heads(self, x: Tensor, heads: slice) -> Tensor:
        """Chunks (…, heads, L) → weights along L: log Π exp(−(u − δ/σ)²/2c²) = −a·u² + b·u/σ, u = (x − μ)/σ."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        precision = self.c[heads].to(dtype).square().clamp(min=NARROWEST).reciprocal()
        a = precision.sum(1, keepdim=True) / 2
        b = (precision * self.mean_offsets[heads].to(dtype)).sum(1, keepdim=True)
        kept = None if self.padding_value is None else x != self.padding_value
        x = x.to(dtype)
        mean, variance = self._moments(x, kept)
        inverse = (variance + self.eps).rsqrt()
        u = (x - mean) * inverse
        logits = u * (b * inverse - a * u)
        if kept is not None and self.masked_statistics:
            # a chunk without any place to weigh: its places pass as they are, whatever the weights
            logits = logits.masked_fill(~kept & kept.any(-1, keepdim=True), -torch.inf)
        return logits.softmax(-1)

    def _moments(self, x: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance along the last axis; of one place the variance is 0."""
        if kept is None:
            return x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=min(1, x.shape[-1] - 1))
        x = torch.where(kept, x, 0)
        if not self.masked_statistics:
            return x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=min(1, x.shape[-1] - 1))
        count = kept.sum(-1, keepdim=True)
        mean = x.sum(-1, keepdim=True) / count.clamp(min=1)
        squares = torch.where(kept, x - mean, 0).square().sum(-1, keepdim=True)
        return mean, squares / (count - 1).clamp(min=1)


@register_notrace_module  # a leaf of FX graphs, as every module that is added to a network
class GaussianBlock(nn.Module):
    """Layers of Gaussian attention, each with a residual. Any shape → same.

    Args:
        axes, num_heads, num_gaussians: of each layer; a number counts for all layers.
        options: of :class:`GaussianAttention`.

    Raises: ValueError: lists of different lengths.
    """

    def __init__(
        self,
        axes: int | Sequence[int] = 1,
        num_heads: int | Sequence[int] = 4,
        num_gaussians: int | Sequence[int] = 2,
        *,
        padding_value: float | None = None,
        masked_statistics: bool = False,
        eps: float = 1e-8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        lists = [value for value in (axes, num_heads, num_gaussians) if not isinstance(value, int)]
        layers = len(lists[0]) if lists else 1
        if any(len(value) != layers for value in lists):
            raise ValueError(
                "GaussianBlock: axes, num_heads and num_gaussians must have an entry for each layer, got "
                f"axes={axes}, num_heads={num_heads}, num_gaussians={num_gaussians}"
            )
        self.layers = nn.ModuleList(
            GaussianAttention(
                *(value if isinstance(value, int) else value[i] for value in (axes, num_heads, num_gaussians)),
                padding_value=padding_value,
                masked_statistics=masked_statistics,
                eps=eps,
                **dd,
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Any shape → same."""
        for layer in self.layers:
            x = layer(x) + x
        return x


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official block's state dict under our names: ``layers.i.attention_heads.j.c`` are the rows of ``layers.i.c``.

    Raises: ValueError: another name.
    """
    heads: dict[str, dict[int, Tensor]] = {}
    for name, value in state.items():
        layer, found, rest = name.partition(".attention_heads.")
        head, _, parameter = rest.partition(".")
        if not found or not head.isdigit():
            raise ValueError(f"GaussianBlock.from_official: expected layers.i.attention_heads.j.<name>, got {name!r}")
        heads.setdefault(f"{layer}.{parameter}", {})[int(head)] = value
    return {name: torch.stack([rows[j] for j in sorted(rows)]) for name, rows in heads.items()}


class GAAM(GaussianBlock):
    """The block as a module for maps of any width; by default it weighs the channels of each place.

    Args:
        dim: channels, which its weights do not depend on.
        axes, num_heads, num_gaussians: as of the block.
    """

    def __init__(
        self,
        dim: int,  # noqa: ARG002  whoever adds a module to a network names it
        axes: int | Sequence[int] = 1,
        num_heads: int | Sequence[int] = 4,
        num_gaussians: int | Sequence[int] = 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(axes, num_heads, num_gaussians, device=device, dtype=dtype)


CARD = Card(
    family="GAAM",
    paper="2401.11143",
    code="https://github.com/gioannides/Gaussian-Adaptive-Attention",
    license="Apache-2.0",
    test="layers/test_gaussian_attention.py",
)
ENTRIES = [Entry("gaam", GAAM, CARD("Weights from products of Gaussians along an axis, with a residual"))]
