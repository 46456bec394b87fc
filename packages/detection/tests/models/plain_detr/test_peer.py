"""Plain-DETR and its Swin V2 beside plain networks: the papers' equations on a state dict, without a block of ours.

Swin V2: Liu et al., CVPR 2022, arXiv 2111.09883, eq. 2 to 4. Plain-DETR: arXiv 2308.01904, section 3 and appendix; what
the text leaves open (ranking by the first class, anchors near the border, 1e-6 and 5e-5) as in the official code.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detection.models import create_model

State = dict[str, Tensor]
SWIN = {"depths": (1, 2, 1, 2), "heads": (1, 2, 2, 4), "window": 4, "pretrained": (4, 4, 4, 2), "whole_map_from": 3}


def linear(s: State, name: str, x: Tensor) -> Tensor:
    out = x @ s[f"{name}.weight"].T
    return out + s[f"{name}.bias"] if f"{name}.bias" in s else out


def norm(s: State, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt() * s[f"{name}.weight"] + s[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def cosine_attention(s: State, name: str, x: Tensor, cells: Tensor, allowed: Tensor, heads: int, before: int) -> Tensor:
    """(N, C) at integer cells (N, 2); pairs that are not ``allowed`` lose 100."""
    bias = torch.cat([s[f"{name}.q_bias"], torch.zeros_like(s[f"{name}.q_bias"]), s[f"{name}.v_bias"]])
    q, k, v = (x @ s[f"{name}.qkv.weight"].T + bias).chunk(3, -1)
    offset = (cells[:, None] - cells[None]).to(x.dtype) / (before - 1) * 8
    coded = offset.sign() * (offset.abs() + 1).log2() / 3
    table = linear(s, f"{name}.cpb_mlp.2", linear(s, f"{name}.cpb_mlp.0", coded).clamp(min=0))
    mixed = []
    width = x.shape[-1] // heads
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        a, b = (t[:, part] / (t[:, part].norm(dim=-1, keepdim=True) + 5e-5) for t in (q, k))
        scale = s[f"{name}.logit_scale"][h].clamp(max=math.log(100)).exp()
        score = a @ b.T * scale + 16 * torch.sigmoid(table[..., h]) - 100.0 * ~allowed
        mixed.append(score.softmax(-1) @ v[:, part])
    return linear(s, f"{name}.proj", torch.cat(mixed, -1))


def swin_v2(s: State, name: str, image: Tensor) -> Tensor:
    """(3, Y, X) → (y, x, C)."""
    image = F.pad(image, (0, -image.shape[2] % 4, 0, -image.shape[1] % 4))
    x = F.conv2d(image[None], s[f"{name}.patch_embed.proj.weight"], s[f"{name}.patch_embed.proj.bias"], stride=4)[0]
    x = norm(s, f"{name}.patch_embed.norm", x.permute(1, 2, 0), 1e-6)
    for stage, depth in enumerate(SWIN["depths"]):  # type: ignore[arg-type]
        for i in range(depth):
            block = f"{name}.layers.{stage}.blocks.{i}"
            whole = stage >= SWIN["whole_map_from"]  # type: ignore[operator]
            mixed = windows(s, f"{block}.attn", x, stage, None if whole else (SWIN["window"] // 2 if i % 2 else 0))  # type: ignore[operator]
            x = x + norm(s, f"{block}.norm1", mixed, 1e-6)
            hidden = linear(s, f"{block}.mlp.fc2", gelu(linear(s, f"{block}.mlp.fc1", x)))
            x = x + norm(s, f"{block}.norm2", hidden, 1e-6)
        if stage < 3:
            down = f"{name}.layers.{stage}.downsample"
            x = F.pad(x, (0, 0, 0, x.shape[1] % 2, 0, x.shape[0] % 2))
            four = torch.cat([x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]], -1)
            x = norm(s, f"{down}.norm", linear(s, f"{down}.reduction", four), 1e-6)
    return norm(s, f"{name}.norm3", x, 1e-6)


def windows(s: State, name: str, x: Tensor, stage: int, shift: int | None) -> Tensor:
    """Each window of the padded and shifted map on its own; ``None`` is one window over all of it."""
    heads, before = SWIN["heads"][stage], SWIN["pretrained"][stage]  # type: ignore[index]
    rows, columns, width = x.shape
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).view(-1, 2)
    if shift is None:
        everything = torch.ones(len(grid), len(grid), dtype=torch.bool)
        return cosine_attention(s, name, x.reshape(-1, width), grid, everything, heads, before).view_as(x)
    side: int = SWIN["window"]  # type: ignore[assignment]
    padded = F.pad(x, (0, 0, 0, -columns % side, 0, -rows % side))
    tall, wide = padded.shape[:2]
    out = torch.empty_like(padded)
    for top in range(0, tall, side):
        for left in range(0, wide, side):
            # Rows of the window in the map before the shift; those that came round are strangers to the others.
            r = torch.arange(top, top + side) + shift
            c = torch.arange(left, left + side) + shift
            cell = torch.stack(torch.meshgrid(r, c, indexing="ij"), -1).view(-1, 2)
            stranger = (cell >= torch.tensor([tall, wide])).long()
            allowed = (stranger[:, None] == stranger[None]).all(-1)
            place = cell % torch.tensor([tall, wide])
            tokens = padded[place[:, 0], place[:, 1]]
            out[place[:, 0], place[:, 1]] = cosine_attention(s, name, tokens, cell, allowed, heads, before)
    return out[:rows, :columns]


def sine(values: Tensor, channels: int) -> Tensor:
    """(N, D) → (N, D·channels)."""
    out = []
    for d in range(values.shape[1]):
        for c in range(channels):
            angle = values[:, d] * 2 * math.pi / 10000 ** (2 * (c // 2) / channels)
            out.append(angle.cos() if c % 2 else angle.sin())
    return torch.stack(out, 1)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """(N, C), (M, C), (M, C) and (heads, N, M) → (N, C)."""
    width, mixed = q.shape[1] // heads, []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        score = q[:, part] @ k[:, part].T / math.sqrt(width)
        mixed.append((score + bias[h] if bias is not None else score).softmax(-1) @ v[:, part])
    return torch.cat(mixed, 1)


def box_bias(s: State, name: str, boxes: Tensor, rows: int, columns: int, stride: int, kind: str) -> Tensor | None:
    """BoxRPB, eq. 2 and 3: from all four edges of cxcywh boxes in pixels to every cell; (heads, N, rows·columns)."""
    if kind == "none":
        return None
    parts = []
    for axis, mlp, count in ((0, "cpb_mlp1", columns), (1, "cpb_mlp2", rows)):
        place = (torch.arange(count) + 0.5) * stride
        low, high = boxes[:, axis] - boxes[:, 2 + axis] / 2, boxes[:, axis] + boxes[:, 2 + axis] / 2
        offset = torch.stack([low[:, None] - place, high[:, None] - place], -1)
        if kind == "log":
            offset = offset.sign() * (offset.abs() + 1).log2() / 3
        parts.append(linear(s, f"{name}.{mlp}.2", linear(s, f"{name}.{mlp}.0", offset).clamp(min=0)))
    x, y = parts
    return (y[:, :, None] + x[:, None]).flatten(1, 2).permute(2, 0, 1)


def moved(boxes: Tensor, deltas: Tensor, limit: Tensor) -> Tensor:
    """Faster R-CNN's deltas on cxcywh boxes, cut off at the picture."""
    center = boxes[:, :2] + boxes[:, 2:] * deltas[:, :2]
    most = math.log(1000 / 16)
    half = boxes[:, 2:] * deltas[:, 2:].clamp(-most, most).exp() / 2
    low, high = (center - half).clamp(min=0).minimum(limit), (center + half).clamp(min=0).minimum(limit)
    return torch.cat([(low + high) / 2, high - low], 1)


