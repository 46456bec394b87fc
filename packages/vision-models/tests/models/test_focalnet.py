"""FocalNet against timm's."""

from typing import Any, cast

import pytest
import timm
import torch
from timm.models.focalnet import FocalNet as TimmFocalNet
from torch import Tensor, nn

from attn_core.weights import official_names
from vision_models import FocalNet, create_model, load_official
from vision_models.models.focalnet import KEY_MAP

SMALL: dict[str, Any] = {"depths": (1, 1, 2, 1), "embed_dim": 16, "num_classes": 7}
PARAMETERS = {
    "focalnet_tiny_srf": 28_427_116,
    "focalnet_tiny_lrf": 28_647_928,
    "focalnet_small_srf": 49_891_216,
    "focalnet_small_lrf": 50_342_440,
    "focalnet_base_srf": 88_148_144,
    "focalnet_base_lrf": 88_749_768,
    "focalnet_tiny_iso": 5_880_280,
    "focalnet_small_iso": 22_376_344,
    "focalnet_base_iso": 87_237_400 + 12 * 2 * 768,  # the published count leaves out the norm in the modulation
    "focalnet_large_fl3": 239_134_898,
    "focalnet_large_fl4": 239_315_402,
    "focalnet_xlarge_fl3": 408_787_378,
    "focalnet_xlarge_fl4": 409_028_042,
    "focalnet_huge_fl3": 745_276_338,
    "focalnet_huge_fl4": 686_460_664,
}
# our options, timm's
OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"focal_levels": 3, "focal_windows": 5}, {"focal_levels": (3,) * 4, "focal_windows": (5,) * 4}),
    (
        {"overlap_down": True, "post_norm": True, "layerscale_value": 0.1, "normalize_modulator": True},
        {"use_overlap_down": True, "use_post_norm": True, "layerscale_value": 0.1, "normalize_modulator": True},
    ),
    (
        {"post_norm": True, "post_norm_in_modulation": True, "focal_levels": (1, 2, 3, 4)},
        {"use_post_norm": True, "use_post_norm_in_modulation": True, "focal_levels": (1, 2, 3, 4)},
    ),
]


