"""TAP in RVT and FAN against plain networks written over the official names, with pools as sums of single tokens."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_core.weights import official_names
from vision_models import FAN, RVT, create_model, load_official

PARAMETERS = {
    "tap_rvt_tiny": 8_744_968,
    "tap_rvt_tiny_plus": 11_049_928,
    "tap_rvt_small": 22_316_104,
    "tap_rvt_small_plus": 23_468_584,
    "tap_rvt_base": 87_091_912,
    "tap_rvt_base_plus": 89_396_872,
    "tap_fan_tiny": 7_404_688,
    "tap_fan_small": 28_513_048,
    "tap_fan_base": 54_643_360,
    "tap_fan_base_hybrid": 50_735_528,
}
RVT_NET: dict[str, Any] = {"depths": (2, 1), "num_heads": (2, 2), "head_dims": (4, 8), "num_classes": 5}
FAN_NET: dict[str, Any] = {"depth": 2, "embed_dim": 16, "num_heads": 2, "num_classes": 5}
# class, options, image: no square, and odd where nothing is padded
NETS: dict[str, tuple[Any, dict[str, Any], tuple[int, int]]] = {
    "rvt": (RVT, {**RVT_NET, "patch_size": 4, "qkv_bias": False}, (21, 27)),
    "rvt_plus": (RVT, {**RVT_NET, "masked_blocks": 1, "img_size": 80, "mlp_ratio": 2.0}, (80, 80)),
    "rvt_alone": (RVT, {**RVT_NET, "patch_size": 4, "scales": None}, (21, 13)),
    "fan": (FAN, {**FAN_NET, "mlp_ratio": 2.0}, (37, 51)),
    "fan_hybrid": (FAN, {**FAN_NET, "stem": "convnext", "stem_dim": 6, "stem_depths": (1, 2), "scales": 2}, (37, 51)),
    "fan_alone": (FAN, {**FAN_NET, "scales": None, "qkv_bias": False, "class_blocks": 1}, (37, 20)),
}


class Plain:
    """What both hosts are made of, from a state under official names; maps are (B, C, Y, X), tokens (B, N, C)."""

    def __init__(self, state: Mapping[str, Tensor], heads: int, training: bool) -> None:
        self.state, self.heads, self.training = state, heads, training

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight = self.state[f"{name}.weight"]
        out = x @ weight.reshape(len(weight), -1).T
        return out + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else out

    def conv(self, x: Tensor, name: str, stride: int = 1, padding: int = 0) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        weight = weight[:, :, None, None] if weight.ndim == 2 else weight
        return F.conv2d(x, weight, bias, stride, padding, groups=x.shape[1] // weight.shape[1])

    def norm(self, x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def map_norm(self, x: Tensor, name: str, *, sample: bool = False) -> Tensor:
        """Over channels; by the variance of a sample, which divides by one less."""
        centered = x - x.mean(1, keepdim=True)
        var = centered.square().sum(1, keepdim=True) / (x.shape[1] - sample)
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return centered / (var + 1e-6).sqrt() * weight[:, None, None] + bias[:, None, None]

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

    @staticmethod
    def shares(scores: Tensor, axis: int) -> Tensor:
        """Exponentials over their sum."""
        exponentials = (scores - scores.amax(axis, keepdim=True).detach()).exp()
        return exponentials / exponentials.sum(axis, keepdim=True)

    @staticmethod
    def as_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
        return x.mT.reshape(x.shape[0], -1, *grid)

    @staticmethod
    def as_tokens(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], -1).mT

    def has(self, start: str) -> bool:
        return any(name.startswith(start) for name in self.state)

    def pooled(self, x: Tensor, name: str) -> Tensor:
        """Map → map: weights of each scale, times sums of nine tokens with zeros outside, divided by nine."""
        if not self.has(name):
            return x
        scores = self.conv(
            self.batch_norm(self.conv(x, f"{name}.proj.0", 1, 1), f"{name}.proj.1"), f"{name}.proj.2", 1, 1
        )
        weights = self.shares(scores, 1)
        rows, columns = x.shape[2:]
        mixed = weights[:, :1] * x
        for far in range(1, weights.shape[1]):
            out = torch.zeros_like(x)
            for i in range(rows):
                for j in range(columns):
                    near = [(i + a, j + b) for a in (-far, 0, far) for b in (-far, 0, far)]
                    inside = [x[:, :, a, b] for a, b in near if 0 <= a < rows and 0 <= b < columns]
                    cell = torch.zeros(rows, columns, dtype=x.dtype)
                    cell[i, j] = 1
                    out = out + torch.stack(inside).sum(0)[..., None, None] / 9 * cell
            mixed = mixed + weights[:, far : far + 1] * out
        return mixed

    def attended(self, q: Tensor, k: Tensor, v: Tensor, heads: int, gate: Tensor | None = None) -> Tensor:
        width = q.shape[2] // heads
        out = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = q[..., part] @ k[..., part].mT / width**0.5
            scores = scores if gate is None else scores / (1 + (-gate[head]).exp())
            out.append(self.shares(scores, 2) @ v[..., part])
        return torch.cat(out, 2)


class PlainRVT(Plain):
    def block(self, x: Tensor, name: str, heads: int) -> Tensor:
        grid = (x.shape[2], x.shape[3])
        normed = self.norm(self.as_tokens(self.pooled(x, f"{name}.dilation_predictor")), f"{name}.norm1")
        q, k, v = self.linear(normed, f"{name}.attn.qkv").chunk(3, 2)
        out = self.attended(q, k, v, heads, self.state.get(f"{name}.attn.att_mask"))
        x = x + self.as_map(self.linear(out, f"{name}.attn.proj"), grid)
        y = self.gelu(
            self.batch_norm(self.conv(self.map_norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"), f"{name}.mlp.bn1")
        )
        y = self.gelu(self.batch_norm(self.conv(y, f"{name}.mlp.dwconv", 1, 1), f"{name}.mlp.bn2"))
        return x + self.batch_norm(self.conv(y, f"{name}.mlp.fc2"), f"{name}.mlp.bn3")

    def __call__(self, image: Tensor) -> Tensor:
        x = self.batch_norm(self.conv(image, "patch_embed.proj.0", 2, 2), "patch_embed.proj.1")
        x = F.max_pool2d(x, 3, 2, 1)
        x = self.conv(x, "patch_embed.proj.3", self.state["patch_embed.proj.3.weight"].shape[2])
        stage = 0
        while self.has(f"transformers.{stage}."):
            number = 0
            while self.has(f"transformers.{stage}.blocks.{number}."):
                x = self.block(x, f"transformers.{stage}.blocks.{number}", self.heads)
                number += 1
            x = self.conv(x, f"pools.{stage}.conv", 2, 1) if self.has(f"pools.{stage}.") else x
            stage += 1
        return self.linear(self.norm(x.mean((2, 3)), "norm"), "head")


class PlainFAN(Plain):
    def patches(self, x: Tensor) -> Tensor:
        if not self.has("patch_embed.backbone"):
            for number in (0, 2, 4, 6):
                x = self.batch_norm(self.conv(x, f"patch_embed.proj.{number}.0", 2, 1), f"patch_embed.proj.{number}.1")
                x = self.gelu(x) if number < 6 else x
            return x
        x = F.pad(x, (0, -x.shape[3] % 16, 0, -x.shape[2] % 16))
        name = "patch_embed.backbone"
        x = self.map_norm(self.conv(x, f"{name}.stem.0", 4), f"{name}.stem.1")
        for stage in (0, 1):
            if stage:
                x = self.conv(
                    self.map_norm(x, f"{name}.stages.1.downsample.0", sample=True), f"{name}.stages.1.downsample.1", 2
                )
            number = 0
            while self.has(block := f"{name}.stages.{stage}.blocks.{number}"):
                y = self.map_norm(self.conv(x, f"{block}.conv_dw", 1, 3), f"{block}.norm", sample=True)
                y = self.conv(self.gelu(self.conv(y, f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
                x = x + self.state[f"{block}.gamma"][:, None, None] * y
                number += 1
        return self.conv(x, "patch_embed.proj", 2)

    @staticmethod
    def positions(grid: tuple[int, int]) -> Tensor:
        """(N, 64): for y, then x, the sine and cosine of 16 frequencies in turn."""
        table = []
        for i in range(grid[0]):
            for j in range(grid[1]):
                row = []
                for place, side in ((i, grid[0]), (j, grid[1])):
                    angle = (place + 1) / (side + 1e-6) * 2 * math.pi
                    for step in range(16):
                        row += [math.sin(angle / 10000 ** (step / 16)), math.cos(angle / 10000 ** (step / 16))]
                table.append(row)
        return torch.tensor(table, dtype=torch.float64)

    def block(self, x: Tensor, name: str, grid: tuple[int, int]) -> Tensor:
        pooled = self.as_tokens(self.pooled(self.as_map(x, grid), f"{name}.dilation_predictor"))
        normed = self.norm(pooled, f"{name}.norm1")
        k, v = self.linear(normed, f"{name}.attn.kv").chunk(2, 2)
        out = self.attended(self.linear(normed, f"{name}.attn.q"), k, v, self.heads)
        x = x + self.state[f"{name}.gamma1"] * self.linear(out, f"{name}.attn.proj")
        normed = self.norm(x, f"{name}.norm2")
        hidden = self.linear(normed, f"{name}.mlp.mlp_v.fc1")
        around = self.gelu(self.conv(self.as_map(hidden, grid), f"{name}.mlp.mlp_v.dwconv.conv1", 1, 1))
        around = self.batch_norm(around, f"{name}.mlp.mlp_v.dwconv.bn")
        around = self.as_tokens(self.conv(around, f"{name}.mlp.mlp_v.dwconv.conv2", 1, 1))
        hidden = hidden + self.state[f"{name}.mlp.mlp_v.gamma"] * around
        values = self.norm(self.linear(hidden, f"{name}.mlp.mlp_v.fc2"), f"{name}.mlp.norm_v", 1e-5)
        q, k = self.linear(normed, f"{name}.mlp.q").exp(), normed.exp()
        q, k = q / q.sum(1, keepdim=True), k / k.sum(1, keepdim=True)
        width = q.shape[2] // self.heads
        gates = []
        for head in range(self.heads):
            part = slice(head * width, (head + 1) * width)
            gate = (q[..., part].mT @ k[..., part]).mean(2)
            gates.append(self.state[f"{name}.mlp.temperature"][head, 0] / (1 + (-gate).exp()))
        return x + self.state[f"{name}.gamma2"] * values * torch.cat(gates, 1)[:, None]

    def class_block(self, x: Tensor, name: str) -> Tensor:
        normed = self.norm(x, f"{name}.norm1")
        q, k, v = (self.linear(normed, f"{name}.attn.{part}") for part in "qkv")
        first = self.linear(self.attended(q[:, :1], k, v, self.heads), f"{name}.attn.proj")
        x = self.norm(x + self.state[f"{name}.gamma1"] * torch.cat([first, normed[:, 1:]], 1), f"{name}.norm2")
        mlp = self.linear(self.gelu(self.linear(x[:, :1], f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        return torch.cat([x[:, :1] + self.state[f"{name}.gamma2"] * mlp, 2 * x[:, 1:]], 1)

    def __call__(self, image: Tensor) -> Tensor:
        x = self.patches(image)
        grid = (x.shape[2], x.shape[3])
        x = self.as_tokens(x) + self.linear(self.positions(grid), "pos_embed.token_projection")
        number = 0
        while self.has(f"blocks.{number}."):
            x = self.block(x, f"blocks.{number}", grid)
            number += 1
        x = torch.cat([self.state["cls_token"].expand(len(x), -1, -1), x], 1)
        number = 0
        while self.has(f"cls_attn_blocks.{number}."):
            x = self.class_block(x, f"cls_attn_blocks.{number}")
            number += 1
        return self.linear(self.norm(x[:, 0], "norm"), "head")


def _drawn(name: str) -> Any:
    build, options, _ = NETS[name]
    model = build(**options).double()
    for key, parameter in model.named_parameters():
        scale = "gamma" in key or (key.endswith("weight") and parameter.ndim == 1)
        nn.init.normal_(parameter, mean=1.0 if scale else 0.0, std=0.3)
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            nn.init.normal_(buffer, std=0.3)
        if key.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 2.0)
    return model


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_of_the_official_models(name: str) -> None:
    assert sum(p.numel() for p in create_model(name, device="meta").parameters()) == PARAMETERS[name]


def test_eleven_masks_make_the_published_size_of_the_base_model() -> None:
    model = create_model("tap_rvt_base_plus", masked_blocks=11, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 92.2


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_logits_and_gradients_equal_a_plain_network(name: str, training: bool) -> None:
    build, _, size = NETS[name]
    model = _drawn(name).train(training)
    names = official_names(model, model.key_map["tapadl"])
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    results: list[list[Tensor]] = []
    for plain in (True, False):
        image = x.clone().requires_grad_()
        own = dict(model.named_parameters())
        state = {**model.state_dict(), **own}
        official = {key: state[ours] for key, ours in names.items()}
        kind = PlainRVT if build is RVT else PlainFAN
        net = kind(official, 2, training) if plain else model
        logits = net(image)
        grads = torch.autograd.grad(logits.square().mean(), [image, *own.values()])
        results.append([logits.detach(), *grads])
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-10 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("name", NETS)
def test_official_checkpoints_make_the_round_trip(name: str) -> None:
    model, other = _drawn(name), _drawn(name)
    model_state = model.state_dict()
    state = {n: model_state[ours] for n, ours in official_names(model, model.key_map["tapadl"]).items()}
    state = {
        n: t[:, :, None, None] if ".mlp.fc" in n and "backbone" in n and t.ndim == 2 else t for n, t in state.items()
    }
    load_official(other, {"state_dict": {f"module.{n}": t for n, t in state.items()}})
    assert all(torch.equal(value, model_state[key]) for key, value in other.state_dict().items())


def test_official_names_look_as_published() -> None:
    expected = {
        "rvt_plus": "patch_embed.proj.3.weight transformers.0.blocks.0.attn.att_mask pools.0.conv.weight norm.weight "
        "transformers.1.blocks.0.dilation_predictor.proj.1.running_var transformers.0.blocks.1.mlp.dwconv.bias",
        "fan_hybrid": "patch_embed.backbone.stages.1.downsample.1.weight blocks.1.dilation_predictor.proj.2.weight "
        "blocks.0.mlp.mlp_v.dwconv.conv2.bias cls_attn_blocks.1.attn.q.weight pos_embed.token_projection.weight",
    }
    for name, keys in expected.items():
        model = _drawn(name)
        assert set(keys.split()) <= official_names(model, model.key_map["tapadl"]).keys()


def test_tables_of_pairs_are_stretched_along_both_tokens() -> None:
    """A table that depends on the rows of both tokens alone does so behind stretching, and keeps its mean."""
    model = create_model("test_tap_rvt")
    larger: Any = create_model("test_tap_rvt", img_size=64)
    own: Any = model.get_submodule("stages.0.blocks.0.attn")
    rows = torch.arange(8.0)
    with torch.no_grad():
        pairs = (rows[:, None] - 2 * rows)[:, None, :, None].expand(8, 8, 8, 8)
        own.att_mask.copy_(pairs.reshape(1, 64, 64))
    load_official(larger, model.state_dict())
    table = larger.get_submodule("stages.0.blocks.0.attn").att_mask.view(16, 16, 16, 16)
    assert table.std(1).max() < 1e-5
    assert table.std(3).max() < 1e-5
    assert table.mean().item() == pytest.approx(own.att_mask.mean().item(), abs=1e-4)
    assert (table[12, 0, 3, 0] - table[3, 0, 12, 0]).item() == pytest.approx(3 * 9 / 2, abs=0.3)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model.eval()(x), larger.eval()(x), rtol=1e-4, atol=1e-5)


def test_the_class_token_is_not_decayed() -> None:
    assert create_model("test_tap_fan", device="meta").no_weight_decay() == {"cls_token"}


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (RVT, {"num_heads": (1, 2)}, "num_heads and head_dims must have one entry for each of 1 stages"),
        (RVT, {"patch_size": 8}, "patch_size must be 4 or 16, got patch_size=8"),
        (RVT, {"masked_blocks": 13}, "masked_blocks must lie between 0 and 12, got masked_blocks=13"),
        (RVT, {"img_size": 14}, "img_size must be at least 15, got img_size=14"),
        (
            RVT,
            {"depths": (1, 1), "num_heads": (2, 3), "head_dims": (4, 4)},
            "width of a stage must be a multiple of that before, got 8 and 12",
        ),
        (RVT, {"scales": 0}, "scales and temperature must be positive, got 0 and 1.0"),
        (FAN, {"temperature": -1.0}, "scales and temperature must be positive, got 4 and -1.0"),
        (FAN, {"stem": "swin"}, "stem must be 'overlapping' or 'convnext', got stem='swin'"),
        (FAN, {"num_heads": 5}, "num_heads must divide embed_dim, got 5 and 192"),
        (FAN, {"stem_depths": (1,)}, r"stem_depths must have two entries, got stem_depths=\(1,\)"),
    ],
    ids=str,
)
def test_wrong_options_are_named(build: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)
