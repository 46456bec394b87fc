"""Mixture of heads in DeiT against a plain network that computes all heads, and in timm's ViT against itself."""

from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from attn_core.nn import HeadRouter, balance_losses
from attn_core.weights import official_names
from vision_models import DeiT, create_model, load_official
from vision_models.layers.mixture_of_heads import RoutedSelfAttention, with_routed_heads
from vision_models.tasks.mixture_of_heads import MixtureOfHeadsTask

PARAMETERS = {
    "moh_vit_small_75": 22_085_992,
    "moh_vit_small_50": 22_082_920,
    "moh_vit_base_75": 86_693_608,
    "moh_vit_base_50": 86_696_680,
}
SHARE = {"moh_vit_small_75": 0.75, "moh_vit_small_50": 0.5, "moh_vit_base_75": 0.75, "moh_vit_base_50": 0.5}
HEADS: dict[str, tuple[int | tuple[int, ...], int | tuple[int, ...]]] = {
    "both kinds": (2, 2),
    "one shared": (1, 3),
    "each block its own": ((0, 5, 1), (4, 0, 2)),
}
SMALL: dict[str, Any] = {
    "depth": 3, "embed_dim": 20, "num_heads": 5, "num_classes": 7, "img_size": 24, "patch_size": 4, "in_chans": 2,
}  # fmt: skip


