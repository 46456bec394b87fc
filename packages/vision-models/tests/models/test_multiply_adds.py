"""Multiply-adds of one picture beside what fvcore counts in the official code, or timm publishes.

fvcore counts normalization and pooling too, which are 1.2 % of haloregnetz_b and less elsewhere.
"""

from typing import Any

import pytest
import torch

from attn_core.flops import count_flops
from vision_models import create_model

GIGA = {
    "biformer_tiny": 2.228,
    "biformer_small": 4.487,
    "biformer_base": 9.795,
    "davit_tiny": 4.540,
    "davit_small": 8.800,
    "davit_base": 15.510,
    "focalnet_tiny_srf": 4.421,
    "focalnet_tiny_lrf": 4.492,
    "focalnet_small_srf": 8.625,
    "focalnet_small_lrf": 8.742,
    "focalnet_base_srf": 15.276,
    "focalnet_base_lrf": 15.432,
    "focalnet_tiny_iso": 1.114,
    "focalnet_small_iso": 4.308,
    "focalnet_base_iso": 16.94,
    "halonet26t": 3.194,
    "halonet50ts": 5.301,
    "sehalonet33ts": 3.552,
    "eca_halonext26ts": 2.441,
    "haloregnetz_b": 1.971,
    "lamhalobotnet50ts_256": 5.02,
    "halo2botnet50ts_256": 5.02,
    "dhvt_tiny_cifar_p4": 0.392,
    "dhvt_tiny_cifar_p2": 1.723,
    "dhvt_small_domain_p16": 5.062,
    "dhvt_tiny_imagenet_p16": 1.369,
    "mambaout_femto": 1.156,
    "mambaout_kobe": 1.515,
    "mambaout_tiny": 4.486,
    "mambaout_small": 8.960,
    "mambaout_base": 15.826,
    "nat_mini": 2.7,
    "nat_base": 13.7,
    "dinat_mini": 2.7,
    "dinat_s_tiny": 4.5,
    "dinat_iso_small": 4.3,
    "vitrpb_small": 4.6,
    "tap_rvt_small_plus": 4.70,
    "tap_fan_base_hybrid": 11.86,
    "ravlt_tiny": 2.626,
    "ravlt_small": 4.899,
    "ravlt_base": 10.616,
    "ravlt_large": 17.256,
    "spectformer_ti": 1.847,
    "spectformer_b": 11.580,
    "gfnet_s": 4.5,
    "gfnet_b": 7.9,
    "spectformer_h_s": 4.06,
    "spectformer_h_l_tl": 13.25,
    "agent_deit_tiny": 1.176,
    "agent_pvt_tiny": 2.000,
    "agent_swin_tiny": 4.528,
    "agent_cswin_tiny": 4.315,
    "inline_deit_tiny": 1.114,
    "inline_pvt_tiny": 1.986,
    "inline_swin_tiny": 4.478,
    "inline_cswin_tiny": 4.331,
    "agent_deit_small": 4.443,
    "agent_deit_base": 17.552,
    "agent_pvt_large": 10.390,
    "agent_swin_base": 15.444,
    "agent_cswin_base": 14.923,
    "inline_deit_small": 4.979,
    "inline_deit_base": 17.207,
    "inline_pvt_large": 10.164,
    "inline_swin_base": 15.435,
    "inline_cswin_base": 14.928,
}


# Larger siblings are of the same code; they are counted when slow tests are asked for.
OFTEN = [pytest.param(name, marks=pytest.mark.slow if giga > 4.2 else ()) for name, giga in GIGA.items()]


@pytest.mark.parametrize("name", OFTEN)
def test_multiply_adds_are_those_of_the_official_code(name: str) -> None:
    with torch.device("meta"):
        model: Any = create_model(name).eval()
    x = torch.empty(1, *model.default_cfg["input_size"], device="meta")
    assert count_flops(lambda: model(x)) / 2e9 == pytest.approx(GIGA[name], rel=0.015)
