"""Detectors that BVR enhances: torchvision's RetinaNet and FCOS, and ATSS (`detection.atss`), on any backbone's FPN.

`add_bvr` puts BVR into such a model in place: its towers, predictions, anchors, losses and post-processing stay.
``retinanet``, ``fcos`` and ``atss`` build hosts with the sizes of https://github.com/microsoft/RelationNet2, and
`load_official` reads its checkpoints with ResNet-50; those with ResNeXt-101-DCN have deformable convolutions in the
backbone and in the last layer of the towers, which torchvision's parts do not have.

Where torchvision's defaults differ from the official configuration, the builders follow the latter: anchors are not
rounded to whole pixels, the points of FCOS lie at stride // 2 in their cell, its levels have a learned scale, extra
levels of the pyramid come without ReLU between them. Labels are 0 … num_classes − 1 everywhere.

Checked in: ``test_bvr_hosts.py``. Shapes: as torchvision's detectors: a list of images (3, Y, X) in [0, 1].
"""

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from .atss import ATSS, ATSSHead
from .bvr import BVRHead, Maps

Host = Literal["retinanet", "fcos", "atss"]
STRIDES = (8, 16, 32, 64, 128)


class PyramidExtension(ExtraFPNBlock):
    """Further levels by 3×3 convolutions of stride 2, from the backbone's last map or from the pyramid's."""

    def __init__(self, in_channels: int, channels: int, levels: int, *, source: Literal["input", "output"], norm: bool):
        super().__init__()
        self.source = source
        self.convs = nn.ModuleList()
        for level in range(levels):
            first = in_channels if source == "input" and level == 0 else channels
            layers: list[nn.Module] = [nn.Conv2d(first, channels, 3, stride=2, padding=1, bias=not norm)]
            self.convs.append(nn.Sequential(*layers, *([_norm(channels)] if norm else [])))

    def forward(self, results: Maps, x: Maps, names: list[str]) -> tuple[Maps, list[str]]:  # pyright: ignore
        last = x[-1] if self.source == "input" else results[-1]
        for level, conv in enumerate(self.convs):
            last = conv(last)
            results, names = [*results, last], [*names, f"extra{level}"]
        return results, names


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, channels), channels)


class PyramidBackbone(nn.Module):
    """A timm backbone with a feature pyramid, as torchvision's detectors take it (``out_channels``, dict of maps).

    Args:
        backbone: timm name, built without weights. channels: of the pyramid.
        strides: of the levels; those beyond the backbone's last are added by convolutions.
        extra: where added levels come from. norm: group norm in the pyramid. norm_eval: keep the backbone's batch
            norms in eval mode, as for fine-tuning on few images. backbone_options: of timm's builder.

    Raises: ValueError if the backbone has no map of the first stride, or strides do not double.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        channels: int = 256,
        strides: Sequence[int] = STRIDES,
        *,
        extra: Literal["input", "output"] = "input",
        norm: bool = True,
        norm_eval: bool = True,
        backbone_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        options = dict(backbone_options or {})
        maps: Any = timm.create_model(backbone, features_only=True, **options)
        have = maps.feature_info.reduction()
        if strides[0] not in have or any(b != 2 * a for a, b in pairwise(strides)):
            raise ValueError(
                f"PyramidBackbone: strides must double, from one of {have}, got strides={tuple(strides)} of {backbone}"
            )
        # The deepest map of each stride: a dilated backbone has several.
        levels = tuple(len(have) - 1 - have[::-1].index(stride) for stride in strides if stride in have)
        self.body: Any = timm.create_model(backbone, features_only=True, out_indices=levels, **options)
        widths = self.body.feature_info.channels()
        self.out_channels = channels
        self.norm_eval = norm_eval
        added = len(strides) - len(levels)
        self.fpn = FeaturePyramidNetwork(
            widths,
            channels,
            PyramidExtension(widths[-1], channels, added, source=extra, norm=norm) if added else None,
            norm_layer=_norm if norm else None,
        )

    def train(self, mode: bool = True) -> "PyramidBackbone":
        """Batch norms of the body stay in eval mode with ``norm_eval``."""
        super().train(mode)
        if self.norm_eval:
            for module in self.body.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, x: Float[Tensor, "B 3 Y X"]) -> OrderedDict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(self.body(x))))


class ExactAnchors(AnchorGenerator):
    """Anchors without rounding, moved by ``offset`` strides from the corner of their cell."""

    def __init__(self, sizes: Sequence[Sequence[float]], ratios: Sequence[float], *, offset: float = 0.0) -> None:
        self.offset = offset
        super().__init__(tuple(tuple(s) for s in sizes), (tuple(ratios),) * len(sizes))  # pyright: ignore

    def generate_anchors(
        self, scales: Any, aspect_ratios: Any, dtype: torch.dtype = torch.float32, device: Any = "cpu"
    ) -> Tensor:
        """(ratios · scales, 4) boxes around (0, 0), ratio-major."""
        root = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        scale = torch.as_tensor(scales, dtype=dtype, device=device)
        w, h = (scale / root.unsqueeze(1)).flatten(), (scale * root.unsqueeze(1)).flatten()
        return torch.stack([-w, -h, w, h], 1) / 2

    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[Tensor]]) -> list[Tensor]:
        anchors = super().grid_anchors(grid_sizes, strides)
        if not self.offset:
            return anchors
        return [a + float(int(step[0]) * self.offset) for a, step in zip(anchors, strides, strict=True)]


def _flat(x: Tensor, width: int) -> Tensor:
    """(B, A·width, y, x) → (B, y·x·A, width), torchvision's order."""
    return x.unflatten(1, (-1, width)).permute(0, 3, 4, 1, 2).flatten(1, 3)