class Plain:
    """DeiT as its official names spell it; the heads of a block one after another, the gates token by token."""

    def __init__(self, state: Mapping[str, Tensor], shared: Any, routed: Any) -> None:
        self.state = state
        self.heads = [(s, r) for s, r in zip(*(n if isinstance(n, tuple) else (n,) * 3 for n in (shared, routed)))]  # noqa: B905
        self.balance: list[Tensor] = []

    def linear(self, x: Tensor, name: str) -> Tensor:
        out = x @ self.state[f"{name}.weight"].T
        return out + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else out

    def norm(self, x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return (
            x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.state[f"{name}.weight"]
            + self.state[f"{name}.bias"]
        )

    def gates(self, x: Tensor, name: str, shared: int, routed: int) -> Tensor:
        """(B, N, 5)."""
        parts = []
        if shared > 1:
            parts.append(shared * torch.softmax(self.linear(x, f"{name}.wg_1"), -1))
        elif shared == 1:
            parts.append(torch.ones(*x.shape[:2], 1, dtype=x.dtype))
        if routed:
            p = torch.softmax(self.linear(x, f"{name}.wg"), -1)
            least = p.sort(-1, descending=True).values[..., routed - 1 : routed]
            chosen = (p >= least).to(p.dtype)
            parts.append(routed * p * chosen / (p * chosen).sum(-1, keepdim=True))
            experts = p.shape[-1]
            self.balance.append(experts * (p.flatten(0, 1).mean(0) * chosen.flatten(0, 1).mean(0)).sum())
        if shared and routed:
            weights = 2 * torch.softmax(self.linear(x, f"{name}.wg_0"), -1)
            parts = [weights[..., :1] * parts[0], weights[..., 1:] * parts[1]]
        return torch.cat(parts, -1)

    def attention(self, x: Tensor, name: str, heads: tuple[int, int]) -> Tensor:
        gates = self.gates(x, name, *heads)
        outs = []
        for h, parts in enumerate(zip(*(t.split(4, -1) for t in self.linear(x, f"{name}.qkv").chunk(3, -1)))):  # noqa: B905
            q, k, v = parts
            outs.append(gates[..., h : h + 1] * (torch.softmax(q @ k.transpose(1, 2) / 2, -1) @ v))
        return self.linear(torch.cat(outs, -1), f"{name}.proj")

    def __call__(self, image: Tensor) -> Tensor:
        patches = image.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        x = patches @ self.state["patch_embed.proj.weight"].flatten(1).T + self.state["patch_embed.proj.bias"]
        x = torch.cat([self.state["cls_token"].expand(len(x), -1, -1), x], 1) + self.state["pos_embed"]
        for i, heads in enumerate(self.heads):
            x = x + self.attention(self.norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn", heads)
            hidden = self.linear(self.norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
            x = x + self.linear(0.5 * hidden * (1 + torch.erf(hidden / 2**0.5)), f"blocks.{i}.mlp.fc2")
        return self.linear(self.norm(x, "norm")[:, 0], "head")


def _drawn(shared: Any, routed: Any) -> Any:
    model = DeiT(**SMALL, shared_heads=shared, routed_heads=routed).double()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.4)
    return model


def _official(model: Any) -> dict[str, str]:
    return official_names(model, model.key_map["deit"])


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_and_share_of_heads(name: str) -> None:
    model: Any = create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    routers = [block.attn.router for block in model.blocks]
    taken = [router.num_shared + router.num_routed for router in routers]
    assert sum(taken) / len(taken) / model.blocks[0].attn.num_heads == SHARE[name]


@pytest.mark.parametrize("heads", HEADS)
def test_logits_balance_and_gradients_equal_a_plain_network(heads: str) -> None:
    model = _drawn(*HEADS[heads])
    x = torch.randn(2, 2, 24, 24, dtype=torch.float64)
    own = dict(model.named_parameters())
    results: list[list[Tensor]] = []
    for plain in (False, True):
        image = x.clone().requires_grad_()
        if plain:
            net = Plain({official: own[ours] for official, ours in _official(model).items()}, *HEADS[heads])
            logits, balance = net(image), net.balance
        else:
            with balance_losses(model) as balance:
                logits = model(image)
        loss = logits.square().mean() + torch.stack(balance).mean()
        results.append([logits.detach(), loss.detach(), *torch.autograd.grad(loss, [image, *own.values()])])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-10 * max(1.0, float(expected.abs().max()))


def test_a_large_image_leaves_heads_out_and_gives_the_same() -> None:
    """1,024 patches, where pairs of token and head are skipped."""
    model = DeiT(**{**SMALL, "img_size": 128}, shared_heads=1, routed_heads=2).double().eval()
    model_state = model.state_dict()
    plain = Plain({official: model_state[ours] for official, ours in _official(model).items()}, 1, 2)
    x = torch.randn(1, 2, 128, 128, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-10, atol=1e-12)


def test_official_names_are_those_of_the_release_and_make_the_round_trip() -> None:
    model, other = _drawn(2, 2), _drawn(2, 2)
    model_state = model.state_dict()
    state = {official: model_state[ours] for official, ours in _official(model).items()}
    assert {"blocks.0.attn.wg.weight", "blocks.1.attn.wg_0.weight", "blocks.2.attn.wg_1.weight"} <= set(state)
    load_official(other, state)
    assert all(torch.equal(value, model_state[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("heads", [(3, 0), (1, 1), (0, 2)], ids=str)
def test_a_timm_vit_keeps_its_weights_and_gets_routers(heads: tuple[int, int]) -> None:
    vit: Any = timm.create_model("test_vit", num_classes=5, num_heads=4 if heads[1] else 3, embed_dim=48).eval()
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        before = vit(x)
        routed: Any = with_routed_heads(vit, *heads)
        assert routed is vit
        for module in vit.modules():
            if isinstance(module, HeadRouter):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)
        after = vit(x)
    assert all(isinstance(block.attn, RoutedSelfAttention) for block in vit.blocks)
    if heads == (3, 0):  # all heads with equal gates: the network as it was
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    else:
        assert (after - before).abs().max() > 1e-3


def test_the_task_adds_the_mean_balance_of_its_own_network() -> None:
    net = _drawn(1, 2).float()
    task, plain = MixtureOfHeadsTask(net, balance=0.5), MixtureOfHeadsTask(DeiT(**SMALL), balance=0.5)
    batch = {"image": torch.randn(4, 2, 24, 24), "label": torch.arange(4)}
    losses = task(mode="loss", **batch)
    with balance_losses(net) as found:
        net(batch["image"])
    torch.testing.assert_close(losses["loss_balance"], 0.5 * torch.stack(found).mean())
    assert set(plain(mode="loss", **batch)) == {"loss"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared_heads": 2}, "shared_heads and routed_heads go together, got 2 and None"),
        ({"shared_heads": (2, 2), "routed_heads": 2}, r"must be one number or 3, got \(2, 2\) and 2"),
        ({"shared_heads": 6, "routed_heads": 0}, "num_shared must lie in 0…5, the heads, got 6"),
        ({"patch_size": 25}, "patch_size must lie in 1…24, the image's side, got patch_size=25"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeiT(**{**SMALL, **options})


def test_blocks_that_cannot_be_routed_are_named() -> None:
    with pytest.raises(
        ValueError, match="with_routed_heads: Linear has no blocks with attention; pass a ViT of timm's"
    ):
        with_routed_heads(nn.Linear(2, 2), 1, 1)
    normed: Any = timm.create_model("test_vit", qk_norm=True)
    with pytest.raises(ValueError, match=r"Attention has k_norm, proj, q_norm, qkv; only attention of qkv and proj"):
        with_routed_heads(normed, 1, 1)
    attention = RoutedSelfAttention(8, 2, 1, 1)
    with pytest.raises(ValueError, match="there is no attention mask and no causality"):
        attention(torch.zeros(1, 4, 8), is_causal=True)
