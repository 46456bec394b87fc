"""Plain-DETR (2.4 M parameters) on digits_coco from scratch; not yet trained to the end, no metric measured."""

# ruff: noqa: C408  recipes are written with dict(), so that a setting looks as on the command line

from mmengine.optim import CosineAnnealingLR, LinearLR
from torch.optim import AdamW

from attn_core.engine import EMAHook
from detection.data import DigitsCoco, collate_detection
from detection.detection_task import DetectionTask
from detection.evaluation.coco_map import CocoMap
from detection.plain_detr import PlainDETR

epochs = 10
warmup = 1
model = dict(
    type=DetectionTask,
    net=dict(
        type=PlainDETR,
        backbone="resnet10t",
        backbone_options=dict(stride=16, frozen_norm=False),
        num_classes=10,
        dim=128,
        num_heads=4,
        ffn_dim=256,
        num_layers=3,
        upsample_stride=8,
        queries=40,
        queries_many=100,
        repeats=5,
        rpb_hidden_dim=64,
        proposal_strides=(8, 16, 32),
        proposal_size=0.15,
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
    optimizer=dict(type=AdamW, lr=8e-4, weight_decay=0.05, fused=True),
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
        eta_min=8e-6,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=10)
custom_hooks = [dict(type=EMAHook, momentum=0.01)]
