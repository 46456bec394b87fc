"""MSA against an independent plain network with maps of N×N, and against the official names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medical_seg.layers.dual_attention import PositionAttention
from medical_seg.models import create_model
from medical_seg.models.multi_scale_attention import MultiScaleAttention, from_official, guided_loss, load_official


class Plain:
    """The published network over the four maps of its backbone, layer by layer from the official names of its weights.

    Nothing here is built of the package's modules: functions of torch, maps of N×N, one scale after the other.
    """

    def __init__(self, model: nn.Module, *, training: bool) -> None:
        self.weights = {official_names(name): value for name, value in model.state_dict(keep_vars=True).items()}
        self.training = training

    def conv(self, x: Tensor, name: str, padding: int = 0) -> Tensor:
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], padding=padding)

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias, mean, variance = (
            self.weights[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
        )
        if self.training:
            variance, mean = torch.var_mean(x, (0, 2, 3), unbiased=False)
        mean, variance = mean[:, None, None], variance[:, None, None]
        return (x - mean) / (variance + 1e-5).sqrt() * weight[:, None, None] + bias[:, None, None]

    def prelu(self, x: Tensor, name: str) -> Tensor:
        return x.clamp(min=0) + self.weights[f"{name}.weight"] * x.clamp(max=0)

    def unit(self, x: Tensor, name: str, first: int, padding: int) -> Tensor:
        """Convolution, normalization and PReLU, numbered one after the other."""
        x = self.norm(self.conv(x, f"{name}.{first}", padding), f"{name}.{first + 1}")
        return self.prelu(x, f"{name}.{first + 2}")

    def position(self, x: Tensor, name: str) -> Tensor:
        x = self.unit(x, f"{name}.attn", 0, 1)
        q, k, v = (self.conv(x, f"{name}.attn.3.{part}_conv").flatten(2) for part in ("query", "key", "value"))
        scores = torch.einsum("bci,bcj->bij", q, k).softmax(2)
        read = torch.einsum("bij,bcj->bci", scores, v).view_as(x)
        return self.unit(self.weights[f"{name}.attn.3.gamma"] * read + x, f"{name}.attn", 4, 1)

    def channel(self, x: Tensor, name: str) -> Tensor:
        x = self.unit(x, f"{name}.attn", 0, 1)
        energy = torch.einsum("bci,bdi->bcd", x.flatten(2), x.flatten(2))
        scores = (energy.amax(2, keepdim=True) - energy).softmax(2)
        read = torch.einsum("bcd,bdi->bci", scores, x.flatten(2)).view_as(x)
        return self.unit(self.weights[f"{name}.attn.3.gamma"] * read + x, f"{name}.attn", 4, 1)

    def semantic(self, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Code and reconstruction."""

        def block(x: Tensor, part: str) -> Tensor:
            for first in (0, 3):
                x = self.norm(self.conv(x, f"{part}.{first}", 1), f"{part}.{first + 1}").clamp(min=0)
            return x

        for level in (1, 2):
            x = F.max_pool2d(block(x, f"{name}.enc{level}.encode"), 2)
        code = x
        for level in (2, 1):
            part = f"{name}.dec{level}.decode"
            weight, bias = self.weights[f"{part}.6.weight"], self.weights[f"{part}.6.bias"]
            x = F.conv_transpose2d(block(x, part), weight, bias, stride=2)
        return code, x

    def __call__(self, maps: Sequence[Tensor], size: tuple[int, ...]) -> tuple[list[Tensor], ...]:
        """Logits, codes, inputs and reconstructions: stage after stage, fine to coarse."""
        down = []
        for number, features in enumerate(maps, start=1):
            small = self.unit(features, f"down{number}", 0, 0)
            down.append(F.interpolate(small, size=maps[0].shape[2:], mode="bilinear", align_corners=False))
        fused = self.unit(torch.cat(down[::-1], 1), "fuse1.fuse_attn", 0, 1)
        fused = self.unit(self.unit(fused, "fuse1.fuse_attn", 3, 1), "fuse1.fuse_attn", 6, 0)
        guided, logits = [fused] * 4, [self.conv(down[k], f"predict{k + 1}") for k in range(4)]
        codes, inputs, reconstructions = [], [], []
        for stage in (1, 2):
            outputs = []
            for k in range(4):
                joined = torch.cat([down[k], guided[k]], 1)
                code, reconstruction = self.semantic(joined, f"semanticModule_{stage}_1")
                attended = self.position(joined, f"pam_attention_{stage}_{k + 1}")
                attended = attended + self.channel(joined, f"cam_attention_{stage}_{k + 1}")
                attended = attended * self.conv(reconstruction, f"conv_sem_{stage}_{4 - k}", 1)
                outputs.append(self.conv(attended, f"conv8_{'1' if stage == 2 else ''}{4 - k}"))
                codes.append(code)
                inputs.append(joined)
                reconstructions.append(reconstruction)
            guided = [output * fused for output in outputs]
        logits += [self.conv(outputs[k], f"predict{k + 1}_2") for k in range(4)]
        large = [F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in logits]
        return large, codes, inputs, reconstructions


