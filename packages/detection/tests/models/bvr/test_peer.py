"""BVR in a RetinaNet beside a plain network: the paper's equations on a state dict, without a block of ours.

Paper: RelationNet++, NeurIPS 2020, arXiv 2010.15831, section 3; what the text leaves open (positions, the logarithm
after the interpolation, lookup at 1.0025 times the offset) as in the official code. The backbone is timm's on both
sides.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detection.models.bvr.hosts import build_detector

State = dict[str, Tensor]
STRIDES, HEADS, BASE = (8, 16, 32, 64), 4, 40


def conv(s: State, name: str, x: Tensor, **options: Any) -> Tensor:
    return F.conv2d(x, s[f"{name}.weight"], s.get(f"{name}.bias"), **options)


def group_norm(s: State, name: str, x: Tensor) -> Tensor:
    """8 channels in a group, as 32 groups of 256."""
    parts = x.unflatten(1, (-1, 8))
    centered = parts - parts.mean((2, 3, 4), keepdim=True)
    normed = (centered / (centered.square().mean((2, 3, 4), keepdim=True) + 1e-5).sqrt()).flatten(1, 2)
    return normed * s[f"{name}.weight"].view(-1, 1, 1) + s[f"{name}.bias"].view(-1, 1, 1)


def pyramid(s: State, maps: list[Tensor]) -> list[Tensor]:
    """Laterals, top-down sums, 3×3 convolutions; the last level by stride 2 from the backbone's last map."""
    f = "backbone.fpn"
    sums = [group_norm(s, f"{f}.inner_blocks.{i}.1", conv(s, f"{f}.inner_blocks.{i}.0", x)) for i, x in enumerate(maps)]
    for i in (len(maps) - 2, len(maps) - 3):
        sums[i] = sums[i] + F.interpolate(sums[i + 1], size=sums[i].shape[2:], mode="nearest")
    levels = [group_norm(s, f"{f}.layer_blocks.{i}.1", conv(s, f"{f}.layer_blocks.{i}.0", x, padding=1))
              for i, x in enumerate(sums)]  # fmt: skip
    last = conv(s, f"{f}.extra_blocks.convs.0.0", maps[-1], stride=2, padding=1)
    return [*levels, group_norm(s, f"{f}.extra_blocks.convs.0.1", last)]


def layers(s: State, names: list[tuple[str, str]], x: Tensor) -> Tensor:
    for convolution, norm in names:
        x = group_norm(s, norm, conv(s, convolution, x, padding=1)).clamp(min=0)
    return x


def tower(s: State, kind: str, x: Tensor) -> Tensor:
    n = f"head.bbox_head.head.{kind}_head.conv"
    return layers(s, [(f"{n}.{i}.0", f"{n}.{i}.1") for i in range(4)], x)


