"""Any network on a folder of volumes or pictures: -d FOLDER -m agunet -f 0.

The folder is in nnU-Net's raw layout, or holds images/ and masks/. Spacing, window, scaling and classes are planned
from it; ``medical-seg plan FOLDER`` prints them. MONAI's Dice with cross-entropy and augmentation, SGD with nnU-Net's
polynomial decay.

There is no test split: the cases of the fold (-f) are the validation split, which chooses the weights and which
``eval`` measures; all others train. What is to stay untouched belongs in a folder of its own: ``predict``, then
``evaluate``.
"""

# pyright: reportPrivateImportUsage=false
# (monai.transforms lists no public names)

# ruff: noqa: C408, F403  recipes are written with dict(), so that a setting looks as on the command line

from monai.losses.dice import DiceCELoss
from monai.transforms import (
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandShiftIntensityd,
)
from torch.optim import SGD

from attn_core.engine import PolyLR, read_base

data = ""
fold = 0
network = "agunet"
options = {}
in_channels = 1
out_channels = 2
classes = ["foreground"]
regions = None
order = []
ignore = None
window = (64, 64, 64)
spacing = (1.0, 1.0, 1.0)
scaling = ["zscore"]
epochs = 100
batch_size = 2
windows_per_case = 8
foreground = 0.33
learning_rate = 0.01
geometry_tolerance = None
thick = False
both = ["image", "label"]
transforms = [
    dict(
        type=RandAffined,
        keys=both,
        prob=0.2,
        rotate_range=(0.3, 0.0, 0.0) if thick else (0.3, 0.3, 0.3),
        scale_range=(0.2, 0.2, 0.2),
        mode=("bilinear", "nearest"),
        padding_mode="border",
    ),
    dict(type=RandFlipd, keys=both, prob=0.5, spatial_axis=0),
    dict(type=RandFlipd, keys=both, prob=0.5, spatial_axis=1),
    dict(type=RandFlipd, keys=both, prob=0.5, spatial_axis=2),
    dict(type=RandGaussianNoised, keys=["image"], prob=0.1, std=0.1),
    dict(type=RandGaussianSmoothd, keys=["image"], prob=0.2),
    dict(type=RandScaleIntensityd, keys=["image"], prob=0.15, factors=0.25, channel_wise=True),
    dict(type=RandShiftIntensityd, keys=["image"], prob=0.15, offsets=0.25, channel_wise=True),
    dict(type=RandAdjustContrastd, keys=["image"], prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
]
_criterion = dict(type=DiceCELoss, include_background=False, to_onehot_y=True, softmax=True, batch=True)

with read_base():
    from ._folder import *

optim_wrapper = dict(
    optimizer=dict(type=SGD, lr=learning_rate, momentum=0.99, weight_decay=3e-5, nesterov=True),
    clip_grad=dict(max_norm=12.0),
)
param_scheduler = [
    dict(type=PolyLR, power=0.9, by_epoch=True, begin=0, end=epochs, eta_min=0.0, convert_to_iter_based=True)
]
