"""Gaussian adaptive attention: the official rule written out, padding, narrow Gaussians, causality, importance.

The official block (``GaussianBlock.py``) gave equal outputs and gradients, to 8e-15, in 5 cases without underflow.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from seq_models.layers.gaussian_attention import GaussianAttention, GaussianBlock, importance_factor


def plain(x: Tensor, layer: GaussianAttention, padding_value: float | None) -> Tensor:
    """Weights along the last axis of one vector, the product of densities as published."""
    length, found = len(x) // layer.num_heads, []
    for head in range(layer.num_heads):
        last = (head + 1) * length if head < layer.num_heads - 1 else len(x)
        chunk = x[head * length : last]
        seen = chunk if padding_value is None else torch.where(chunk == padding_value, 0.0, chunk)
        deviation = (seen.var() + 1e-8).sqrt()
        weight = torch.ones_like(chunk)
        for offset, c in zip(layer.mean_offsets[head], layer.c[head], strict=True):
            z = (chunk - seen.mean() - offset) / deviation
            weight = weight * torch.exp(-(z**2) / (2 * c**2)) / (2 * math.pi * c**2).sqrt()
        found.append(weight / weight.sum())
    return torch.cat(found)


def layer_of(heads: int, gaussians: int, **options: Any) -> GaussianAttention:
    layer = GaussianAttention(heads, gaussians, **options).double()
    with torch.no_grad():
        layer.mean_offsets.normal_(std=0.1)
        layer.c.uniform_(0.4, 0.9)
    return layer


@pytest.mark.parametrize("axis", [-1, 1, 0])
@pytest.mark.parametrize("padding_value", [None, 0.0])
@pytest.mark.parametrize(("heads", "gaussians"), [(2, 3), (3, 1)])
def test_weights_are_the_normalized_product_of_gaussians(
    axis: int, padding_value: float | None, heads: int, gaussians: int
) -> None:
    """Axes × padding × heads that do not divide the axis; outputs and gradients."""
    torch.manual_seed(0)
    layer = layer_of(heads, gaussians, axis=axis, padding_value=padding_value)
    x = torch.randn(17, 19, 14).double()
    if padding_value is not None:
        x[torch.rand(x.shape) < 0.05] = padding_value
    x.requires_grad_()
    along = x.movedim(axis, -1)
    rows = [plain(row, layer, padding_value) for row in along.flatten(0, -2)]
    expected = torch.stack(rows).view_as(along).movedim(-1, axis)
    assert (layer.weights(x) - expected).abs().max() < 1e-10
    result = x * expected if padding_value is None else torch.where(x != padding_value, x * expected, x)
    assert (layer(x) - result).abs().max() < 1e-10
    probe, leaves = torch.randn_like(x), (x, layer.c, layer.mean_offsets)
    pairs = [torch.autograd.grad((out * probe).sum(), leaves) for out in (layer(x), result)]
    assert all((a - b).abs().max() < 1e-8 * max(1.0, float(b.abs().max())) for a, b in zip(*pairs, strict=True))


@torch.no_grad()
def test_a_block_adds_the_input_of_each_layer_and_reads_official_names() -> None:
    block = GaussianBlock([2, 3], [1, 2], [-1, 1]).double()
    heads = {
        f"layers.{number}.attention_heads.{head}.{name}": torch.rand(gaussians).double() + 0.5
        for number, (count, gaussians) in enumerate([(2, 1), (3, 2)])
        for head in range(count)
        for name in ("mean_offsets", "c")
    }
    block.load_official(heads)
    assert torch.equal(block.layers[1].c[2], heads["layers.1.attention_heads.2.c"])  # pyright: ignore[reportIndexIssue]
    assert sum(p.numel() for p in block.parameters()) == 2 * (2 * 1 + 3 * 2)
    x = torch.randn(2, 9, 8).double()
    first = x + torch.stack([plain(row, block.layers[0], None) for row in x.flatten(0, 1)]).view_as(x) * x  # pyright: ignore[reportArgumentType]
    turned = first.transpose(1, 2)
    weight = torch.stack([plain(row, block.layers[1], None) for row in turned.flatten(0, 1)]).view_as(turned)  # pyright: ignore[reportArgumentType]
    assert (block(x) - first - (weight * turned).transpose(1, 2)).abs().max() < 1e-10


@torch.no_grad()
def test_masked_places_are_in_no_statistic_and_a_padded_row_is_as_alone() -> None:
    layer = layer_of(1, 2, axis=1)
    x = torch.randn(2, 9, 4).double()
    mask = torch.ones(2, 9, 1, dtype=torch.bool)
    mask[1, 6:] = False
    weights = layer.weights(x, mask)
    assert (weights[1, :6] - layer.weights(x[1:, :6])[0]).abs().max() < 1e-10
    assert not weights[1, 6:].any()
    assert torch.equal(layer(x, mask)[1, 6:], x[1, 6:])
    mask[1] = False
    assert torch.equal(layer(x, mask)[1], x[1])


@torch.no_grad()
def test_nothing_underflows_where_the_official_product_does() -> None:
    layer = GaussianAttention(2, 40)
    layer.c.fill_(0.02)
    x = torch.randn(3, 64)
    for given in (x, x.half(), torch.full((3, 64), 2.0), torch.randn(3, 2)):
        weights = layer.weights(given)
        assert weights.dtype == given.dtype
        assert bool(weights.isfinite().all())
        torch.testing.assert_close(weights.float().sum(-1), torch.full((3,), 2.0), rtol=0, atol=1e-2)


def test_along_time_it_is_refused_in_causal_models() -> None:
    with pytest.raises(ValueError, match=r"axis must be -1 \(features\) in a causal model, got axis=1"):
        GaussianBlock([1], [1], [1], causal=True)
    torch.manual_seed(0)
    x = torch.randn(1, 8, 6)
    later = x.clone()
    later[:, 5:] += 1
    along_time, along_features = layer_of(2, 2, axis=1).float(), layer_of(2, 2, causal=True).float()
    assert (along_time(x) - along_time(later))[:, :5].abs().max() > 1e-3
    assert torch.equal(along_features(x)[:, :5], along_features(later)[:, :5])


@torch.no_grad()
def test_importance_grows_with_the_weights_of_a_place() -> None:
    layer = layer_of(1, 1)
    x = torch.randn(50, 6).double()
    x[:, 2] *= 0.01
    x[:, 4] *= 5
    found = importance_factor(layer, [x[:20], x[20:].view(5, 6, 6)])
    total = layer.weights(x).sum(0)
    torch.testing.assert_close(found.double(), (total - total.min()) / (total.max() - total.min()), rtol=0, atol=1e-6)
    assert int(found.argmax()) == 2
    assert int(found.argmin()) == 4


def test_what_does_not_fit_is_named() -> None:
    for call, words in [
        (lambda: GaussianAttention(0, 1), "num_heads must be at least 1, got num_heads=0"),
        (lambda: GaussianAttention(1, 0), "num_gaussians must be at least 1, got num_gaussians=0"),
        (lambda: GaussianAttention(4, 1)(torch.zeros(2, 3)), r"must have at least num_heads=4 places, got \(2, 3\)"),
        (lambda: GaussianAttention(1, 1, axis=2)(torch.zeros(2, 3)), r"axis 2 must have at least"),
        (lambda: GaussianBlock([1, 2], [1], [0]), "one number for each layer, got 2, 1 and 1"),
        (lambda: importance_factor(GaussianAttention(1, 1), []), "batches must hold at least one input, got none"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
