"""FeatEnHancer before Plain-DETR on digits_coco in the dark; ``--set enhance=False`` trains the detector alone.

Data: 800 pictures of digits as a camera takes them at night, validated on 200, tested on 200. The module has a quarter
of the published width (52 k of 139 k parameters); ``--set width=32`` is the published one and slower. Only short runs
were made: whether the module helps here is not measured.
"""

# ruff: noqa: C408, F403, F405  recipes are written with dict(), and read their bases with *
# pyright: reportUnboundVariable=false, reportUndefinedVariable=false

from torch.optim import AdamW

from attn_core.engine import read_base
from detection.data import DarkDigitsCoco, collate_detection
from detection.tasks.detection import DetectionTask
from detection.tasks.low_light import enhanced_detector

enhance = True
width = 8
epochs = 8
_num_classes = 10
_proposal_size = 28.0

with read_base():
    from ._digits import *
    from ._plain_detr_small import *

model = dict(type=DetectionTask, net=dict(type=enhanced_detector, detector=model["net"], enhance=enhance, width=width))
train_dataloader = dict(
    dataset=dict(type=DarkDigitsCoco, split="train", transform=dict(augment=True, flip=0.0)),
    batch_size=4,
    drop_last=True,
    collate_fn=collate_detection,
)
val_dataloader = dict(dataset=dict(type=DarkDigitsCoco, split="val"), batch_size=25, collate_fn=collate_detection)
test_dataloader = dict(dataset=dict(type=DarkDigitsCoco, split="test"), batch_size=25, collate_fn=collate_detection)
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=2e-3, weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys={".body.": dict(lr_mult=2.0)}),
)
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=4)
