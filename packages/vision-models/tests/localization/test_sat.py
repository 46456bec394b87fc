"""SAT against a plain network over the official names, with attention gated as the paper writes it."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_models.localization import create_localizer, list_localizers
from vision_models.localization.losses import batch_area_loss, normalization_loss, smoothing_kernel
from vision_models.localization.rollout import rollout
from vision_models.localization.sat import SAT, load_official

SMALL: dict[str, Any] = {"depth": 4, "embed_dim": 24, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 5}


def network(**options: Any) -> SAT:
    net = SAT(**{**SMALL, **options}).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def normed(x: Tensor, state: Mapping[str, Tensor], name: str) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def dense(x: Tensor, state: Mapping[str, Tensor], name: str) -> Tensor:
    out = x @ state[f"{name}.weight"].T
    return out + state[f"{name}.bias"] if f"{name}.bias" in state else out


def plain(
    state: Mapping[str, Tensor], x: Tensor, *, depth: int, heads: int, gated: int, patch: int
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Logits, map and the attention of every block, head by head with the N×N matrix."""
    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    rows, columns = x.shape[2:]
    tokens = [state["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT, state["loc_token"].expand(len(x), -1, -1)]
    x = torch.cat(tokens, 1) + torch.cat([state["pos_embed"], state["loc_embed"]], 1)
    masks, maps = [], []
    for i in range(depth):
        h = normed(x, state, f"blocks.{i}.norm1")
        width = h.shape[2] // heads
        qkv = dense(h, state, f"blocks.{i}.attn.qkv")
        outs, logits, attentions = [], [], []
        for head in range(heads):
            q, k, v = (
                qkv[..., part * h.shape[2] + head * width : part * h.shape[2] + (head + 1) * width] for part in range(3)
            )
            a = q @ k.mT / width**0.5
            logits.append(a[:, -1])
            e = (a - a.amax(-1, keepdim=True)).exp()
            attentions.append(e / e.sum(-1, keepdim=True))
            outs.append(v)
        mask = 1 / (1 + (-torch.stack(logits).sum(0) / heads).exp())
        if i >= depth - gated:
            masks.append(mask)
            used = [a * mask[:, None] for a in attentions]
        else:
            used = attentions
        maps.append(sum(attentions) / heads)
        mixed = torch.cat([a @ v for a, v in zip(used, outs, strict=True)], 2)
        x = x + dense(mixed, state, f"blocks.{i}.attn.proj")
        h = dense(normed(x, state, f"blocks.{i}.norm2"), state, f"blocks.{i}.mlp.fc1")
        h = h * 0.5 * (1 + torch.erf(h / 2**0.5))
        x = x + dense(h, state, f"blocks.{i}.mlp.fc2")
    patches = normed(x, state, "norm")[:, 1:-1].mT.unflatten(2, (rows, columns))
    scores = F.conv2d(patches, state["head.weight"], state["head.bias"], padding=1)
    found = sum(masks)[:, 1:-1].unflatten(1, (rows, columns)) / len(masks) if masks else None  # type: ignore[index]
    return scores.flatten(2).sum(2) / (rows * columns), found, maps


@pytest.mark.parametrize(
    "options", [{}, {"last_k": 1}, {"last_k": 4, "qkv_bias": False}, {"last_k": 0}, {"in_chans": 1, "patch_size": 16}]
)
def test_output_and_gradients_equal_the_plain_network(options: dict[str, Any]) -> None:
    net = network(**options)
    x = torch.randn(2, net.in_chans, 32, 32, dtype=torch.float64)
    state = dict(net.named_parameters())
    logits, found, _ = plain(state, x, depth=4, heads=3, gated=options.get("last_k", 3), patch=net.patch_size)
    ours = net.located(x)
    torch.testing.assert_close(ours.logits, logits, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(net(x), logits, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ours.classes.mean((2, 3)), logits)
    pairs = [(ours.logits, logits)]
    if found is None:
        assert ours.map is None
    else:
        assert ours.map is not None
        torch.testing.assert_close(ours.map, found, rtol=1e-9, atol=1e-11)
        pairs.append((ours.map, found))
    weights = [torch.randn_like(mine) for mine, _ in pairs]
    sums = [sum((w * pair[side]).sum() for w, pair in zip(weights, pairs, strict=True)) for side in (0, 1)]
    leaves = list(net.parameters())
    gradients = [torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True) for total in sums]  # type: ignore[arg-type]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "classes", "count"), [("sat_small", 200, 22_357_832), ("sat_small", 1000, 25_123_432)]
)
def test_parameters_are_those_measured_but_for_the_kernel_of_the_loss(name: str, classes: int, count: int) -> None:
    with torch.device("meta"):
        net = create_localizer(name, num_classes=classes)
    assert sum(p.numel() for p in net.parameters()) == count  # officially 9 more, of a frozen 3×3 kernel
    assert set(list_localizers()) == {"sat_tiny", "sat_small", "sat_base"}


def test_images_of_another_size_work_and_pictures_do_not_see_each_other() -> None:
    net = network()
    x = torch.randn(3, 3, 40, 64, dtype=torch.float64)
    found = net.located(x)
    assert found.map is not None
    assert found.map.shape == (3, 5, 8)
    for i in range(3):
        torch.testing.assert_close(net(x[i : i + 1])[0], found.logits[i])


def test_the_kernel_of_the_loss_is_the_measured_one() -> None:
    kernel = smoothing_kernel()
    torch.testing.assert_close(kernel.sum(), torch.tensor(1.0))
    rounded = [round(kernel[i, j].item(), 4) for i, j in ((0, 0), (0, 1), (1, 1))]
    assert rounded == [0.0026, 0.0460, 0.8054]
    assert torch.equal(kernel, kernel.T)
    assert torch.equal(kernel, kernel.flip(0))


def test_losses_are_of_the_batch_and_of_smoothed_maps() -> None:
    maps = torch.rand(2, 4, 5, dtype=torch.float64)
    maps[0], maps[1] = 0.1, 0.5
    assert batch_area_loss(maps, 0.3).item() == pytest.approx(0)  # one too small, one too large
    assert batch_area_loss(maps, 0.4).item() == pytest.approx(0.1)
    maps = torch.rand(2, 4, 5, dtype=torch.float64)
    kernel = smoothing_kernel().double()
    total = 0.0
    for m in maps:
        for y in range(4):
            for x in range(5):
                smooth = sum(
                    float(m[y + dy, x + dx] * kernel[dy + 1, dx + 1])
                    for dy in (-1, 0, 1)
                    for dx in (-1, 0, 1)
                    if 0 <= y + dy < 4 and 0 <= x + dx < 5
                )
                total += (1 - smooth) * smooth
    assert normalization_loss(maps).item() == pytest.approx(total / 40, rel=1e-6)


def test_official_names_load_and_tables_of_another_square_are_stretched() -> None:
    net = network()
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    state["module.weight"] = smoothing_kernel()[None, None]
    fresh = load_official(SAT(**SMALL).double(), {"model": state})
    net_state = net.state_dict()
    assert all(torch.equal(value, net_state[name]) for name, value in fresh.state_dict().items())
    larger = load_official(SAT(**{**SMALL, "img_size": 48}).double(), {"model": state})
    assert larger.pos_embed.shape == (1, 37, 24)
    torch.testing.assert_close(larger.pos_embed[:, 0], net.pos_embed[:, 0])
    bare = {n: v for n, v in state.items() if "loc_" not in n and "head" not in n}  # DeiT's
    load_official(SAT(**{**SMALL, "num_classes": 7}).double(), {"model": bare}, ignore=("head", "loc_"))
    with pytest.raises(ValueError, match="loc_token"):
        load_official(SAT(**SMALL).double(), {"model": bare}, ignore=("head",))


def test_rollout_carries_one_row_of_the_product_of_all_blocks() -> None:
    net = network(last_k=0)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    _, _, maps = plain(dict(net.named_parameters()), x, depth=4, heads=3, gated=0, patch=8)
    product = torch.eye(18, dtype=torch.float64).expand(2, 18, 18)
    for attention in maps:
        product = (attention + torch.eye(18, dtype=torch.float64)) / 2 @ product
    expected = product[:, 1:-1].mean(1)[:, 1:-1].unflatten(1, (4, 4))
    torch.testing.assert_close(rollout(net, x), expected)


def test_a_network_exports_to_one_graph() -> None:
    net = network().float()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "SAT: num_heads must divide embed_dim=24, got num_heads=5"),
        ({"last_k": 5}, "SAT: last_k must be from 0 to depth=4, got last_k=5"),
        ({"img_size": 4}, "SAT: img_size must be at least patch_size=8, got img_size=4"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAT(**{**SMALL, **options})


def test_images_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"SAT: images must be \(B, 3, Y, X\), got \(2, 1, 32, 32\)"):
        SAT(**SMALL)(torch.zeros(2, 1, 32, 32))
    with pytest.raises(ValueError, match="SAT: image 32×4 is smaller than a patch of 8²"):
        SAT(**SMALL)(torch.zeros(2, 3, 32, 4))
