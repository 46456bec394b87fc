"""Sentence Attention Blocks beside a plain network written anew; official names and sizes; options; refusals."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_tools import create_model
from vlm_tools.models.sentence_blocks import SentenceBlocks, load_official, official_names


def perturbed(model: Any) -> Any:
    """Weights at which every branch counts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            elif name.endswith("running_mean"):
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
            elif value.is_floating_point() and value.dim() == 1:
                value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return model.double().eval()


def plain(model: SentenceBlocks, maps: list[Tensor], text: Tensor, size: tuple[int, int]) -> Tensor:
    """Everything behind the backbone from the paper's text, with the weights of a state dict."""
    w = dict([*model.named_parameters(), *model.named_buffers()])
    scaled = []
    for n, x in enumerate(maps):
        own = f"sentence_attentions.{n}.attention."
        hidden = text @ w[own + "0.weight"].T + w[own + "0.bias"]
        centered = hidden - hidden.mean(-1, keepdim=True)
        normed = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        hidden = (normed * w[own + "1.weight"] + w[own + "1.bias"]).clamp_min(0)
        scores = (hidden @ w[own + "3.weight"].T + w[own + "3.bias"]).exp()
        scaled.append(torch.einsum("bcyx,bc->bcyx", x, scores / scores.sum(-1, keepdim=True)))
    merged = scaled.pop()
    for n in range(len(scaled) - 1, -1, -1):
        own = f"merge_blocks.{n}.low_res_conv."
        low = torch.einsum("bcyx,dc->bdyx", merged, w[own + "0.weight"][:, :, 0, 0])
        mean, variance, gain, shift = (
            w[own + "1." + name][:, None, None] for name in ("running_mean", "running_var", "weight", "bias")
        )
        low = (low - mean) / (variance + 1e-5).sqrt() * gain + shift
        fine = scaled[n]
        merged = (F.interpolate(low, size=fine.shape[2:], mode="bilinear") + fine).clamp_min(0)
    logits = torch.einsum("bcyx,kc->bkyx", merged, w["classifier.weight"][:, :, 0, 0])
    return F.interpolate(logits + w["classifier.bias"][:, None, None], size=size, mode="bilinear")


def test_outputs_and_gradients_are_those_of_a_plain_network() -> None:
    torch.manual_seed(0)
    model = perturbed(create_model("test_sentence_blocks", num_classes=2))
    image, text = torch.rand(2, 3, 45, 50, dtype=torch.float64), torch.randn(2, 48, dtype=torch.float64)
    backbone: Any = timm.create_model("test_efficientnet", features_only=True).double().eval()
    backbone.load_state_dict(model.backbone.state_dict())
    mean, variance = (model.init_norm.get_buffer(f"running_{x}")[:, None, None] for x in ("mean", "var"))
    expected = plain(model, list(backbone((image - mean) / (variance + 1e-5).sqrt())), text, (45, 50))
    found = model(image, text)
    assert found.shape == (2, 2, 45, 50)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    own = [p for n, p in model.named_parameters() if not n.startswith("backbone")]
    weight = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), own, retain_graph=True) for x in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
    rest = [torch.autograd.grad((found * weight).sum(), list(model.backbone.parameters()), retain_graph=True)]
    rest.append(torch.autograd.grad((expected * weight).sum(), list(backbone.parameters())))
    for one, other in zip(*rest, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_the_official_backbones_have_their_own_channels_and_the_published_size() -> None:
    with torch.device("meta"):
        found: dict[int, Any] = {n: SentenceBlocks(f"tf_efficientnet_b{n}") for n in (0, 3, 7)}
    channels = {
        n: [block.attention[3].out_features for block in model.sentence_attentions] for n, model in found.items()
    }
    assert channels == {0: [16, 24, 40, 112, 320], 3: [24, 32, 48, 136, 384], 7: [32, 48, 80, 224, 640]}
    assert sum(p.numel() for p in found[3].parameters()) == 14_096_145
    assert sum(p.numel() for p in create_model("test_sentence_blocks").parameters()) < 500_000


def test_official_checkpoints_are_renamed_block_by_block_and_both_ways() -> None:
    with torch.device("meta"):
        names = official_names(SentenceBlocks("tf_efficientnet_b3"))
    assert names["backbone._conv_stem.weight"] == "backbone.conv_stem.weight"
    assert names["backbone._blocks.1._project_conv.weight"] == "backbone.blocks.0.1.conv_pw.weight"
    assert names["backbone._blocks.2._expand_conv.weight"] == "backbone.blocks.1.0.conv_pw.weight"
    assert names["backbone._blocks.25._bn2.running_var"] == "backbone.blocks.6.1.bn3.running_var"
    assert names["backbone._blocks.25._se_expand.bias"] == "backbone.blocks.6.1.se.conv_expand.bias"
    assert names["init_norm.running_mean"] == "init_norm.running_mean"
    torch.manual_seed(0)
    model, other = (SentenceBlocks("tf_efficientnet_b0", text_dim=8).eval() for _ in range(2))
    model_state = model.state_dict()
    official = {theirs: model_state[ours] for theirs, ours in official_names(model).items()}
    load_official(other, official)
    other_state = other.state_dict()
    assert all(torch.equal(value, other_state[name]) for name, value in model.state_dict().items())
    load_official(other, model.state_dict())
    del official["backbone._bn0.weight"]
    with pytest.raises(ValueError, match=r"^load_official: .* does not fit .*missing backbone\._bn0\.weight"):
        load_official(other, official)
    load_official(other, official, ignore=("backbone.bn1",))


def test_the_sentence_chooses_and_options_count() -> None:
    torch.manual_seed(0)
    model: Any = create_model("test_sentence_blocks").eval()
    image, text = torch.rand(2, 3, 36, 36), torch.randn(2, 48)
    assert not torch.allclose(model(image, text), model(image, text.flip(0)))
    weights = model.sentence_attentions[0].attention(text)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2))
    assert create_model("test_sentence_blocks", text_dim=8).sentence_attentions[0].attention[0].in_features == 8
    assert create_model("test_sentence_blocks", num_classes=3)(image, text).shape == (2, 3, 36, 36)
    dropping: Any = create_model("test_sentence_blocks", dropout=0.9)
    assert dropping.dropout.p == 0.9
    other = create_model("sentence_blocks", backbone="test_vit", text_dim=8)
    assert other(torch.rand(1, 3, 160, 160), torch.rand(1, 8)).shape == (1, 1, 160, 160)


def test_pretrained_weights_are_asked_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    made = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: asked.append(options) or made(
        name, **{**options, "pretrained": False}))  # fmt: skip
    SentenceBlocks("test_efficientnet", text_dim=8, pretrained=True)
    SentenceBlocks("test_efficientnet", text_dim=8)
    assert [options["pretrained"] for options in asked] == [True, False]


def test_refusals() -> None:
    for options, message in (
        ({"backbone": "tf_efficientnet_b9"}, "timm offers no features of backbone='tf_efficientnet_b9'"),
        ({"text_dim": 0}, "text_dim must be at least 1, got text_dim=0"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got dropout=1.0"),
    ):
        with pytest.raises(ValueError, match=f"^SentenceBlocks: {message}"):
            create_model("test_sentence_blocks", **options) if "backbone" not in options else SentenceBlocks(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^SentenceBlocks: text must be \(B, 48\), got \(1, 5\)"):
        create_model("test_sentence_blocks")(torch.rand(1, 3, 36, 36), torch.rand(1, 5))
