"""The lifting detector: targets, losses, decoding, the switch between liftings, and the official checkpoint's names."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from detection.data.ring3d import Ring3D, collate_scenes
from detection.models.bevformer.detector import BEVFormerDFA3D, BEVOutput, GridSelfAttention, load_official
from detection.tasks.bevformer import BEVDetectionTask, center_focal_loss, center_targets

SMALL: dict[str, Any] = {
    "backbone": "test_resnet", "dim": 16, "num_layers": 1, "num_points": 4, "num_heads": 2, "bev_size": (8, 8),
    "depth_blocks": 0, "depth_context": None,
}  # fmt: skip
REGION = (-32.0, -32.0, -5.0, 32.0, 32.0, 3.0)


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    data = Ring3D("val", scenes=1)
    return collate_scenes([data[0], data[1]])


@pytest.mark.parametrize("lifting", ["dfa2d", "dfa3d", "dfa3d_gt"])
def test_every_lifting_trains_every_parameter(lifting: Any, batch: dict[str, Any]) -> None:
    task = BEVDetectionTask(BEVFormerDFA3D(lifting=lifting, **SMALL))
    losses = task.loss(**batch)
    assert ("loss_depth" in losses) == (lifting == "dfa3d")
    sum(losses.values()).backward()  # type: ignore[union-attr]
    still = [name for name, p in task.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not still


@pytest.mark.parametrize("lifting", ["dfa2d", "dfa3d", "dfa3d_gt"])
def test_no_samples_give_no_boxes_and_gradients_of_zero(lifting: Any, batch: dict[str, Any]) -> None:
    model = BEVFormerDFA3D(lifting=lifting, **{**SMALL, "depth_blocks": 1, "depth_context": "aspp_dcn"})
    output = model(batch["image"][:0], batch["lidar2img"][:0], batch["depth"][:0])
    assert output.boxes.shape == (0, 10, 8, 8)
    assert model.decode(output) == []
    sum(part.sum() for part in output if part is not None).backward()  # type: ignore[union-attr]
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_liftings_differ_by_depth_parameters_only() -> None:
    names = {
        kind: {n for n, _ in BEVFormerDFA3D(lifting=kind, **SMALL).named_parameters()} for kind in ("dfa2d", "dfa3d")
    }  # type: ignore[arg-type]
    assert names["dfa2d"] < names["dfa3d"]
    assert all("depth" in name or name.startswith("pts_dpt_head") for name in names["dfa3d"] - names["dfa2d"])


def test_depth_dim_is_the_width_of_the_depth_head_alone() -> None:
    usual, wide = (BEVFormerDFA3D(**SMALL, depth_dim=width) for width in (None, 24))
    sizes = [{n: p.shape for n, p in model.named_parameters()} for model in (usual, wide)]
    changed = {name for name, size in sizes[0].items() if sizes[1][name] != size}
    assert changed
    assert all(name.startswith("pts_dpt_head.") for name in changed)
    assert {16, 24} == {size[name][0] for size in sizes for name in changed if name.endswith("reduce_conv.0.weight")}


def test_decoding_gives_back_what_the_targets_encode() -> None:
    model = BEVFormerDFA3D(**SMALL)
    boxes = torch.tensor([[-20.0, 7.5, -1, 4.5, 1.9, 1.6, 2.5, 3, -1], [10.0, 30.0, 0, 0.7, 0.7, 1.7, -3.0, 0, 0]])
    labels = torch.tensor([0, 2])
    heat, cells, code = center_targets(boxes, labels, 3, (8, 8), REGION)
    maps = torch.zeros(1, 10, 64)
    maps[0, :, cells] = code.T
    output = BEVOutput((heat.unsqueeze(0) * 20 - 10), maps.view(1, 10, 8, 8), None)
    found = model.decode(output, top_k=2)[0]
    order = found["labels"].argsort()
    torch.testing.assert_close(found["boxes"][order], boxes, atol=1e-4, rtol=1e-4)
    assert found["labels"][order].tolist() == [0, 2]
    assert heat[0].max() == 1
    assert heat[1].max() == 0


def test_objects_outside_the_region_are_left_out() -> None:
    boxes = torch.tensor([[40.0, 0, 0, 1, 1, 1, 0, 0, 0]])
    heat, cells, _ = center_targets(boxes, torch.tensor([1]), 3, (8, 8), REGION)
    assert heat.sum() == 0
    assert len(cells) == 0


def test_overlapping_heat_takes_the_greater_value() -> None:
    near = torch.tensor([[1.0, 1, 0, 20, 20, 1, 0, 0, 0], [9.0, 1, 0, 20, 20, 1, 0, 0, 0]])
    both = center_targets(near, torch.tensor([0, 0]), 1, (8, 8), REGION)[0]
    single = [center_targets(near[i : i + 1], torch.tensor([0]), 1, (8, 8), REGION)[0] for i in (0, 1)]
    torch.testing.assert_close(both, torch.maximum(*single))


def test_focal_loss_of_one_center() -> None:
    logits, target = torch.tensor([0.3, -1.0]), torch.tensor([1.0, 0.5])
    p = logits.sigmoid()
    expected = -((1 - p[0]) ** 2 * p[0].log() + 0.5**4 * p[1] ** 2 * (1 - p[1]).log())
    torch.testing.assert_close(center_focal_loss(logits, target), expected)
    assert center_focal_loss(torch.tensor([-100.0]), torch.tensor([0.0])) == 0


def test_grid_attention_starts_as_a_mean_around_each_cell() -> None:
    layer = GridSelfAttention(8, 2, 2)
    for projection in (layer.value_proj, layer.output_proj):
        nn.init.eye_(projection.weight)
    query = torch.zeros(1, 25, 8)
    query[0, 12] = 1.0  # the middle of 5×5
    # head 0 looks right by 1 and 2 cells, head 1 left: two cells see the middle with each, at ½
    out = (layer(query, torch.zeros_like(query), (5, 5)) - query).detach()
    assert out[0, :, :4].sum().item() == pytest.approx(4.0)
    assert out[0, 11, 0].item() == pytest.approx(0.5)
    assert out[0, 10, 0].item() == pytest.approx(0.5)


def test_official_lifting_loads_by_name() -> None:
    model = BEVFormerDFA3D(**{**SMALL, "depth_blocks": 1})
    state = {}
    for key, value in model.state_dict().items():
        if ".attentions.1." in key:
            state[f"pts_bbox_head.transformer.encoder.{key}"] = torch.randn_like(value)
        elif key.startswith("pts_dpt_head."):
            state[key] = torch.ones_like(value)
    load_official(model, {"state_dict": {**state, "img_backbone.conv1.weight": torch.zeros(1)}})
    model_state = model.state_dict()
    for key, value in state.items():
        own = key.removeprefix("pts_bbox_head.transformer.encoder.")
        torch.testing.assert_close(model_state[own], value)
    with pytest.raises(ValueError, match="no key starts with pts_bbox_head"):
        load_official(model, {"conv.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"does not fit this BEVFormerDFA3D: unexpected pts_dpt_head\.x"):
        load_official(model, {**state, "pts_dpt_head.x": torch.zeros(1)})
    key = "pts_dpt_head.reduce_conv.0.bias"
    with pytest.raises(ValueError, match=f"missing {key}"):
        load_official(model, {name: value for name, value in state.items() if name != key})
    load_official(model, {name: value for name, value in state.items() if name != key}, ignore=(key,))


def test_yaw_is_recovered_over_the_whole_circle() -> None:
    for yaw in torch.linspace(-math.pi + 0.01, math.pi - 0.01, 9).tolist():
        code = center_targets(torch.tensor([[0.0, 0, 0, 1, 1, 1, yaw, 0, 0]]), torch.tensor([0]), 1, (8, 8), REGION)[2]
        assert torch.atan2(code[0, 6], code[0, 7]).item() == pytest.approx(yaw, abs=1e-5)


def test_mistakes_are_named(batch: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="lifting must be 'dfa2d', 'dfa3d' or 'dfa3d_gt', got lifting='lss'"):
        BEVFormerDFA3D(lifting="lss", **SMALL)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'test_resnet' has maps with strides \[.*\], got stride=5"):
        BEVFormerDFA3D(stride=5, **SMALL)
    with pytest.raises(ValueError, match="lifting='dfa3d_gt' needs depth, got depth=None"):
        BEVFormerDFA3D(lifting="dfa3d_gt", **SMALL)(batch["image"], batch["lidar2img"])
    with pytest.raises(ValueError, match="net must be a BEVFormerDFA3D, got Linear"):
        BEVDetectionTask(nn.Linear(1, 1))
