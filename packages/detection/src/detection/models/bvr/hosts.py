"""Detectors that BVR enhances: torchvision's RetinaNet, FCOS and Faster R-CNN, and ATSS (`detection.models.bvr.atss`).

`add_bvr` puts BVR into such a model in place: its towers, predictions, anchors, losses and post-processing stay.
`build_detector` makes hosts with the sizes of https://github.com/microsoft/RelationNet2, and `load_official` reads its
checkpoints: RetinaNet with ResNet-50, and RetinaNet, FCOS and ATSS with ResNeXt-101 64×4d and deformable convolutions.
The Faster R-CNN of the paper is not in its code: `detection.models.bvr.faster_rcnn`.

Where torchvision's defaults differ from the official configuration, the builders follow the latter: anchors are not
rounded to whole pixels, the points of FCOS lie at stride // 2 in their cell, its levels have a learned scale, extra
levels of the pyramid come without ReLU between them. Labels are 0 … num_classes − 1 everywhere.

Checked in: ``models/bvr/test_hosts.py``. Shapes: as torchvision's detectors: a list of images (3, Y, X) in [0, 1].
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead

from attn_core import weights
from attn_core.catalog import Card, Entry
from detection.layers.deformable_conv import ModulatedDeformConv
from detection.layers.pyramid import STRIDES, ExactAnchors, Extra, Maps, PyramidBackbone, group_norm
from detection.models.bvr.atss import ATSS, ATSSHead
from detection.models.bvr.faster_rcnn import BVRRoIHeads, faster_rcnn
from detection.models.bvr.head import BVRHead, Geometry

Host = Literal["retinanet", "fcos", "atss", "faster_rcnn"]
Detector = RetinaNet | FCOS | FasterRCNN


def _flat(x: Tensor, width: int) -> Tensor:
    """(B, A·width, y, x) → (B, y·x·A, width), torchvision's order."""
    return x.unflatten(1, (-1, width)).permute(0, 3, 4, 1, 2).flatten(1, 3)


class TorchvisionHost(nn.Module):
    """A torchvision head (RetinaNet's, FCOS's or an `ATSSHead`) through the protocol `HostHead`.

    Args:
        head: holds the parameters. num_levels: FCOS and ATSS get a learned scale per level; 0 keeps torchvision's.
    """

    def __init__(self, head: RetinaNetHead | FCOSHead, num_levels: int = 0) -> None:
        super().__init__()
        self.head = head
        self.scales = nn.Parameter(torch.ones(num_levels)) if num_levels else None

    def forward_features(self, features: Maps) -> tuple[Maps, Maps]:
        """Outputs of the towers."""
        cls, reg = self._branches()
        return [cls.conv(x) for x in features], [reg.conv(x) for x in features]

    def _branches(self) -> tuple[Any, Any]:
        return self.head.classification_head, self.head.regression_head

    def forward_predictions(self, cls_features: Maps, reg_features: Maps) -> dict[str, Tensor]:
        """What the head's own forward would give for these tower outputs."""
        cls, reg = self._branches()
        boxes = [reg.bbox_reg(x) for x in reg_features]
        if self.scales is not None:
            boxes = [x * scale for x, scale in zip(boxes, self.scales, strict=True)]
        if isinstance(self.head, FCOSHead) and not isinstance(self.head, ATSSHead):
            boxes = [F.relu(x) for x in boxes]
        logits = torch.cat([_flat(cls.cls_logits(x), cls.num_classes) for x in cls_features], 1)
        outputs = {"cls_logits": logits, "bbox_regression": torch.cat([_flat(x, 4) for x in boxes], 1)}
        if isinstance(self.head, FCOSHead):
            outputs["bbox_ctrness"] = torch.cat([_flat(reg.bbox_ctrness(x), 1) for x in reg_features], 1)
        return outputs

    def forward(self, features: Maps) -> dict[str, Tensor]:
        """The host without BVR."""
        return self.forward_predictions(*self.forward_features(features))

    def compute_loss(
        self, targets: list[dict[str, Tensor]], head_outputs: dict[str, Any], anchors: Maps, matched_idxs: Maps
    ) -> dict[str, Tensor]:
        """Losses of torchvision's head."""
        return self.head.compute_loss(targets, head_outputs, anchors, matched_idxs)