@pytest.fixture
def model() -> Any:
    """Every weight and statistic is drawn: zeros and ones would hide mistakes."""
    torch.manual_seed(0)
    model = create_model("test_msa", in_channels=2, out_channels=3).double()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.startswith("backbone"):
                continue
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif name.endswith("gamma"):
                value.fill_(0.4)
            elif value.ndim == 1:
                value.copy_(torch.randn(value.shape) * 0.3 + (0.8 if name.endswith("weight") else 0.1))
    return model


def maps_of(model: Any, x: Tensor) -> list[Tensor]:
    maps = model.backbone(x)
    assert [x.shape[2] // m.shape[2] for m in maps] == [4, 8, 16, 32]
    return maps


def close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=0, atol=1e-10 * float(theirs.detach().abs().max()))


def test_prediction_and_gradients_equal_the_plain_network(model: Any) -> None:
    model.eval()
    x = torch.randn(2, 2, 32, 64, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = model(ours)
    logits, *_ = Plain(model, training=False)(maps_of(model, theirs), (32, 64))
    expected = torch.stack(logits[4:]).mean(0)
    assert close(found, expected)
    gradients = [torch.autograd.grad(y.square().sum(), at)[0] for y, at in ((found, ours), (expected, theirs))]
    assert close(*gradients)


def test_all_that_training_reads_equals_the_plain_network(model: Any) -> None:
    x = torch.randn(2, 2, 32, 64, dtype=torch.float64)
    for module in model.modules():
        module.training = True
    model.backbone.eval()
    found = model(x)
    expected = Plain(model, training=True)(maps_of(model, x), (32, 64))
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == len(theirs) == 8
        assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))


def test_training_gives_eight_of_everything_and_every_parameter_a_gradient(model: Any) -> None:
    x = torch.randn(2, 2, 32, 48, dtype=torch.float64)
    output = model.train()(x)
    assert [tuple(m.shape) for m in output.logits] == [(2, 3, 32, 48)] * 8
    assert [tuple(m.shape) for m in output.codes] == [(2, 64, 2, 3)] * 8
    assert [i.shape for i in output.inputs] == [r.shape for r in output.reconstructions]
    losses = guided_loss(output, torch.randint(0, 3, (2, 32, 48)))
    torch.stack(list(losses.values())).sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []


def test_the_loss_is_the_weighted_sum_of_eight_four_and_eight_terms(model: Any) -> None:
    output = model.train()(torch.randn(2, 2, 32, 32, dtype=torch.float64))
    target = torch.randint(0, 3, (2, 32, 32))
    losses = guided_loss(output, target, guide_weight=2.0, reconstruction_weight=3.0)
    segmentation = sum(F.cross_entropy(logits, target) for logits in output.logits)
    guide = sum(((output.codes[k] - output.codes[k + 4]) ** 2).mean() for k in range(4))
    reconstruction = sum(((a - b) ** 2).mean() for a, b in zip(output.inputs, output.reconstructions, strict=True))
    assert torch.allclose(losses["loss_segmentation"], torch.as_tensor(segmentation))
    assert torch.allclose(losses["loss_guide"], torch.as_tensor(2.0 * guide))
    assert torch.allclose(losses["loss_reconstruction"], torch.as_tensor(3.0 * reconstruction))
    other = guided_loss(output, target, segmentation=lambda logits, _: logits.sum() * 0)
    assert float(other["loss_segmentation"].detach()) == 0


def official_names(ours: str) -> str:
    """The official name of one of our parameters, written independently of the module's table."""
    part, _, rest = ours.partition(".")
    if part == "backbone":
        block, _, rest = rest.partition(".")
        where = {"conv1": "layer0.0", "bn1": "layer0.1", "layer1": "layer1.1"}.get(block, block)
        return f"resnext.{where}.{rest}"
    if part == "down":
        index, _, rest = rest.partition(".")
        return f"down{int(index) + 1}.{rest}"
    if part == "fuse":
        return f"fuse1.{rest}"
    if part == "unused":
        return rest
    if part == "heads":
        stage, scale, rest = rest.split(".", 2)
        return f"predict{int(scale) + 1}{'_2' if stage == '1' else ''}.{rest}"
    stage, what, rest = rest.split(".", 2)
    number = int(stage) + 1
    if what == "semantic":
        return f"semanticModule_{number}_1.{rest}"
    scale, _, rest = rest.partition(".")
    if what in ("position", "channel"):
        return f"{what[0].replace('p', 'pam').replace('c', 'cam')}_attention_{number}_{int(scale) + 1}.{rest}"
    backwards = 4 - int(scale)
    if what == "guide":
        return f"conv_sem_{number}_{backwards}.{rest}"
    return f"conv8_{'1' if stage == '1' else ''}{backwards}.{rest}"


