"""RAVLT against a formulation with all N×N scores, written from the paper's equations."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_core.weights import official_names
from vision_models import RAVLT, create_model, load_official
from vision_models.models import ravlt
from vision_models.models.ravlt import KEY_MAP, rotation

SMALL: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48), "num_heads": (1, 2, 2, 4), "num_classes": 7}
PARAMETERS = {
    "ravlt_tiny": 14_897_768,
    "ravlt_small": 25_591_208,
    "ravlt_base": 48_241_288,
    "ravlt_large": 95_242_440,
}


def _rotate(x: Tensor, height: int, width: int) -> Tensor:
    """Complex pairs turned by (row or column)·frequency."""
    quarter = x.shape[-1] // 4
    frequency = (1 / 10000 ** torch.linspace(0, 1, quarter)).to(x.dtype)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angle = torch.cat([rows.reshape(-1, 1) * frequency, columns.reshape(-1, 1) * frequency], -1)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(-2)


def _plain(qkv: Tensor, num_heads: int, linear: bool) -> Tensor:
    batch, height, width, channels = qkv.shape
    tokens, dim = height * width, channels // 3 // num_heads
    q, k, v = qkv.reshape(batch, tokens, 3, num_heads, dim).permute(2, 0, 3, 1, 4)
    if linear:
        q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
        weight = tokens * torch.softmax(torch.einsum("bhd,bhnd->bhn", q.mean(2), k) / dim**0.5, -1)
        k = k * weight[..., None]
        mass = torch.einsum("bhnd,bhmd->bhnm", q, k).mean(-1, keepdim=True) + 1e-6
        scores = torch.einsum("bhnd,bhmd->bhnm", _rotate(q, height, width), _rotate(k, height, width)) / tokens / mass
    else:
        q, k = _rotate(q, height, width), _rotate(k, height, width)
        scores = torch.softmax(torch.einsum("bhnd,bhmd->bhnm", q, k) / dim**0.5, -1)
    return torch.einsum("bhnm,bhmd->bhnd", scores, v).transpose(1, 2).reshape(batch, height, width, -1)


def _redraw(net: nn.Module) -> None:
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_(std=0.2)  # pyright: ignore[reportOptionalMemberAccess]
            module.running_var.uniform_(0.5, 1.5)  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_published(name: str) -> None:
    assert sum(p.numel() for p in create_model(name, device="meta").parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("size", [(64, 64), (65, 33)], ids=str)
@pytest.mark.parametrize("attention", [("linear", "linear", "softmax", "softmax"), "linear"], ids=str)
def test_logits_and_gradients_equal_the_formulation_with_all_scores(
    attention: Any, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = RAVLT(**SMALL, attention=attention).double()
    _redraw(model)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    results: list[list[Tensor]] = []
    for mix in (ravlt.mix_tokens, _plain):
        monkeypatch.setattr(ravlt, "mix_tokens", mix)
        image = x.clone().requires_grad_()
        logits = model(image)
        results.append([logits.detach(), *torch.autograd.grad(logits.square().mean(), [image, *model.parameters()])])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-10 * max(1.0, float(expected.abs().max()))


def plain(w: dict[str, Tensor], x: Tensor, attention: tuple[str, ...], num_heads: tuple[int, ...]) -> Tensor:
    """The whole network over the official names, from the paper; it shares no code with ours."""

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = w[f"{name}.weight"]
        weight = weight if weight.ndim == 4 else weight[:, :, None, None]
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(x, weight, w[f"{name}.bias"], stride=stride, padding=weight.shape[2] // 2, groups=groups)

    def batch_norm(name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            w[f"{name}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def layer_norm(name: str, x: Tensor) -> Tensor:
        mean, var = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        return (x - mean) / (var + 1e-6).sqrt() * w[f"{name}.weight"].view(-1, 1, 1) + w[f"{name}.bias"].view(-1, 1, 1)

    def attend(p: str, x: Tensor, heads: int, linear: bool) -> Tensor:
        q, k, v, gate = conv(f"{p}qkvo", x).chunk(4, 1)
        qkv = torch.cat([q, k, v], 1).permute(0, 2, 3, 1)
        mixed = _plain(qkv, heads, linear).permute(0, 3, 1, 2)
        return conv(f"{p}proj", (mixed + conv(f"{p}lepe", v)) * gate)

    def feed_forward(p: str, x: Tensor) -> Tensor:
        x = F.gelu(conv(f"{p}fc1", x))
        return conv(f"{p}fc2", x + conv(f"{p}dwconv", x))

    for n, stride in ((0, 2), (3, 1), (6, 1), (9, 2)):
        x = batch_norm(f"patch_embed.proj.{n + 1}", conv(f"patch_embed.proj.{n}", x, stride))
        x = x if n == 9 else F.gelu(x)
    for i, (kind, heads) in enumerate(zip(attention, num_heads, strict=True)):
        j = 0
        while f"layers.{i}.blocks.{j}.gamma_1" in w:
            p = f"layers.{i}.blocks.{j}."
            x = x + conv(f"{p}pos", x)
            x = x + w[f"{p}gamma_1"].view(-1, 1, 1) * attend(
                f"{p}attn.", layer_norm(f"{p}norm1.norm", x), heads, kind == "linear"
            )
            x = x + w[f"{p}gamma_2"].view(-1, 1, 1) * feed_forward(f"{p}ffn.", layer_norm(f"{p}norm2.norm", x))
            j += 1
        if i < 3:
            p = f"layers.{i}.downsample."
            x = batch_norm(f"{p}norm", conv(f"{p}reduction", x, 2))
    x = batch_norm("norm", conv("proj", x))
    return F.linear((x * x.sigmoid()).mean((2, 3)), w["head.weight"], w["head.bias"])


@pytest.mark.parametrize("size", [(64, 64), (65, 33)], ids=str)
@pytest.mark.parametrize("attention", [("linear", "linear", "softmax", "softmax"), ("linear",) * 4], ids=str)
def test_logits_and_gradient_equal_the_plain_network(attention: Any, size: tuple[int, int]) -> None:
    model = RAVLT(**SMALL, attention=attention).double().eval()
    _redraw(model)
    model_state = model.state_dict()
    state = {official: model_state[ours] for official, ours in official_names(model, KEY_MAP["rala"]).items()}
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    results: list[list[Tensor]] = []
    for net in (model, lambda image: plain(state, image, attention, SMALL["num_heads"])):
        image = x.clone().requires_grad_()
        logits = net(image)
        results.append([logits.detach(), *torch.autograd.grad(logits.square().sum(), image)])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-9 * float(expected.abs().max())


def test_single_precision_is_close_to_double() -> None:
    model = create_model("test_ravlt").eval()
    _redraw(model)
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        single, double = model(x), model.double()(x.double())
    assert (single - double).abs().max() <= 1e-5 * max(1.0, float(double.abs().max()))


def test_first_half_of_a_head_turns_with_the_row() -> None:
    sin, cos = rotation(3, 5, 8, torch.empty(0, dtype=torch.float64))
    sin, cos = sin.view(3, 5, 8), cos.view(3, 5, 8)
    assert torch.equal(sin[:, 0, :4], sin[:, 4, :4])
    assert torch.equal(cos[0, :, 4:], cos[2, :, 4:])
    assert float(sin[1, 0, 0]) == pytest.approx(torch.sin(torch.tensor(1.0)).item(), abs=1e-7)
    assert sin.dtype == torch.float64
    assert rotation(2, 2, 4, torch.empty(0, dtype=torch.bfloat16))[0].dtype == torch.float32


def test_official_checkpoints_make_the_round_trip() -> None:
    model, other = (RAVLT(**SMALL) for _ in range(2))
    _redraw(model)
    model_state = model.state_dict()
    state = {name: model_state[own] for name, own in official_names(model, KEY_MAP["rala"]).items()}
    shaped: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".gamma_" in name:
            value = value.view(1, -1, 1, 1)
        elif value.ndim == 2 and not name.startswith("norm"):
            value = value[:, :, None, None]  # the official code has convolutions for all linear layers
        shaped[name] = value
    for i in range(4):
        shaped[f"layers.{i}.RoPE.angle"] = torch.ones(4)
    load_official(other, {"model": shaped})
    assert all(torch.equal(value, model_state[name]) for name, value in other.state_dict().items())


def test_official_names_look_as_published() -> None:
    names = official_names(RAVLT(**SMALL), KEY_MAP["rala"])
    published = {
        "patch_embed.proj.9.weight": "stem.9.weight",
        "layers.0.downsample.reduction.weight": "stages.1.downsample.reduction.weight",
        "layers.2.downsample.norm.running_var": "stages.3.downsample.norm.running_var",
        "layers.2.blocks.1.norm2.norm.bias": "stages.2.blocks.1.norm2.bias",
        "layers.2.blocks.1.attn.qkvo.weight": "stages.2.blocks.1.attn.qkvo.weight",
        "layers.0.blocks.0.gamma_1": "stages.0.blocks.0.gamma_1",
        "proj.weight": "norm.proj.weight",
        "norm.running_mean": "norm.norm.running_mean",
        "head.bias": "head.fc.bias",
    }
    assert {name: names[name] for name in published} == published


def test_network_without_its_projection_gets_a_classifier_that_fits() -> None:
    model: Any = create_model("test_ravlt", num_classes=5).eval()
    model.prune_intermediate_layers([3], prune_norm=True, prune_head=False)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    assert model.num_features == 48


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_with_finite_gradients(dtype: torch.dtype) -> None:
    model = create_model("test_ravlt", dtype=dtype)
    model(torch.randn(2, 3, 96, 96, dtype=dtype)).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": (32, 64)}, "dims must have one entry for each of 4 stages"),
        ({"num_heads": (1,)}, "num_heads must have one entry for each of 4 stages"),
        ({"layer_scale": (1.0,)}, "layer_scale must have one entry for each of 4 stages"),
        ({"attention": ("linear",)}, "attention must have one entry for each of 4 stages"),
        ({"attention": "sofmax"}, "attention must be 'linear' or 'softmax', got 'sofmax'"),
        ({"num_heads": (3, 2, 4, 8)}, "the width of a head must be a multiple of 4, got 64 channels, 3 heads"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"RAVLT: .*{message}"):
        RAVLT(**options)