class TorchvisionHost(nn.Module):
    """A torchvision head (RetinaNet's, FCOS's or an `ATSSHead`) through the protocol `detection.bvr.HostHead`.

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
    model: RetinaNet | FCOS,
    *,
    strides: Sequence[int] = STRIDES,
    num_heads: int = 8,
    base_size: int = 400,
    share_geometry: bool = False,
    logits_convs: int = 1,
    norm: bool = True,
) -> RetinaNet | FCOS:
    """Let a torchvision RetinaNet or FCOS (or our ATSS) see keypoints; in place, and returned.

    Args:
        model: any weights; they stay. strides: of its levels in pixels. The rest: of `detection.bvr.BVRHead`.

    Raises: ValueError for another model, or one that has BVR already.
    """
    head: Any = model.head
    if isinstance(head, BVRHead):
        raise ValueError("add_bvr: the model has BVR already")
    host = head if isinstance(head, TorchvisionHost) else TorchvisionHost(head) if _known(head) else None
    if host is None:
        raise ValueError(f"add_bvr: model must be a RetinaNet, FCOS or ATSS, got a head {type(head).__name__}")
    classification = host.head.classification_head
    model.head = BVRHead(
        host,
        classification.num_classes,
        classification.cls_logits.in_channels,
        strides,
        num_heads=num_heads,
        base_size=base_size,
        share_geometry=share_geometry,
        logits_convs=logits_convs,
        norm=norm,
    )
    return model


def _known(head: nn.Module) -> bool:
    return isinstance(head, RetinaNetHead | FCOSHead)


def build_detector(
    host: Host = "retinanet",
    num_classes: int = 80,
    *,
    bvr: bool = True,
    backbone: str = "resnet50",
    backbone_options: Mapping[str, Any] | None = None,
    channels: int = 256,
    strides: Sequence[int] = STRIDES,
    anchor_scale: float | None = None,
    min_size: int = 800,
    max_size: int = 1333,
    num_heads: int = 8,
    norm: bool = True,
    norm_eval: bool = True,
    score_thresh: float = 0.05,
    nms_thresh: float | None = None,
) -> RetinaNet | FCOS:
    """A detector as RelationNet2's configurations have it; ``bvr=False`` is its host alone.

    Args:
        host: RetinaNet (9 anchors), FCOS or ATSS (one anchor of 8 strides). num_classes: labels 0 … num_classes − 1.
        backbone, backbone_options, channels, strides, norm_eval: of the `PyramidBackbone`.
        norm: group norm in pyramid and heads.
        anchor_scale: side of the smallest anchor of a level in strides; 4 for RetinaNet, 8 for ATSS, if None.
        min_size, max_size: images are resized to, in pixels, as torchvision does.
        nms_thresh: 0.5 for RetinaNet, 0.6 otherwise, if None.

    Raises: ValueError for an unknown host, or an anchor scale that is not positive or is given to FCOS.
    """
    if host not in ("retinanet", "fcos", "atss"):
        raise ValueError(f"build_detector: host must be 'retinanet', 'fcos' or 'atss', got host={host!r}")
    if anchor_scale is not None and (anchor_scale <= 0 or host == "fcos"):
        raise ValueError(
            "build_detector: anchor_scale must be positive, and FCOS has no anchors; "
            f"got anchor_scale={anchor_scale} with host={host!r}"
        )
    levels = len(strides)
    extra: Literal["input", "output"] = "input" if host == "retinanet" else "output"
    body = PyramidBackbone(
        backbone, channels, strides, extra=extra, norm=norm, norm_eval=norm_eval, backbone_options=backbone_options
    )
    nms = nms_thresh if nms_thresh is not None else (0.5 if host == "retinanet" else 0.6)
    sizes: dict[str, Any] = {
        "min_size": min_size, "max_size": max_size, "score_thresh": score_thresh, "nms_thresh": nms,
        "detections_per_img": 100,
    }  # fmt: skip
    if host == "retinanet":
        octaves = [[(anchor_scale or 4) * stride * 2 ** (i / 3) for i in range(3)] for stride in strides]
        head = RetinaNetHead(channels, 9, num_classes, norm_layer=_norm if norm else None)
        model: RetinaNet | FCOS = RetinaNet(
            body, num_classes, anchor_generator=ExactAnchors(octaves, (0.5, 1.0, 2.0)), head=head, **sizes
        )
        model.head = TorchvisionHost(head)
    elif host == "fcos":
        points = ExactAnchors([[stride] for stride in strides], (1.0,), offset=0.5)
        head = FCOSHead(channels, 1, num_classes)
        model = FCOS(body, num_classes, anchor_generator=points, head=head, **sizes)
        model.head = TorchvisionHost(head, levels)
    else:
        squares = ExactAnchors([[(anchor_scale or 8) * stride] for stride in strides], (1.0,))
        head = ATSSHead(channels, num_classes)
        model = ATSS(body, num_classes, anchor_generator=squares, head=head, **sizes)
        model.head = TorchvisionHost(head, levels)
    if bvr:
        add_bvr(
            model,
            strides=strides,
            num_heads=num_heads,
            share_geometry=host == "atss",
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
_TOWER = re.compile(r"^bbox_head\.bbox_head\.(cls|reg)_convs\.(\d+)\.(conv|gn)\.(weight|bias)$")
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
    if "head.reg_transformer.relative_positional_encoding.embedding_transform.0.conv.weight" not in mapped:
        for name in [key for key in mapped if key.startswith("head.cls_transformer.relative")]:
            mapped.setdefault(name.replace("cls_transformer", "reg_transformer"), mapped[name])
    return mapped


def load_official(model: RetinaNet | FCOS, checkpoint: Mapping[str, Any]) -> None:
    """Load an official RelationNet2 checkpoint (``["state_dict"]`` or it) into a detector with ResNet-50.

    Raises: ValueError that names the first missing, unknown or unfitting parameter.
    """
    mapped = map_official_keys(model, checkpoint.get("state_dict", checkpoint))
    own = model.state_dict()
    for key in own:
        if key not in mapped and not key.endswith("num_batches_tracked"):
            raise ValueError(f"load_official: the checkpoint has nothing for {key}")
    for key, tensor in mapped.items():
        if key not in own:
            raise ValueError(f"load_official: {key} is unknown here; were host and backbone built as the checkpoint's?")
        if own[key].shape != tensor.shape:
            raise ValueError(f"load_official: {key} has shape {tuple(tensor.shape)}, the model {tuple(own[key].shape)}")
    model.load_state_dict(mapped, strict=False)


def bvr_retinanet_resnet50(**options: Any) -> RetinaNet | FCOS:
    """46.4 M parameters, RetinaNet with ResNet-50 and BVR, published AP 38.5 (host alone 35.6)."""
    return build_detector("retinanet", **options)


def bvr_fcos_resnet50(**options: Any) -> RetinaNet | FCOS:
    """37.2 M parameters, FCOS with ResNet-50 and BVR; published with ResNeXt-101-DCN only."""
    return build_detector("fcos", **options)


def bvr_atss_resnet50(**options: Any) -> RetinaNet | FCOS:
    """40.7 M parameters, ATSS with ResNet-50 and BVR; published with ResNeXt-101-DCN only."""
    return build_detector("atss", **options)


def test_bvr_retinanet(**options: Any) -> RetinaNet | FCOS:
    """0.4 M parameters, for tests."""
    small = {"backbone": "test_resnet", "channels": 16, "strides": (8, 16, 32), "num_heads": 4, "num_classes": 10}
    return build_detector("retinanet", **{**small, "min_size": 128, "max_size": 160, **options})


test_bvr_retinanet.__test__ = False  # pyright: ignore  # pytest would take the name for a test's
VARIANTS = (bvr_retinanet_resnet50, bvr_fcos_resnet50, bvr_atss_resnet50, test_bvr_retinanet)
CARD = ("RelationNet++ (BVR)", "2010.15831", "https://github.com/microsoft/RelationNet2", "MIT", "test_bvr.py")