def add_bvr(
    model: Detector,
    *,
    strides: Sequence[int] = STRIDES,
    num_heads: int = 8,
    base_size: int = 400,
    geometry: Geometry = "towers",
    logits_convs: int = 1,
    norm: bool = True,
) -> Detector:
    """Let a torchvision RetinaNet, FCOS or Faster R-CNN (or our ATSS) see keypoints; in place, and returned.

    Args:
        model: any weights; they stay. num_heads, base_size: of the attention and of its geometry table.
        strides: of the levels in pixels. geometry, logits_convs, norm: of `BVRHead`. Faster R-CNN does not read
            these four.

    Raises: ValueError for another model, or one that has BVR already.
    """
    part = "roi_heads" if isinstance(model, FasterRCNN) else "head"
    head: Any = getattr(model, part)
    if isinstance(head, BVRHead | BVRRoIHeads):
        raise ValueError("add_bvr: the model has BVR already")
    if isinstance(model, FasterRCNN):
        dim: Any = model.backbone.out_channels
        model.roi_heads = BVRRoIHeads(head, dim, num_heads=num_heads, base_size=base_size)
        return model.train(model.training)
    host = head if isinstance(head, TorchvisionHost) else TorchvisionHost(head) if _known(head) else None
    if host is None:
        raise ValueError(
            f"add_bvr: model must be a RetinaNet, FCOS, ATSS or Faster R-CNN, got a head {type(head).__name__}"
        )
    classification = host.head.classification_head
    model.head = BVRHead(
        host,
        classification.num_classes,
        classification.cls_logits.in_channels,
        strides,
        num_heads=num_heads,
        base_size=base_size,
        geometry=geometry,
        logits_convs=logits_convs,
        norm=norm,
    )
    return model.train(model.training)


def _known(head: nn.Module) -> bool:
    return isinstance(head, RetinaNetHead | FCOSHead)


def _towers(head: FCOSHead, *, norm: bool, deformable: bool) -> None:
    """Make FCOS's towers those of the configuration: biases instead of norms, last convolutions deformable."""
    for branch in (head.classification_head, head.regression_head):
        tower: Any = branch.conv
        for i, layer in enumerate(tower):
            if isinstance(layer, nn.GroupNorm):
                tower[i] = group_norm(layer.num_channels) if norm else nn.Identity()
        if deformable:
            tower[-3] = ModulatedDeformConv(tower[-3])