def test_official_names_and_counts_match_in_both_directions() -> None:
    with torch.device("meta"):
        legacy = MultiScaleAttention(legacy=True)
        lean = MultiScaleAttention()
    assert sum(p.numel() for p in legacy.parameters()) == 104_511_475
    assert sum(p.numel() for p in lean.parameters()) == 103_556_063
    official = {official_names(name): value for name, value in legacy.state_dict().items()}
    assert len(official) == len(legacy.state_dict()) == 1372
    assert from_official(official, legacy=True).keys() == legacy.state_dict().keys()
    assert from_official(official).keys() == lean.state_dict().keys()
    lean_state = lean.state_dict()
    for name, value in from_official(official).items():
        assert value.shape == lean_state[name].shape
    assert "conv8_11.weight" in official
    assert "conv_sem_2_4.bias" in official


def test_an_official_state_dict_is_loaded_whole_or_not_at_all(tmp_path: Path) -> None:
    """Wrapped as trainers wrap it, without and with the modules that nothing calls."""
    options = {"backbone": "test_resnet", "width": 8, "in_channels": 2, "out_channels": 3}
    torch.manual_seed(1)
    source = MultiScaleAttention(legacy=True, **options)
    official = {f"module.{official_names(name)}": value for name, value in source.state_dict().items()}
    torch.save({"state_dict": official}, tmp_path / "official.pth")
    source_state = source.state_dict()
    for legacy in (True, False):
        model = load_official(MultiScaleAttention(legacy=legacy, **options), tmp_path / "official.pth")
        for name, value in model.state_dict().items():
            assert torch.equal(value, source_state[name]), name
    with pytest.raises(ValueError, match=r"does not fit this MultiScaleAttention: .*predict1"):
        load_official(MultiScaleAttention(**{**options, "out_channels": 4}), official)
    other = load_official(MultiScaleAttention(**{**options, "out_channels": 4}), official, ignore=("heads",))
    name = "fuse.fuse_attn.0.weight"
    assert torch.equal(other.get_parameter(name), source.get_parameter(name))


def test_a_first_step_changes_running_statistics_of_the_shared_module_coarse_to_fine(model: Any) -> None:
    """The last scale that the shared module sees weighs most in its statistics: officially the finest."""
    semantic = model.stages[0].semantic
    seen: list[Tensor] = []
    semantic.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    model.train()
    joined = model(torch.randn(2, 2, 32, 32, dtype=torch.float64)).inputs[:4]
    assert all(torch.equal(a, b) for a, b in zip(seen, joined[::-1], strict=True))


def test_batches_do_not_mix_in_prediction(model: Any) -> None:
    model.eval()
    x = torch.randn(2, 2, 32, 32, dtype=torch.float64)
    assert torch.allclose(model(x)[1:], model(x[1:]), atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiScaleAttention(0), "in_channels and out_channels must be at least 1, got 0 and 5"),
        (lambda: MultiScaleAttention(backbone="resnet1999"), "timm has no model backbone='resnet1999'"),
        (lambda: MultiScaleAttention(backbone="test_vit"), "has maps at 1/.*, not at 1/4 to 1/32"),
        (lambda: create_model("test_msa")(torch.zeros(1, 1, 32)), r"expected \(B C Y X\), got shape \(1, 1, 32\)"),
        (lambda: create_model("test_msa")(torch.zeros(1, 3, 32, 32)), "the network reads 1 channels, got 3"),
        (
            lambda: create_model("test_msa")(torch.zeros(1, 1, 33, 32)),
            "image 33×32 is not divisible by 16; pad to 48×32",
        ),
        (lambda: from_official({"encoder.weight": torch.zeros(1)}), "the official network has no 'encoder.weight'"),
    ],
)
def test_mistakes_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_position_attention_of_the_paper_s_size_never_holds_a_map() -> None:
    """A quarter of 256² has 4,096 positions: no tensor of 4,096² elements may be kept for the backward pass."""
    attend = PositionAttention(8, 2)
    x = torch.randn(1, 8, 64, 64, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        attend(x).sum().backward()
    assert max(kept) < 64**4 / 20
