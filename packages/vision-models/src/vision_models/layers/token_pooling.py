"""TAP and ADL: tokens mixed with their neighborhood before attention, and a loss that keeps attention from one token.

Paper: Guo, Stutz, Schiele, Robustifying Token Attention for Vision Transformers, ICCV 2023, arXiv 2303.11126. Facts of
the official code (guoyongcs/TAPADL): a pooled token is a ninth of a sum of nine at the borders too, where zeros stand
outside; the loss thresholds the mean row of attention and each row at ``threshold``/N, and gives a pair without such
entries a similarity of 0. Its loss of a single image mixes up axes (``squeeze``); ours does not.
"""

# pyright: reportPrivateImportUsage=false
# (timm.models exports these names, though it lists none)

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ROWS = 128  # of attention that the loss holds at once


def dilated_mean(x: Tensor, dilation: int) -> Tensor:
    """A ninth of the sum of the 3×3 tokens ``dilation`` apart, zeros outside the map. (B, Y, X, C) → same."""
    near = F.pad(x, (0, 0, dilation, dilation, dilation, dilation))
    near = near[:, : -2 * dilation] + near[:, dilation:-dilation] + near[:, 2 * dilation :]
    return (near[:, :, : -2 * dilation] + near[:, :, dilation:-dilation] + near[:, :, 2 * dilation :]) / 9


@register_notrace_module  # or FX would find different graphs for training and evaluation
class TokenPooling(nn.Module):
    """Every token becomes a mix of itself and means at growing dilation, with weights of its own (TAP).

    Args:
        scales: how many are mixed: the token itself and the dilations 1, …, scales − 1.
        temperature: divides the scores of the scales.

    Shapes: (B, Y, X, dim) → same.
    Raises: ValueError: scales or temperature are not positive.
    """

    def __init__(
        self,
        dim: int,
        scales: int = 4,
        *,
        temperature: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if scales < 1 or temperature <= 0:
            raise ValueError(f"TokenPooling: scales and temperature must be positive, got {scales} and {temperature}")
        self.scales = scales
        self.temperature = temperature
        self.proj = nn.Sequential(
            nn.Conv2d(dim, scales, 3, padding=1, bias=False, device=device, dtype=dtype),
            nn.BatchNorm2d(scales, device=device, dtype=dtype),
            nn.Conv2d(scales, scales, 3, padding=1, bias=False, device=device, dtype=dtype),
        )

    def weights(self, x: Tensor) -> Tensor:
        """The share of each scale in each token, (B, Y, X, scales)."""
        scores = self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return (scores / self.temperature).softmax(3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, dim) → same."""
        weights = self.weights(x)
        mixed = weights[..., :1] * x
        for dilation in range(1, self.scales):
            mixed = mixed + weights[..., dilation : dilation + 1] * dilated_mean(x, dilation)
        return mixed


class Attended(NamedTuple):
    """What attention's rows follow from: softmax(gate · q·kᵀ / √D), gate 1 where there is none.

    Shapes: q, k (B, H, N, D); gate (H, N, N).
    """

    q: Tensor
    k: Tensor
    gate: Tensor | None = None


class ObservedAttention(nn.Module):
    """Base of attention whose queries and keys :func:`attention_of` collects."""

    seen: list[Attended] | None = None

    def note(self, q: Tensor, k: Tensor, gate: Tensor | None = None) -> None:
        """For the forward pass to call before it attends."""
        if self.seen is not None:
            self.seen.append(Attended(q, k, gate))


@contextmanager
def attention_of(net: nn.Module) -> Iterator[list[Attended]]:
    """Within it, ``net`` appends to the list what each of its layers attends with.

    Raises: ValueError: no layer of ``net`` can be observed.
    """
    layers = [module for module in net.modules() if isinstance(module, ObservedAttention)]
    if not layers:
        raise ValueError(f"attention_of: no attention of {type(net).__name__} can be observed; RVT and FAN have such")
    seen: list[Attended] = []
    for layer in layers:
        layer.seen = seen
    try:
        yield seen
    finally:
        for layer in layers:
            layer.seen = None


def diversification_loss(layers: Sequence[Attended], threshold: float = 2.0) -> Tensor:
    """The mean over layers, images and queries of cos(row, mean row), both without entries up to threshold/N (ADL).

    A row is attention averaged over heads. Only ``ROWS`` rows of a layer are held at once, in the backward pass too,
    which computes them again; beside them there are column means and products of rows: memory linear in N.

    Raises: ValueError: there are no layers.
    """
    if not layers:
        raise ValueError("diversification_loss: needs at least one layer, got none")
    return torch.stack([_similarity(layer, threshold / layer.k.shape[2]) for layer in layers]).mean()


def _similarity(layer: Attended, smallest: float) -> Tensor:
    q, k, gate = layer
    if q.dtype in (torch.float16, torch.bfloat16):
        q, k = q.float(), k.float()
    count = q.shape[2]
    parts = [slice(start, start + ROWS) for start in range(0, count, ROWS)]

    def column_sum(q: Tensor, k: Tensor, gate: Tensor | None) -> Tensor:
        return _rows(q, k, gate).sum(1)

    def cosines(q: Tensor, k: Tensor, gate: Tensor | None, mean: Tensor) -> Tensor:
        return F.cosine_similarity(_above(_rows(q, k, gate), smallest), mean[:, None], dim=2).sum(1)

    def cut(part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        return q[:, :, part], k, None if gate is None else gate[:, part]

    if len(parts) == 1:
        rows = _rows(q, k, gate)
        mean = _above(rows.mean(1, keepdim=True), smallest)
        return F.cosine_similarity(_above(rows, smallest), mean, dim=2).mean()
    sums, found = q.new_zeros(len(q), count), q.new_zeros(len(q))
    for part in parts:
        sums = sums + checkpoint(column_sum, *cut(part), use_reentrant=False)
    mean = _above(sums / count, smallest)
    for part in parts:
        found = found + checkpoint(cosines, *cut(part), mean, use_reentrant=False)
    return found.mean() / count


def _rows(q: Tensor, k: Tensor, gate: Tensor | None) -> Tensor:
    """(B, n, N): attention of some queries, mean over heads."""
    scores = (q @ k.mT) * q.shape[3] ** -0.5
    return (scores if gate is None else scores * gate).softmax(3).mean(1)


def _above(values: Tensor, smallest: float) -> Tensor:
    return torch.where(values > smallest, values, 0.0)
