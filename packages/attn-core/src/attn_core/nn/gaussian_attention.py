"""Gaussian adaptive attention (GAAM): weights from Gaussians around the mean of an axis, computed in log space.

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
``masked_statistics=True``, and a ``mask`` given beside the input, leave masked places out of mean, variance and sum.

**Along time it is not causal**: mean and variance see what comes. ``causal=True`` refuses every axis but the last, that
of the features, along which a token weighs itself alone.

Numbers are checked in ``tests/nn/test_gaussian_attention.py`` against loops over heads and Gaussians.
Any shape → same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

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
        causal: whether it stands in a causal model, where the axis must be -1.

    Raises: ValueError: numbers that are not positive, another axis than -1 with ``causal``; at the call, an axis that
        is not there or too short.
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
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if causal and axis != -1:
            raise ValueError(
                f"GaussianAttention: axis must be -1 (features) in a causal model, got axis={axis}: the mean of any "
                "other sees later tokens"
            )
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

    def forward(self, x: Tensor, mask: Bool[Tensor, "..."] | None = None) -> Tensor:
        """Any shape → same; what is masked, or equal to ``padding_value``, passes as it is."""
        out, kept = x * self.weights(x, mask).to(x.dtype), self._kept(x, mask)
        return out if kept is None else torch.where(kept, out, x)

    def _kept(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        if mask is not None:
            return mask.expand_as(x)
        return None if self.padding_value is None else x != self.padding_value

    def weights(self, x: Tensor, mask: Bool[Tensor, "..."] | None = None) -> Tensor:
        """What each element is multiplied by, of the shape of ``x``; float32 at least.

        Args:
            mask: False for padding, which is in no mean, variance or sum and has the weight 0; broadcast to x. It
                stands in for ``padding_value``.
        """
        if not -x.ndim <= self.axis < x.ndim:
            raise ValueError(f"GaussianAttention: there is no axis={self.axis} in an input of shape {tuple(x.shape)}")
        kept = self._kept(x, mask)
        x, kept = x.movedim(self.axis, -1), None if kept is None else kept.movedim(self.axis, -1)
        length = x.shape[-1] // self.num_heads
        if length == 0:
            raise ValueError(f"GaussianAttention: num_heads={self.num_heads} exceeds the {x.shape[-1]} places of axis "
                             f"{self.axis}; use num_heads<={x.shape[-1]}")  # fmt: skip
        equal = self.num_heads if x.shape[-1] % self.num_heads == 0 else self.num_heads - 1
        left_out = self.masked_statistics or mask is not None

        def of_heads(first: int, last: int) -> Tensor:
            """Of neighboring heads with chunks of one length."""
            places = slice(first * length, last * length if last < self.num_heads else None)
            chunks, holes = (None if t is None else t[..., places].unflatten(-1, (last - first, -1)) for t in (x, kept))
            assert chunks is not None
            return self._of_heads(chunks, holes, left_out, slice(first, last)).flatten(-2)

        runs = [(0, equal), (equal, self.num_heads)]  # the last head may be longer
        return torch.cat([of_heads(*run) for run in runs if run[0] < run[1]], -1).movedim(-1, self.axis)

    def _of_heads(self, x: Tensor, kept: Tensor | None, left_out: bool, heads: slice) -> Tensor:
        """Chunks (…, heads, L) → weights along L: log Π exp(−(u − δ/σ)²/2c²) = −a·u² + b·u/σ, u = (x − μ)/σ."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        precision = self.c[heads].to(dtype).square().clamp(min=NARROWEST).reciprocal()
        a = precision.sum(1, keepdim=True) / 2
        b = (precision * self.mean_offsets[heads].to(dtype)).sum(1, keepdim=True)
        x = x.to(dtype)
        mean, variance = self._moments(x, kept, left_out)
        inverse = (variance + self.eps).rsqrt()
        u = (x - mean) * inverse
        logits = u * (b * inverse - a * u)
        if kept is None or not left_out:
            return logits.softmax(-1)
        # A chunk without any place to weigh has finite logits, and then the weights 0.
        hidden = logits.masked_fill(~kept & kept.any(-1, keepdim=True), -torch.inf)
        return hidden.softmax(-1).masked_fill(~kept, 0)

    @staticmethod
    def _moments(x: Tensor, kept: Tensor | None, left_out: bool) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance along the last axis; of one place the variance is 0."""
        if kept is not None:
            x = torch.where(kept, x, 0)
        if kept is None or not left_out:
            return x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=min(1, x.shape[-1] - 1))
        count = kept.sum(-1, keepdim=True)
        mean = x.sum(-1, keepdim=True) / count.clamp(min=1)
        squares = torch.where(kept, x - mean, 0).square().sum(-1, keepdim=True)
        return mean, squares / (count - 1).clamp(min=1)


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
        causal: bool = False,
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
                causal=causal,
                **dd,
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor, mask: Bool[Tensor, "..."] | None = None) -> Tensor:
        """Any shape → same; padding is doubled with every layer, as officially."""
        for layer in self.layers:
            x = layer(x, mask) + x
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


@torch.no_grad()
def importance_factor(layer: GaussianAttention, batches: Sequence[Tensor]) -> Float[Tensor, " L"]:
    """The paper's Importance Factor: weights of the places along the layer's axis, summed over all data, from 0 to 1.

    Args:
        batches: inputs of the layer, of any sizes but that of the axis.

    Raises:
        ValueError: no batches.
    """
    if len(batches) == 0:
        raise ValueError("importance_factor: batches must hold at least one input, got none")
    total = sum(layer.weights(x).double().movedim(layer.axis, -1).flatten(0, -2).sum(0) for x in batches)
    assert isinstance(total, Tensor)
    low, high = total.min(), total.max()
    return ((total - low) / (high - low).clamp(min=torch.finfo(torch.float64).tiny)).float()