# Whole: one branch for each host; parts would relay the options.
def build_detector(
    host: Host = "retinanet",
    num_classes: int = 80,
    *,
    bvr: bool = True,
    backbone: str = "resnet50",
    backbone_options: Mapping[str, Any] | None = None,
    channels: int = 256,
    strides: Sequence[int] | None = None,
    anchor_scale: float | None = None,
    region_dim: int = 1024,
    min_size: int = 800,
    max_size: int = 1333,
    num_heads: int = 8,
    base_size: int = 400,
    geometry: Geometry | None = None,
    norm: bool = True,
    norm_eval: bool = True,
    deformable: Literal["none", "backbone", "backbone+towers"] = "none",
    score_thresh: float = 0.05,
    nms_thresh: float | None = None,
) -> Detector:
    """A detector as RelationNet2's configurations have it; ``bvr=False`` is its host alone.

    Args:
        host: RetinaNet (9 anchors), FCOS, ATSS (one anchor of 8 strides) or Faster R-CNN (3 anchors of 8 strides).
        num_classes: labels 0 … num_classes − 1.
        backbone, backbone_options, channels, norm_eval: of the `PyramidBackbone`.
        strides: of the pyramid; 8 to 128, or 4 to 64 for Faster R-CNN, if None.
        anchor_scale: side of the smallest anchor of a level in strides; 4 for RetinaNet, 8 for others, if None.
        region_dim: length of a region's vector, for Faster R-CNN.
        min_size, max_size: images are resized to, in pixels, as torchvision does.
        num_heads, base_size: of BVR. geometry: of its `BVRHead`; ``"shared"`` for ATSS, else ``"towers"`` if None.
        norm: group norm in the pyramid, in the towers and in BVR; the towers of ATSS always have it.
        deformable: convolutions of a ResNet's last three stages, and the last ones of the towers of FCOS and ATSS.
        nms_thresh: 0.5 for RetinaNet and Faster R-CNN, 0.6 otherwise, if None.

    Raises: ValueError for an unknown host or value of ``deformable``, towers that cannot be deformable, or an anchor
        scale that is not positive or is given to FCOS.
    """
    if host not in ("retinanet", "fcos", "atss", "faster_rcnn"):
        raise ValueError(
            f"build_detector: host must be 'retinanet', 'fcos', 'atss' or 'faster_rcnn', got host={host!r}"
        )
    if anchor_scale is not None and (anchor_scale <= 0 or host == "fcos"):
        raise ValueError(
            "build_detector: anchor_scale must be positive, and FCOS has no anchors; "
            f"got anchor_scale={anchor_scale} with host={host!r}"
        )
    dense = host in ("fcos", "atss")
    if deformable not in ("none", "backbone", "backbone+towers") or (deformable == "backbone+towers" and not dense):
        raise ValueError(
            "build_detector: deformable must be 'none', 'backbone' or, for FCOS and ATSS, 'backbone+towers', "
            f"got deformable={deformable!r} with host={host!r}"
        )
    strides = tuple(strides) if strides is not None else (4, 8, 16, 32, 64) if host == "faster_rcnn" else STRIDES
    extra: Extra = "input" if host == "retinanet" else "output" if dense else "subsample"
    body = PyramidBackbone(
        backbone,
        channels,
        strides,
        extra=extra,
        norm=norm and host != "faster_rcnn",
        norm_eval=norm_eval,
        backbone_options=backbone_options,
        deformable=deformable != "none",
    )
    sizes: dict[str, Any] = {
        "min_size": min_size,
        "max_size": max_size,
        "score_thresh": score_thresh,
        "nms_thresh": nms_thresh if nms_thresh is not None else (0.6 if dense else 0.5),
    }
    if host == "faster_rcnn":
        triples = ExactAnchors([[(anchor_scale or 8) * stride] for stride in strides], (0.5, 1.0, 2.0))
        maps = [str(i) for i in range(body.levels)]
        model: Detector = faster_rcnn(body, num_classes, anchors=triples, maps=maps, region_dim=region_dim, **sizes)
        return add_bvr(model, num_heads=num_heads, base_size=base_size) if bvr else model
    sizes["detections_per_img"] = 100
    if host == "retinanet":
        octaves = [[(anchor_scale or 4) * stride * 2 ** (i / 3) for i in range(3)] for stride in strides]
        head = RetinaNetHead(channels, 9, num_classes, norm_layer=group_norm if norm else None)
        model = RetinaNet(
            body, num_classes, anchor_generator=ExactAnchors(octaves, (0.5, 1.0, 2.0)), head=head, **sizes
        )
        model.head = TorchvisionHost(head)
    elif host == "fcos":
        points = ExactAnchors([[stride] for stride in strides], (1.0,), offset=0.5)
        head = FCOSHead(channels, 1, num_classes)
        _towers(head, norm=norm, deformable=deformable == "backbone+towers")
        model = FCOS(body, num_classes, anchor_generator=points, head=head, **sizes)
        model.head = TorchvisionHost(head, len(strides))
    else:
        squares = ExactAnchors([[(anchor_scale or 8) * stride] for stride in strides], (1.0,))
        head = ATSSHead(channels, num_classes)
        _towers(head, norm=True, deformable=deformable == "backbone+towers")
        model = ATSS(body, num_classes, anchor_generator=squares, head=head, **sizes)
        model.head = TorchvisionHost(head, len(strides))
    if bvr:
        add_bvr(
            model,
            strides=strides,
            num_heads=num_heads,
            base_size=base_size,
            geometry=geometry or ("shared" if host == "atss" else "towers"),
            logits_convs=0 if host == "fcos" else 1,
            norm=norm,
        )
    return model


