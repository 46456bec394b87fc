"""AGUNet as its paper trains it: -d FOLDER --whole --window 128,128,144.

Bouget et al., arXiv 2101.07715: each volume resized to 128×128×144, flips, turns and zoom, Dice of the foreground,
Adam 1e-3 over 32 volumes per step. The authors publish no training code and their 600 volumes are private: number of
epochs and strength of augmentation are ours. Not run to the end here.
"""

# pyright: reportPrivateImportUsage=false
# (monai.transforms lists no public names)

# ruff: noqa: C408, F403  recipes are written with dict(), so that a setting looks as on the command line

from monai.losses.dice import DiceLoss
from monai.transforms import RandAffined, RandFlipd
from torch.optim import Adam

from attn_core.engine import read_base

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
window = (128, 128, 144)
spacing = None
scaling = ["zscore"]
epochs = 100
batch_size = 2
windows_per_case = 1
foreground = 0.33
learning_rate = 1e-3
geometry_tolerance = None
thick = False
both = ["image", "label"]
transforms = [
    dict(
        type=RandAffined,
        keys=both,
        prob=0.5,
        rotate_range=(0.3, 0.0, 0.0) if thick else (0.3, 0.3, 0.3),
        translate_range=(10, 10, 10),
        scale_range=(0.1, 0.1, 0.1),
        mode=("bilinear", "nearest"),
        padding_mode="border",
    ),
    dict(type=RandFlipd, keys=both, prob=0.5, spatial_axis=2),
]
_criterion = dict(type=DiceLoss, include_background=False, to_onehot_y=True, softmax=True, batch=True)

with read_base():
    from ._folder import *

optim_wrapper = dict(
    optimizer=dict(type=Adam, lr=learning_rate),
    accumulative_counts=16,
)
