"""Plain-DETR (1.1 M parameters) on digits_coco from scratch; not yet trained to the end, no metric measured.

Data: 800 pictures of digits, validated on 200, tested on 200. Time: about 2,000 steps of 0.3 core-seconds.
"""

# ruff: noqa: C408  recipes are written with dict(), so that a setting looks as on the command line

from mmengine.optim import CosineAnnealingLR, LinearLR
from torch.optim import AdamW

from attn_core.engine import EMAHook
from detection.data import DigitsCoco, collate_detection
from detection.detection_task import DetectionTask
from detection.evaluation.coco_map import CocoMap
from detection.plain_detr import PlainDETR

epochs = 20
warmup = 1
model = dict(
    type=DetectionTask,
    net=dict(
        type=PlainDETR,
        backbone="resnet10t",
        backbone_options=dict(stride=16, frozen_norm=False, options=dict(channels=(32, 64, 128, 256), stem_width=16)),
        num_classes=10,
        dim=128,
        num_heads=4,
        ffn_dim=256,
        num_layers=2,
        upsample_stride=8,
        queries=30,
        queries_many=90,
        repeats=6,
        rpb_hidden_dim=256,
        position_bias="log",
        reparam=True,
        proposal_strides=(8, 16, 32),
        proposal_size=20.0,
        query_content="features",
        proposal_classes=True,
    ),
)
train_dataloader = dict(
    dataset=dict(type=DigitsCoco, split="train", transform=dict(augment=True, flip=0.0)),
    batch_size=8,
    drop_last=True,
    collate_fn=collate_detection,
)
val_dataloader = dict(dataset=dict(type=DigitsCoco, split="val"), batch_size=25, collate_fn=collate_detection)
test_dataloader = dict(dataset=dict(type=DigitsCoco, split="test"), batch_size=25, collate_fn=collate_detection)
val_evaluator = dict(type=CocoMap)
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=1e-3, weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = [
    dict(type=LinearLR, start_factor=0.05, by_epoch=True, begin=0, end=warmup, convert_to_iter_based=True),
    dict(
        type=CosineAnnealingLR,
        by_epoch=True,
        begin=warmup,
        end=epochs,
        T_max=epochs - warmup,
        eta_min=1e-5,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=4)
custom_hooks = [dict(type=EMAHook, momentum=0.01)]
