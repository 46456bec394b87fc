"""MSA against a plain formulation with maps of N×N, and against the official names."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medical_seg.models import create_model
from medical_seg.models.multi_scale_attention import MultiScaleAttention, from_official, guided_loss


def plain_attention(layer: Any, x: Tensor) -> Tensor:
    """First three modules, the attention with its whole map, last three."""
    x = layer.attn[:3](x)
    attend = layer.attn[3]
    flat = x.flatten(2)
    if hasattr(attend, "query_conv"):
        q, k, v = (conv(x).flatten(2) for conv in (attend.query_conv, attend.key_conv, attend.value_conv))
        out = v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)
    else:
        energy = flat @ flat.transpose(1, 2)
        out = (energy.max(-1, keepdim=True).values - energy).softmax(-1) @ flat
    return layer.attn[4:](attend.gamma * out.view_as(x) + x)


def plain(model: Any, x: Tensor) -> Tensor:
    """Prediction: every scale written out, the mean taken of the enlarged maps."""
    maps = model.backbone(x)
    down = [F.interpolate(d(m), size=maps[0].shape[2:], mode="bilinear") for d, m in zip(model.down, maps, strict=True)]
    fused = model.fuse(torch.cat([down[3], down[2], down[1], down[0]], 1))
    total = torch.zeros(())
    for scale in range(4):
        guided = fused
        for stage in model.stages:
            joined = torch.cat([down[scale], guided], 1)
            _, reconstruction = stage.semantic(joined)
            both = plain_attention(stage.position[scale], joined) + plain_attention(stage.channel[scale], joined)
            attended = stage.project[scale](both * stage.guide[scale](reconstruction))
            guided = attended * fused
        total = total + F.interpolate(model.heads[1][scale](attended), size=x.shape[2:], mode="bilinear")
    return total / 4


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    model = create_model("test_msa", in_channels=2, out_channels=3).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.4)
    return model


def test_prediction_and_gradients_equal_the_formulation_with_whole_maps(model: Any) -> None:
    model.eval()
    x = torch.randn(2, 2, 32, 48, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = model(ours), plain(model, theirs)
    assert torch.allclose(a, b, rtol=0, atol=1e-11 * float(b.detach().abs().max()))
    a.square().sum().backward()
    b.square().sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, rtol=0, atol=1e-10 * float(theirs.grad.abs().max()))


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
    other = guided_loss(output, target, segmentation=lambda logits, t: logits.sum() * 0)
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
    for name, value in from_official(official).items():
        assert value.shape == lean.state_dict()[name].shape
    assert "conv8_11.weight" in official
    assert "conv_sem_2_4.bias" in official


def test_a_first_step_changes_running_statistics_of_the_shared_module_coarse_to_fine(model: Any) -> None:
    """The last scale that the shared module sees weighs most in its statistics: officially the finest."""
    semantic = model.stages[0].semantic
    seen: list[Tensor] = []
    semantic.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
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


def test_position_attention_of_the_paper_s_size_never_holds_a_map(model: Any) -> None:
    """A quarter of 256² has 4,096 positions: no tensor of 4,096² elements may be kept for the backward pass."""
    attend = copy.deepcopy(model.stages[0].position[0].attn[3]).float()
    x = torch.randn(1, 8, 64, 64, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        attend(x).sum().backward()
    assert max(kept) < 64**4 / 20
