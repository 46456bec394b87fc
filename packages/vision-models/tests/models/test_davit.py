"""DaViT against timm's, whose parameters have the same names."""

from typing import Any

import pytest
import timm
import torch
from timm.models.davit import DaVit as TimmDaViT
from torch import Tensor, nn

from attn_core.weights import official_names
from vision_models import DaViT, create_model, load_official
from vision_models.models.davit import KEY_MAP

SMALL: dict[str, Any] = {"depths": (1, 1, 2, 1), "num_heads": (2, 4, 4, 4), "num_classes": 7}
DIMS = (16, 32, 48, 64)
PARAMETERS = {
    "davit_tiny": 28_360_168,
    "davit_small": 49_745_896,
    "davit_base": 87_954_408,
    "davit_large": 196_811_752,
    "davit_huge": 348_922_856,
    "davit_giant": 1_406_470_120,
    "davit_base_fl": 90_370_048,
    "davit_huge_fl": 360_636_416,
}
# our options, timm's
OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    (
        {"channel_attention_version": 2, "window_size": 5, "down_kernel_size": 3, "named_blocks": True},
        {"channel_attn_v2": True, "window_size": 5, "down_kernel_size": 3, "named_blocks": True},
    ),
    ({"cpe_act": True, "qkv_bias": False}, {"cpe_act": True, "qkv_bias": False}),
    ({"head_norm_first": True, "attn_types": ("channel",)}, {"head_norm_first": True, "attn_types": ("channel",)}),
]


def _pair(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[DaViT, TimmDaViT]:
    model = DaViT(dims=DIMS, **SMALL, **ours).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    peer = TimmDaViT(embed_dims=DIMS, **SMALL, **theirs).double().eval()
    state = model.state_dict()
    peer.load_state_dict({"norm_pre" + k[4:] if k.startswith("norm.") else k: v for k, v in state.items()})
    return model, peer


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_published(name: str) -> None:
    options = {"num_classes": 0} if name.endswith("_fl") else {}
    assert sum(p.numel() for p in create_model(name, device="meta", **options).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("size", [(112, 112), (100, 132), (65, 33)], ids=str)
@pytest.mark.parametrize(("ours", "theirs"), OPTIONS, ids=str)
def test_logits_and_gradients_equal_timms(ours: dict[str, Any], theirs: dict[str, Any], size: tuple[int, int]) -> None:
    model, peer = _pair(ours, theirs)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    results: list[list[Tensor]] = []
    for net in (model, peer):
        image = x.clone().requires_grad_()
        logits = net(image)
        results.append([logits.detach(), *torch.autograd.grad(logits.square().mean(), [image, *net.parameters()])])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-10 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_with_finite_gradients(dtype: torch.dtype) -> None:
    model = create_model("test_davit", dtype=dtype)
    model(torch.randn(2, 3, 96, 96, dtype=dtype)).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("layout", list(KEY_MAP))
def test_official_checkpoints_make_the_round_trip(layout: str) -> None:
    florence = {"named_blocks": True, "down_kernel_size": 3, "channel_attention_version": 2, "head_norm_first": False}
    options: dict[str, Any] = florence if layout == "florence2" else {}
    model, other = (DaViT(dims=DIMS, **SMALL, **options) for _ in range(2))
    model_state = model.state_dict()
    state = {name: model_state[ours] for name, ours in official_names(model, KEY_MAP[layout]).items()}
    load_official(other, {"state_dict": state})
    assert all(torch.equal(value, model_state[name]) for name, value in other.state_dict().items())


def test_official_names_look_as_published() -> None:
    names = official_names(DaViT(**SMALL, dims=DIMS), KEY_MAP["davit"])
    published = {
        "patch_embeds.0.proj.weight": "stem.conv.weight",
        "patch_embeds.1.norm.bias": "stages.1.downsample.norm.bias",
        "main_blocks.2.1.0.cpe.0.proj.weight": "stages.2.blocks.1.0.cpe1.proj.weight",
        "main_blocks.0.0.1.attn.qkv.bias": "stages.0.blocks.0.1.attn.qkv.bias",
        "norms.weight": "head.norm.weight",
        "head.bias": "head.fc.bias",
    }
    assert {name: names[name] for name in published} == published


def test_timms_own_checkpoint_loads_as_it_is() -> None:
    peer: Any = timm.create_model("davit_tiny", num_classes=3)
    model = load_official(create_model("davit_tiny", num_classes=3), peer.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), peer.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1)}, "must have one entry for each stage"),
        ({"num_heads": (5, 6, 12, 24)}, "num_heads must divide the width of its stage, got 5 and 96"),
        ({"window_size": 0}, "window_size must be positive, got window_size=0"),
        ({"attn_types": ("spatial", "chanel")}, "attn_types must name 'spatial' and 'channel'"),
        ({"down_kernel_size": 4}, "down_kernel_size must be 2 or 3, got down_kernel_size=4"),
        ({"channel_attention_version": 3}, "channel_attention_version must be 1 or 2, got 3"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"DaViT: .*{message}"):
        DaViT(**options)
