"""Every option of every backbone changes what the network is or computes; an option without an entry here fails."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from vision_models import (
    DHVT,
    FAN,
    NAT,
    PVT,
    RAVLT,
    RVT,
    BiFormer,
    CSwin,
    DaViT,
    DeiT,
    FocalNet,
    HaloNet,
    MambaOut,
    Sparsifiner,
    SpectFormer,
    SpectFormerH,
    Swin,
    TransNeXt,
)
from vision_models.models import CATALOG

# class: small variant, and for each option another value (with what it needs beside it)
OTHERS: dict[Any, tuple[str, dict[str, Any]]] = {
    BiFormer: (
        "test_biformer",
        {
            "depths": (1, 1, 1, 1),
            "dims": (16, 32, 48, 48),
            "stem": "patch",
            "norm_layer": "layer",
            "mlp_ratios": 2.0,
            "head_dim": 8,
            "qk_dims": (16, 16, 48, 64),
            "qk_scale": 0.5,
            "n_win": 5,
            "topks": (0, 4, 9, -2),
            "lepe_source": "value",
            "pad_mode": "masked",
            "side_dwconv": 3,
            "before_attn_dwconv": 0,
            "param_attention": "qkv",
            "soft_routing": True,
            "param_routing": {"param_routing": True, "diff_routing": True, "soft_routing": True},
            "kv_downsample_mode": {"kv_downsample_mode": "ada_avgpool", "kv_per_wins": (1, 1, 1, 1)},
            "kv_per_wins": ({"kv_downsample_mode": "ada_avgpool"}, {"kv_per_wins": (1, 1, 1, 1)}),
            "kv_downsample_ratios": ({"kv_downsample_mode": "avgpool"}, {"kv_downsample_ratios": (2, 1, 1, 1)}),
            "mlp_dwconv": True,
            "pre_norm": False,
            "layer_scale_init_value": 0.1,
        },
    ),
    CSwin: (
        "test_agent_cswin",
        {
            "depths": (1, 1, 1, 1),
            "embed_dim": 16,
            "num_heads": (1, 2, 4, 8),
            "attention": "inline",
            "agents": (4, 4, 4, 4),
            "split": (1, 2, 2),
            "img_size": 64,
            "mlp_ratio": 2.0,
            "qkv_bias": False,
        },
    ),
    DaViT: (
        "test_davit",
        {
            "depths": (1, 1, 2, 1),
            "dims": (16, 24, 32, 32),
            "num_heads": (1, 1, 1, 1),
            "window_size": 3,
            "mlp_ratio": 2.0,
            "qkv_bias": False,
            "attn_types": ("channel", "spatial"),
            "cpe_act": True,
            "ffn": False,
            "down_kernel_size": 3,
            "channel_attention_version": 2,
            "named_blocks": True,
            "head_norm_first": True,
        },
    ),
    DeiT: (
        "test_agent_deit",
        {
            "depth": {"depth": 3, "attention": "agent"},
            "embed_dim": 32,
            "num_heads": 2,
            "attention": "inline",
            "agents": 9,
            "shared_heads": ({"attention": "softmax"}, {"shared_heads": 2, "routed_heads": 1}),
            "routed_heads": (
                {"attention": "softmax", "shared_heads": 1, "routed_heads": 1},
                {"shared_heads": 1, "routed_heads": 2},
            ),
            "patch_size": 8,
            "img_size": 64,
            "mlp_ratio": 2.0,
            "qkv_bias": False,
        },
    ),
    DHVT: (
        "test_dhvt",
        {
            "depth": 3,
            "embed_dim": 32,
            "num_heads": 2,
            "patch_size": 4,
            "stem": "patch",
            "head_tokens": False,
            "feed_forward": "mlp",
            "img_size": ({"stem": "patch"}, {"img_size": 64}),
            "mlp_ratio": 2.0,
            "qkv_bias": False,
        },
    ),
    FAN: (
        "test_tap_fan",
        {
            "depth": 3,
            "embed_dim": 48,
            "num_heads": 2,
            "stem": "convnext",
            "stem_depths": ({"stem": "convnext", "stem_dim": 8, "stem_depths": (1, 1)}, {"stem_depths": (1, 2)}),
            "stem_dim": ({"stem": "convnext", "stem_dim": 8, "stem_depths": (1, 1)}, {"stem_dim": 12}),
            "scales": 3,
            "temperature": 2.0,
            "class_blocks": 1,
            "mlp_ratio": 2.0,
            "qkv_bias": False,
        },
    ),
    FocalNet: (
        "test_focalnet",
        {
            "depths": (1, 1, 1, 1),
            "embed_dim": 24,
            "patch_size": 8,
            "mlp_ratio": 2.0,
            "focal_levels": 1,
            "focal_windows": 5,
            "overlap_down": True,
            "post_norm": True,
            "post_norm_in_modulation": True,
            "normalize_modulator": True,
            "layerscale_value": 0.1,
            "pad_odd": True,
            "stem_padding": ({"overlap_down": True}, {"stem_padding": 3}),
        },
    ),
    HaloNet: (
        "test_halonet",
        {
            "blocks": (("conv",), ("conv",), ("halo",), ("halo",)),
            "dims": (32, 48, 64, 64),
            "bottle_ratio": 0.25,
            "bottle_in": True,
            "stem": "7x7",
            "stem_dim": 24,
            "stem_pool": False,
            "act": "silu",
            "group_size": 8,
            "channel_attn": "eca",
            "se_ratio": ({"channel_attn": "se", "se_ratio": 0.5}, {"se_ratio": 1.0}),
            "linear_out": True,
            "project_shortcut": False,
            "num_heads": 1,
            "head_dim": 4,
            "qk_ratio": 0.5,
            "value_ratio": 2.0,
            "block_size": 2,
            "halo_size": 2,
            "border": "masked",
            "img_size": ({"blocks": (("conv",), ("conv",), ("conv",), ("bottleneck",))}, {"img_size": 128}),
            "final_dim": 32,
        },
    ),
    MambaOut: (
        "test_mambain",
        {
            "depths": (1, 1, 1, 1),
            "dims": (12, 16, 24, 24),
            "expansion": 3.0,
            "conv_ratio": 0.5,
            "kernel_size": 5,
            "act": "gelu",
            "ssm": False,
            "ssm_state": 2,
            "layer_scale": None,
            "stem_norm": True,
            "down_norm_first": False,
            "head_norm": True,
        },
    ),
    NAT: (
        "test_nat",
        {
            "depths": (1, 1, 1, 1),
            "embed_dim": 16,
            "num_heads": (1, 1, 1, 1),
            "kernel_size": 5,
            "dilation": (1, 3, 1, 1),
            "tokens": "patch",
            "patch_size": ({"tokens": "patch"}, {"patch_size": 2}),
            "attention": "softmax",
            "img_size": ({"attention": "softmax"}, {"img_size": 64}),
            "layer_scale": None,
            "mlp_ratio": 2.0,
            "qkv_bias": False,
        },
    ),
    PVT: (
        "test_agent_pvt",
        {
            "depths": {"depths": (1, 1, 1, 2)},
            "embed_dims": (16, 24, 32, 32),
            "num_heads": (1, 1, 1, 1),
            "attention": "inline",
            "agents": (4, 4, 4, 4),
            "agent_shapes": ((2, 3), (3, 3), (2, 2), (1, 1)),
            "sr_ratios": (8, 4, 2, 2),
            "agent_sr_ratios": (2, 2, 1, 1),
            "img_size": 64,
            "mlp_ratios": (4, 4, 4, 4),
            "qkv_bias": False,
        },
    ),
    RAVLT: (
        "test_ravlt",
        {
            "depths": (1, 1, 1, 1),
            "dims": (16, 24, 32, 32),
            "num_heads": (1, 1, 1, 1),
            "attention": "softmax",
            "mlp_ratio": 2.0,
            "layer_scale": 0.5,
            "proj_dim": 32,
        },
    ),
    Sparsifiner: (
        "test_sparsifiner",
        {
            "depth": 3,
            "embed_dim": 32,
            "num_heads": 2,
            "keep": 0.5,
            "rank": 4,
            "reduce": 3,
            "patch_size": 8,
            "img_size": 64,
            "mlp_ratio": 2.0,
            "qkv_bias": False,
        },
    ),
    SpectFormer: (
        "test_gfnet",
        {
            "depths": (1, 1, 2, 1),
            "dims": (12, 16, 24, 24),
            "spectral": {"spectral": 2, "num_heads": 2},
            "num_heads": ({"spectral": 2, "num_heads": 2}, {"num_heads": 4}),
            "patch_size": 2,
            "mlp_ratio": 2.0,
            "layer_scale": None,
            "img_size": 64,
        },
    ),
    SpectFormerH: (
        "test_spectformer_h",
        {
            "depths": (1, 1, 2, 1),
            "dims": (12, 16, 24, 24),
            "num_heads": (1, 1, 1, 1),
            "mlp_ratios": (1, 1, 1, 1),
            "stem_dim": 12,
            "spectral": 1,
            "token_label": False,
            "img_size": 64,
        },
    ),
    RVT: (
        "test_tap_rvt",
        {
            "depths": (1, 1, 1, 1),
            "num_heads": {"num_heads": (2, 2, 2, 2), "head_dims": (6, 12, 12, 24)},
            "head_dims": (6, 6, 6, 6),
            "patch_size": 16,
            "masked_blocks": 0,
            "img_size": 64,
            "scales": 3,
            "temperature": 2.0,
            "mlp_ratio": 2.0,
            "qkv_bias": False,
        },
    ),
    Swin: (
        "test_agent_swin",
        {
            "depths": {"depths": (1, 1, 2, 1)},
            "embed_dim": 24,
            "num_heads": (1, 2, 4, 8),
            "attention": "softmax",
            "agents": (4, 4, 4, 4),
            "agent_shapes": ((2, 3), (3, 3), (2, 2), (1, 1)),
            "img_size": 64,
            "window": 3,
            "mlp_ratio": 2.0,
            "qkv_bias": False,
        },
    ),
    TransNeXt: (
        "test_moh_transnext",
        {
            "depths": (1, 1, 2, 1),
            "embed_dims": (16, 16, 24, 32),
            "num_heads": (2, 4, 3, 4),
            "mlp_ratios": (3, 3, 3, 3),
            "sr_ratios": (4, 4, 2, 1),
            "shared_heads": (2, 1, 2, 2),
            "routed_heads": (0, 1, 2, 1),
            "img_size": 64,
            "qkv_bias": False,
        },
    ),
}
# Tested in test_every_model.py, or for BiFormer in test_biformer.py (a gradient, an error), for every family alike.
ELSEWHERE = {"in_chans", "num_classes", "global_pool", "drop_rate", "drop_path_rate", "device", "dtype"}
ELSEWHERE |= {"auto_pad", "diff_routing"}


@pytest.mark.parametrize("build", OTHERS)
def test_no_option_is_left_out(build: Any) -> None:
    assert set(inspect.signature(build).parameters) - ELSEWHERE == set(OTHERS[build][1])


@pytest.mark.parametrize(
    ("build", "option"), [(build, option) for build, (_, others) in OTHERS.items() for option in others], ids=str
)
def test_another_value_makes_another_network(build: Any, option: str) -> None:
    variant, others = OTHERS[build]
    settings: Any = CATALOG.entry(variant).settings  # pyright: ignore[reportAttributeAccessIssue]
    value = others[option]
    before, after = value if isinstance(value, tuple) and isinstance(value[0], dict) else ({}, value)
    after = after if isinstance(after, dict) else {option: after}
    both = [{**settings, "num_classes": 5, **options} for options in (before, {**before, **after})]
    with torch.device("meta"):
        shapes = [{name: tuple(p.shape) for name, p in build(**options).state_dict().items()} for options in both]
    if shapes[0] != shapes[1]:
        return
    plain, other = (build(**options).eval() for options in both)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    other.load_state_dict(plain.state_dict())
    x: Tensor = torch.randn(1, 3, 90, 100)
    with torch.no_grad():
        assert not torch.allclose(plain(x), other(x), rtol=1e-4, atol=1e-5) or option == "layer_scale"
    if option == "layer_scale":  # a start value
        assert build(**{**settings, **after}).stages[0].blocks[0].gamma_1[0].item() == 0.5