def logit(p: Tensor) -> Tensor:
    p = p.clamp(0, 1)
    return (p.clamp(min=1e-5) / (1 - p).clamp(min=1e-5)).log()


def head(s: State, name: str, x: Tensor) -> Tensor:
    for layer in (0, 1):
        x = linear(s, f"{name}.layers.{layer}", x).clamp(min=0)
    return linear(s, f"{name}.layers.2", x)


def resample(s: State, name: str, x: Tensor, steps: int) -> Tensor:
    """Maps (C, y, x) by 2 for each step: up if positive, down if negative; layer norm and GELU between."""
    for step in range(abs(steps)):
        if step:
            x = gelu(norm(s, f"{name}.{3 * step - 2}.ln", x.permute(1, 2, 0)).permute(2, 0, 1))
        convolve = F.conv_transpose2d if steps > 0 else F.conv2d
        x = convolve(x[None], s[f"{name}.{3 * step}.weight"], s[f"{name}.{3 * step}.bias"], stride=2)[0]
    return x


# Whole: a second network, read beside the paper from top to bottom.
def plain_detr(s: State, image: Tensor, o: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """(3, Y, X) in [0, 1] → logits (Q, K) and cxcywh boxes (Q, 4) of every layer, and of all proposals."""
    mean, std = (torch.tensor(v, dtype=torch.float32).double() for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    image = (image - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    x = resample(s, "upsample", swin_v2(s, "body", image).permute(2, 0, 1), 5 - int(math.log2(o["stride"])))
    x = F.conv2d(x[None], s["input_proj.0.weight"], s["input_proj.0.bias"])
    memory = F.group_norm(x, 32, s["input_proj.1.weight"], s["input_proj.1.bias"])[0]
    dim, rows, columns = memory.shape
    tokens, stride, pixels = memory.flatten(1).T, o["stride"], o["reparam"]

    anchors, features, limit = [], [], torch.empty(0)
    for level, own in enumerate(o["proposal_strides"]):
        maps = resample(s, f"enc_output_proj.{level}", memory, int(math.log2(stride / own)))
        high, wide = maps.shape[1:]
        if level == 0:
            limit = torch.tensor([wide * own, high * own], dtype=image.dtype)
        y, x = torch.meshgrid(torch.arange(high) + 0.5, torch.arange(wide) + 0.5, indexing="ij")
        size = torch.full((high * wide,), o["proposal_size"] * 2**level)
        scale = (own, own) if pixels else (1 / wide, 1 / high)
        anchors.append(torch.stack([x.flatten() * scale[0], y.flatten() * scale[1], size, size], 1))
        features.append(maps.flatten(1).T)
    anchor = torch.cat(anchors)
    frame = limit.repeat(2) if pixels else torch.ones(4)
    usable = ((anchor > 0.01 * frame) & (anchor < 0.99 * frame)).all(1)
    state = norm(s, "enc_output_norm", linear(s, "enc_output", torch.cat(features) * usable[:, None]))
    last = len([name for name in s if name.startswith("class_embed.") and name.endswith(".bias")]) - 1
    scores, deltas = linear(s, f"class_embed.{last}", state), head(s, f"bbox_embed.{last}", state)
    if pixels:
        boxes = moved(torch.where(usable[:, None], anchor, limit.max()), deltas, limit)
    else:
        boxes = torch.where(usable[:, None], torch.sigmoid(deltas + (anchor / (1 - anchor)).log()), 1.0)
    ranking = scores.amax(1) if o["proposal_classes"] else scores[:, 0]
    chosen = ranking.topk(o["queries"]).indices
    reference = previous = boxes[chosen].detach()

    embedded = norm(s, "pos_trans_norm", linear(s, "pos_trans", sine(reference, dim // 2)))
    position, content = embedded[:, :dim], embedded[:, dim:]
    if o["query_content"] == "learned":
        content = s["query_embed.weight"][: o["queries"]]
    elif o["query_content"] == "features":
        content = state[chosen]
    cell = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).view(-1, 2) + 0.5
    if not pixels:
        cell = cell / (torch.tensor([rows, columns]) + 1e-6)
    key = tokens + sine(cell, dim // 2) + s["level_embed"][0]

    logits, found, q = [], [], content
    for n in range(last):
        layer = f"layers.{n}"
        own = norm(s, f"{layer}.norm2", q)
        weight, bias = s[f"{layer}.self_attn.in_proj_weight"], s[f"{layer}.self_attn.in_proj_bias"]
        a, b = ((own + position) @ weight[i : i + dim].T + bias[i : i + dim] for i in (0, dim))
        value = own @ weight[2 * dim :].T + bias[2 * dim :]
        q = q + linear(s, f"{layer}.self_attn.out_proj", attention(a, b, value, o["num_heads"]))
        cross = f"{layer}.cross_attn"
        shown = reference if pixels else reference * torch.tensor([columns, rows] * 2) * stride
        offsets = box_bias(s, cross, shown, rows, columns, stride, o["position_bias"])
        own = linear(s, f"{cross}.q", norm(s, f"{layer}.norm1", q) + position)
        mixed = attention(own, linear(s, f"{cross}.k", key), linear(s, f"{cross}.v", tokens), o["num_heads"], offsets)
        q = q + linear(s, f"{cross}.proj", mixed)
        own = norm(s, f"{layer}.norm3", q)
        q = q + linear(s, f"{layer}.linear2", linear(s, f"{layer}.linear1", own).clamp(min=0))
        state = norm(s, "final_layer_norm", q)
        delta = head(s, f"bbox_embed.{n}", state)
        # Looking forward twice: a box carries gradients of its own layer and of the one before, the next query of none.
        own, after = (
            moved(box, delta, limit) if pixels else torch.sigmoid(delta + logit(box)) for box in (previous, reference)
        )
        logits.append(linear(s, f"class_embed.{n}", state))
        found.append(own)
        previous, reference = after, after.detach()
    return [*logits, scores], [*found, boxes]


def model(**options: Any) -> Any:
    """Small, in float64, with weights that leave no norm or head at its zero beginning."""
    from detection.models.plain_detr.swin_v2 import SwinV2

    torch.manual_seed(0)
    body = SwinV2(embed_dim=8, depths=SWIN["depths"], num_heads=SWIN["heads"], window=4, mlp_ratio=2.0,  # type: ignore[arg-type]
                  pretrained_window=SWIN["pretrained"], drop_path=0.1)  # type: ignore[arg-type]  # fmt: skip
    net: Any = create_model("test_plain_detr", backbone=body, num_classes=3, queries=6, **options).double().eval()
    for name, parameter in net.named_parameters():
        if parameter.ndim < 2 or "bbox_embed" in name or "cpb_mlp" in name:
            torch.nn.init.normal_(parameter, std=0.1 if "bbox_embed" in name else 0.3)
    return net


OPTIONS: list[dict[str, Any]] = [
    {},
    {"reparam": True, "position_bias": "log", "query_content": "features", "proposal_classes": True},
    {"upsample_stride": 8, "position_bias": "none", "query_content": "positions", "proposal_strides": (8, 32)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["official", "reparam", "wide"])
@pytest.mark.parametrize("size", [(96, 128), (77, 101)])
def test_every_layer_equals_the_plain_network(options: dict[str, Any], size: tuple[int, int]) -> None:
    net = model(**options)
    o = {"stride": 16, "reparam": False, "position_bias": "linear", "query_content": "learned", "queries": 6,
         "proposal_classes": False, "proposal_strides": (8, 16, 32, 64), "num_heads": 2} | options  # fmt: skip
    o |= {"stride": o.pop("upsample_stride", 16), "proposal_size": 50.0 if o["reparam"] else 0.05}
    image = torch.rand(3, *size, dtype=torch.float64, requires_grad=True)
    outputs = net.outputs([image])
    layers = [*outputs["layers"], outputs["proposals"]]
    default, _ = torch.get_default_dtype(), torch.set_default_dtype(torch.float64)
    try:
        logits, boxes = plain_detr(net.state_dict(keep_vars=True), image, o)
    finally:
        torch.set_default_dtype(default)
    assert len(layers) == len(logits) == 3
    for layer, expected, own in zip(layers, logits, boxes, strict=True):
        torch.testing.assert_close(layer["pred_logits"][0], expected, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(layer["pred_boxes"][0], own, atol=1e-8, rtol=1e-9)
    assert boxes[0].detach().std(0).max() > 1e-2  # not all cut off at one border
    draws = [torch.randn_like(x) for x in (*logits, *boxes)]
    found = [layer[name][0] for name in ("pred_logits", "pred_boxes") for layer in layers]
    wanted = {"image": image, **dict(net.named_parameters())}
    gradients = [
        torch.autograd.grad(torch.stack([(x * y).sum() for x, y in zip(side, draws, strict=True)]).sum(),
                            list(wanted.values()), allow_unused=True)
        for side in (found, [*logits, *boxes])
    ]  # fmt: skip
    for name, actual, expected in zip(wanted, *gradients, strict=True):
        assert (actual is None) == (expected is None), name
        if actual is not None:
            assert (actual - expected).abs().max() <= 1e-8 * max(1.0, float(expected.abs().max())), name
