"""NAT and DiNAT against a plain network written from the papers' equations, with windows as lists of keys."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_core.weights import official_names
from vision_models import NAT, NATDense, create_model, load_official
from vision_models.models.nat import KEY_MAP

PARAMETERS = {
    "nat_mini": 19_984_174,
    "nat_tiny": 27_901_582,
    "nat_small": 50_743_297,
    "nat_base": 89_769_652,
    "dinat_mini": 19_984_174,
    "dinat_tiny": 27_901_582,
    "dinat_small": 50_719_681,
    "dinat_base": 89_769_652,
    "dinat_large": 200_943_514,
    "dinat_large_384": 200_943_514,
    "dinat_large_384_11x11": 201_144_250,
    "dinat_s_tiny": 28_288_354,
    "dinat_s_small": 49_606_258,
    "dinat_s_base": 87_768_224,
    "dinat_s_large": 196_532_476,
    "dinat_s_large_384": 196_532_476,
    "nat_iso_small": 21_999_736,
    "nat_iso_base": 86_465_800,
    "dinat_iso_small": 21_999_736,
    "dinat_iso_base": 86_465_800,
    "vitrpb_small": 22_080_376,
    "vitrpb_base": 86_627_080,
}
SMALL: dict[str, Any] = {"depths": (2, 2), "embed_dim": 8, "num_heads": (1, 2), "kernel_size": 3, "num_classes": 5}
PATCH: dict[str, Any] = {"tokens": "patch", "dilation": (3, 2), "mlp_ratio": 4}
NETS: dict[str, dict[str, Any]] = {
    "nat": {**SMALL, "layer_scale": 0.5},
    "dinat": {**SMALL, "dilation": (2, 3), "kernel_size": 5, "qkv_bias": False},
    "dinat_s": {**SMALL, **PATCH},
    "isotropic": {**SMALL, **PATCH, "depths": (3,), "num_heads": (2,), "dilation": (2,), "patch_size": 8},
    "vitrpb": {**SMALL, **PATCH, "depths": (2,), "num_heads": (2,), "dilation": None, "attention": "softmax",
               "patch_size": 8, "img_size": 40},
}  # fmt: skip
LAYOUT = {"nat": "nat", "dinat": "nat", "dinat_s": "dinat_s", "isotropic": "isotropic", "vitrpb": "isotropic"}


def keys_of(place: int, length: int, kernel: int, dilation: int) -> list[int]:
    """The cells of one axis that a cell sees: those of its residue, the nearest ``kernel`` of them around it."""
    mine = list(range(place % dilation, length, dilation))
    first = min(max(mine.index(place) - kernel // 2, 0), len(mine) - kernel)
    return mine[first : first + kernel]


class Plain:
    """The network as its official names spell it; every block by hand."""

    def __init__(self, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> None:
        self.state, self.options = state, options
        self.conv = options.get("tokens", "conv") == "conv"
        self.levels = "layers" if options.get("tokens") == "patch" else "levels"
        self.isotropic = len(options["depths"]) == 1

    def linear(self, x: Tensor, name: str) -> Tensor:
        out = x @ self.state[f"{name}.weight"].T
        return out + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else out

    def norm(self, x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def convolved(self, x: Tensor, name: str, stride: int, padding: int) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, padding).permute(0, 2, 3, 1)

    def attention(self, x: Tensor, name: str, dilation: int, heads: int) -> Tensor:
        table = self.state[f"{name}.rpb"]
        height, width, dim = x.shape[1], x.shape[2], x.shape[3] // heads
        whole = self.options.get("attention") == "softmax"
        kernel = self.options["kernel_size"]
        if not whole:
            x = F.pad(x, (0, 0, 0, max(0, kernel * dilation - width), 0, max(0, kernel * dilation - height)))
        rows, columns = x.shape[1], x.shape[2]
        q, k, v = self.linear(x, f"{name}.qkv").split(heads * dim, 3)
        q, k, v = (t.reshape(t.shape[0], rows, columns, heads, dim) for t in (q, k, v))
        down = [range(rows) if whole else keys_of(i, rows, kernel, dilation) for i in range(rows)]
        right = [range(columns) if whole else keys_of(j, columns, kernel, dilation) for j in range(columns)]
        cells = torch.tensor([[(a, b) for a in down[i] for b in right[j]] for i in range(height) for j in range(width)])
        a, b = cells.unbind(2)  # (queries, keys of each)
        i, j = torch.arange(height).repeat_interleave(width)[:, None], torch.arange(width).repeat(height)[:, None]
        bias = table[:, (a - i) // dilation + table.shape[1] // 2, (b - j) // dilation + table.shape[2] // 2]
        scores = (q[:, i, j] * dim**-0.5 * k[:, a, b]).sum(-1) + bias.permute(1, 2, 0)
        out = (scores.softmax(2)[..., None] * v[:, a, b]).sum(2).flatten(2).unflatten(1, (height, width))
        return self.linear(out, f"{name}.proj")

    def block(self, x: Tensor, name: str, dilation: int, heads: int) -> Tensor:
        scales = self.state.get(f"{name}.gamma1", 1.0), self.state.get(f"{name}.gamma2", 1.0)
        x = x + scales[0] * self.attention(self.norm(x, f"{name}.norm1"), f"{name}.attn", dilation, heads)
        hidden = self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
        return x + scales[1] * self.linear(hidden, f"{name}.mlp.fc2")

    def smaller(self, x: Tensor, name: str) -> Tensor:
        if self.conv:
            return self.norm(self.convolved(x, f"{name}.reduction", 2, 1), f"{name}.norm")
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        four = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.linear(self.norm(torch.cat(four, 3), f"{name}.norm"), f"{name}.reduction")

    def __call__(self, image: Tensor) -> Tensor:
        x = image.permute(0, 2, 3, 1)
        if self.conv:
            x = self.convolved(self.convolved(x, "patch_embed.proj.0", 2, 1), "patch_embed.proj.1", 2, 1)
        else:
            patch = self.options.get("patch_size", 4)
            x = F.pad(x, (0, 0, 0, -x.shape[2] % patch, 0, -x.shape[1] % patch))
            x = self.convolved(x, "patch_embed.proj", patch, 0)
        x = self.norm(x, "patch_embed.norm")
        every = self.options.get("dilation") or (1,) * len(self.options["depths"])
        for level, depth in enumerate(self.options["depths"]):
            for number in range(depth):
                name = f"layers.{number}" if self.isotropic else f"{self.levels}.{level}.blocks.{number}"
                dilation = every[level] if number % 2 else 1
                x = self.block(x, name, dilation, self.options["num_heads"][level])
            if level + 1 < len(self.options["depths"]):
                x = self.smaller(x, f"{self.levels}.{level}.downsample")
        return self.linear(self.norm(x, "norm").mean((1, 2)), "head")


def _drawn(options: dict[str, Any], kind: Any = NAT) -> Any:
    model = kind(**options).double()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.3)
    return model


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_of_the_official_models(name: str) -> None:
    assert sum(p.numel() for p in create_model(name, device="meta").parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_logits_and_gradients_equal_a_plain_network(name: str, training: bool) -> None:
    """The picture is odd, and the maps of the second stage are smaller than a window, whose padding is seen."""
    options = NETS[name]
    model = _drawn(options).train(training)
    names = official_names(model, KEY_MAP[LAYOUT[name]])
    size = (40, 40) if name == "vitrpb" else (27, 21)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    results: list[list[Tensor]] = []
    for plain in (False, True):
        image = x.clone().requires_grad_()
        own = dict(model.named_parameters())
        net = Plain({official: own[ours] for official, ours in names.items()}, options) if plain else model
        logits = net(image)
        grads = torch.autograd.grad(logits.square().mean(), [image, *own.values()])
        results.append([logits.detach(), *grads])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-10 * max(1.0, float(expected.abs().max()))


def test_dilations_reach_as_far_as_the_map_of_the_training_size() -> None:
    for name, sides in (("dinat_mini", (56, 28, 14, 7)), ("dinat_large_384", (96, 48, 24, 12))):
        model: Any = create_model(name, device="meta")
        for stage, side in zip(model.stages, sides, strict=True):
            reach = [block.attn.kernel_size * block.attn.dilation for block in stage.blocks]
            assert set(reach[::2]) == {7}
            assert all(side - 7 < far <= side or far == 7 for far in reach[1::2])


@pytest.mark.parametrize("name", NETS)
def test_official_checkpoints_make_the_round_trip(name: str) -> None:
    model, other = _drawn(NETS[name]), _drawn(NETS[name])
    model_state = model.state_dict()
    state = {n: model_state[ours] for n, ours in official_names(model, KEY_MAP[LAYOUT[name]]).items()}
    if name == "vitrpb":
        state["layers.0.attn.relative_position_index"] = torch.zeros(25, 25, dtype=torch.long)
    load_official(other, state)
    assert all(torch.equal(value, model_state[key]) for key, value in other.state_dict().items())


def test_official_names_look_as_published() -> None:
    published = {
        "nat": ("patch_embed.proj.1.weight", "levels.0.downsample.reduction.weight", "levels.1.blocks.1.attn.rpb"),
        "dinat_s": ("patch_embed.proj.weight", "layers.0.downsample.norm.bias", "layers.1.blocks.0.mlp.fc1.weight"),
        "isotropic": ("patch_embed.norm.weight", "layers.2.attn.qkv.weight", "head.bias"),
    }
    for name, expected in published.items():
        names = official_names(NAT(**NETS[name]), KEY_MAP[name])
        assert set(expected) <= set(names)


def test_tables_of_another_kernel_or_map_are_stretched() -> None:
    for options, other in ((NETS["nat"], {"kernel_size": 5}), (NETS["vitrpb"], {"img_size": 64})):
        model: Any = NAT(**options)
        larger: Any = NAT(**{**options, **other})
        load_official(larger, model.state_dict())
        before, after = (net.stages[0].blocks[0].attn.rpb for net in (model, larger))
        assert after.shape[1] > before.shape[1]
        torch.testing.assert_close(after, F.interpolate(before[None], size=after.shape[1:], mode="bicubic")[0])


def test_a_dense_backbone_norms_each_map_and_takes_the_official_names() -> None:
    options = {"depths": (1, 1), "embed_dim": 8, "num_heads": (1, 1), "kernel_size": 3}
    model = NATDense("dinat_mini", dilation=(2, 2), **options)
    maps = model(torch.randn(1, 3, 50, 34))
    assert [tuple(m.shape) for m in maps] == [(1, 8, 13, 9), (1, 16, 7, 5)]
    assert {"norm0.weight", "norm1.bias"} <= set(official_names(model, KEY_MAP["nat"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": (1, 2)}, "num_heads and dilation must have one entry for each of 4 stages"),
        ({"dilation": (2, 1)}, "num_heads and dilation must have one entry for each of 4 stages"),
        ({"num_heads": (3, 4, 8, 16)}, "num_heads must divide the width of its stage, got 3 and 64"),
        ({"tokens": "pixel"}, "tokens must be 'conv' or 'patch', got tokens='pixel'"),
        ({"attention": "full"}, "attention must be 'neighborhood' or 'softmax', got attention='full'"),
        ({"patch_size": 0}, "patch_size and img_size must be positive, got 0 and 224"),
        ({"kernel_size": 4}, "kernel_size must be odd and at least 3, got 4"),
        ({"dilation": (0, 1, 1, 1)}, "dilation must be positive, got 0"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NAT(**options)
