"""Options that other tests leave at their default: changing one changes what it says, and nothing else."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from detection.data import DetectionTransform
from detection.data.ring3d import sparse
from detection.layers.dfa3d import DepthHead, pillar_points
from detection.losses import HybridCriterion
from detection.matchers import hungarian_match
from detection.models import create_model
from detection.models.bevformer.detector import BEVOutput
from detection.models.bvr.head import BVRTransformer
from detection.models.bvr.hosts import build_detector
from detection.models.plain_detr.detector import PlainDETR, TimmBackbone
from detection.models.plain_detr.swin_v2 import SwinV2
from detection.tasks.bevformer import BEVDetectionTask, center_targets

TARGET = [{"labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]


def candidates() -> dict[str, Tensor]:
    """Query 0 is sure of the class, 1 has the nearest numbers, 2 has the greatest overlap."""
    logits = torch.tensor([[[2.0], [-3.0], [-3.0]]])
    boxes = torch.tensor([[[0.15, 0.15, 0.1, 0.1], [0.5, 0.5, 0.02, 0.3], [0.5, 0.5, 0.4, 0.4]]])
    return {"pred_logits": logits, "pred_boxes": boxes}


@pytest.mark.parametrize(
    ("costs", "chosen"),
    [
        ({"class_cost": 100.0}, 0),
        ({"class_cost": 0.0, "giou_cost": 0.0}, 1),
        ({"class_cost": 0.0, "box_cost": 0.0}, 2),
    ],
)
def test_each_cost_of_the_matching_decides_where_it_outweighs_the_others(costs: dict[str, float], chosen: int) -> None:
    ((query, _),) = hungarian_match(candidates(), TARGET, **costs)
    assert query.tolist() == [chosen]


@pytest.mark.parametrize(
    ("option", "ending"),
    [("class_weight", "class"), ("box_weight", "box"), ("giou_weight", "giou"), ("many_weight", "many")],
)
def test_each_weight_scales_its_losses_alone(option: str, ending: str) -> None:
    one = {name: value[:, 2:] for name, value in candidates().items()}  # one query: the matching cannot change
    outputs: Any = {"layers": [one], "layers_many": [one], "proposals": one}
    base: dict[str, float] = {"class_weight": 2.0, "box_weight": 5.0, "giou_weight": 2.0, "many_weight": 1.0}
    before = HybridCriterion(repeats=1, **base)(outputs, TARGET)  # pyright: ignore[reportArgumentType]
    after = HybridCriterion(repeats=1, **{**base, option: 3 * base[option]})(outputs, TARGET)  # pyright: ignore[reportArgumentType]
    for name, value in before.items():
        scaled = name.endswith("_many") if ending == "many" else f"_{ending}_" in name
        torch.testing.assert_close(after[name], value * (3 if scaled else 1))


def test_swin_options_reach_the_network() -> None:
    small: dict[str, Any] = {"embed_dim": 8, "depths": (1, 1, 1, 2), "num_heads": (1, 1, 1, 2), "window": 4,
                             "pretrained_window": (4, 4, 4, 2), "mlp_ratio": 1.0, "drop_path": 0.0}  # fmt: skip

    def output(**options: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        net = SwinV2(**small, **options)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        image = torch.rand(1, 3, 160, 192, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = net(image)
        out.sum().backward()
        return out.detach(), image.grad  # pyright: ignore[reportReturnType]

    plain = output()
    for a, b in zip(output(grad_checkpointing=True), plain, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(output(global_blocks=((), (), (), ()))[0], plain[0])


def test_pictures_are_normalized_by_mean_and_std() -> None:
    torch.manual_seed(0)
    net: Any = create_model("test_plain_detr", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)).eval()
    other: Any = create_model("test_plain_detr", mean=(0.0,) * 3, std=(1.0,) * 3).eval()
    other.load_state_dict(net.state_dict())
    image = torch.rand(3, 64, 64)
    normed = (image - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    ours, expected = (model.outputs([x])["layers"][-1] for model, x in ((net, image), (other, normed)))
    torch.testing.assert_close(ours["pred_logits"], expected["pred_logits"])


def test_the_bias_network_is_as_wide_as_asked_for() -> None:
    for width in (8, 24):
        net: Any = create_model("test_plain_detr", rpb_hidden_dim=width)
        assert net.layers[0].cross_attn.cpb_mlp1[0].weight.shape == (width, 2)


def test_pretrained_weights_of_timm_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    create, asked = timm.create_model, []

    def spy(name: str, *, pretrained: bool = False, **options: Any) -> Any:
        asked.append(pretrained)
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", spy)
    TimmBackbone("test_resnet")
    assert asked == [False, False]
    TimmBackbone("test_resnet", pretrained=True)
    assert asked == [False, False, False, True]


def test_thresholds_of_a_host_filter_its_boxes() -> None:
    def found(**options: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        net: Any = build_detector("fcos", 3, bvr=False, backbone="test_resnet", channels=32, strides=(8, 16),
                                  min_size=64, max_size=64, **options).eval()  # fmt: skip
        torch.nn.init.zeros_(net.head.head.classification_head.cls_logits.bias)
        torch.nn.init.constant_(net.head.head.regression_head.bbox_reg.bias, 2.0)  # four cells wide
        return net([torch.rand(3, 64, 64)])[0]

    def overlap(boxes: dict[str, Tensor]) -> float:
        iou = box_iou(boxes["boxes"], boxes["boxes"]).detach().fill_diagonal_(0)
        return float(iou[boxes["labels"][:, None] == boxes["labels"]].max())

    everything, apart = found(score_thresh=0.0, nms_thresh=1.0), found(score_thresh=0.0, nms_thresh=0.1)
    assert len(everything["boxes"]) == 100
    assert len(found(score_thresh=0.99)["boxes"]) == 0
    assert overlap(apart) <= 0.1 < overlap(everything)


def test_batch_norms_of_a_pyramid_learn_statistics_only_without_norm_eval() -> None:
    for norm_eval in (True, False):
        net: Any = build_detector("retinanet", 3, bvr=False, backbone="test_resnet", channels=16, strides=(8, 16),
                                  norm_eval=norm_eval)  # fmt: skip
        before = {name: value.clone() for name, value in net.state_dict().items() if "running_mean" in name}
        net.train().backbone(torch.rand(2, 3, 64, 64))
        net_state = net.state_dict()
        assert all(torch.equal(net_state[name], value) for name, value in before.items()) == norm_eval


def test_depth_options_scale_the_loss_and_group_the_bins() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"in_channels": 8, "dim": 8, "bound": (2.0, 16.0, 0.5), "blocks": 0, "context": None}
    single, double = (DepthHead(**options, loss_weight=weight) for weight in (0.5, 1.0))
    double.load_state_dict(single.state_dict())
    logits, bins = single(torch.randn(2, 8, 3, 4)), torch.randint(28, (2, 3, 4))
    torch.testing.assert_close(double.loss(logits, bins), 2 * single.loss(logits, bins))
    assert DepthHead(**options, group_sizes=())(torch.randn(1, 8, 2, 2)).shape[1] == 28
    assert DepthHead(**options, group_sizes=(2, 4, 8))(torch.randn(1, 8, 2, 2)).shape[1] == 6
    net: Any = create_model("test_bevformer_dfa3d", depth_bound=(1.0, 43.0, 0.5), depth_groups=(2, 4, 8))
    assert net.pts_dpt_head.depth_conv[-1].out_channels == 18


def test_small_objects_get_at_least_the_least_radius() -> None:
    box = torch.tensor([[0.5, 0.5, 0, 0.1, 0.1, 1, 0, 0, 0]])
    region = (-8.0, -8.0, -5.0, 8.0, 8.0, 3.0)
    heats = [center_targets(box, torch.tensor([0]), 1, (16, 16), region, min_radius=radius)[0] for radius in (1.0, 3.0)]
    assert (heats[1] > 0.5).sum() > (heats[0] > 0.5).sum() == 1


@pytest.mark.parametrize("option", [{"flip": 1.0}, {"color": 0.9}, {"iou_crop": 1.0}, {"crop": True}])
def test_each_augmentation_changes_pictures_only_when_it_is_on(option: dict[str, Any]) -> None:
    image = torch.randint(0, 255, (3, 60, 80), dtype=torch.uint8)
    boxes, labels = torch.tensor([[10.0, 10, 40, 40]]), torch.tensor([0])
    off: dict[str, Any] = {"short_sides": (), "max_size": 1333, "flip": 0.0}

    def seen(**options: Any) -> list[Tensor]:
        torch.manual_seed(3)
        return [DetectionTransform(**{**off, **options})(image, boxes, labels)[0] for _ in range(4)]

    plain = seen()
    assert all(torch.equal(a, b) for a, b in zip(seen(**option), plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(seen(augment=True), plain, strict=True))
    changed = seen(augment=True, **option)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(changed, plain, strict=True))


def test_no_pictures_give_no_boxes() -> None:
    net = create_model("test_plain_detr").eval()
    assert isinstance(net, PlainDETR)
    assert net([]) == []
    assert net(torch.zeros(0, 3, 64, 64)) == []
    with pytest.raises(ValueError, match="the batch holds no picture"):
        net.train()([], [])


def test_each_weight_of_the_bird_s_eye_losses_scales_its_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net: Any = create_model("test_bevformer_dfa3d")
    rows, columns = net.bev_size
    output = BEVOutput(
        torch.randn(1, net.num_classes, rows, columns), torch.randn(1, 10, rows, columns), torch.randn(1, 3, 2, 2)
    )
    monkeypatch.setattr(net, "forward", lambda *_: output)
    monkeypatch.setattr(net.pts_dpt_head, "loss", lambda *_: torch.tensor(2.0))
    boxes, labels = torch.tensor([[0.5, 0.5, 0, 2, 4, 1, 0, 3, 4]]), torch.tensor([0])
    batch: dict[str, Any] = {"image": None, "lidar2img": None, "depth": torch.zeros(1, 6, 96, 160),
                             "boxes": [boxes], "labels": [labels]}  # fmt: skip

    def losses(**options: float) -> dict[str, Tensor]:
        return BEVDetectionTask(net, **options).loss(**batch)

    plain = losses()
    assert losses(depth_weight=3.0)["loss_depth"] == 3 * plain["loss_depth"] == 6
    torch.testing.assert_close(losses(box_weight=1.5)["loss_box"], 3 * plain["loss_box"])
    still, slow, fast = (losses(velocity_weight=weight)["loss_box"] for weight in (0.0, 0.1, 0.2))
    torch.testing.assert_close(fast - slow, slow - still)
    assert slow > still
    assert slow == plain["loss_box"]


def test_anchors_of_a_pillar_keep_the_margin_from_bottom_and_top() -> None:
    for margin in (0.5, 1.0):
        points = pillar_points((2, 2), 3, (-1, -1, -5, 1, 1, 3), anchor_margin=margin)
        assert (points[..., 2].min(), points[..., 2].max()) == (-5 + margin, 3 - margin)


def test_a_geometry_per_set_is_learned_for_each() -> None:
    shared, own = (BVRTransformer(16, 2, 2, base_size=50, geometry_per_set=each) for each in (False, True))
    assert len({id(geometry) for geometry in shared.geometries()}) == 1
    assert len({id(geometry) for geometry in own.geometries()}) == 2


def test_sparse_depth_keeps_that_share_of_the_pixels() -> None:
    depth = np.ones((96, 160), np.uint16)
    shares = [float(sparse(depth, 0, 0, 0, keep).mean()) for keep in (0.05, 0.5, 1.0)]
    assert shares == pytest.approx([0.05, 0.5, 1.0], abs=0.02)


def test_a_swin_reads_as_many_channels_as_asked_for() -> None:
    net = SwinV2(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window=4, in_chans=5)
    assert net(torch.rand(1, 5, 64, 64)).shape == (1, 64, 2, 2)