def _pair(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[FocalNet, TimmFocalNet]:
    peer = TimmFocalNet(**SMALL, **theirs).double().eval()
    for parameter in peer.parameters():
        nn.init.normal_(parameter, std=0.1)
    return load_official(FocalNet(**SMALL, **ours).double(), peer.state_dict()).eval(), peer


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_published(name: str) -> None:
    assert sum(p.numel() for p in create_model(name, device="meta").parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("size", [(112, 112), (100, 132), (65, 33)], ids=str)
@pytest.mark.parametrize(("ours", "theirs"), OPTIONS, ids=str)
def test_logits_and_gradients_equal_timms(ours: dict[str, Any], theirs: dict[str, Any], size: tuple[int, int]) -> None:
    model, peer = _pair(ours, theirs)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    names = official_names(model, KEY_MAP["timm"])
    results: list[list[Tensor]] = []
    for net, order in ((model, list(names.values())), (peer, list(names))):
        image = x.clone().requires_grad_()
        logits = net(image)
        parameters = dict(net.named_parameters())
        grads = torch.autograd.grad(logits.square().mean(), [image, *(parameters[name] for name in order)])
        results.append([logits.detach(), grads[0], *(grad.flatten() for grad in grads[1:])])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-10 * max(1.0, float(expected.abs().max()))


def test_odd_maps_are_cut_or_padded() -> None:
    x = torch.randn(1, 3, 200, 264)
    cut, padded = (
        cast(Any, create_model("test_focalnet", pad_odd=pad_odd)).forward_intermediates(x, intermediates_only=True)
        for pad_odd in (False, True)
    )
    assert [tuple(level.shape[2:]) for level in cut] == [(50, 66), (25, 33), (12, 16), (6, 8)]
    assert [tuple(level.shape[2:]) for level in padded] == [(50, 66), (25, 33), (13, 17), (7, 9)]


def test_normalized_modulator_is_the_mean_over_levels() -> None:
    plain, mean = (FocalNet(**SMALL, normalize_modulator=normalize).eval() for normalize in (False, True))
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    mean.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert (plain(x) - mean(x)).abs().max() > 1e-3 * plain(x).abs().max()
    for module in plain.modules():  # the context enters linearly, so dividing h's weights does the same
        if type(module).__name__ == "FocalModulation":
            module.h.weight.data /= len(module.focal_layers) + 1  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue, reportOperatorIssue]
    torch.testing.assert_close(plain(x), mean(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_with_finite_gradients(dtype: torch.dtype) -> None:
    model = create_model("test_focalnet", dtype=dtype)
    model(torch.randn(2, 3, 96, 96, dtype=dtype)).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("layout", list(KEY_MAP))
@pytest.mark.parametrize("post", [False, True])
def test_official_checkpoints_make_the_round_trip(layout: str, post: bool) -> None:
    options: dict[str, Any] = {**SMALL, "post_norm": post, "post_norm_in_modulation": post}
    if layout == "isotropic":
        options |= {"depths": (4,), "patch_size": 16}
    model, other = (FocalNet(**options, layerscale_value=0.1) for _ in range(2))
    model_state = model.state_dict()
    state = {name: model_state[ours] for name, ours in official_names(model, KEY_MAP[layout]).items()}
    load_official(other, {"model": state})
    assert all(torch.equal(value, model_state[name]) for name, value in other.state_dict().items())


def test_isotropic_network_is_one_stage_of_timms_and_gives_a_map_from_every_block() -> None:
    peer = TimmFocalNet(depths=(4,), embed_dim=16, num_classes=7).double().eval()
    model = FocalNet(depths=(4,), embed_dim=16, num_classes=7).double().eval()
    names = official_names(model, KEY_MAP["isotropic"])
    peer_state = peer.state_dict()
    state = {
        ours: peer_state[name.replace("patch_embed.", "stem.").replace("head.", "head.fc.")]
        for name, ours in names.items()
    }
    model_state = model.state_dict()
    model.load_state_dict({name: value.view_as(model_state[name]) for name, value in state.items()})
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    torch.testing.assert_close(model(x), peer(x), rtol=0, atol=1e-10)
    maps: Any = model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(level.shape[1:]) for level in maps] == [(16, 16, 24)] * 4
    variant: Any = create_model("focalnet_tiny_iso", features_only=True, device="meta")
    assert [row["reduction"] for row in variant.feature_info.get_dicts()] == [16, 16, 16]
    assert len(create_model("focalnet_tiny_iso", device="meta").feature_info) == 12


def test_official_names_look_as_published() -> None:
    model = FocalNet(**SMALL, layerscale_value=0.1, post_norm_in_modulation=True)
    names = official_names(model, KEY_MAP["focalnet"])
    published = {
        "patch_embed.proj.weight": "stem.proj.weight",
        "layers.0.downsample.norm.bias": "stages.1.downsample.norm.bias",
        "layers.2.blocks.1.modulation.focal_layers.1.0.weight": "stages.2.blocks.1.modulation.focal_layers.1.0.weight",
        "layers.2.blocks.1.modulation.ln.weight": "stages.2.blocks.1.modulation.norm.weight",
        "layers.3.blocks.0.gamma_2": "stages.3.blocks.0.ls2.gamma",
        "norm.weight": "norm.weight",
        "head.bias": "head.fc.bias",
    }
    assert {name: names[name] for name in published} == published


def test_timms_own_checkpoint_loads_as_it_is() -> None:
    peer: Any = timm.create_model("focalnet_tiny_srf", num_classes=3)
    model = load_official(create_model("focalnet_tiny_srf", num_classes=3), peer.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), peer.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"focal_levels": (2, 2)}, "focal_levels must have one entry for each of 4 stages"),
        ({"focal_levels": -1}, "focal_levels must not be negative"),
        ({"focal_windows": 4}, "focal_windows must be odd"),
        ({"patch_size": 8, "overlap_down": True}, "patch_size must be 4 with overlap_down, else positive, got 8"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"FocalNet: .*{message}"):
        FocalNet(**options)