def keypoints(s: State, kind: str, levels: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Heatmap logits and offsets of one kind of point on every level."""
    n, found = "head.keypoint_head", []
    for x in levels:
        x = layers(s, [(f"{n}.keypoint_layers.{kind}.{i}.conv", f"{n}.keypoint_layers.{kind}.{i}.gn") for i in (0, 1)],
                   x)  # fmt: skip
        parts = []
        for branch in ("cls", "offset"):
            b = f"{n}.keypoint_{branch}_heads.{kind}"
            own = layers(s, [(f"{b}.0.conv", f"{b}.0.gn")], x)
            parts.append(conv(s, f"{b}.1", own, padding=1))
        found.append((parts[0], parts[1]))
    return found


def centers(x: Tensor, stride: int) -> Tensor:
    rows, columns = x.shape[2:]
    y, x_ = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([x_.flatten(), y.flatten()], 1).double() * stride + stride // 2


def keys(maps: list[tuple[Tensor, Tensor]], source: list[Tensor], total: int) -> tuple[Tensor, Tensor]:
    """Features and positions of the best peaks of one picture: 20 of a level, then ``total``."""
    rows: list[tuple[float, Tensor, Tensor]] = []
    for (logits, offsets), features, stride in zip(maps, source, STRIDES, strict=True):
        heat = logits[0].sigmoid()
        place = centers(logits, stride)
        entries = []
        for k in range(len(heat)):
            for cell in range(heat[k].numel()):
                y, x = divmod(cell, heat.shape[2])
                around = heat[k, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
                score = heat[k, y, x].item() if heat[k, y, x] == around.max() else 0.0
                entries.append((score, features[0, :, y, x], place[cell] + offsets[0, :, y, x] * stride))
        rows += sorted(entries, key=lambda entry: -entry[0])[:20]
    best = sorted(rows, key=lambda entry: -entry[0])[:total]
    assert best[-1][0] > 0
    return torch.stack([entry[1] for entry in best]), torch.stack([entry[2] for entry in best])


def geometry(s: State, name: str, offsets: Tensor) -> Tensor:
    """(N, K, 2) in units → (heads, N, K): the table is the 1×1 convolution of a sine map, read bilinearly."""
    weight, bias = (
        s[f"{name}.embedding_transform.0.conv.weight"].flatten(1),
        s[f"{name}.embedding_transform.0.conv.bias"],
    )
    dim = weight.shape[1]
    grid = torch.arange(-(BASE // 2), BASE // 2 + 1).double()
    waves = grid[:, None] / 1000 ** (4 * torch.arange(dim // 4).double() / dim)
    coded = torch.cat([waves.sin(), waves.cos()], 1).float().double()  # kept in float32
    table = (
        torch.cat([coded[None].expand(BASE + 1, -1, -1), coded[:, None].expand(-1, BASE + 1, -1)], -1) @ weight.T + bias
    )
    place = ((offsets / (BASE / 2) + 1) * (BASE + 1) / 2 - 0.5).clamp(0, BASE)
    low = place.floor().long().clamp(max=BASE - 1)
    share = place - low
    read = sum(
        table[low[..., 1] + j, low[..., 0] + i]
        * (share[..., :1] if i else 1 - share[..., :1])
        * (share[..., 1:] if j else 1 - share[..., 1:])
        for j in (0, 1)
        for i in (0, 1)
    )
    return read.clamp(min=1e-6).log().permute(2, 0, 1)  # type: ignore[union-attr]


def bridged(s: State, name: str, levels: list[Tensor], sets: list[tuple[Tensor, Tensor]], *, own: bool) -> list[Tensor]:
    out = []
    for x, stride in zip(levels, STRIDES, strict=True):
        query, place = x[0].flatten(1).T, centers(x, stride)
        total, dim = query, query.shape[1]
        for g, (features, positions) in enumerate(sets):
            weight, bias = s[f"{name}.decoder.{g}.in_proj_weight"], s[f"{name}.decoder.{g}.in_proj_bias"]
            q = query @ weight[:dim].T + bias[:dim]
            k, v = (features @ weight[i : i + dim].T + bias[i : i + dim] for i in (dim, 2 * dim))
            table = f"{name}.relative_positional_encoding" + (f".{g}" if own else "")
            bias = geometry(s, table, (positions[None] - place[:, None]) / STRIDES[0])
            width, heads = dim // HEADS, []
            for h in range(HEADS):
                part = slice(h * width, (h + 1) * width)
                heads.append((q[:, part] @ k[:, part].T / width**0.5 + bias[h]).softmax(-1) @ v[:, part])
            mixed = torch.cat(heads, 1) @ s[f"{name}.decoder.{g}.out_proj.weight"].T
            total = total + mixed + s[f"{name}.decoder.{g}.out_proj.bias"]
        out.append(total.clamp(min=0).T.view_as(x))
    return out


def flat(maps: list[Tensor], width: int) -> Tensor:
    return torch.cat([x.unflatten(1, (-1, width)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in maps], 1)


@pytest.mark.parametrize("tables", ["towers", "sets"])
def test_the_whole_head_equals_the_plain_network(tables: Any) -> None:
    torch.manual_seed(0)
    net: Any = build_detector("retinanet", 3, backbone="test_resnet", channels=32, strides=STRIDES, num_heads=HEADS,
                              base_size=BASE, geometry=tables).double().eval()  # fmt: skip
    for name, parameter in net.named_parameters():
        if "backbone.body" not in name:
            torch.nn.init.normal_(parameter, std=0.5 if "offset_heads" in name else 0.2)
    net.head.total = 10  # so small maps have no fifty peaks
    s = net.state_dict(keep_vars=True)
    image = torch.randn(1, 3, 96, 128, dtype=torch.float64, requires_grad=True)
    levels = pyramid(s, list(net.backbone.body(image)))
    cls, reg = ([tower(s, kind, x) for x in levels] for kind in ("classification", "regression"))
    points = {kind: keypoints(s, kind, levels) for kind in ("top_left_corner", "bottom_right_corner", "center")}
    corners = [keys(points[kind], reg, 10) for kind in ("top_left_corner", "bottom_right_corner")]
    middle = [keys(points["center"], cls, 10)]
    cls = bridged(s, "head.cls_transformer", cls, middle, own=tables == "sets")
    reg = bridged(s, "head.reg_transformer", reg, corners, own=tables == "sets")
    h = "head.bbox_head.head"
    logits = flat([conv(s, f"{h}.classification_head.cls_logits", x, padding=1) for x in cls], 3)
    boxes = flat([conv(s, f"{h}.regression_head.bbox_reg", x, padding=1) for x in reg], 4)
    features = list(net.backbone(image).values())
    out = net.head(features)
    for ours, expected in zip(features, levels, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(out["cls_logits"], logits, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(out["bbox_regression"], boxes, atol=1e-9, rtol=1e-9)
    assert logits.detach().std() > 0.1
    draws = torch.randn_like(logits), torch.randn_like(boxes)
    wanted = {"image": image, **dict(net.named_parameters())}
    gradients = [
        torch.autograd.grad((a * draws[0]).sum() + (b * draws[1]).sum(), list(wanted.values()), allow_unused=True)
        for a, b in ((out["cls_logits"], out["bbox_regression"]), (logits, boxes))
    ]
    for name, actual, expected in zip(wanted, *gradients, strict=True):
        assert (actual is None) == (expected is None), name
        if actual is not None:
            assert (actual - expected).abs().max() <= 1e-8 * max(1.0, float(expected.abs().max())), name
    assert sum(gradient is not None for gradient in gradients[0]) > 100
