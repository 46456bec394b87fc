"""Plain-DETR with 1.2 M parameters, from scratch in small batches; a recipe says ``_num_classes``, then reads this."""

# ruff: noqa: C408  dict(), as on the command line; names that the recipe gives
# pyright: reportUndefinedVariable=false, reportUnboundVariable=false

from torch.optim import AdamW

from attn_core.engine import EMAHook
from detection.metrics.coco_map import CocoMap
from detection.models.plain_detr.detector import PlainDETR
from detection.tasks.detection import DetectionTask

model = dict(
    type=DetectionTask,
    net=dict(
        type=PlainDETR,
        backbone="resnet10t",
        backbone_options=dict(
            stride=8,
            frozen_norm=False,
            options=dict(channels=(32, 64, 128, 128), stem_width=16, output_stride=8),
        ),
        num_classes=_num_classes,
        dim=128,
        num_heads=4,
        ffn_dim=256,
        num_layers=2,
        upsample_stride=8,
        queries=30,
        queries_many=60,
        repeats=6,
        rpb_hidden_dim=32,
        position_bias="log",
        reparam=True,
        proposal_strides=(8,),
        proposal_size=_proposal_size,
        query_content="features",
        proposal_classes=True,
        match_anchors=True,
        class_weight=10.0,
    ),
)
val_evaluator = dict(type=CocoMap)
test_evaluator = dict(type=CocoMap, per_class=True)
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=2e-3, weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys={"net.body": dict(lr_mult=2.0)}),
)
custom_hooks = [dict(type=EMAHook, momentum=0.005)]
