"""Swin as a host: with windows alone against timm's, and the official dense backbone."""

from typing import Any

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from vision_models import Swin, SwinDense, create_model, load_official

SMALL: dict[str, Any] = {"depths": (2, 2, 2, 2), "embed_dim": 12, "num_heads": (1, 2, 4, 4), "num_classes": 7}


def test_windows_alone_equal_timms_swin() -> None:
    """Where windows fill the map; elsewhere timm pads after shifting, and we before, as the official dense code."""
    size = 112
    peer = SwinTransformer(img_size=size, window_size=7, **SMALL).double().eval()
    for name, parameter in peer.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.3)
    model = Swin(img_size=size, **SMALL).double().eval()
    rename = (("patch_embed.", "stem."), ("layers.", "stages."))
    state = {}
    for name, value in peer.state_dict().items():
        for theirs, ours in rename:
            name = ours + name.removeprefix(theirs) if name.startswith(theirs) else name
        state[name] = value
    load_official(model, state)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    results: list[list[Tensor]] = []
    for net in (model, peer):
        image = x.clone().requires_grad_()
        logits = net(image)
        leaves = [image, net.get_parameter("norm.weight")]
        results.append([logits.detach(), *torch.autograd.grad(logits.square().mean(), leaves)])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-10 * max(1.0, float(expected.abs().max()))


def test_windows_are_shifted_on_maps_larger_than_one() -> None:
    attn: Any = Swin(img_size=112, **SMALL).stages[0].blocks[1].attn  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    assert (attn.window, attn.shift) == (7, 3)
    x = torch.randn(1, 7, 7, 12)
    still = attn(x)
    attn.always_shift = True
    assert not torch.allclose(attn(x), still)
    mask = attn.mask(14, 14, 3, torch.device("cpu"))
    assert mask.shape == (4, 49, 49)
    assert not mask[0].any()
    assert mask[3, 0, 48]  # the last window joins the corners of the map


@pytest.mark.parametrize("kind", ["agent", "inline"])
def test_base_models_see_the_whole_map_in_two_blocks_of_the_third_stage(kind: str) -> None:
    model: Any = create_model(f"{kind}_swin_base", device="meta")
    kinds = [[type(block.attn).__name__ == "GlobalAttention" for block in stage.blocks] for stage in model.stages]
    assert kinds == [[True] * 2, [True] * 2, [True] * 2 + [False] * 16, [False] * 2]


def test_dense_backbone_returns_four_normed_maps_of_any_size() -> None:
    options: dict[str, Any] = {**SMALL, "attention": ("agent", "agent", ("agent", "softmax"), "softmax")}
    del options["num_classes"]
    model = SwinDense("agent_swin_tiny", agent_shapes=((9, 9), (3, 5), (4, 4), (7, 7)), **options).eval()
    maps = model(torch.randn(1, 3, 200, 264))
    assert [tuple(m.shape[1:]) for m in maps] == [(12, 50, 66), (24, 25, 33), (48, 13, 17), (96, 7, 9)]
    for level in maps:
        torch.testing.assert_close(level.mean(1), torch.zeros_like(level[:, 0]), atol=1e-5, rtol=0)
    model(torch.randn(1, 3, 33, 65))[3].sum().backward()


def test_dense_checkpoints_make_the_round_trip() -> None:
    options: dict[str, Any] = {**SMALL, "attention": "agent"}
    del options["num_classes"]
    model, other = SwinDense(**options), SwinDense(**options)
    state = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    names = {name.replace("out_norms.", "norm"): value for name, value in model.state_dict().items()}
    assert "norm3.weight" in names
    load_official(other, {"state_dict": state})
    model_state = model.state_dict()
    assert all(torch.equal(value, model_state[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": (1, 2)}, "must have one entry for each of 4 stages"),
        ({"attention": "agent", "agents": (9,)}, "must have one entry for each of 4 stages"),
        ({"num_heads": (5, 6, 12, 24)}, "num_heads must divide the width of its stage, got 5 and 96"),
        ({"window": 0}, "window must be positive, got window=0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Swin: .*{message}"):
        Swin(**options)


def test_unknown_variant_is_named() -> None:
    with pytest.raises(ValueError, match=r"SwinDense: variant must be one of .*, got variant='swin_tiny'"):
        SwinDense("swin_tiny")


@pytest.mark.parametrize(("name", "part"), [("agent_swin_base_384", 1.0), ("agent_swin_base", 0.875)])
def test_larger_images_are_tested_uncropped_as_timms_swin(name: str, part: float) -> None:
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    assert cfg.crop_pct == part