# official name (mmdet) → name here; in this order
KEY_MAP: tuple[tuple[str, str], ...] = (
    (r"^backbone\.", "backbone.body."),
    (r"^neck\.lateral_convs\.(\d+)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
    (r"^neck\.lateral_convs\.(\d+)\.gn\.", r"backbone.fpn.inner_blocks.\1.1."),
    (r"^neck\.fpn_convs\.([012])\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
    (r"^neck\.fpn_convs\.([012])\.gn\.", r"backbone.fpn.layer_blocks.\1.1."),
    (r"^neck\.fpn_convs\.3\.conv\.", "backbone.fpn.extra_blocks.convs.0.0."),
    (r"^neck\.fpn_convs\.3\.gn\.", "backbone.fpn.extra_blocks.convs.0.1."),
    (r"^neck\.fpn_convs\.4\.conv\.", "backbone.fpn.extra_blocks.convs.1.0."),
    (r"^neck\.fpn_convs\.4\.gn\.", "backbone.fpn.extra_blocks.convs.1.1."),
    (r"^bbox_head\.bbox_head\.(?:retina|atss)_cls\.", "head.bbox_head.head.classification_head.cls_logits."),
    (r"^bbox_head\.bbox_head\.conv_cls\.", "head.bbox_head.head.classification_head.cls_logits."),
    (r"^bbox_head\.bbox_head\.(?:retina|atss)_reg\.", "head.bbox_head.head.regression_head.bbox_reg."),
    (r"^bbox_head\.bbox_head\.conv_reg\.", "head.bbox_head.head.regression_head.bbox_reg."),
    (r"^bbox_head\.bbox_head\.(?:atss|conv)_centerness\.", "head.bbox_head.head.regression_head.bbox_ctrness."),
    (r"^bbox_head\.(keypoint_head|cls_transformer|reg_transformer)\.", r"head.\1."),
)
_TOWER = re.compile(r"^bbox_head\.bbox_head\.(cls|reg)_convs\.(\d+)\.(conv|gn)\.((?:conv_offset\.)?(?:weight|bias))$")
_SCALE = re.compile(r"^bbox_head\.bbox_head\.scales\.(\d+)\.scale$")


def map_official_keys(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an official checkpoint under the names of ``model``, a detector of `build_detector`."""
    own = model.state_dict()
    # torchvision's towers are (convolution with norm and ReLU) blocks for RetinaNet, flat lists for FCOS and ATSS
    blocks = "head.bbox_head.head.classification_head.conv.0.0.weight" in own
    mapped: dict[str, Tensor] = {}
    scales: dict[int, Tensor] = {}
    for key, tensor in state.items():
        if key.endswith("base_embedding"):
            continue
        if match := _SCALE.match(key):
            scales[int(match[1])] = tensor.reshape(())
            continue
        if match := _TOWER.match(key):
            tower = {"cls": "classification_head", "reg": "regression_head"}[match[1]]
            layer, part = int(match[2]), int(match[3] == "gn")
            place = f"{layer}.{part}" if blocks else str(3 * layer + part)
            mapped[f"head.bbox_head.head.{tower}.conv.{place}.{match[4]}"] = tensor
            continue
        for pattern, name in KEY_MAP:
            key, found = re.subn(pattern, name, key)
            if found:
                break
        mapped[key] = tensor
    if scales:
        mapped["head.bbox_head.scales"] = torch.stack([scales[i] for i in range(len(scales))])
    return mapped


def load_official(model: Detector, source: Mapping[str, Any] | str | Path, *, ignore: Sequence[str] = ()) -> Detector:
    """Load an official RelationNet2 checkpoint into the detector that it was trained as, every parameter or none.

    Args:
        source: a file, ``hf://owner/repo/file``, or what it holds. ignore: beginnings of our names that may differ.

    Raises: ValueError naming what is missing, unknown or of another shape; for geometry tables that the model has not.
    """
    checkpoint = weights.read(source, prefixes=("module.",))
    mapped = map_official_keys(model, checkpoint.tensors)
    return weights.fill(model, replace(checkpoint, tensors=_geometry(model, mapped)), ignore=ignore)


def _geometry(model: Detector, mapped: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tables of a checkpoint as the model has them: a shared one counts for both towers."""
    head: Any = getattr(model, "head", None)
    if not isinstance(head, BVRHead):
        return mapped
    start = "head.cls_transformer.relative_positional_encoding."
    pairs = {key: key.replace("cls_transformer", "reg_transformer") for key in mapped if key.startswith(start)}
    same = all(reg not in mapped or torch.equal(mapped[cls], mapped[reg]) for cls, reg in pairs.items())
    found: Geometry = "sets" if any(key.startswith(f"{start}0.") for key in pairs) else "shared" if same else "towers"
    if found != head.geometry and not (found == "shared" and head.geometry == "towers"):
        raise ValueError(
            f"load_official: the checkpoint has geometry tables as geometry={found!r}, the model as "
            f"{head.geometry!r}; build it with geometry={found!r}"
        )
    return {reg: mapped[cls] for cls, reg in pairs.items()} | mapped if found == "shared" else mapped


X101 = {"backbone": "resnext101_64x4d", "base_size": 300, "norm": False, "nms_thresh": 0.6}
TEST = {"backbone": "test_resnet", "channels": 16, "strides": (8, 16, 32), "num_heads": 4, "num_classes": 10}
CARD = Card(
    family="RelationNet++ (BVR)",
    paper="2010.15831",
    code="https://github.com/microsoft/RelationNet2",
    license="MIT",
    test="models/bvr/test_peer.py",
)
ENTRIES: list[Entry[Any]] = [
    Entry(
        "bvr_retinanet_resnet50",
        partial(build_detector, "retinanet"),
        CARD("46.4 M parameters, RetinaNet with ResNet-50 and BVR (host alone 35.6)", "AP 38.5"),
    ),
    Entry(
        "bvr_fcos_resnet50",
        partial(build_detector, "fcos"),
        CARD("37.2 M parameters, FCOS with ResNet-50 and BVR; published with ResNeXt-101-DCN only"),
    ),
    Entry(
        "bvr_atss_resnet50",
        partial(build_detector, "atss"),
        CARD("40.7 M parameters, ATSS with ResNet-50 and BVR; published with ResNeXt-101-DCN only"),
    ),
    Entry(
        "bvr_faster_rcnn_resnet50",
        partial(build_detector, "faster_rcnn"),
        CARD("57.0 M parameters, Faster R-CNN with ResNet-50 and BVR; the paper reports +1.9 AP, its code lacks it"),
    ),
    Entry(
        "bvr_retinanet_x101_dcn",
        partial(build_detector, "retinanet", deformable="backbone", **X101),
        CARD("112.0 M parameters, RetinaNet with deformable ResNeXt-101 64×4d and BVR", "AP 46.5"),
    ),
    Entry(
        "bvr_fcos_x101_dcn",
        partial(build_detector, "fcos", deformable="backbone+towers", **X101),
        CARD("102.9 M parameters, FCOS with deformable ResNeXt-101 64×4d and BVR", "AP 48.7"),
    ),
    Entry(
        "bvr_atss_x101_dcn",
        partial(build_detector, "atss", deformable="backbone+towers", **X101),
        CARD("106.5 M parameters, ATSS with deformable ResNeXt-101 64×4d and BVR", "AP 50.6"),
    ),
    Entry(
        "test_bvr_retinanet",
        partial(build_detector, "retinanet", min_size=128, max_size=160, **TEST),
        CARD("0.5 M parameters, for tests"),
    ),
    Entry(
        "test_bvr_faster_rcnn",
        partial(build_detector, "faster_rcnn", region_dim=32, anchor_scale=2.0, min_size=128, max_size=160, **TEST),
        CARD("0.4 M parameters, for tests"),
    ),
]
