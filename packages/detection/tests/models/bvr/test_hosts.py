"""BVR in torchvision's detectors and in ATSS: the host stays as it is, official checkpoints load."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.image_list import ImageList

from detection.layers.pyramid import ExactAnchors, PyramidBackbone
from detection.models import create_model
from detection.models.bvr.head import BVRHead
from detection.models.bvr.hosts import (
    KEY_MAP,
    Host,
    TorchvisionHost,
    add_bvr,
    build_detector,
    load_official,
)

HOSTS: tuple[Host, ...] = ("retinanet", "fcos", "atss")
IMAGES = [(3, 64, 80), (3, 70, 64)]


def small(host: Host = "retinanet", *, bvr: bool = True, **options: Any) -> Any:
    return build_detector(
        host,
        4,
        bvr=bvr,
        **options,
        backbone="test_resnet",
        channels=32,
        strides=(8, 16, 32),
        min_size=64,
        max_size=80,
        num_heads=4,
    )


def batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    boxes = [torch.tensor([[8.0, 9, 40, 50], [30, 20, 62, 44]]), torch.zeros(0, 4)]
    labels = [torch.tensor([3, 0]), torch.zeros(0, dtype=torch.long)]
    return [torch.rand(shape) for shape in IMAGES], [
        {"boxes": b, "labels": k} for b, k in zip(boxes, labels, strict=True)
    ]


@pytest.mark.parametrize("host", HOSTS)
def test_every_host_trains_with_bvr_and_every_parameter_learns(host: Host) -> None:
    model = small(host)
    losses = model(*batch())
    assert {"classification", "bbox_regression", "loss_point_cls", "loss_point_offset"} <= set(losses)
    torch.stack(list(losses.values())).sum().backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not still


@pytest.mark.parametrize("host", HOSTS)
def test_detections_stay_inside_the_image_and_batch_equals_single(host: Host) -> None:
    model = small(host).eval()
    torch.nn.init.normal_(model.head.bbox_head.head.classification_head.cls_logits.weight, std=0.5)
    images = [torch.rand(3, 64, 80), torch.rand(3, 64, 80)]
    with torch.no_grad():
        both = model(images)
        alone = model(images[1:])[0]
    assert len(alone["boxes"]) > 0
    torch.testing.assert_close(both[1]["boxes"], alone["boxes"], atol=1e-3, rtol=1e-4)
    assert (alone["boxes"] >= 0).all()
    assert (alone["boxes"] <= torch.tensor([80.0, 64, 80, 64])).all()
    assert alone["labels"].max() < 4


@pytest.mark.parametrize("host", ["retinanet", "fcos"])
def test_host_without_bvr_predicts_what_torchvisions_head_does(host: Host) -> None:
    head = small(host, bvr=False).head
    assert isinstance(head, TorchvisionHost)
    maps = [torch.randn(2, 32, 5, 6), torch.randn(2, 32, 3, 3), torch.randn(2, 32, 1, 1)]
    ours, theirs = head(maps), head.head(maps)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value)


def test_plain_torchvision_model_takes_bvr_in_place_and_keeps_its_weights() -> None:
    body = PyramidBackbone("test_resnet", 32, (8, 16, 32))
    anchors = ExactAnchors([[32.0], [64.0], [128.0]], (0.5, 1.0, 2.0))
    model = RetinaNet(body, 4, anchor_generator=anchors, min_size=64, max_size=80)
    before = {key: value.clone() for key, value in model.head.state_dict().items()}
    assert add_bvr(model, strides=(8, 16, 32), num_heads=4) is model
    assert isinstance(model.head, BVRHead)
    model_head_state = model.head.state_dict()
    for key, value in before.items():
        torch.testing.assert_close(model_head_state[f"bbox_head.head.{key}"], value)
    assert model(*batch())["loss_point_cls"] > 0


def test_a_dilated_backbone_gives_its_deepest_map_of_each_stride() -> None:
    small = {"channels": (8, 16, 24, 40), "stem_width": 8, "output_stride": 8}
    body = PyramidBackbone("resnet10t", 8, (8, 16), backbone_options=small)
    assert body.body.feature_info.channels() == [40]
    assert [tuple(level.shape[-2:]) for level in body(torch.rand(1, 3, 64, 32)).values()] == [(8, 4), (4, 2)]
    model = build_detector("retinanet", 3, bvr=False, backbone="resnet10t", backbone_options=small, channels=8,
                           strides=(8, 16))  # fmt: skip
    assert model.backbone.body.feature_info.channels() == [40]  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]


def test_anchors_are_those_of_the_official_configuration() -> None:
    anchors = ExactAnchors([[32.0, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)]], (0.5, 1.0, 2.0))
    images = ImageList(torch.zeros(1, 3, 16, 24), [(16, 24)])
    found = anchors(images, [torch.zeros(1, 1, 2, 3)])[0]
    assert found.shape == (2 * 3 * 9, 4)
    w, h = found[0, 2] - found[0, 0], found[0, 3] - found[0, 1]
    assert (w * h).item() == pytest.approx(32**2, rel=1e-5)
    assert (h / w).item() == pytest.approx(0.5, rel=1e-5)
    torch.testing.assert_close(found[9:18], found[:9] + torch.tensor([8.0, 0, 8, 0]))
    points = ExactAnchors([[8]], (1.0,), offset=0.5)(images, [torch.zeros(1, 1, 2, 3)])[0]
    assert points[1].tolist() == [8, 0, 16, 8]  # center at (12, 4): the second cell of the first row


@pytest.mark.parametrize(("host", "default"), [("retinanet", 4.0), ("atss", 8.0)])
def test_anchor_scale_is_the_side_of_the_smallest_anchor_in_strides(host: Host, default: float) -> None:
    for scale in (None, 2.0):
        model: Any = build_detector(host, 3, bvr=False, backbone="test_resnet", channels=32, strides=(8, 16),
                                    anchor_scale=scale)  # fmt: skip
        cell = model.anchor_generator.cell_anchors[0]
        side = ((cell[:, 2] - cell[:, 0]) * (cell[:, 3] - cell[:, 1])).sqrt().min()
        assert side.item() == pytest.approx(8 * (scale or default))
    for wrong in ({"host": host, "anchor_scale": 0.0}, {"host": "fcos", "anchor_scale": 2.0}):
        with pytest.raises(ValueError, match="anchor_scale must be positive, and FCOS has no anchors"):
            build_detector(**wrong)  # pyright: ignore[reportArgumentType]


def official_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of an official RetinaNet checkpoint, written out here."""
    rules = [
        (r"^backbone\.body\.", "backbone."),
        (r"^backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
        (r"^backbone\.fpn\.inner_blocks\.(\d)\.1\.", r"neck.lateral_convs.\1.gn."),
        (r"^backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
        (r"^backbone\.fpn\.layer_blocks\.(\d)\.1\.", r"neck.fpn_convs.\1.gn."),
        (r"^backbone\.fpn\.extra_blocks\.convs\.0\.0\.", "neck.fpn_convs.3.conv."),
        (r"^backbone\.fpn\.extra_blocks\.convs\.0\.1\.", "neck.fpn_convs.3.gn."),
        (r"^backbone\.fpn\.extra_blocks\.convs\.1\.0\.", "neck.fpn_convs.4.conv."),
        (r"^backbone\.fpn\.extra_blocks\.convs\.1\.1\.", "neck.fpn_convs.4.gn."),
        (r"^head\.bbox_head\.head\.classification_head\.conv\.(\d)\.0\.", r"bbox_head.bbox_head.cls_convs.\1.conv."),
        (r"^head\.bbox_head\.head\.classification_head\.conv\.(\d)\.1\.", r"bbox_head.bbox_head.cls_convs.\1.gn."),
        (r"^head\.bbox_head\.head\.regression_head\.conv\.(\d)\.0\.", r"bbox_head.bbox_head.reg_convs.\1.conv."),
        (r"^head\.bbox_head\.head\.regression_head\.conv\.(\d)\.1\.", r"bbox_head.bbox_head.reg_convs.\1.gn."),
        (r"^head\.bbox_head\.head\.classification_head\.cls_logits\.", "bbox_head.bbox_head.retina_cls."),
        (r"^head\.bbox_head\.head\.regression_head\.bbox_reg\.", "bbox_head.bbox_head.retina_reg."),
        (r"^head\.", "bbox_head."),
    ]
    named = {}
    for key, value in state.items():
        for pattern, name in rules:
            key, found = re.subn(pattern, name, key)
            if found:
                break
        named[key] = value
    return named


def test_official_checkpoint_survives_a_round_trip() -> None:
    source, target = (
        build_detector("retinanet", 4, backbone="test_resnet", channels=32, num_heads=4) for _ in range(2)
    )
    checkpoint = official_names(source.state_dict())
    assert "bbox_head.keypoint_head.keypoint_cls_heads.center.1.weight" in checkpoint
    assert "bbox_head.bbox_head.cls_convs.3.gn.bias" in checkpoint
    assert len(KEY_MAP) == 15
    for tower in ("cls", "reg"):
        checkpoint[f"bbox_head.{tower}_transformer.relative_positional_encoding.base_embedding"] = torch.zeros(1)
    load_official(target, {"state_dict": checkpoint})
    target_state = target.state_dict()
    for key, value in source.state_dict().items():
        torch.testing.assert_close(target_state[key], value)


@pytest.mark.parametrize("host", ["fcos", "atss"])
def test_checkpoints_with_deformable_convolutions_survive_a_round_trip(host: Host) -> None:
    """As published with ResNeXt-101: towers without norm for FCOS, one geometry table for ATSS, scales of levels."""
    options: dict[str, Any] = {"deformable": "backbone+towers", "norm": False, "base_size": 40}
    source, target = (small(host, **options) for _ in range(2))
    with torch.no_grad():
        source.head.bbox_head.scales.copy_(torch.tensor([2.0, 3.0, 4.0]))
    named: dict[str, Tensor] = {}
    predictions = {"fcos": "conv_{}", "atss": "atss_{}"}[host]
    for key, value in source.state_dict().items():
        if key == "head.bbox_head.scales":
            named |= {f"bbox_head.bbox_head.scales.{i}.scale": scale for i, scale in enumerate(value)}
        elif match := re.match(r"head\.bbox_head\.head\.(classification|regression)_head\.conv\.(\d+)\.(.*)", key):
            tower = {"classification": "cls", "regression": "reg"}[match[1]]
            layer, part = divmod(int(match[2]), 3)
            named[f"bbox_head.bbox_head.{tower}_convs.{layer}.{('conv', 'gn')[part]}.{match[3]}"] = value
        elif match := re.match(r"head\.bbox_head\.head\.\w+_head\.(cls_logits|bbox_reg|bbox_ctrness)\.(.*)", key):
            kind = {"cls_logits": "cls", "bbox_reg": "reg", "bbox_ctrness": "centerness"}[match[1]]
            named[f"bbox_head.bbox_head.{predictions.format(kind)}.{match[2]}"] = value
        elif match := re.match(r"backbone\.fpn\.(\w+)\.(\d)\.0\.(.*)", key):
            kind = {"inner_blocks": "lateral_convs", "layer_blocks": "fpn_convs"}[match[1]]
            named[f"neck.{kind}.{match[2]}.conv.{match[3]}"] = value
        elif host == "fcos" or "reg_transformer.relative" not in key:
            named[re.sub("^head", "bbox_head", key.replace("backbone.body.", "backbone."))] = value
    assert "bbox_head.bbox_head.cls_convs.3.conv.conv_offset.bias" in named
    assert "backbone.layer2.0.conv2.conv_offset.weight" in named
    assert ("bbox_head.bbox_head.reg_convs.1.conv.bias" in named) == (host == "fcos")
    assert ("bbox_head.bbox_head.reg_convs.1.gn.bias" in named) == (host == "atss")
    load_official(target, named)
    target_state = target.state_dict()
    for key, value in source.state_dict().items():
        torch.testing.assert_close(target_state[key], value)


@pytest.mark.parametrize("geometry", ["shared", "towers", "sets"])
def test_checkpoints_with_every_sharing_of_geometry_survive_a_round_trip(geometry: Any) -> None:
    source, target = (small(geometry=geometry) for _ in range(2))
    for part in {*source.head.cls_transformer.geometries(), *source.head.reg_transformer.geometries()}:
        torch.nn.init.normal_(part.embedding_transform[0].conv.weight)
    named = official_names(source.state_dict())
    load_official(target, named)
    target_state = target.state_dict()
    for key, value in source.state_dict().items():
        torch.testing.assert_close(target_state[key], value)
    others = {"shared": ("sets",), "towers": ("shared", "sets"), "sets": ("shared", "towers")}[geometry]
    for other in others:
        with pytest.raises(ValueError, match=f"geometry={geometry!r}, the model as {other!r}; build it with geometry="):
            load_official(small(geometry=other), named)
    if geometry == "shared":
        wider = load_official(small(geometry="towers"), named).state_dict()
        table = "head.{}_transformer.relative_positional_encoding.embedding_transform.0.conv.weight"
        assert torch.equal(wider[table.format("cls")], wider[table.format("reg")])


@pytest.mark.parametrize(
    ("host", "parameters"),
    [("retinanet", 112_023_140), ("fcos", 102_931_712), ("atss", 106_472_184)],
)
def test_sizes_with_deformable_resnext(host: str, parameters: int) -> None:
    with torch.device("meta"):
        model = create_model(f"bvr_{host}_x101_dcn")
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_mistakes_are_named() -> None:
    model = small()
    with pytest.raises(ValueError, match="the model has BVR already"):
        add_bvr(model)
    with pytest.raises(ValueError, match="host must be 'retinanet', 'fcos', 'atss' or 'faster_rcnn', got host='yolo'"):
        build_detector("yolo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"deformable must be 'none', .*got deformable='backbone\+towers'"):
        build_detector("retinanet", deformable="backbone+towers")
    model.head = torch.nn.Identity()
    with pytest.raises(ValueError, match="must be a RetinaNet, FCOS, ATSS or Faster R-CNN, got a head Identity"):
        add_bvr(model)
    with pytest.raises(ValueError, match=r"strides must double, from one of \[.*\], got strides=\(8, 24\)"):
        PyramidBackbone("test_resnet", 32, (8, 24))
    model = small()
    with pytest.raises(ValueError, match="the given dict holds no weights"):
        load_official(model, {"state_dict": {}})
    state = official_names(model.state_dict())
    with pytest.raises(ValueError, match="does not fit this RetinaNet: unexpected extra"):
        load_official(model, {**state, "extra": torch.zeros(1)})
    key = "bbox_head.bbox_head.retina_cls.bias"
    with pytest.raises(ValueError, match=r"missing .*cls_logits\.bias"):
        load_official(model, {name: value for name, value in state.items() if name != key})
    with pytest.raises(ValueError, match=r"cls_logits.bias is \(1,\), the model has \(36,\)"):
        load_official(model, {**state, key: torch.zeros(1)})
