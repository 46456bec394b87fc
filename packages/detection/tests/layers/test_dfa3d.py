"""DFA3D: the operator and its gradients against loops, the module's layout, projection, depth labels and depth head."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core import deformable_attention
from detection.data.ring3d import LIDAR2IMG
from detection.layers.dfa3d import (
    CameraCrossAttention,
    DeformableLifting,
    DepthHead,
    depth_bins,
    known_depth,
    nearest_depth_bin,
    pillar_points,
    project,
)

SHAPES = [(4, 5), (2, 3)]


def loops(value: Tensor, depth: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Every sample on its own: bilinear in the image, linear in depth, zero outside."""
    B, N, H, _, P = weights.shape
    rows = []
    for b in range(B):
        for n in range(N):
            for m in range(H):
                total = value.new_zeros(value.shape[-1])
                start = 0
                for level, (h, w) in enumerate(SHAPES):
                    for p in range(P):
                        x, y, z = locations[b, n, m, level, p] * torch.tensor([w, h, depth.shape[-1]]) - 0.5
                        x0, y0, z0 = (math.floor(t.item()) for t in (x, y, z))
                        for i in (0, 1):
                            for j in (0, 1):
                                if not (0 <= y0 + i < h and 0 <= x0 + j < w):
                                    continue
                                cell = start + (y0 + i) * w + x0 + j
                                score = sum(
                                    (1 - (z - z0 - k).abs()) * depth[b, cell, m, z0 + k]
                                    for k in (0, 1)
                                    if 0 <= z0 + k < depth.shape[-1]
                                )
                                area = (1 - (y - y0 - i).abs()) * (1 - (x - x0 - j).abs())
                                total = total + weights[b, n, m, level, p] * area * score * value[b, cell, m]
                    start += h * w
                rows.append(total)
    return torch.stack(rows).view(B, N, -1)


def test_operator_and_all_gradients_equal_loops_in_float64() -> None:
    B, N, H, D, P, Z = 1, 4, 2, 3, 2, 5
    cells = sum(h * w for h, w in SHAPES)
    inputs = [
        torch.randn(B, cells, H, D, dtype=torch.float64),
        torch.rand(B, cells, H, Z, dtype=torch.float64),
        torch.rand(B, N, H, 2, P, 3, dtype=torch.float64) * 1.4 - 0.2,  # some outside
        torch.rand(B, N, H, 2, P, dtype=torch.float64),
    ]
    ours = [t.clone().requires_grad_() for t in inputs]
    slow = [t.clone().requires_grad_() for t in inputs]
    out = deformable_attention(ours[0], SHAPES, ours[2], ours[3], ours[1])
    expected = loops(*slow)
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=0)
    direction = torch.randn_like(out)
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    for a, b in zip(ours, slow, strict=True):
        assert b.grad is not None
        assert b.grad.abs().max() > 0
        torch.testing.assert_close(a.grad, b.grad, atol=1e-9, rtol=0)
    assert slow[2].grad is not None
    assert (slow[2].grad.abs().sum((0, 1, 2, 3, 4)) > 0).all()  # x, y and depth


def test_unit_depth_is_deformable_attention_in_two_dimensions() -> None:
    lifted = DeformableLifting(16, 4, 2, 4).double()
    flat = DeformableLifting(16, 4, 2, 4, depth=False).double()
    flat.load_state_dict(lifted.state_dict(), strict=False)
    value = torch.randn(2, sum(h * w for h, w in SHAPES), 16, dtype=torch.float64)
    query = torch.randn(2, 7, 16, dtype=torch.float64)
    reference = torch.rand(2, 7, 2, 3, dtype=torch.float64) * 0.5 + 0.25
    ones = torch.ones(2, value.shape[1], 40, dtype=torch.float64)
    torch.testing.assert_close(
        lifted(query, value, SHAPES, reference, ones), flat(query, value, SHAPES, reference), atol=1e-12, rtol=0
    )


