"""FeatEnHancer against a plain network, before detectors of this package and of torchvision, and what it refuses."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from attn_core.engine import build
from detection.layers.featenhancer import KEY_MAP, Enhanced, FeatEnHancer, load_official
from detection.models import MODULES, create_model
from detection.models import load_official as load_any
from detection.models.bvr.hosts import build_detector
from detection.tasks.low_light import enhanced_detector

# Names and shapes of an official module: (outputs, inputs, kernel).
OFFICIAL = {
    "e_conv1": (32, 3, 3),
    **{f"e_conv{i}": (32, 32, 3) for i in (2, 3, 4)},
    **{f"e_conv{i}": (32, 64, 3) for i in (5, 6)},
    "e_conv7": (24, 64, 3),
    "ue_conv8": (32, 48, 3),
    "ue_conv9": (24, 32, 3),
    "quarter_conv": (3, 3, 7),
    "hexa_conv": (3, 3, 3),
    "scale_aware_aggregation.query_conv1": (24, 24, 7),
    "scale_aware_aggregation.query_conv2": (24, 24, 3),
    "scale_aware_aggregation.key_conv": (24, 24, 3),
}


def official_state(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for name, (outputs, inputs, side) in OFFICIAL.items():
        scale = (2 / (inputs * side**2)) ** 0.5  # keeps the numbers of one size through all layers
        state[f"{name}.weight"] = torch.randn(outputs, inputs, side, side, generator=draw).double() * scale
        state[f"{name}.bias"] = torch.randn(outputs, generator=draw).double() * 0.1
    return state


def stretched(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear with corners on corners: one matrix for the rows, one for the columns."""

    def matrix(long: int, short: int) -> Tensor:
        place = torch.arange(long, dtype=x.dtype) * (short - 1) / max(long - 1, 1)
        return (1 - (place[:, None] - torch.arange(short, dtype=x.dtype)).abs()).clamp(min=0)

    return torch.einsum("Yy,Xx,bcyx->bcYX", matrix(height, x.shape[2]), matrix(width, x.shape[3]), x)


