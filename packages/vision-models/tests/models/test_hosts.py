"""Whole networks of agent and InLine attention beside plain ones, written from the papers over the official names.

The plain networks are functions of a state dict in the official layout; they share no code with ours. Attention has
all its scores in full; windows and stripes are masks over the whole map.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_core.weights import official_names
from vision_models import PVT, CSwin, DeiT, Swin, load_official

Weights = Mapping[str, Tensor]
Grid = tuple[int, int]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (var + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def conv(w: Weights, name: str, x: Tensor, **options: Any) -> Tensor:
    return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), **options)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).mT


def mlp(w: Weights, name: str, x: Tensor) -> Tensor:
    return linear(w, f"{name}.fc2", F.gelu(linear(w, f"{name}.fc1", x)))


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None, seen: Tensor | None = None
) -> Tensor:
    """bias (H, N, M), seen (N, M)."""
    outs = []
    for h, (a, b, c) in enumerate(zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True)):
        scores = a @ b.mT * a.shape[-1] ** -0.5
        scores = scores if bias is None else scores + bias[h]
        scores = scores if seen is None else scores.masked_fill(~seen, float("-inf"))
        outs.append(scores.softmax(-1) @ c)
    return torch.cat(outs, -1)


def agent_attention(
    w: Weights, p: str, q: Tensor, k: Tensor, v: Tensor, grid: Grid, heads: int, kv_grid: Grid | None = None
) -> Tensor:
    before, count = q.shape[1] - grid[0] * grid[1], w[f"{p}an_bias"].shape[1]
    maps = q[:, before:].mT.unflatten(2, grid)
    agents = tokens(F.adaptive_avg_pool2d(maps, round(count**0.5)))

    def stretched(small: str, lines: Tensor, size: Grid) -> Tensor:
        return (
            F.interpolate(w[p + small], size, mode="bilinear") + F.interpolate(lines, size, mode="bilinear")
        ).flatten(2)

    collect = stretched("an_bias", (w[f"{p}ah_bias"] + w[f"{p}aw_bias"])[0], kv_grid or grid)
    lines = (w[f"{p}ha_bias"] + w[f"{p}wa_bias"])[0].permute(0, 3, 1, 2)
    read = stretched("na_bias", lines, grid).mT
    if before:
        collect, read = torch.cat([w[f"{p}ac_bias"][0], collect], 2), torch.cat([w[f"{p}ca_bias"][0], read], 1)
    out = softmax_attention(q, agents, softmax_attention(agents, k, v, heads, collect), heads, read)
    values = v[:, before:].mT.unflatten(2, kv_grid or grid)
    values = values if kv_grid is None else F.interpolate(values, grid, mode="bilinear")
    name = f"{p}dwc" if f"{p}dwc.weight" in w else f"{p}get_v"
    return out + F.pad(tokens(conv(w, name, values, padding=1, groups=values.shape[1])), (0, 0, before, 0))


def inline_attention(
    w: Weights, p: str, q: Tensor, k: Tensor, v: Tensor, grid: Grid, heads: int, source: Tensor
) -> Tensor:
    count, before = q.shape[1], q.shape[1] - grid[0] * grid[1]
    outs = []
    for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        scores = a @ b.mT * a.shape[-1] ** -0.5 / count
        outs.append((scores - scores.mean(-1, keepdim=True) + 1 / count) @ c)
    out = torch.cat(outs, -1)
    hidden = source.mean(1)[:, :, None]
    hidden = F.gelu(F.conv1d(hidden, w[f"{p}residual.0.weight"], w[f"{p}residual.0.bias"], groups=heads))
    kernels = F.conv1d(hidden, w[f"{p}residual.2.weight"], w[f"{p}residual.2.bias"], groups=heads)
    values = v[:, before:].mT.unflatten(2, grid)
    channels = values.shape[1]
    local = torch.cat(
        [
            F.conv2d(image[None], kernel.view(channels, 1, 3, 3), padding=1, groups=channels)
            for image, kernel in zip(values, kernels, strict=True)
        ]
    )
    if f"{p}get_v.weight" in w:
        local = local + conv(w, f"{p}get_v", values, padding=1, groups=channels)
    return out + F.pad(tokens(local), (0, 0, before, 0))


def deit(w: Weights, x: Tensor, kinds: list[list[str]], heads: list[int]) -> Tensor:
    x = conv(w, "patch_embed.proj", x, stride=16)
    grid = (x.shape[2], x.shape[3])
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), tokens(x)], 1) + w["pos_embed"]
    for i, kind in enumerate(kinds[0]):
        p = f"blocks.{i}."
        y = norm(w, f"{p}norm1", x, 1e-6)
        q, k, v = linear(w, f"{p}attn.qkv", y).chunk(3, -1)
        if kind == "agent":
            out = agent_attention(w, f"{p}attn.", q, k, v, grid, heads[0])
        elif kind == "inline":
            out = inline_attention(w, f"{p}attn.", q, k, v, grid, heads[0], y)
        else:
            out = softmax_attention(q, k, v, heads[0])
        x = x + linear(w, f"{p}attn.proj", out)
        x = x + mlp(w, f"{p}mlp", norm(w, f"{p}norm2", x, 1e-6))
    return linear(w, "head", norm(w, "norm", x, 1e-6)[:, 0])


def pvt(
    w: Weights, x: Tensor, kinds: list[list[str]], heads: list[int], sr: tuple[int, ...], agent_sr: tuple[int, ...]
) -> Tensor:
    for i, blocks in enumerate(kinds):
        patch = 2 if i else 4
        x = conv(w, f"patch_embed{i + 1}.proj", x, stride=patch)
        grid = (x.shape[2], x.shape[3])
        x = norm(w, f"patch_embed{i + 1}.norm", tokens(x), 1e-5) + w[f"pos_embed{i + 1}"]
        for j, kind in enumerate(blocks):
            p = f"block{i + 1}.{j}."
            y = norm(w, f"{p}norm1", x, 1e-6)
            ratio = {"agent": agent_sr[i], "inline": 1, "softmax": sr[i]}[kind]
            small, kv_grid = y, None
            if ratio > 1:
                maps = conv(w, f"{p}attn.sr", y.mT.unflatten(2, grid), stride=ratio)
                small, kv_grid = norm(w, f"{p}attn.norm", tokens(maps), 1e-5), (maps.shape[2], maps.shape[3])
            q, (k, v) = linear(w, f"{p}attn.q", y), linear(w, f"{p}attn.kv", small).chunk(2, -1)
            if kind == "agent":
                out = agent_attention(w, f"{p}attn.", q, k, v, grid, heads[i], kv_grid)
            elif kind == "inline":
                out = inline_attention(w, f"{p}attn.", q, k, v, grid, heads[i], y)
            else:
                out = softmax_attention(q, k, v, heads[i])
            x = x + linear(w, f"{p}attn.proj", out)
            x = x + mlp(w, f"{p}mlp", norm(w, f"{p}norm2", x, 1e-6))
        x = x.mT.unflatten(2, grid)
    return linear(w, "head", x.mean((2, 3)))


def swin(w: Weights, x: Tensor, kinds: list[list[str]], heads: list[int]) -> Tensor:
    x = conv(w, "patch_embed.proj", x, stride=4)
    for i, blocks in enumerate(kinds):
        grid = (x.shape[2], x.shape[3])
        x = tokens(x) if i else norm(w, "patch_embed.norm", tokens(x), 1e-5)
        for j, kind in enumerate(blocks):
            p = f"layers.{i}.blocks.{j}."
            y = norm(w, f"{p}norm1", x, 1e-5)
            q, k, v = linear(w, f"{p}attn.qkv", y).chunk(3, -1)
            if kind == "agent":
                out = agent_attention(w, f"{p}attn.", q, k, v, grid, heads[i])
            elif kind == "inline":
                out = inline_attention(w, f"{p}attn.", q, k, v, grid, heads[i], y)
            else:
                out = _windows(w[f"{p}attn.relative_position_bias_table"], q, k, v, grid, heads[i], shifted=j % 2 == 1)
            x = x + linear(w, f"{p}attn.proj", out)
            x = x + mlp(w, f"{p}mlp", norm(w, f"{p}norm2", x, 1e-5))
        if i + 1 < len(kinds):
            maps = F.pad(x.mT.unflatten(2, grid), (0, grid[1] % 2, 0, grid[0] % 2))
            four = torch.cat([maps[:, :, a::2, b::2] for b in (0, 1) for a in (0, 1)], 1)
            x = linear(
                w, f"layers.{i}.downsample.reduction", norm(w, f"layers.{i}.downsample.norm", tokens(four), 1e-5)
            )
            x = x.mT.unflatten(2, (four.shape[2], four.shape[3]))
    return linear(w, "head", norm(w, "norm", x, 1e-5).mean(1))


def _windows(table: Tensor, q: Tensor, k: Tensor, v: Tensor, grid: Grid, heads: int, *, shifted: bool) -> Tensor:
    """Token i sees token j of its window, unless the shift brought them together from opposite borders."""
    side = (round(len(table) ** 0.5) + 1) // 2
    shift = side // 2 if shifted and min(grid) > side else 0
    y, x = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    rows, columns = (y - shift) % grid[0], (x - shift) % grid[1]
    window = rows // side * grid[1] + columns // side
    region = 2 * (y < shift).long() + (x < shift).long()
    seen = (window[:, None] == window) & (region[:, None] == region)
    down = (rows[:, None] - rows).clamp(1 - side, side - 1) + side - 1
    across = (columns[:, None] - columns).clamp(1 - side, side - 1) + side - 1
    return softmax_attention(q, k, v, heads, table[down * (2 * side - 1) + across].permute(2, 0, 1), seen)


def cswin(w: Weights, x: Tensor, kinds: list[list[str]], heads: list[int], split: tuple[int, ...]) -> Tensor:
    for i, blocks in enumerate(kinds):
        if i:
            x, name = conv(w, f"merge{i}.conv", x, stride=2, padding=1), f"merge{i}.norm"
        else:
            x, name = conv(w, "stage1_conv_embed.0", x, stride=4, padding=2), "stage1_conv_embed.2"
        grid = (x.shape[2], x.shape[3])
        x = norm(w, name, tokens(x), 1e-5)
        for j, kind in enumerate(blocks):
            p = f"stage{i + 1}.{j}."
            q, k, v = linear(w, f"{p}qkv", norm(w, f"{p}norm1", x, 1e-5)).chunk(3, -1)
            if kind == "agent":
                out = agent_attention(w, f"{p}attns.0.", q, k, v, grid, heads[i])
            elif kind == "inline":
                out = inline_attention(w, f"{p}attns.0.", q, k, v, grid, heads[i], x)
            elif i == len(kinds) - 1:
                out = _stripes(w, f"{p}attns.0", q, k, v, grid, heads[i], *grid)
            else:
                halves = zip(*(part.chunk(2, -1) for part in (q, k, v)), strict=True)
                sides = ((grid[0], split[i]), (split[i], grid[1]))
                parts = [
                    _stripes(w, f"{p}attns.{b}", *half, grid, heads[i] // 2, *side)
                    for b, (half, side) in enumerate(zip(halves, sides, strict=True))
                ]
                out = torch.cat(parts, -1)
            x = x + linear(w, f"{p}proj", out)
            x = x + mlp(w, f"{p}mlp", norm(w, f"{p}norm2", x, 1e-5))
        x = x.mT.unflatten(2, grid)
    return linear(w, "head", norm(w, "norm", tokens(x), 1e-5).mean(1))


def _stripes(
    w: Weights, p: str, q: Tensor, k: Tensor, v: Tensor, grid: Grid, heads: int, rows: int, columns: int
) -> Tensor:
    y, x = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    stripe = (y // rows * grid[1] + x // columns).flatten()
    out = softmax_attention(q, k, v, heads, seen=stripe[:, None] == stripe)
    for s in stripe.unique():  # a convolution that does not see other stripes
        inside = (stripe == s).view(grid)
        values = v.mT.unflatten(2, grid) * inside
        out = out + tokens(inside * conv(w, f"{p}.get_v", values, padding=1, groups=values.shape[1]))
    return out


# host: class, options, plain network and its further arguments
A, I, S = "agent", "inline", "softmax"
HOSTS: dict[str, tuple[Any, dict[str, Any], Any, tuple[Any, ...]]] = {
    "deit": (DeiT, {"depth": 3, "embed_dim": 24, "num_heads": 3, "agents": 4, "img_size": 48}, deit, ()),
    "pvt": (
        PVT,
        {
            "depths": (1, 2, 1, 1),
            "embed_dims": (12, 16, 24, 32),
            "num_heads": (1, 2, 2, 4),
            "mlp_ratios": (2, 2, 1, 1),
            "agents": (9, 4, 4, 1),
            "img_size": 64,
            "sr_ratios": (4, 2, 1, 1),
            "agent_sr_ratios": (4, 2, 1, 1),
        },
        pvt,
        ((4, 2, 1, 1), (4, 2, 1, 1)),
    ),
    "swin": (
        Swin,
        {"depths": (1, 2, 2, 1), "embed_dim": 12, "num_heads": (1, 2, 2, 4), "agents": (9, 4, 4, 1), "img_size": 56},
        swin,
        (),
    ),
    "cswin": (
        CSwin,
        {
            "depths": (1, 1, 2, 1),
            "embed_dim": 12,
            "num_heads": (2, 2, 4, 4),
            "agents": (9, 4, 4, 1),
            "split": (1, 2, 2),
            "img_size": 64,
        },
        cswin,
        ((1, 2, 2),),
    ),
}
KINDS: dict[str, list[Any]] = {
    "deit": [(A, A, S), (I, I, S)],
    "pvt": [(A, A, S, A), (S, S, A, S), (I, (S, I), I, S)],
    "swin": [(A, A, (A, S), S), (S, S, S, S), (I, (I, S), S, I)],
    "cswin": [(A, A, S, S), (S, S, (I, S), A), (I, I, S, S)],
}


def official_state(model: Any) -> dict[str, Tensor]:
    """Random weights under the official names and in the official shapes."""
    own, (layout,) = model.state_dict(), model.key_map
    state = {}
    for official, ours in official_names(model, model.key_map[layout]).items():
        shape = list(own[ours].shape)
        for table, axis in {"ah_bias": 3, "aw_bias": 2, "ha_bias": 2, "wa_bias": 1}.items():
            if official.endswith(table):
                shape.insert(axis, 1)
                shape.insert(0, 1)
        scale = 1.2 * (own[ours][0].numel() or 1) ** -0.5 if own[ours].ndim > 1 else 0.3
        value = torch.randn(shape, dtype=torch.float64) * (0.5 if "bias" in official else scale)
        state[official] = value + ("norm" in official and official.endswith("weight"))
    return state


@pytest.mark.parametrize(("host", "kinds"), [(host, kinds) for host in HOSTS for kinds in KINDS[host]], ids=str)
def test_logits_and_their_gradient_equal_the_plain_network(host: str, kinds: Any) -> None:
    build, options, plain, further = HOSTS[host]
    model = build(**options, attention=kinds, num_classes=7).double().eval()
    state = official_state(model)
    load_official(model, state)
    depths = options.get("depths", (1,) * options.get("depth", 1))
    stages = [list(kinds)] if host == "deit" else [
        [kind] * depth if isinstance(kind, str) else list(kind) for kind, depth in zip(kinds, depths, strict=True)
    ]  # fmt: skip
    heads = options["num_heads"]
    x = torch.randn(2, 3, options["img_size"], options["img_size"], dtype=torch.float64)
    results: list[list[Tensor]] = []
    for net in (model, lambda image: plain(state, image, stages, [heads] if host == "deit" else list(heads), *further)):
        image = x.clone().requires_grad_()
        logits = net(image)
        results.append([logits.detach(), *torch.autograd.grad(logits.square().sum(), image)])
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() <= 1e-9 * float(expected.abs().max())
    assert all(isinstance(value, Tensor) for value in state.values())


def test_every_parameter_of_the_plain_networks_matters() -> None:
    """Or a mutation of ours could hide behind weights that neither network reads."""
    build, options, _, _ = HOSTS["pvt"]
    model: nn.Module = build(**options, attention="agent", num_classes=7).double()
    model(torch.randn(2, 3, 64, 64, dtype=torch.float64)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
