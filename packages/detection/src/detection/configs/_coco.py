"""What the recipes on COCO share; a recipe says ``variant``, then reads this and adds ``paramwise_cfg``."""

# ruff: noqa: C408  dict(), as on the command line; names that the recipe gives
# pyright: reportUndefinedVariable=false, reportUnboundVariable=false

from torch.optim import AdamW

from attn_core.engine import LinearLR, MultiStepLR
from detection.data import CocoDetection, collate_detection
from detection.metrics.coco_map import CocoMap
from detection.models import pretrained
from detection.tasks.detection import DetectionTask
from detection.tasks.plain_detr_groups import PlainDETRGroups

data_root = "data/coco"
num_classes = 91
labels = "category_id"  # "contiguous" for other data than COCO
epochs = 12
batch = 16  # of all processes; on one GPU --set batch=2, and a lower rate
model = dict(
    type=DetectionTask,
    net=dict(type=pretrained, name=variant, weights="", num_classes=num_classes),
)
train_dataloader = dict(
    dataset=dict(
        type=CocoDetection,
        root=data_root,
        split="train",
        labels=labels,
        num_classes=num_classes,
        transform=dict(
            short_sides=(480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800), augment=True, flip=0.5, crop=True
        ),
    ),
    batch_size=batch,
    num_workers=4,
    drop_last=True,
    collate_fn=collate_detection,
)
val_dataloader = dict(
    dataset=dict(type=CocoDetection, root=data_root, split="val", labels=labels, num_classes=num_classes),
    batch_size=batch,
    num_workers=4,
    collate_fn=collate_detection,
)
test_dataloader = dict(
    dataset=dict(type=CocoDetection, root=data_root, split=("test", "val"), labels=labels, num_classes=num_classes),
    batch_size=batch,
    num_workers=4,
    collate_fn=collate_detection,
)
val_evaluator = dict(type=CocoMap)
test_evaluator = dict(type=CocoMap, per_class=True)
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=2e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=0.1),
    constructor=PlainDETRGroups,
)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-3, by_epoch=False, begin=0, end=1000),
    dict(type=MultiStepLR, by_epoch=True, milestones=[11], gamma=0.1),
]
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=1)
default_hooks = dict(checkpoint=dict(every_epochs=1, keep=2))
