"""BEVFormer with DFA3D lifting beside a plain network: every sample read by itself, without a block of ours.

Paper: Li et al., DFA3D, ICCV 2023, arXiv 2307.12972, eq. 1 to 6; Li et al., BEVFormer, ECCV 2022, arXiv 2203.17270. The
backbone is timm's on both sides.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d

from detection.data.ring3d import LIDAR2IMG
from detection.models.bevformer.detector import BEVFormerDFA3D

State = dict[str, Tensor]
ROWS, COLUMNS, DIM, HEADS, POINTS, ANCHORS = 3, 4, 16, 2, 4, 2
REGION, BOUND = (-32.0, -32.0, -5.0, 32.0, 32.0, 3.0), (1.0, 41.0, 2.0)


def linear(s: State, name: str, x: Tensor) -> Tensor:
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def conv(s: State, name: str, x: Tensor, **options: Any) -> Tensor:
    return F.conv2d(x, s[f"{name}.weight"], s.get(f"{name}.bias"), **options)


def batch_norm(s: State, name: str, x: Tensor) -> Tensor:
    mean, var, w, b = (s[f"{name}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias"))
    return (x - mean) / (var + 1e-5).sqrt() * w + b


def layer_norm(s: State, name: str, x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * s[f"{name}.weight"] + s[f"{name}.bias"]


def group_norm(s: State, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 8, s[f"{name}.weight"], s[f"{name}.bias"])


def depth_distribution(s: State, x: Tensor) -> Tensor:
    """(K, C, y, x) → (K, D, y, x): residual block, atrous pyramid, deformable convolution, softmax."""
    n = "pts_dpt_head"
    x = batch_norm(s, f"{n}.reduce_conv.1", conv(s, f"{n}.reduce_conv.0", x, padding=1)).clamp(min=0)
    inner = batch_norm(s, f"{n}.depth_conv.0.bn1", conv(s, f"{n}.depth_conv.0.conv1", x, padding=1)).clamp(min=0)
    x = (x + batch_norm(s, f"{n}.depth_conv.0.bn2", conv(s, f"{n}.depth_conv.0.conv2", inner, padding=1))).clamp(min=0)
    a, branches = f"{n}.depth_conv.1", []
    for i, dilation in enumerate((1, 6, 12, 18), 1):
        spread = {"padding": dilation, "dilation": dilation} if i > 1 else {}
        branch = batch_norm(s, f"{a}.aspp{i}.bn", conv(s, f"{a}.aspp{i}.atrous_conv", x, **spread))
        branches.append(branch.clamp(min=0))
    pooled = conv(s, f"{a}.global_avg_pool.1", x.mean((2, 3), keepdim=True))
    branches.append(batch_norm(s, f"{a}.global_avg_pool.2", pooled).clamp(min=0).expand_as(x))
    x = batch_norm(s, f"{a}.bn1", conv(s, f"{a}.conv1", torch.cat(branches, 1))).clamp(min=0)
    d = f"{n}.depth_conv.2"
    x = deform_conv2d(x, conv(s, f"{d}.conv_offset", x, padding=1), s[f"{d}.weight"], padding=(1, 1))
    return conv(s, f"{n}.depth_conv.3", x).softmax(1)


def read(values: Tensor, x: Tensor, y: Tensor, depth: Tensor | None = None, z: Tensor | None = None) -> Tensor:
    """(y, x, D) bilinearly at cell coordinates, zero outside; each corner weighs its depth distribution at z."""
    total = torch.zeros_like(values[0, 0])
    for j in (math.floor(y.item()), math.floor(y.item()) + 1):
        for i in (math.floor(x.item()), math.floor(x.item()) + 1):
            if 0 <= j < values.shape[0] and 0 <= i < values.shape[1]:
                share = (1 - (y - j).abs()) * (1 - (x - i).abs())
                if depth is not None and z is not None:
                    bins = [k for k in (math.floor(z.item()), math.floor(z.item()) + 1) if 0 <= k < len(depth)]
                    share = share * sum((1 - (z - k).abs()) * depth[k, j, i] for k in bins)
                total = total + share * values[j, i]
    return total


def self_attention(s: State, n: str, grid: Tensor, pos: Tensor) -> Tensor:
    values = linear(s, f"{n}.value_proj", grid).view(ROWS, COLUMNS, HEADS, -1)
    offsets = linear(s, f"{n}.sampling_offsets", grid + pos).view(-1, HEADS, 4, 2)
    weights = linear(s, f"{n}.attention_weights", grid + pos).view(-1, HEADS, 4).softmax(-1)
    rows = []
    for q in range(ROWS * COLUMNS):
        y, x = divmod(q, COLUMNS)
        heads = [
            sum(weights[q, h, p] * read(values[:, :, h], x + offsets[q, h, p, 0], y + offsets[q, h, p, 1])
                for p in range(4))
            for h in range(HEADS)
        ]  # fmt: skip
        rows.append(torch.cat(heads))  # type: ignore[arg-type]
    return grid + linear(s, f"{n}.output_proj", torch.stack(rows))


def lifting(s: State, n: str, grid: Tensor, maps: Tensor, matrices: Tensor, size: tuple[int, int],
            depth: Tensor | None) -> Tensor:  # fmt: skip
    """Every query asks each camera that sees an anchor of its pillar, and takes the mean."""
    d, rows = f"{n}.deformable_attention", []
    high, wide = maps.shape[2:]
    for q in range(ROWS * COLUMNS):
        row, column = divmod(q, COLUMNS)
        x = REGION[0] + (column + 0.5) / COLUMNS * (REGION[3] - REGION[0])
        y = REGION[1] + (row + 0.5) / ROWS * (REGION[4] - REGION[1])
        heights = [REGION[2] + 0.5 + a / (ANCHORS - 1) * (REGION[5] - REGION[2] - 1) for a in range(ANCHORS)]
        offsets = linear(s, f"{d}.sampling_offsets", grid[q]).view(HEADS, POINTS, 2)
        weights = linear(s, f"{d}.attention_weights", grid[q]).view(HEADS, POINTS).softmax(-1)
        along = linear(s, f"{d}.sampling_offsets_depth", grid[q]).view(HEADS, POINTS) if depth is not None else None
        answers = []
        for k, matrix in enumerate(matrices):
            spots = [matrix @ torch.tensor([x, y, z, 1.0], dtype=torch.float64) for z in heights]
            seen = [p[2] > 1e-5 and 0 < p[0] / p[2] < size[1] and 0 < p[1] / p[2] < size[0] for p in spots]
            if not any(seen):
                continue
            values = linear(s, f"{d}.value_proj", maps[k].flatten(1).T).view(high, wide, HEADS, -1)
            heads = []
            for h in range(HEADS):
                total = 0.0
                for p in range(POINTS):
                    spot = spots[p % ANCHORS]
                    u, v = (spot[axis] / spot[2].clamp(min=1e-5) / size[1 - axis] for axis in (0, 1))
                    where = u * wide + offsets[h, p, 0] - 0.5, v * high + offsets[h, p, 1] - 0.5
                    if along is not None and depth is not None:
                        bins = len(depth[k])
                        place = (spot[2] - BOUND[0]) / (BOUND[1] - BOUND[0]) * bins + along[h, p] - 0.5
                        total = total + weights[h, p] * read(values[:, :, h], *where, depth[k], place)
                    else:
                        total = total + weights[h, p] * read(values[:, :, h], *where)
                heads.append(total)
            answers.append(torch.cat(heads))  # type: ignore[arg-type]
        rows.append(sum(answers) / len(answers) if answers else torch.zeros(DIM, dtype=torch.float64))
    return grid + linear(s, f"{n}.output_proj", torch.stack(rows))  # type: ignore[arg-type]


def plain(s: State, features: Tensor, matrices: Tensor, size: tuple[int, int], layers: int, *, deep: bool
          ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Maps of K cameras → heatmap logits and box codes."""
    maps = group_norm(s, "img_neck.1", conv(s, "img_neck.0", features))
    depth = depth_distribution(s, maps) if deep else None
    pos = torch.cat([s["row_embedding"][:, None].expand(-1, COLUMNS, -1),
                     s["column_embedding"][None].expand(ROWS, -1, -1)], -1).flatten(0, 1)  # fmt: skip
    grid = s["bev_embedding"]
    for i in range(layers):
        n = f"layers.{i}"
        grid = layer_norm(s, f"{n}.norms.0", self_attention(s, f"{n}.attentions.0", grid, pos))
        grid = lifting(s, f"{n}.attentions.1", grid, maps, matrices, size, depth)
        grid = layer_norm(s, f"{n}.norms.1", grid)
        hidden = linear(s, f"{n}.ffn.3", linear(s, f"{n}.ffn.0", grid).clamp(min=0))
        grid = layer_norm(s, f"{n}.norms.2", grid + hidden)
    plane = grid.T.view(1, DIM, ROWS, COLUMNS)
    plane = group_norm(s, "head_conv.1", conv(s, "head_conv.0", plane, padding=1)).clamp(min=0)
    return conv(s, "heatmap", plane, padding=1), conv(s, "boxes", plane, padding=1)