def test_two_points_on_one_ray_differ_by_depth_only() -> None:
    """The paper's motivation: without depth, points on a camera ray read the same feature."""
    layers = {depth: CameraCrossAttention(16, 4, 1, 4, depth=depth, dropout=0.0) for depth in (True, False)}
    ray = (
        torch.tensor(LIDAR2IMG[0]).inverse()
        @ torch.tensor([[80.0 * t, 48.0 * t, t, 1.0] for t in (8.0, 20.0)]).double().T
    )
    points = ray.T[:, :3].unsqueeze(1).expand(-1, 4, -1)
    reference, visible = project(points, torch.tensor(LIDAR2IMG[:1])[None], (96, 160), (1.0, 41.0, 0.5))
    assert visible.all()
    value = torch.randn(1, 60, 16)
    depth = torch.zeros(1, 60, 80)
    depth[:, :, 13:15] = 1  # a surface at 8 m
    out = {}
    for with_depth, layer in layers.items():
        attention = layer.deformable_attention
        for offsets in (attention.sampling_offsets, attention.sampling_offsets_depth):
            if offsets is not None:
                torch.nn.init.zeros_(offsets.bias)
        query = torch.zeros(1, 2, 16)
        args = (value, [(6, 10)], reference.float(), visible, depth if with_depth else None)
        out[with_depth] = layer(query, *args) - layer.output_proj.bias
    near, far = out[False][0]
    torch.testing.assert_close(near, far)
    near, far = out[True][0]
    assert near.norm() > 0.1
    assert far.norm() < 1e-5


def test_cross_attention_equals_camera_by_camera() -> None:
    B, K, C = 2, 6, 16
    layer = CameraCrossAttention(C, 4, 1, 4, dropout=0.0).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.2)
    points = pillar_points((5, 4), 2, (-32, -32, -5, 32, 32, 3))
    matrices = torch.from_numpy(LIDAR2IMG).expand(B, -1, -1, -1).clone()
    matrices[1, :, 0] += 20 * matrices[1, :, 2]  # another view: every sample has its own mask
    reference, visible = project(points, matrices, (96, 160), (1.0, 41.0, 4.0))
    query = torch.randn(B, 20, C, dtype=torch.float64)
    value = torch.randn(B * K, 15, C, dtype=torch.float64)
    depth = torch.rand(B * K, 15, 10, dtype=torch.float64)
    out = layer(query, value, [(3, 5)], reference, visible, depth)
    hit = visible.any(-1)
    assert not torch.equal(hit[0], hit[1])
    for b in range(B):
        total = torch.zeros(20, C, dtype=torch.float64)
        for k in range(K):
            part = slice(b * K + k, b * K + k + 1)
            read = layer.deformable_attention(
                query[b : b + 1], value[part], [(3, 5)], reference[b : b + 1, k], depth[part]
            )
            total += read[0] * hit[b, k].unsqueeze(1)
        mean = total / hit[b].sum(0).clamp(min=1).unsqueeze(1)
        torch.testing.assert_close(out[b], query[b] + layer.output_proj(mean), atol=1e-12, rtol=0)


def test_anchor_index_runs_fastest_over_points() -> None:
    layer = DeformableLifting(8, 1, 1, 4, depth=False)
    for p in layer.parameters():
        torch.nn.init.zeros_(p)
    torch.nn.init.eye_(layer.value_proj.weight)
    layer.attention_weights.bias.data = torch.tensor([0.0, -1e9, -1e9, -1e9])  # only the first point counts
    layer.sampling_offsets.bias.data[2:] = 99.0
    reference = torch.tensor([[0.25, 0.5, 0.5], [0.75, 0.5, 0.5]]).view(1, 1, 2, 3)
    value = torch.zeros(1, 2, 8)
    value[0, 0, 0], value[0, 1, 0] = 1.0, 2.0
    assert layer(torch.zeros(1, 1, 8), value, [(1, 2)], reference)[0, 0, 0] == 1.0  # anchor 0
    layer.attention_weights.bias.data = torch.tensor([-1e9, 0.0, -1e9, -1e9])
    layer.sampling_offsets.bias.data[:] = 0
    assert layer(torch.zeros(1, 1, 8), value, [(1, 2)], reference)[0, 0, 0] == 2.0  # anchor 1


def test_parameters_of_the_base_configuration() -> None:
    assert sum(p.numel() for p in CameraCrossAttention(256, 8, 4, 8).parameters()) == 394_752
    assert DepthHead().depth_conv[-1].out_channels == 24
    assert sum(p.numel() for p in DepthHead().parameters()) == 6_559_018


