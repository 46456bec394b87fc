"""Any network on a folder of volumes or pictures: -d FOLDER -m agunet -f 0.

The folder is in nnU-Net's raw layout, or holds images/ and masks/. Spacing, window, scaling and classes are planned
from it; ``medical-seg plan FOLDER`` prints them. SGD with nnU-Net's polynomial decay.
"""

# ruff: noqa: C408  recipes are written with dict(), so that a setting looks as on the command line

from mmengine.optim import PolyLR
from torch.optim import SGD

from medical_seg.data.patches import FolderCases
from medical_seg.losses import DiceCE
from medical_seg.training import Dice, SegmentationTask

data = ""
fold = 0
network = "agunet"
options = {}
in_channels = 1
out_channels = 2
classes = ["background", "foreground"]
ignore = None
window = (64, 64, 64)
spacing = (1.0, 1.0, 1.0)
scaling = ["zscore"]
epochs = 100
batch_size = 2
windows_per_case = 8
foreground = 0.33
learning_rate = 0.01
model = dict(
    type=SegmentationTask,
    network=network,
    window=window,
    in_channels=in_channels,
    out_channels=out_channels,
    options=options,
    criterion=dict(type=DiceCE, ignore=ignore),
)
train_dataloader = dict(
    dataset=dict(
        type=FolderCases,
        folder=data,
        split="train",
        fold=fold,
        window=window,
        spacing=spacing,
        scaling=scaling,
        windows_per_case=windows_per_case,
        foreground=foreground,
    ),
    batch_size=batch_size,
    drop_last=True,
)
val_dataloader = dict(
    dataset=dict(
        type=FolderCases, folder=data, split="val", fold=fold, window=window, spacing=spacing, scaling=scaling
    ),
    batch_size=1,
)
val_evaluator = dict(type=Dice, classes=classes)
optim_wrapper = dict(
    optimizer=dict(type=SGD, lr=learning_rate, momentum=0.99, weight_decay=3e-5, nesterov=True),
    clip_grad=dict(max_norm=12.0),
)
param_scheduler = [
    dict(type=PolyLR, power=0.9, by_epoch=True, begin=0, end=epochs, eta_min=0.0, convert_to_iter_based=True)
]
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=5)
default_hooks = dict(checkpoint=dict(every_epochs=5, keep=2, best="dice"))
