"""DHVT against a plain network written from the paper's equations, over the official names."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_core.weights import official_names
from vision_models import DHVT, create_model, load_official
from vision_models.models.dhvt import KEY_MAP

PARAMETERS = {
    "dhvt_tiny_cifar_p4": 6_008_650,
    "dhvt_small_cifar_p4": 23_425_450,
    "dhvt_tiny_cifar_p2": 5_845_162,
    "dhvt_small_cifar_p2": 22_766_698,
    "dhvt_tiny_domain_p16": 6_105_975,
    "dhvt_small_domain_p16": 23_788_431,
    "dhvt_tiny_imagenet_p16": 6_267_334,
    "dhvt_small_imagenet_p16": 24_040_606,
}
SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 16, "num_heads": 2, "num_classes": 5}
VIT: dict[str, Any] = {"stem": "patch", "head_tokens": False, "feed_forward": "mlp", "img_size": 24}
NETS: dict[str, dict[str, Any]] = {
    "p2": {**SMALL, "patch_size": 2, "num_heads": 4},
    "p4": {**SMALL, "patch_size": 4, "mlp_ratio": 2.0, "qkv_bias": False},
    "p16": {**SMALL, "patch_size": 16},
    "vit": {**SMALL, **VIT, "patch_size": 4},
    "head_tokens": {**SMALL, **VIT, "patch_size": 4, "head_tokens": True},
}


class Plain:
    """The network as its official names spell it; a loop over heads, an explicit softmax, norms by hand."""

    def __init__(self, state: Mapping[str, Tensor], heads: int, patch: int, training: bool) -> None:
        self.state, self.heads, self.patch, self.training = state, heads, patch, training

    def linear(self, x: Tensor, name: str) -> Tensor:
        out = x @ self.state[f"{name}.weight"].T
        return out + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else out

    def norm(self, x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def batch_norm(self, x: Tensor, name: str) -> Tensor:
        if self.training:
            mean = x.mean((0, 2, 3))
            var = (x - mean[:, None, None]).square().mean((0, 2, 3))
        else:
            mean, var = self.state[f"{name}.running_mean"], self.state[f"{name}.running_var"]
        scale = self.state[f"{name}.weight"] / (var + 1e-5).sqrt()
        return (x - mean[:, None, None]) * scale[:, None, None] + self.state[f"{name}.bias"][:, None, None]

    @staticmethod
    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    def affine(self, x: Tensor, name: str) -> Tensor:
        return x * self.state[f"{name}.alpha"] + self.state[f"{name}.beta"]

    def patches(self, image: Tensor) -> Tensor:
        if "pos_embed" in self.state:
            image = F.pad(image, (0, -image.shape[3] % self.patch, 0, -image.shape[2] % self.patch))
            return F.conv2d(
                image, self.state["patch_embed.proj.weight"], self.state["patch_embed.proj.bias"], self.patch
            )
        x = self.affine(image, "patch_embed.pre_affine")
        steps = self.patch.bit_length() - 1
        for number in range(steps):
            name = f"patch_embed.proj.{2 * number}"
            x = self.batch_norm(F.conv2d(x, self.state[f"{name}.0.weight"], None, 2, 1), f"{name}.1")
            x = self.gelu(x) if number + 1 < steps or self.patch == 2 else x
        return self.affine(x, "patch_embed.post_affine")

    def attention(self, x: Tensor, name: str) -> Tensor:
        count, width = x.shape[1], x.shape[2] // self.heads
        if f"{name}.pos_embed" in self.state:
            for head in range(self.heads):
                own = self.linear(x[:, :count, head * width : (head + 1) * width].sum(1) / count, f"{name}.ht_proj")
                parts = [self.gelu(self.norm(part, f"{name}.ht_norm", 1e-5)) for part in own.split(width, 1)]
                own = torch.cat(parts, 1) + self.state[f"{name}.pos_embed"][:, head]
                x = torch.cat([x, own[:, None]], 1)
        q, k, v = self.linear(x, f"{name}.qkv").chunk(3, 2)
        heads = []
        for head in range(self.heads):
            part = slice(head * width, (head + 1) * width)
            scores = (q[..., part] @ k[..., part].mT / width**0.5).exp()
            heads.append(scores / scores.sum(2, keepdim=True) @ v[..., part])
        out = self.linear(torch.cat(heads, 2), f"{name}.proj")
        first = out[:, 0] + (out[:, count:].sum(1) / self.heads if x.shape[1] > count else 0)
        return torch.cat([first[:, None], out[:, 1:count]], 1)

    def feed_forward(self, x: Tensor, name: str, grid: tuple[int, int]) -> Tensor:
        if f"{name}.fc1.weight" in self.state:
            return self.linear(self.gelu(self.linear(x, f"{name}.fc1")), f"{name}.fc2")
        weights = {i: (self.state[f"{name}.conv{i}.weight"], self.state[f"{name}.conv{i}.bias"]) for i in (1, 2, 3)}
        y = x[:, 1:].mT.reshape(x.shape[0], -1, *grid)
        y = self.gelu(self.batch_norm(F.conv2d(y, *weights[1]), f"{name}.bn1"))
        around = F.conv2d(y, *weights[2], padding=1, groups=y.shape[1])
        y = y + self.gelu(self.batch_norm(around, f"{name}.bn2"))
        y = self.batch_norm(F.conv2d(y, *weights[3]), f"{name}.bn3")
        gate = self.linear(y.sum((2, 3)) / (grid[0] * grid[1]), f"{name}.compress")
        gate = self.linear(self.gelu(gate), f"{name}.excitation")
        return torch.cat([(x[:, 0] * gate)[:, None], y.reshape(*y.shape[:2], -1).mT], 1)

    def __call__(self, image: Tensor) -> Tensor:
        cells = self.patches(image)
        grid = (cells.shape[2], cells.shape[3])
        x = torch.cat([self.state["cls_token"].expand(len(image), -1, -1), cells.reshape(*cells.shape[:2], -1).mT], 1)
        if "pos_embed" in self.state:
            x = x + self.state["pos_embed"]
        depth = 1 + max(int(name.split(".")[1]) for name in self.state if name.startswith("blocks."))
        for name in (f"blocks.{i}" for i in range(depth)):
            x = x + self.attention(self.norm(x, f"{name}.norm1"), f"{name}.attn")
            x = x + self.feed_forward(self.norm(x, f"{name}.norm2"), f"{name}.mlp", grid)
        return self.linear(self.norm(x, "norm")[:, 0], "head")


def _drawn(options: dict[str, Any]) -> Any:
    model = DHVT(**options).double()
    for name, parameter in model.named_parameters():
        scale = name.endswith(("weight", "alpha")) and parameter.ndim in (1, 4) and parameter.shape[-1] != 3
        nn.init.normal_(parameter, mean=1.0 if scale and "conv" not in name else 0.0, std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer, std=0.3)
        if name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 2.0)
    return model


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_of_the_official_models(name: str) -> None:
    assert sum(p.numel() for p in create_model(name, device="meta").parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_logits_and_gradients_equal_a_plain_network(name: str, training: bool) -> None:
    """The picture is no square, and odd where there is no table of positions."""
    options = NETS[name]
    model = _drawn(options).train(training)
    names = official_names(model, KEY_MAP["dhvt"])
    size = (24, 24) if "img_size" in options else (37, 51) if name == "p16" else (11, 15)
    x = torch.randn(3, 3, *size, dtype=torch.float64)
    results: list[list[Tensor]] = []
    for plain in (True, False):
        image = x.clone().requires_grad_()
        own = dict(model.named_parameters())
        state = {**model.state_dict(), **own}
        official = {name: state[ours] for name, ours in names.items()}
        net = Plain(official, options["num_heads"], options["patch_size"], training) if plain else model
        logits = net(image)
        grads = torch.autograd.grad(logits.square().mean(), [image, *own.values()])
        results.append([logits.detach(), *grads])
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-10 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("name", NETS)
def test_official_checkpoints_make_the_round_trip(name: str) -> None:
    model, other = _drawn(NETS[name]), _drawn(NETS[name])
    model_state = model.state_dict()
    state = {n: model_state[ours] for n, ours in official_names(model, KEY_MAP["dhvt"]).items()}
    load_official(other, {"model": state})
    assert all(torch.equal(value, model_state[key]) for key, value in other.state_dict().items())


def test_official_names_look_as_published() -> None:
    names = official_names(DHVT(**NETS["p4"]), KEY_MAP["dhvt"])
    expected = "patch_embed.pre_affine.alpha patch_embed.proj.2.1.running_var cls_token blocks.1.attn.ht_norm.weight"
    expected += " blocks.0.attn.pos_embed blocks.1.mlp.conv2.weight blocks.0.mlp.excitation.bias norm.bias head.weight"
    assert set(expected.split()) <= names.keys()
    assert "pos_embed" not in names


def test_patches_trade_places_without_a_trace_but_in_the_convolutions() -> None:
    """Nothing else says where a token is: head tokens are means, and there is no table."""
    model = _drawn({**NETS["p4"], "feed_forward": "mlp"}).eval()
    block = model.blocks[0]
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    order = torch.tensor([0, 3, 1, 2, 6, 5, 4])
    torch.testing.assert_close(block(x[:, order], (2, 3)), block(x, (2, 3))[:, order])


def test_a_table_of_another_grid_is_stretched_for_images_and_checkpoints() -> None:
    model, larger = _drawn(NETS["vit"]).eval(), _drawn({**NETS["vit"], "img_size": 40}).eval()
    load_official(larger, model.state_dict())
    cells = model.pos_embed[:, 1:].mT.unflatten(2, (6, 6))
    stretched = F.interpolate(cells, size=(10, 10), mode="bicubic").flatten(2).mT
    torch.testing.assert_close(larger.pos_embed, torch.cat([model.pos_embed[:, :1], stretched], 1))
    x = torch.randn(1, 3, 40, 40, dtype=torch.float64)
    torch.testing.assert_close(model(x), larger(x))


def test_only_the_class_token_and_the_table_of_patches_are_not_decayed() -> None:
    assert DHVT(**NETS["p4"]).no_weight_decay() == {"cls_token"}
    assert DHVT(**NETS["head_tokens"]).no_weight_decay() == {"cls_token", "pos_embed"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "conv"}, "stem must be 'overlapping' or 'patch', got stem='conv'"),
        ({"feed_forward": "glu"}, "feed_forward must be 'daff' or 'mlp', got feed_forward='glu'"),
        ({"patch_size": 8}, "patch_size of overlapping patches must be 2, 4 or 16, got patch_size=8"),
        ({"stem": "patch", "patch_size": 0}, "patch_size must be positive, got patch_size=0"),
        ({"num_heads": 5}, "num_heads must divide embed_dim, got 5 and 192"),
        ({"img_size": 0}, "img_size must be positive, got img_size=0"),
        ({"global_pool": "max"}, "DHVT: global_pool must be 'token', 'avg' or '', got global_pool='max'"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DHVT(**options)
