"""Backbones for detection and segmentation: official checkpoints with a norm for each stage, and what they compute."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_core.weights import official_names
from vision_models import (
    BiFormerDense,
    DaViTDense,
    FocalNetDense,
    MambaOutDense,
    NATDense,
    RAVLTDense,
    SwinDense,
    load_official,
)

# class: small variant, layout of the checkpoints, official name of the second norm
DENSE: dict[Any, tuple[str, str, str]] = {
    BiFormerDense: ("test_biformer", "biformer", "extra_norms.1.weight"),
    DaViTDense: ("test_davit", "davit", "norm1.weight"),
    FocalNetDense: ("test_focalnet", "focalnet", "norm1.weight"),
    MambaOutDense: ("test_mambaout", "mambaout", "out_norms.1.weight"),
    NATDense: ("test_nat", "nat", "norm1.weight"),
    RAVLTDense: ("test_ravlt", "rala", "extra_norms.1.norm.weight"),
    SwinDense: ("test_agent_swin", "swin", "norm1.weight"),
}


def redrawn(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("build", DENSE)
def test_official_dense_checkpoints_load_and_every_name_is_theirs(build: Any) -> None:
    variant, layout, norm = DENSE[build]
    model: Any = redrawn(build(variant))
    other = build(variant)
    names = official_names(model, model.key_map[layout])
    assert norm in names
    model_state = model.state_dict()
    state = {f"backbone.{official}": model_state[ours] for official, ours in names.items()}
    load_official(other, {"state_dict": {**state, "bbox_head.weight": torch.zeros(1)}})
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for level, expected in zip(other.eval()(x), model.eval()(x), strict=True):
            torch.testing.assert_close(level, expected)
    with pytest.raises(ValueError, match=f"missing {norm}"):
        load_official(other, {name: value for name, value in state.items() if name != f"backbone.{norm}"})


@pytest.mark.parametrize("build", DENSE)
def test_maps_are_normed_on_the_way_out_only(build: Any) -> None:
    model: Any = redrawn(build(DENSE[build][0])).double().eval()
    x = torch.randn(1, 3, 72, 104, dtype=torch.float64)
    with torch.no_grad():
        maps = model(x)
        taps = model.forward_intermediates(x, intermediates_only=True)
    eps = 1e-6 if build in (BiFormerDense, MambaOutDense, RAVLTDense) else 1e-5
    for level, (out, tap, norm) in enumerate(zip(maps, taps, model.out_norms, strict=True)):
        assert out.shape[2:] == tuple(-(-side // (4 << level)) for side in x.shape[2:])
        mean, var = tap.mean(1, keepdim=True), tap.var(1, unbiased=False, keepdim=True)
        expected: Tensor = (tap - mean) / (var + eps).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)


def test_focalnet_pads_its_overlapping_windows_by_three_as_the_dense_code() -> None:
    dense: Any = FocalNetDense("test_focalnet", overlap_down=True)
    plain: Any = FocalNetDense("test_focalnet", overlap_down=True, stem_padding=2)
    assert dense.stem.proj.padding == (3, 3)
    plain.load_state_dict(dense.state_dict())
    x = torch.randn(1, 3, 66, 70)
    expected = nn.functional.conv2d(
        nn.functional.pad(x, (0, 2, 0, 2)), dense.stem.proj.weight, dense.stem.proj.bias, 4, 3
    )
    torch.testing.assert_close(dense.stem.proj(nn.functional.pad(x, (0, 2, 0, 2))), expected)
    assert not torch.allclose(dense(x)[0], plain(x)[0])
    with pytest.raises(ValueError, match="stem_padding must be 2 or 3, got stem_padding=1"):
        FocalNetDense("test_focalnet", stem_padding=1)


def test_davit_without_mlp_has_none_and_keeps_its_second_position() -> None:
    model: Any = DaViTDense("test_davit", ffn=False)
    names = official_names(model, model.key_map["davit"])
    assert not any(".mlp." in name or ".norm2." in name for name in names)
    assert "main_blocks.0.0.0.cpe.1.proj.weight" in names
    other: Any = redrawn(DaViTDense("test_davit", ffn=False))
    model_state = model.state_dict()
    load_official(other, {n: model_state[o] for n, o in names.items()})


@pytest.mark.parametrize("build", DENSE)
def test_unknown_variants_are_named(build: Any) -> None:
    with pytest.raises(ValueError, match=rf"{build.__name__}: variant must be one of .*got variant='nosuch'"):
        build("nosuch")