@pytest.mark.parametrize("kind", ["dfa3d", "dfa2d"])
def test_the_whole_network_equals_the_plain_one(kind: Any) -> None:
    torch.manual_seed(0)
    net = BEVFormerDFA3D(
        lifting=kind, backbone="test_resnet", dim=DIM, num_heads=HEADS, num_points=POINTS, num_layers=2,
        bev_size=(ROWS, COLUMNS), num_anchors=ANCHORS, region=REGION, depth_bound=BOUND, depth_blocks=1,
    ).double().eval()  # fmt: skip
    for name, value in net.state_dict().items():
        if "img_backbone" not in name and value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "running_var" in name else torch.randn_like(value) * 0.3)
    image = torch.rand(1, 2, 3, 64, 96, dtype=torch.float64)
    # Two cameras of the ring whose pictures are as large as ours.
    shrink = torch.diag(torch.tensor([96 / 160, 64 / 96, 1.0, 1.0], dtype=torch.float64))
    matrices = shrink @ torch.tensor(LIDAR2IMG[:2], dtype=torch.float64)
    features = net.img_backbone(image[0] * 4 - 2)[-1]
    heat, boxes = plain(net.state_dict(keep_vars=True), features, matrices, (64, 96), 2, deep=kind == "dfa3d")
    out = net(image, matrices[None])
    torch.testing.assert_close(out.heatmap, heat, atol=1e-6, rtol=1e-6)  # pillars are float32
    torch.testing.assert_close(out.boxes, boxes, atol=1e-6, rtol=1e-6)
    assert heat.detach().std() > 1e-2
    draws = torch.randn_like(heat), torch.randn_like(boxes)
    wanted = dict(net.named_parameters())
    gradients = [
        torch.autograd.grad((a * draws[0]).sum() + (b * draws[1]).sum(), list(wanted.values()), allow_unused=True)
        for a, b in ((out.heatmap, out.boxes), (heat, boxes))
    ]
    for name, actual, expected in zip(wanted, *gradients, strict=True):
        assert (actual is None) == (expected is None), name
        if actual is not None:
            assert (actual - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max())), name
