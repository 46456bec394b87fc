"""What the recipes on folders share: each gives the names that are read here, then reads this."""

# ruff: noqa: C408  dict(), as on the command line; names that the recipe gives
# pyright: reportUndefinedVariable=false, reportUnboundVariable=false

from medical_seg.data.patches import FolderCases
from medical_seg.metrics.dice import Dice
from medical_seg.tasks.segmentation import SegmentationTask

model = dict(
    type=SegmentationTask,
    network=network,
    window=window,
    in_channels=in_channels,
    out_channels=out_channels,
    options=options,
    criterion=_criterion,
    regions=regions,
    order=order,
    ignore=ignore,
)
_cases = dict(
    type=FolderCases,
    folder=data,
    fold=fold,
    window=window,
    spacing=spacing,
    scaling=scaling,
    geometry_tolerance=geometry_tolerance,
)
train_dataloader = dict(
    dataset=dict(
        **_cases,
        split="train",
        windows_per_case=windows_per_case,
        foreground=foreground,
        transforms=transforms,
    ),
    batch_size=batch_size,
    drop_last=True,
)
val_dataloader = dict(dataset=dict(**_cases, split="val"), batch_size=1)
val_evaluator = dict(type=Dice, classes=classes)
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=5)
default_hooks = dict(checkpoint=dict(every_epochs=5, keep=2, best="dice"))
