"""SpectFormer and GFNet against a plain network over the official names, with gates as sums over all shifts."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_core.weights import official_names
from vision_models import SpectFormer, SpectFormerH, create_model, load_official
from vision_models.bench.spectformer import official
from vision_models.layers.spectral_gate import SpectralGate
from vision_models.models.spectformer import KEY_MAP, KEY_MAP_H

PARAMETERS = {
    "spectformer_ti": 9_158_376,
    "spectformer_xs": 20_028_520,
    "spectformer_s": 32_449_768,
    "spectformer_b": 57_159_656,
    "gfnet_ti": 7_511_784,
    "gfnet_xs": 15_985_768,
    "gfnet_s": 24_869_608,
    "gfnet_b": 43_120_616,
    "gfnet_h_ti": 15_085_096,
    "gfnet_h_s": 32_162_632,
    "gfnet_h_b": 53_744_200,
    "spectformer_h_s": 21_777_928,
    "spectformer_h_b": 32_539_880,
    "spectformer_h_l": 54_162_792,
    "spectformer_h_s_tl": 22_226_928,
    "spectformer_h_b_tl": 33_052_880,
    "spectformer_h_l_tl": 54_675_792,
}
PLAIN: dict[str, Any] = {
    "depths": (3,),
    "dims": (8,),
    "num_heads": 2,
    "patch_size": 4,
    "img_size": 24,
    "num_classes": 5,
}
PYRAMID: dict[str, Any] = {**PLAIN, "depths": (1, 2), "dims": (8, 12), "patch_size": 2, "img_size": 12}
H: dict[str, Any] = {"depths": (1, 2, 1, 1), "dims": (4, 6, 8, 12), "num_heads": (1, 1, 2, 3), "stem_dim": 4,
                     "mlp_ratios": (2, 1, 2, 1), "num_classes": 5, "img_size": 20}  # fmt: skip
# name: options, layout of the checkpoints, picture
NETS: dict[str, tuple[dict[str, Any], str, tuple[int, int]]] = {
    "spectformer": ({**PLAIN, "spectral": 1}, "isotropic", (27, 21)),
    "gfnet": ({**PLAIN, "spectral": None}, "isotropic", (24, 24)),
    "gfnet_h": ({**PYRAMID, "spectral": None, "layer_scale": 0.5}, "pyramid", (15, 12)),
    "pyramid": ({**PYRAMID, "spectral": 1}, "pyramid", (12, 12)),
    "hierarchical": (H, "hierarchical", (20, 20)),
    "token_label": ({**H, "token_label": True}, "hierarchical", (35, 21)),
}


def build(options: dict[str, Any], layout: str) -> Any:
    return SpectFormerH(**options) if layout == "hierarchical" else SpectFormer(**options)


def layout_of(name: str) -> Any:
    return {**KEY_MAP, **KEY_MAP_H}[NETS[name][1]]


class Plain:
    """The network as its official names spell it; every block by hand."""

    def __init__(self, state: Mapping[str, Tensor], name: str, training: bool) -> None:
        self.state, self.training = state, training
        self.options, self.layout, _ = NETS[name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def batch_norm(self, x: Tensor, name: str) -> Tensor:
        mean, var = self.state[f"{name}.running_mean"], self.state[f"{name}.running_var"]
        if self.training:
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2), unbiased=False)
        return (x - mean) / (var + 1e-5).sqrt() * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def conv(self, x: Tensor, name: str, stride: int, padding: int, groups: int = 1) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, padding, 1, groups).permute(0, 2, 3, 1)

    def mlp(self, x: Tensor, name: str) -> Tensor:
        x = self.linear(x, f"{name}.fc1")
        if f"{name}.dwconv.dwconv.weight" in self.state:
            x = self.conv(x, f"{name}.dwconv.dwconv", 1, 1, x.shape[-1])
        return self.linear(0.5 * x * (1 + torch.erf(x / 2**0.5)), f"{name}.fc2")

    def gate(self, x: Tensor, name: str) -> Tensor:
        """The sum over all shifts (a, b) of the neighbor there, times the kernel's tap for it."""
        weight = torch.view_as_complex(self.state[f"{name}.complex_weight"])
        height = weight.shape[0]
        taps = torch.fft.irfft(torch.fft.ifft(weight, dim=0), n=height, dim=1)
        out = torch.zeros_like(x)
        reach = [range(-(side // 2), side - side // 2) for side in (height, *x.shape[1:3])]
        for a in set(reach[0]) & set(reach[1]):
            for b in set(reach[0]) & set(reach[2]):
                out = out + x.roll((a, b), (1, 2)) * taps[a, b]
        return out

    def attention(self, q: Tensor, x: Tensor, name: str, heads: int) -> Tensor:
        """Tokens q (B, N, C) ask x (B, M, C)."""
        dim = x.shape[2] // heads
        if f"{name}.qkv.weight" in self.state:
            query, key, value = self.linear(x, f"{name}.qkv").split(x.shape[2], 2)
        else:
            query = self.linear(q, f"{name}.q")
            key, value = self.linear(x, f"{name}.kv").split(x.shape[2], 2)
        outs = []
        for head in range(heads):
            part = slice(head * dim, (head + 1) * dim)
            scores = query[..., part] @ key[..., part].mT / dim**0.5
            outs.append(scores.softmax(2) @ value[..., part])
        return self.linear(torch.cat(outs, 2), f"{name}.proj")

    def block(self, x: Tensor, name: str, heads: int) -> Tensor:
        y = self.norm(x, f"{name}.norm1")
        if f"{name}.filter.complex_weight" in self.state:
            y = self.mlp(self.norm(self.gate(y, f"{name}.filter"), f"{name}.norm2"), f"{name}.mlp")
            return x + self.state.get(f"{name}.gamma", 1.0) * y
        if f"{name}.attn.complex_weight" in self.state:
            x = x + self.gate(y, f"{name}.attn")
        else:
            tokens = y.flatten(1, 2)
            x = x + self.attention(tokens, tokens, f"{name}.attn", heads).view(x.shape)
        return x + self.mlp(self.norm(x, f"{name}.norm2"), f"{name}.mlp")

    def __call__(self, image: Tensor) -> Tensor:
        x = image.permute(0, 2, 3, 1)
        if self.layout == "hierarchical":
            return self.classified(*self.tokens(x))
        options, isotropic = self.options, self.layout == "isotropic"
        x = self.conv(x, "patch_embed.proj" if isotropic else "patch_embed.0.proj", options["patch_size"], 0)
        table = self.state["pos_embed"]
        side = math.isqrt(table.shape[1])
        cells = table.view(1, side, side, -1).permute(0, 3, 1, 2)
        if tuple(x.shape[1:3]) != (side, side):
            cells = F.interpolate(cells, size=x.shape[1:3], mode="bicubic")
        x = x + cells.permute(0, 2, 3, 1)
        for stage, depth in enumerate(options["depths"]):
            if stage:
                x = self.conv(x, f"patch_embed.{stage}.proj", 2, 0)
            for number in range(depth):
                x = self.block(x, f"blocks.{number}" if isotropic else f"blocks.{stage}.{number}", options["num_heads"])
        return self.linear(self.norm(x, "norm").mean((1, 2)), "head")

    def stem(self, x: Tensor) -> Tensor:
        for number in (0, 3, 6):
            x = self.conv(x, f"patch_embed1.conv.{number}", 1 if number else 2, 1 if number else 3)
            x = self.batch_norm(x, f"patch_embed1.conv.{number + 1}").clamp(min=0)
        return self.norm(self.conv(x, "patch_embed1.proj", 2, 1), "patch_embed1.norm", 1e-5)

    def tokens(self, x: Tensor, mixed: Any = lambda x: x) -> tuple[Tensor, Tensor]:
        """The class token and the tokens of the last map, normed."""
        x = mixed(self.stem(x))
        for stage, depth in enumerate(self.options["depths"], start=1):
            if stage > 1:
                x = self.norm(x, f"norm{stage - 1}")
                x = self.norm(self.conv(x, f"patch_embed{stage}.proj", 2, 1), f"patch_embed{stage}.norm", 1e-5)
            for number in range(depth):
                x = self.block(x, f"block{stage}.{number}", self.options["num_heads"][stage - 1])
        x = x.flatten(1, 2)
        token = x.mean(1, keepdim=True)
        every = self.norm(torch.cat([token, x], 1), "post_network.0.norm1")
        token = token + self.attention(every[:, :1], every, "post_network.0.attn", self.options["num_heads"][-1])
        token = token + self.mlp(self.norm(token, "post_network.0.norm2"), "post_network.0.mlp")
        return self.norm(token, "norm4")[:, 0], self.norm(x, "norm4")

    def classified(self, token: Tensor, rest: Tensor) -> Tensor:
        logits = self.linear(token, "head")
        return logits + 0.5 * self.linear(rest, "aux_head").amax(1) if "aux_head.weight" in self.state else logits


def drawn(name: str) -> Any:
    options, layout, _ = NETS[name]
    model = build(options, layout).double()
    for key, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in key and key.endswith("weight") else 0.0, std=0.3)
    for key, buffer in model.named_buffers():
        if "running" in key:
            nn.init.uniform_(buffer, 0.5, 1.5)
    return model


def plain_of(model: Any, name: str, training: bool) -> Plain:
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {official: own[ours] for official, ours in official_names(model, layout_of(name)).items()}
    return Plain({key: value.clone() if "running" in key else value for key, value in state.items()}, name, training)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_of_the_official_models(name: str) -> None:
    assert sum(p.numel() for p in create_model(name, device="meta").parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(("name", "training"), [*((name, False) for name in NETS), ("token_label", True)])
def test_logits_and_gradients_equal_a_plain_network(name: str, training: bool) -> None:
    """Pictures of another size than the tables meet gates with zeros around their taps, or with fewer taps."""
    model = drawn(name).train(training)
    plain = plain_of(model, name, training)
    x = torch.randn(2, 3, *NETS[name][2], dtype=torch.float64)
    results: list[list[Tensor]] = []
    for net in (plain, model):
        image = x.clone().requires_grad_()
        logits = net(image)
        results.append([logits.detach(), *torch.autograd.grad(logits.square().mean(), [image, *model.parameters()])])
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-10 * max(1.0, expected.abs().max().item())


def test_token_labelling_classifies_every_token_and_exchanges_those_of_mixed_images() -> None:
    model = drawn("token_label").eval()
    plain = plain_of(model, "token_label", False)
    x = torch.randn(3, 3, 45, 33, dtype=torch.float64)

    def mixed(maps: Tensor) -> Tensor:
        out = maps.clone()
        out[:, 8:, :8] = maps.flip(0)[:, 8:, :8]
        return out

    with torch.no_grad():
        for box, change in ((None, lambda maps: maps), ((1, 0, 2, 1), mixed)):
            token, rest = plain.tokens(x.permute(0, 2, 3, 1), change)
            dense = plain.linear(rest, "aux_head")
            if box:
                dense = dense.view(3, 2, 2, -1)
                dense = torch.where(torch.tensor([[0, 0], [1, 0]])[None, :, :, None] > 0, dense.flip(0), dense).flatten(
                    1, 2
                )
            ours = model.forward_dense(x, box)
            torch.testing.assert_close(ours, (plain.linear(token, "head"), dense), rtol=1e-10, atol=1e-10)
        cls, dense = model.forward_dense(x)
        torch.testing.assert_close(model(x), cls + 0.5 * dense.max(1)[0])
    with pytest.raises(
        ValueError, match="forward_dense: there is no classifier of tokens; build with token_label=True"
    ):
        drawn("hierarchical").forward_dense(x)


@pytest.mark.parametrize("name", NETS)
def test_official_checkpoints_make_the_round_trip(name: str) -> None:
    model, other = drawn(name), drawn(name)
    model_state = model.state_dict()
    load_official(other, {n: model_state[ours] for n, ours in official_names(model, layout_of(name)).items()})
    assert all(torch.equal(value, model_state[key]) for key, value in other.state_dict().items())


def test_official_names_look_as_published() -> None:
    published = {
        "spectformer": ("patch_embed.proj.weight", "pos_embed", "blocks.0.filter.complex_weight", "norm.weight",
                        "blocks.1.attn.qkv.bias", "blocks.2.mlp.fc2.weight", "head.weight"),
        "gfnet_h": ("patch_embed.0.proj.bias", "patch_embed.1.proj.weight", "blocks.1.1.filter.complex_weight",
                    "blocks.0.0.gamma", "pos_embed", "head.bias"),
        "token_label": ("patch_embed1.conv.7.running_var", "patch_embed1.proj.bias", "patch_embed1.norm.weight",
                        "patch_embed4.proj.weight", "patch_embed2.norm.bias", "block1.0.attn.complex_weight",
                        "block3.0.attn.kv.weight", "block2.1.mlp.dwconv.dwconv.weight", "norm1.weight", "norm4.bias",
                        "post_network.0.attn.q.weight", "post_network.0.mlp.fc1.bias", "head.weight", "aux_head.bias"),
    }  # fmt: skip
    for name, expected in published.items():
        assert set(expected) <= set(official_names(drawn(name), layout_of(name)))


@pytest.mark.parametrize("name", ["spectformer", "gfnet_h", "hierarchical"])
def test_gates_and_positions_of_another_size_compute_as_the_first_network_does_there(name: str) -> None:
    """Loading into a network for another image equals showing that image to the network as it was."""
    options, layout, _ = NETS[name]
    model = drawn(name).eval()
    side = 2 * options["img_size"]
    larger = build({**options, "img_size": side}, layout).double().eval()
    load_official(larger, model.state_dict())
    x = torch.randn(1, 3, side, side, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(larger(x), model(x), rtol=1e-10, atol=1e-10)
    assert larger.state_dict().keys() == model.state_dict().keys()


def test_published_networks_run_at_256_with_heads_that_divide() -> None:
    for name in ("spectformer_ti", "spectformer_b", "gfnet_h_ti", "spectformer_h_s"):
        depths = {"depths": (5,) if "_h_" not in name else (1, 1, 1, 1)}
        model: Any = create_model(name, **depths, device="meta").eval()
        assert model(torch.empty(1, 3, 256, 256, device="meta")).shape == (1, 1000)


def test_depth_of_the_change_from_gates_to_attention_is_an_option() -> None:
    for spectral, gates in ((0, 0), (2, 2), (None, 3)):
        model = SpectFormer(**{**PLAIN, "spectral": spectral})
        assert sum(isinstance(module, SpectralGate) for module in model.modules()) == gates
    for spectral in (0, 3, 4):
        model = SpectFormerH(**H, spectral=spectral)
        assert sum(isinstance(module, SpectralGate) for module in model.modules()) == sum(H["depths"][:spectral])


@pytest.mark.parametrize("name", ["spectformer", "gfnet_h", "token_label"])
def test_the_official_formulation_of_the_benchmark_computes_the_same(name: str) -> None:
    """At the size that the gates are made for, and but for their spectra, which it takes in float32."""
    model = drawn(name).float().eval()
    x = torch.randn(2, 3, *(NETS[name][0]["img_size"],) * 2)
    with torch.no_grad():
        expected = model(x)
        assert (official(model)(x) - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["test_spectformer", "test_gfnet", "test_spectformer_h"])
def test_half_precision_trains_with_finite_gradients(name: str, dtype: torch.dtype) -> None:
    model = create_model(name, dtype=dtype)
    out = model(torch.randn(2, 3, 64, 64, dtype=dtype))
    assert out.dtype == dtype
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            SpectFormer,
            {"dims": (8, 8)},
            r"depths and dims must have one entry for each stage, got \(19,\) and \(8, 8\)",
        ),
        (SpectFormer, {"spectral": 20}, "spectral must lie in 0…19, the number of blocks, got 20"),
        (SpectFormer, {"num_heads": 5}, r"num_heads must divide the widths \(384,\), got num_heads=5"),
        (SpectFormer, {"img_size": 15}, "img_size must be at least 16, .* got 15 and 16"),
        (SpectFormer, {"patch_size": 0}, "and patch_size positive, got 224 and 0"),
        (SpectFormerH, {"depths": (1, 1)}, "must have one entry for each of four stages, got"),
        (SpectFormerH, {"spectral": 5}, "spectral must lie in 0…4, the number of stages, got spectral=5"),
        (SpectFormerH, {"num_heads": (1, 1, 3, 4)}, "num_heads must divide the width of its stage, got 3 and 320"),
        (SpectFormerH, {"img_size": 0}, "img_size must be positive, got img_size=0"),
        (SpectFormerH, {"global_pool": "max"}, "global_pool must be 'token' or '', got global_pool='max'"),
    ],
    ids=str,
)
def test_wrong_options_are_named(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)