def plain(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The published network over its official names, scale by scale and block by block."""

    def conv(name: str, value: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        return F.conv2d(value, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding)

    def features(value: Tensor) -> Tensor:
        f1 = conv("e_conv1", value).clamp(min=0)
        f2 = conv("e_conv2", f1).clamp(min=0)
        f3 = conv("e_conv3", f2).clamp(min=0)
        f4 = conv("e_conv4", f3).clamp(min=0)
        f5 = conv("e_conv5", torch.cat([f3, f4], 1)).clamp(min=0)
        f6 = conv("e_conv6", torch.cat([f2, f5], 1)).clamp(min=0)
        return conv("e_conv7", torch.cat([f1, f6], 1))

    size = (x.shape[2], x.shape[3])
    quarter = conv("quarter_conv", x, 4, 0)
    full, fourth, eighth = (features(v) for v in (x, quarter, conv("hexa_conv", quarter, 2, 0)))
    full, fourth = full.clamp(min=0), fourth.clamp(min=0)
    safa = "scale_aware_aggregation."
    a = conv(f"{safa}query_conv2", conv(f"{safa}query_conv1", full, 4, 0), 2, 0)
    b = conv(f"{safa}key_conv", fourth, 2, 0)
    chosen = []
    for n in range(8):
        own, key = a[:, 3 * n : 3 * n + 3], b[:, 3 * n : 3 * n + 3]
        scores = torch.stack([(own * key).sum(1), (key * key).sum(1)]) / 3**0.5
        share = scores.exp() / scores.exp().sum(0)
        chosen.append(share[0].unsqueeze(1) * own + share[1].unsqueeze(1) * key)
    full = full + stretched(torch.cat(chosen, 1), *size)
    merged = conv("ue_conv8", torch.cat([full, stretched(eighth, *size)], 1))
    residuals = conv("ue_conv9", merged).tanh()
    for n in range(8):
        x = x + residuals[:, 3 * n : 3 * n + 3]
    return x


@pytest.mark.parametrize("size", [(32, 40), (37, 51), (15, 15)])
def test_output_and_gradients_equal_the_plain_network_at_even_odd_and_smallest_sizes(size: tuple[int, int]) -> None:
    state = {name: value.requires_grad_() for name, value in official_state().items()}
    net = load_official(FeatEnHancer().double(), {k: v.detach() for k, v in state.items()})
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    ours, expected = net(x), plain(state, x)
    assert (ours - x).abs().max() > 0.5
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(ours)
    names = {ours: official for official, ours in _official_to_ours(net).items()}
    parameters = dict(net.named_parameters())
    own = torch.autograd.grad((ours * weight).sum(), [x, *parameters.values()])
    plain_grads = torch.autograd.grad((expected * weight).sum(), [x, *(state[names[name]] for name in parameters)])
    torch.testing.assert_close(own, plain_grads, rtol=1e-9, atol=1e-11)


def _official_to_ours(net: nn.Module) -> dict[str, str]:
    from attn_core import weights

    return weights.official_names(net, KEY_MAP["official"])


def test_an_official_checkpoint_loads_alone_and_out_of_its_detector(tmp_path: Path) -> None:
    state = {name: value.float() for name, value in official_state().items()}
    assert sum(value.numel() for value in state.values()) == 139_400
    whole: Any = FeatEnHancer()
    assert sum(p.numel() for p in whole.parameters()) == 139_400
    file = tmp_path / "model_final.pth"
    torch.save({"model": {"backbone.x": torch.zeros(1), **{f"feat_enhancer.{k}": v for k, v in state.items()}}}, file)
    wrapped: Any = Enhanced(create_model("test_plain_detr"))
    before = {key: value.clone() for key, value in wrapped.detector.state_dict().items()}
    for model, source in ((whole, state), (wrapped, file)):
        assert load_any(model, source) is model
    assert torch.equal(wrapped.enhancer.quarter.weight, state["quarter_conv.weight"])
    assert torch.equal(whole.aggregation.coarse.bias, state["scale_aware_aggregation.key_conv.bias"])
    wrapped_detector_state = wrapped.detector.state_dict()
    assert all(torch.equal(wrapped_detector_state[key], value) for key, value in before.items())
    with pytest.raises(ValueError, match=r"missing ue_conv9\.bias"):
        load_official(FeatEnHancer(), {k: v for k, v in state.items() if k != "ue_conv9.bias"})
    with pytest.raises(ValueError, match=r"e_conv1\.weight is \(32, 3, 3, 3\), the model has \(8, 3, 3, 3\)"):
        load_official(FeatEnHancer(width=8), state)


def test_without_the_last_convolution_the_picture_stays_as_it_is() -> None:
    net: Any = FeatEnHancer()
    nn.init.zeros_(net.residuals.weight)
    nn.init.zeros_(net.residuals.bias)
    x = torch.randn(2, 3, 21, 34)
    assert torch.equal(net(x), x)


def test_width_and_blocks_are_what_is_built_and_how_far_a_pixel_can_move() -> None:
    for width, blocks in ((4, 1), (8, 3)):
        net: Any = FeatEnHancer(width=width, blocks=blocks)
        assert net.features.down[1].weight.shape == (width, width, 3, 3)
        assert net.residuals.weight.shape == (3 * blocks, width, 3, 3)
        nn.init.constant_(net.residuals.bias, 30.0)
        x = torch.randn(1, 3, 16, 16)
        torch.testing.assert_close(net(x), x + blocks)
    module = MODULES.create("featenhancer", width=4)
    assert isinstance(module, FeatEnHancer)
    weights = torch.cat([p.flatten() for n, p in FeatEnHancer().named_parameters() if n.endswith("weight")])
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)


def test_pictures_that_do_not_fit_are_refused_by_name() -> None:
    net = FeatEnHancer(width=4)
    for picture, message in (
        (torch.rand(1, 3, 14, 40), "pictures must be at least 15×15 pixels, got 14×40 (Y×X); enlarge them first"),
        (torch.rand(1, 3, 40, 3), "pictures must be at least 15×15 pixels, got 40×3"),
        (torch.rand(1, 1, 40, 40), "pictures must be (B, 3, Y, X) floating-point numbers, got (1, 1, 40, 40)"),
        (torch.zeros(1, 3, 40, 40, dtype=torch.uint8), "got (1, 3, 40, 40) torch.uint8"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            net(picture)
    for name in ("width", "blocks"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got {name}=0"):
            FeatEnHancer(**{name: 0})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="at least 15×15 pixels, got 9×9"):
        Enhanced(create_model("test_plain_detr")).eval()([torch.rand(3, 40, 40), torch.rand(3, 9, 9)])
    with pytest.raises(ValueError, match=r"a Identity does not say how it normalizes pictures .*; give mean and std"):
        Enhanced(nn.Identity())
    with pytest.raises(ValueError, match=r"give both mean and std or neither, got mean=\(0, 0, 0\), std=None"):
        Enhanced(nn.Identity(), mean=(0, 0, 0))


def test_bfloat16_is_close_and_an_empty_batch_stays_empty() -> None:
    net = FeatEnHancer(width=8)
    x = torch.randn(1, 3, 24, 33)
    half = net.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), net.float()(x), rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net(x), net.float()(x), rtol=2e-2, atol=2e-2)
    assert net(torch.zeros(0, 3, 20, 20)).shape == (0, 3, 20, 20)
    enhanced = Enhanced(create_model("test_plain_detr"), net).eval()
    assert enhanced([]) == []


def test_a_picture_in_a_batch_of_other_sizes_is_enhanced_as_alone() -> None:
    enhanced = Enhanced(nn.Identity(), FeatEnHancer(width=4).double(), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    pictures = [torch.rand(3, y, x, dtype=torch.float64) for y, x in ((20, 31), (16, 16), (20, 31))]
    found = enhanced(pictures)
    for picture, own in zip(pictures, found, strict=True):
        torch.testing.assert_close(own, enhanced([picture])[0], rtol=1e-10, atol=1e-12)
    views = torch.stack(pictures[::2]).unsqueeze(1)
    torch.testing.assert_close(enhanced(views)[1, 0], found[2], rtol=1e-10, atol=1e-12)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    normed = enhanced.enhancer(((pictures[1] - mean) / std).unsqueeze(0))[0]
    torch.testing.assert_close((found[1] - mean) / std, normed, rtol=1e-5, atol=1e-6)  # the buffers are float32


DETECTORS: dict[str, Any] = {
    "plain_detr": lambda: create_model("test_plain_detr"),
    "bvr_retinanet": lambda: create_model("test_bvr_retinanet"),
    "torchvision_faster_rcnn": lambda: fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=32, max_size=64
    ),
}


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_trains_behind_it_and_teaches_it_and_sees_what_it_gives(name: str) -> None:
    enhanced: Any = Enhanced(DETECTORS[name](), FeatEnHancer(width=4, blocks=2))
    for parameter in enhanced.enhancer.parameters():  # four channels of the published start may all be dead
        nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else nn.init.constant_(parameter, 0.3)
    images = [torch.rand(3, 48, 40), torch.rand(3, 40, 48)]
    targets = [{"boxes": torch.tensor([[4.0, 5, 30, 32]]), "labels": torch.tensor([1])} for _ in images]
    losses = enhanced.train()(images, targets)
    torch.stack([value for value in losses.values() if value.requires_grad]).sum().backward()
    still = [n for n, p in enhanced.enhancer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []
    enhanced.eval()
    with torch.no_grad():
        found, expected = enhanced(images), enhanced.detector(enhanced.enhance(images))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours["boxes"], theirs["boxes"])


def test_scenes_of_several_cameras_are_enhanced_too() -> None:
    enhanced: Any = Enhanced(create_model("test_bevformer_dfa3d"), FeatEnHancer(width=4, blocks=1)).eval()
    assert enhanced.mean.flatten().tolist() == [0.5] * 3
    scene = torch.rand(1, 2, 3, 32, 48)
    output = enhanced(scene, torch.eye(4).expand(1, 2, 4, 4))
    expected = enhanced.detector(enhanced.enhance(scene), torch.eye(4).expand(1, 2, 4, 4))
    assert enhanced.enhance(scene).shape == scene.shape
    torch.testing.assert_close(output.heatmap, expected.heatmap)


def test_a_recipe_puts_it_before_its_detector_or_leaves_it_out() -> None:
    recipe = {"type": build_detector, "host": "fcos", "num_classes": 3, "bvr": False, "backbone": "test_resnet",
              "channels": 32, "strides": (8, 16)}  # fmt: skip
    alone: Any = enhanced_detector(recipe, enhance=False)
    assert type(alone) is type(build(recipe))
    net: Any = enhanced_detector(recipe, width=4, blocks=2)
    assert type(net) is Enhanced
    assert net.enhancer.state_dict()["residuals.weight"].shape == (6, 4, 3, 3)
    assert enhanced_detector(alone).detector is alone  # pyright: ignore[reportAttributeAccessIssue]
