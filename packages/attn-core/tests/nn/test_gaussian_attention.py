"""Gaussian attention against loops over heads and Gaussians in float64: densities are multiplied."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_core.nn.gaussian_attention import GaussianAttention, GaussianBlock, from_official, importance_factor


def chunk_of(x: Tensor, offsets: Tensor, c: Tensor, padding: float | None, masked: bool, eps: float) -> Tensor:
    """One head on its places (…, L): densities multiplied, divided by their sum."""
    kept = torch.ones_like(x, dtype=torch.bool) if padding is None else x != padding
    rows = []
    for row, mask in zip(x.reshape(-1, x.shape[-1]), kept.reshape(-1, x.shape[-1]), strict=True):
        seen = row[mask] if masked else torch.where(mask, row, 0)
        mean = seen.mean() if len(seen) else row.new_zeros(())
        variance = seen.var() if len(seen) > 1 else row.new_zeros(())
        product = torch.ones_like(row)
        for delta, width in zip(offsets, c, strict=True):
            z = (row - (mean + delta)) / (variance + eps).sqrt()
            product = product * (-z.square() / (2 * width**2)).exp() / (2 * math.pi * width**2).sqrt()
        if masked:
            product = product * mask
        weights = product / product.sum() if product.sum() > 0 else product
        rows.append(torch.where(mask, row * weights, row))
    return torch.stack(rows).view_as(x)


def plain(module: GaussianAttention, x: Tensor) -> Tensor:
    x = x.movedim(module.axis, -1)
    length = x.shape[-1] // module.num_heads
    parts = [x[..., j * length : (j + 1) * length] for j in range(module.num_heads - 1)]
    parts.append(x[..., (module.num_heads - 1) * length :])
    outs = [
        chunk_of(part, module.mean_offsets[j], module.c[j], module.padding_value, module.masked_statistics, module.eps)
        for j, part in enumerate(parts)
    ]
    return torch.cat(outs, -1).movedim(-1, module.axis)


def attention(*arguments: Any, **options: Any) -> GaussianAttention:
    module = GaussianAttention(*arguments, **options).double()
    nn.init.normal_(module.mean_offsets, std=0.3)
    with torch.no_grad():  # of any sign, and wide enough for densities
        module.c.copy_((torch.rand_like(module.c) + 0.5) * torch.randn_like(module.c).sign())
    return module


CASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((2, 8, 3), {"axis": 1, "num_heads": 2, "num_gaussians": 3}),
    ((2, 11, 3), {"axis": 1, "num_heads": 4, "num_gaussians": 1}),  # the last head is longer
    ((3, 2, 7), {"axis": -1, "num_heads": 1, "num_gaussians": 2}),
    ((2, 2, 5, 3), {"axis": 2, "num_heads": 1, "num_gaussians": 2}),
    ((2, 6, 3), {"axis": 1, "num_heads": 6, "num_gaussians": 2}),  # chunks of one place
    ((2, 9, 3), {"axis": 1, "num_heads": 2, "padding_value": 0.0}),
    ((2, 9, 3), {"axis": 1, "num_heads": 2, "padding_value": 0.0, "masked_statistics": True}),
    ((2, 3, 2), {"axis": 1, "num_heads": 3, "padding_value": 0.0}),
    ((2, 9, 3), {"axis": 1, "num_heads": 3, "eps": 0.5}),
]


@pytest.mark.parametrize(("shape", "options"), CASES)
def test_output_and_gradients_equal_products_of_densities(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    module = attention(**options)
    if shape[options["axis"]] == options["num_heads"]:
        nn.init.zeros_(module.mean_offsets)  # or the densities below underflow: the variance is 0
    x = torch.randn(shape, dtype=torch.float64)
    if "padding_value" in options:
        x[0, 7:] = 0.0
        x[1, :, 0] = 0.0  # a chunk without anything to weigh
    x.requires_grad_()
    expected, out = plain(module, x), module(x)
    weight, leaves = torch.randn_like(out), [x, *module.parameters()]
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        torch.autograd.grad((out * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        rtol=1e-7,
        atol=1e-9,
    )


def test_masking_changes_the_statistics_only_when_asked() -> None:
    x = torch.randn(1, 8, dtype=torch.float64)
    x[0, 5:] = 0.0
    diluted = attention(1, 1, padding_value=0.0)
    masked = attention(1, 1, padding_value=0.0, masked_statistics=True)
    masked.load_state_dict(diluted.state_dict())
    alone = attention(1, 1)
    alone.load_state_dict(diluted.state_dict())
    torch.testing.assert_close(masked(x)[:, :5], alone(x[:, :5]))
    assert not torch.allclose(diluted(x)[:, :5], alone(x[:, :5]))


def test_narrow_gaussians_keep_weights_and_gradients() -> None:
    # The densities of float32 are all 0 here: exp(−z²/2c²) with c = 0.01.
    module = GaussianAttention(1, 2, 3)
    nn.init.constant_(module.c, 0.01)
    x = torch.randn(2, 10, 4, requires_grad=True)
    weights = module.weights(x)
    torch.testing.assert_close(weights.unflatten(1, (2, 5)).sum(2), torch.ones(2, 2, 4))
    (module(x).square().sum()).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().amax() > 0
    nn.init.zeros_(module.c)
    assert module(x).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weighs_in_float32(dtype: torch.dtype) -> None:
    module = attention(1, 2, 8).float()
    x = torch.randn(2, 16, 5, dtype=dtype)
    out = module(x)
    assert out.dtype == dtype
    torch.testing.assert_close(module.weights(x), module.weights(x.float()))


def test_a_block_adds_each_layer_to_its_input() -> None:
    block: Any = GaussianBlock((1, 2, -1), (2, 1, 1), (2, 1, 3)).double()
    x = torch.randn(2, 6, 4, 3, dtype=torch.float64)
    expected = x
    for layer in block.layers:
        expected = plain(layer, expected) + expected
    torch.testing.assert_close(block(x), expected)


def test_fresh_widths_are_positive_with_a_median_of_one() -> None:
    widths = GaussianAttention(1, 50, 20).c
    assert widths.min() > 0
    assert 0.8 < widths.median() < 1.25


@pytest.mark.parametrize(("heads", "gaussians"), [(1, 1), (4, 3)])
def test_parameters_are_two_for_each_gaussian_of_each_head(heads: int, gaussians: int) -> None:
    assert sum(p.numel() for p in GaussianAttention(1, heads, gaussians).parameters()) == 2 * heads * gaussians


def test_official_weights_of_each_head_become_rows() -> None:
    block: Any = GaussianBlock((1, 2), (11, 1), 2)  # more than ten: names are ordered by number, not by letter
    official = {
        f"layers.{i}.attention_heads.{j}.{name}": rows[j]
        for i, layer in enumerate(block.layers)
        for name, rows in layer.state_dict().items()
        for j in range(len(rows))
    }
    loaded = from_official(official)
    ours = block.state_dict()
    assert loaded.keys() == ours.keys()
    assert all(torch.equal(loaded[name], value) for name, value in ours.items())
    with pytest.raises(ValueError, match=r"expected layers.i.attention_heads.j.<name>, got 'c'"):
        from_official({"c": torch.zeros(1)})


@torch.no_grad()
def test_masked_places_are_in_no_statistic_and_a_padded_row_is_as_alone() -> None:
    module = attention(1, 1, 2)
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    mask = torch.ones(2, 9, 1, dtype=torch.bool)
    mask[1, 6:] = False
    weights = module.weights(x, mask)
    torch.testing.assert_close(weights[1, :6], module.weights(x[1:, :6])[0], rtol=0, atol=1e-10)
    assert not weights[1, 6:].any()
    torch.testing.assert_close(module(x, mask)[1, 6:], x[1, 6:], rtol=0, atol=0)  # passed on, not computed
    mask[1] = False
    torch.testing.assert_close(module(x, mask)[1], x[1], rtol=0, atol=0)
    block = GaussianBlock((1, 1), (1, 1), (2, 2)).double()
    torch.testing.assert_close(block(x, mask)[1], 4 * x[1])  # both layers get the mask


def test_along_time_it_is_refused_in_causal_models() -> None:
    with pytest.raises(ValueError, match=r"axis must be -1 \(features\) in a causal model, got axis=1"):
        GaussianBlock(1, 1, 1, causal=True)
    x = torch.randn(1, 8, 6)
    later = x.clone()
    later[:, 5:] += 1
    along_time, along_features = attention(1, 2, 2).float(), attention(-1, 2, 2, causal=True).float()
    assert (along_time(x) - along_time(later))[:, :5].abs().max() > 1e-3
    torch.testing.assert_close(along_features(x)[:, :5], along_features(later)[:, :5], rtol=0, atol=1e-6)


@torch.no_grad()
def test_importance_grows_with_the_weights_of_a_place() -> None:
    module = attention(-1, 1, 1)
    nn.init.zeros_(module.mean_offsets)
    nn.init.constant_(module.c, 0.7)
    x = torch.randn(50, 6, dtype=torch.float64)
    x[:, 2] *= 0.01
    x[:, 4] *= 5
    found = importance_factor(module, [x[:20], x[20:].view(5, 6, 6)])
    total = module.weights(x).sum(0)
    torch.testing.assert_close(found.double(), (total - total.min()) / (total.max() - total.min()), rtol=0, atol=1e-6)
    assert (int(found.argmax()), int(found.argmin())) == (2, 4)
    with pytest.raises(ValueError, match="batches must hold at least one input, got none"):
        importance_factor(module, [])


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="GaussianAttention: num_gaussians must be positive, got num_gaussians=0"):
        GaussianAttention(1, 1, 0)
    with pytest.raises(ValueError, match=r"no axis=3 in an input of shape \(2, 4\)"):
        GaussianAttention(3)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="num_heads=5 exceeds the 4 places of axis 1; use num_heads<=4"):
        GaussianAttention(1, 5)(torch.zeros(2, 4))
    with pytest.raises(
        ValueError, match=r"GaussianBlock: .* entry for each layer, got axes=\(1, 2\), num_heads=\(1,\)"
    ):
        GaussianBlock((1, 2), (1,))
