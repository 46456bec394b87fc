"""Plain-DETR (1.2 M parameters) from scratch on few pictures of your own, minutes on a CPU: ``-d DATA``.

Data: any folder that ``detection check DATA`` understands; one json without splits is divided 70 : 15 : 15.

Measured on 20 pictures of 128 × 128 with 93 digits of ten classes, ``write_coco(Path("twenty"), "train", limit=20)`` of
``detection.data.digits_coco``, with ``-d twenty --set flip=0``: mAP50 100 % on the 14 pictures it was trained on, as
``--set tested=train`` has it, and 23 % on the 3 test pictures; 183 s of processor time.
"""

# ruff: noqa: C408, F403  recipes are written with dict(), and read their bases with *
# pyright: reportUnboundVariable=false

from attn_core.engine import read_base, warmup_cosine
from detection.data import CocoDetection, collate_detection

data_root = "data"
num_classes = 1  # -d DATA counts them
labels = "contiguous"
turned = "auto"
side = 192  # pixels of the short side that the network sees
largest = 320
steps = 300
warmup = 60
batch = 4
flip = 0.5  # 0 for digits, letters, left and right hands
tested = "test"  # "train": has it learned its own pictures?
_num_classes = num_classes
_proposal_size = 32.0

with read_base():
    from ._plain_detr_small import *

source = dict(type=CocoDetection, root=data_root, divide=True, labels=labels, num_classes=num_classes, turned=turned)
seen = dict(short_sides=(side,), max_size=largest)
train_dataloader = dict(
    dataset=dict(
        **source,
        split="train",
        transform=dict(short_sides=(side,), max_size=largest, augment=True, flip=flip, iou_crop=0.5, color=0.4),
    ),
    batch_size=batch,
    shuffle=True,
    collate_fn=collate_detection,
)
val_dataloader = dict(
    dataset=dict(**source, split=("val", "test"), transform=seen), batch_size=batch, collate_fn=collate_detection
)
test_dataloader = dict(
    dataset=dict(**source, split=(tested, "test", "val"), transform=seen),
    batch_size=batch,
    collate_fn=collate_detection,
)
param_scheduler = warmup_cosine(steps, warmup, start_factor=0.05, in_steps=True)
train_cfg = dict(by_epoch=False, max_iters=steps, val_interval=300)