def test_depth_labels_are_the_nearest_known_depth_in_range() -> None:
    depth = torch.zeros(1, 4, 6)
    depth[0, 0, :2] = torch.tensor([3.2, 2.6])  # cell 0: nearest 2.6
    depth[0, 0, 2] = 60.0  # cell 1: beyond the range
    depth[0, 2, 4] = 1.9  # cell (1, 2): before it
    depth[0, 3, 0] = 57.99
    bins = nearest_depth_bin(depth, 2, (2.0, 58.0, 0.5))
    assert bins.tolist() == [[[1, -1, -1], [111, -1, -1]]]
    ahead = known_depth(bins, 112, tolerance=2)
    assert ahead[0, :, 0, 0].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert ahead[0, :, 1, 1].sum() == 0


def test_grouped_depth_repeats_probabilities_and_learns_its_label() -> None:
    head = DepthHead(8, 8, (0.0, 14.0, 1.0), blocks=1, context=None)
    logits = torch.randn(2, 3, 1, 2)
    spread = head.distribution(logits)
    assert spread[0, :, 0, 0].unique().numel() == 3
    torch.testing.assert_close(spread.sum(1), (logits.softmax(1) * torch.tensor([2.0, 4, 8]).view(1, 3, 1, 1)).sum(1))
    bins = torch.tensor([[[1, -1]], [[5, 13]]])
    target = F.one_hot(torch.tensor([0, 1, 2]), 3).float()
    p = logits.softmax(1).movedim(1, -1)[bins >= 0]
    expected = 0.5 * F.binary_cross_entropy(p, target, reduction="sum") / 3
    torch.testing.assert_close(head.loss(logits, bins), expected)
    assert head.loss(logits, torch.full((2, 1, 2), -1)) == 0


def test_depth_loss_stays_finite_when_the_head_is_certain() -> None:
    head = DepthHead(8, 8, (0.0, 14.0, 1.0), blocks=0, context=None)
    logits = torch.tensor([200.0, 0, 0]).view(1, 3, 1, 1).requires_grad_()
    head.loss(logits, torch.tensor([[[13]]])).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype: torch.dtype) -> None:
    layer = DeformableLifting(16, 4, 1, 4)
    args = (torch.randn(1, 5, 16), torch.randn(1, 6, 16), [(2, 3)], torch.rand(1, 5, 2, 3), torch.rand(1, 6, 9))
    exact = layer(*args)
    half = layer.to(dtype)(args[0].to(dtype), args[1].to(dtype), args[2], args[3], args[4].to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), exact, atol=0.05, rtol=0.05)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"depth_bins: bound must be .* got bound=\(1.0, 2.2, 0.5\)"):
        depth_bins((1.0, 2.2, 0.5))
    with pytest.raises(ValueError, match="region must be"):
        pillar_points((2, 2), 1, (0, 0, 0, -1, 1, 1))
    with pytest.raises(ValueError, match="num_heads=3 must divide dim=16"):
        DeformableLifting(16, 3)
    with pytest.raises(ValueError, match="4×6 pixels cannot be divided into cells of 3×3"):
        nearest_depth_bin(torch.zeros(1, 4, 6), 3, (1.0, 2.0, 0.5))
    with pytest.raises(ValueError, match="80 bins are no multiple of 14"):
        DepthHead(8, 8, (1.0, 41.0, 0.5))
    layer = DeformableLifting(8, 2, 1, 4)
    query, value, reference = torch.zeros(1, 1, 8), torch.zeros(1, 6, 8), torch.zeros(1, 1, 2, 3)
    with pytest.raises(ValueError, match="depth=None, but it was built with depth=True"):
        layer(query, value, [(2, 3)], reference)
    with pytest.raises(ValueError, match="3 anchors must divide num_points=4"):
        layer(query, value, [(2, 3)], torch.zeros(1, 1, 3, 3), torch.zeros(1, 6, 2))
    with pytest.raises(ValueError, match="depth given, built without"):
        DeformableLifting(8, 2, 1, 4, depth=False)(query, value, [(2, 3)], reference, torch.zeros(1, 6, 2))
