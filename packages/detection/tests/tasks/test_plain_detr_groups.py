"""Learning rates and weight decays by layer, against the rule written out for one small model."""

from typing import Any

import pytest
import torch

from attn_core.engine.errors import ConfigError
from detection.models import create_model
from detection.models.plain_detr.detector import PlainDETR
from detection.tasks.plain_detr_groups import PlainDETRGroups, layers_above


def rates(model: Any, **paramwise_cfg: Any) -> dict[str, tuple[float, float]]:
    constructor = PlainDETRGroups({"optimizer": {"type": "AdamW", "lr": 2e-4, "weight_decay": 0.05}}, paramwise_cfg)
    groups: list[dict[str, Any]] = []
    constructor.add_params(groups, model)
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_swin_layers_learn_slower_the_deeper_they_lie() -> None:
    model: Any = create_model("test_plain_detr")  # depths 1, 1, 2, 2
    found = rates(model, decay_rate=0.9)
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, distance, decay in (
        ("body.patch_embed.proj.weight", 7, 0.05),
        ("body.layers.0.blocks.0.mlp.fc1.weight", 6, 0.05),
        ("body.layers.0.downsample.reduction.weight", 6, 0.05),
        ("body.layers.2.blocks.1.attn.cpb_mlp.0.weight", 3, 0.0),
        ("body.layers.2.downsample.norm.weight", 3, 0.0),
        ("body.layers.3.blocks.1.attn.logit_scale", 1, 0.0),
        ("body.norm3.weight", 0, 0.0),
        ("level_embed", 0, 0.0),
        ("layers.0.cross_attn.cpb_mlp1.2.weight", 0, 0.0),
        ("layers.0.linear1.weight", 0, 0.05),
    ):
        assert found[name] == (pytest.approx(2e-4 * 0.9**distance), decay), name
    assert layers_above("net.body.layers.2.blocks.17.mlp.fc1.weight", [2, 2, 18, 2]) == 3


def test_a_key_slows_the_backbone_down_and_frozen_parameters_stay_out() -> None:
    model: Any = create_model("test_plain_detr")
    model.body.norm3.weight.requires_grad_(False)
    found = rates(model, custom_keys={"body.": {"lr_mult": 0.1}})
    assert "body.norm3.weight" not in found
    assert found["body.layers.0.blocks.0.mlp.fc1.weight"] == (pytest.approx(2e-5), 0.05)
    assert found["enc_output.weight"] == (2e-4, 0.05)


def test_layer_decay_needs_the_backbone_it_knows() -> None:
    class Flat(torch.nn.Module):
        channels, stride = 8, 16

    with pytest.raises(ConfigError, match="needs a Swin V2 backbone"):
        rates(PlainDETR(Flat(), 3, dim=32, num_heads=2, num_layers=1), decay_rate=0.9)
