"""What the recipes on planes of the ICBM152 brain share; a recipe says ``network`` and ``options``, then reads this."""

# ruff: noqa: C408  dict(), as on the command line; names that the recipe gives
# pyright: reportUndefinedVariable=false, reportUnboundVariable=false

from torch.optim import AdamW

from attn_core.engine import LinearLR
from medical_seg.data.icbm152 import Icbm152
from medical_seg.losses.dice_ce import DiceCE
from medical_seg.metrics.dice import Dice
from medical_seg.tasks.segmentation import SegmentationTask

_planes = dict(type=Icbm152, window=window)
model = dict(
    type=SegmentationTask,
    network=network,
    window=window,
    in_channels=1,
    out_channels=4,
    options=options,
    criterion=dict(type=DiceCE),
)
train_dataloader = dict(dataset=dict(**_planes, split="train"), batch_size=batch_size, drop_last=True)
test_dataloader = dict(dataset=dict(**_planes, split="test"), batch_size=1)
test_evaluator = dict(type=Dice, classes=["CSF", "grey matter", "white matter"])
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=learning_rate, weight_decay=0.01, fused=True), clip_grad=dict(max_norm=5.0)
)
param_scheduler = [dict(type=LinearLR, start_factor=1.0, end_factor=0.01, by_epoch=False, begin=0, end=steps)]
train_cfg = dict(by_epoch=False, max_iters=steps, val_interval=100)
default_hooks = dict(checkpoint=dict(every_steps=100, keep=1))
