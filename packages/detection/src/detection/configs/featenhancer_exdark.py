"""FeatEnHancer before torchvision's RetinaNet on ExDark, as published: 640 pixels, 12 epochs of SGD at 1e-3.

Data: ExDark as its authors distribute it (``--set data_root=...``), 3,000 pictures of 12 classes, validated on 1,800,
tested on 2,563. Published: mAP50 72.6 with the module, 72.1 without, from a detector trained on COCO. ``--set
backbone_weights=DEFAULT`` loads torchvision's ImageNet weights. Not run here. DARK FACE: ``--set kind=DarkFace
--set num_classes=1``.
"""

# ruff: noqa: C408  recipes are written with dict(), so that a setting looks as on the command line

from torch.optim import SGD
from torchvision.models.detection import retinanet_resnet50_fpn

from attn_core.engine import LinearLR, MultiStepLR
from detection.data import DarkFace, ExDark, collate_detection
from detection.metrics.coco_map import CocoMap
from detection.tasks.detection import DetectionTask
from detection.tasks.low_light import enhanced_detector

data_root = "data/exdark"
kind = "ExDark"  # or "DarkFace"
num_classes = 12
backbone_weights = None
enhance = True
epochs = 12
batch = 8
_type = dict(ExDark=ExDark, DarkFace=DarkFace)[kind]
seen = dict(short_sides=(640,), max_size=640)
model = dict(
    type=DetectionTask,
    net=dict(
        type=enhanced_detector,
        detector=dict(
            type=retinanet_resnet50_fpn,
            weights=None,
            weights_backbone=backbone_weights,
            num_classes=num_classes,
            min_size=640,
            max_size=640,
        ),
        enhance=enhance,
    ),
)
train_dataloader = dict(
    dataset=dict(type=_type, root=data_root, split="train", transform=dict(**seen, augment=True, flip=0.5)),
    batch_size=batch,
    num_workers=4,
    shuffle=True,
    drop_last=True,
    collate_fn=collate_detection,
)
val_dataloader = dict(
    dataset=dict(type=_type, root=data_root, split="val", transform=seen),
    batch_size=batch,
    num_workers=4,
    collate_fn=collate_detection,
)
test_dataloader = dict(
    dataset=dict(type=_type, root=data_root, split="test", transform=seen),
    batch_size=batch,
    num_workers=4,
    collate_fn=collate_detection,
)
val_evaluator = dict(type=CocoMap)
test_evaluator = dict(type=CocoMap, per_class=True)
optim_wrapper = dict(optimizer=dict(type=SGD, lr=1e-3, momentum=0.9, weight_decay=1e-4), clip_grad=dict(max_norm=35.0))
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-3, by_epoch=False, begin=0, end=500),
    dict(type=MultiStepLR, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=1)
default_hooks = dict(checkpoint=dict(every_epochs=1, keep=2))
