"""Gaussian adaptive attention: features weigh themselves by Gaussians around the mean of an axis.

Paper: Ioannides, Chadha and Elkins, Gaussian Adaptive Attention is All You Need: Robust Contextual Representations
Across Multiple Modalities, arXiv 2401.11143. Official: gioannides/Gaussian-Adaptive-Attention,
``gaussian_adaptive_attention/GaussianBlock.py``, Apache-2.0.

Same: heads are chunks **along the axis** (the last takes the rest), the Gaussians of a head are **multiplied** (the
paper writes of a mixture), the variance is unbiased, a block adds its input. Differs: in log space, where the product
is a parabola however many Gaussians there are and the division by the sum a softmax, so nothing under- or overflows
(the official weights become 0 for narrow Gaussians); a chunk of one place has variance 0, not NaN; padding is left out
of the statistics by ``mask``, where the official one counts it as zeros (``padding_value``).

**Along time it is not causal**: mean and variance see what comes. ``causal=True`` refuses every axis but the last, that
of the features, along which a token weighs itself alone.
Numbers are checked in ``test_gaussian_attention.py``.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import initialization as init

LEAST = 1e-12  # squared width of a Gaussian: beyond it 1/c² leaves float32


class GaussianAttention(nn.Module):
    """The input times weights that sum to 1 in each chunk of an axis.

    Args:
        num_heads: chunks of the axis, each with Gaussians of its own; at most its length.
        num_gaussians: Gaussians of a head.
        axis: officially ``norm_axis``.
        padding_value: numbers equal to it pass as they are, and count as zeros in mean and variance (officially so).
        causal: whether the layer stands in a causal model, where the axis must be the last.

    Shapes: any → the same.

    Raises:
        ValueError: numbers below 1; another axis than the last with ``causal``.
    """

    def __init__(
        self,
        num_heads: int,
        num_gaussians: int,
        *,
        axis: int = -1,
        padding_value: float | None = None,
        eps: float = 1e-8,
        causal: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("num_heads", num_heads), ("num_gaussians", num_gaussians)):
            if value < 1:
                raise ValueError(f"GaussianAttention: {name} must be at least 1, got {name}={value}")
        if causal and axis != -1:
            raise ValueError(
                f"GaussianAttention: axis must be -1 (features) in a causal model, got axis={axis}: the mean of any "
                "other sees later tokens"
            )
        self.num_heads, self.axis, self.padding_value, self.eps = num_heads, axis, padding_value, eps
        self.mean_offsets = nn.Parameter(torch.empty(num_heads, num_gaussians))
        self.c = nn.Parameter(torch.empty(num_heads, num_gaussians))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Offsets 0, widths exp of standard normal numbers."""
        init.zeros_(self.mean_offsets)
        init.normal_(self.c)
        init.copy_(self.c, self.c.exp())

    def forward(self, x: Tensor, mask: Bool[Tensor, "*shape"] | None = None) -> Tensor:
        """x times :meth:`weights`; what is masked, or equal to ``padding_value``, stays as it is."""
        kept = self._kept(x, mask)
        out = x * self.weights(x, mask)
        return out if kept is None else torch.where(kept, out, x)

    def _kept(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        if mask is not None:
            return mask.expand_as(x)
        return None if self.padding_value is None else x != self.padding_value

    def weights(self, x: Tensor, mask: Bool[Tensor, "*shape"] | None = None) -> Tensor:
        """Weights of the numbers of x, in its dtype.

        Args:
            mask: False for padding, which is in no mean, variance or sum and has weight 0; broadcast to x.

        Raises:
            ValueError: x has no such axis, or fewer places along it than heads.
        """
        if not -x.ndim <= self.axis < x.ndim or x.shape[self.axis] < self.num_heads:
            raise ValueError(
                f"GaussianAttention: axis {self.axis} must have at least num_heads={self.num_heads} places, "
                f"got {tuple(x.shape)}"
            )
        exact = x if x.dtype == torch.float64 else x.float()
        along, kept = exact.movedim(self.axis, -1), self._kept(x, mask)
        kept = None if kept is None else kept.movedim(self.axis, -1)
        size = along.shape[-1] // self.num_heads
        sizes = [size] * (self.num_heads - 1) + [along.shape[-1] - size * (self.num_heads - 1)]
        if len(set(sizes)) == 1:  # one pass for all heads
            parts = [self._of_heads(*(self._split(t) for t in (along, kept)), mask is not None, slice(None))]  # pyright: ignore[reportCallIssue]
        else:
            holes = [None] * len(sizes) if kept is None else kept.split(sizes, -1)
            parts = [
                self._of_heads(part[..., None, :], None if hole is None else hole[..., None, :], mask is not None,
                               slice(head, head + 1))
                for head, (part, hole) in enumerate(zip(along.split(sizes, -1), holes, strict=True))
            ]  # fmt: skip
        return torch.cat([part.flatten(-2) for part in parts], -1).movedim(-1, self.axis).to(x.dtype)

    def _split(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.unflatten(-1, (self.num_heads, -1))

    def _of_heads(self, x: Tensor, kept: Tensor | None, left_out: bool, heads: slice) -> Tensor:
        """(…, heads, L) → weights: log Π_g exp(−(u − δ_g/σ)²/2c_g²) is −a·u² + b·u/σ for u = (x − μ)/σ."""
        precision = 1 / self.c[heads].to(x.dtype).square().clamp(min=LEAST)
        a = precision.sum(-1, keepdim=True) / 2
        b = (precision * self.mean_offsets[heads].to(x.dtype)).sum(-1, keepdim=True)
        seen = x if kept is None else x.masked_fill(~kept, 0)
        if left_out and kept is not None:
            count = kept.sum(-1, keepdim=True)
            mean = seen.sum(-1, keepdim=True) / count.clamp(min=1)
            squares = (seen - mean).masked_fill(~kept, 0).square().sum(-1, keepdim=True)
            variance = squares / (count - 1).clamp(min=1)
        else:
            mean = seen.mean(-1, keepdim=True)
            variance = (seen - mean).square().sum(-1, keepdim=True) / max(1, x.shape[-1] - 1)
        inverse = (variance + self.eps).rsqrt()
        u = (x - mean) * inverse
        logits = u * (b * inverse - a * u)
        if not left_out or kept is None:
            return logits.softmax(-1)
        # A chunk of padding alone has finite logits and then weights of 0.
        hidden = logits.masked_fill(~kept & kept.any(-1, keepdim=True), -torch.inf)
        return hidden.softmax(-1).masked_fill(~kept, 0)


class GaussianBlock(nn.Module):
    """Layers of :class:`GaussianAttention`, each with its input added.

    Args:
        num_heads, num_gaussians, axes: of each layer, the numbers of all lists alike.

    Shapes: any → the same.

    Raises:
        ValueError: lists of unequal lengths, and what a layer refuses.
    """

    def __init__(
        self,
        num_heads: Sequence[int],
        num_gaussians: Sequence[int],
        axes: Sequence[int],
        *,
        padding_value: float | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        if len({len(num_heads), len(num_gaussians), len(axes)}) != 1:
            raise ValueError(
                "GaussianBlock: num_heads, num_gaussians and axes must have one number for each layer, "
                f"got {len(num_heads)}, {len(num_gaussians)} and {len(axes)}"
            )
        self.layers = nn.ModuleList(
            [
                GaussianAttention(heads, gaussians, axis=axis, padding_value=padding_value, causal=causal)
                for heads, gaussians, axis in zip(num_heads, num_gaussians, axes, strict=True)
            ]
        )

    def forward(self, x: Tensor, mask: Bool[Tensor, "*shape"] | None = None) -> Tensor:
        """Each layer's result plus its input; padding is doubled with every layer, as officially."""
        for layer in self.layers:
            x = layer(x, mask) + x
        return x

    def load_official(self, state: Mapping[str, Tensor]) -> "GaussianBlock":
        """Copy a state dict of the official block, whose heads have parameters of their own.

        Raises:
            KeyError: a name is missing.
        """
        with torch.no_grad():
            for number, layer in enumerate(self.layers):
                for name in ("mean_offsets", "c"):
                    heads = range(layer.num_heads)  # pyright: ignore[reportArgumentType]
                    rows = [state[f"layers.{number}.attention_heads.{head}.{name}"] for head in heads]
                    getattr(layer, name).copy_(torch.stack(rows))
        return self


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
