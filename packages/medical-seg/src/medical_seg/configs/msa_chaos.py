"""MSA as its authors train it: -d FOLDER -m msa --window 1,256,256.

Sinha and Dolz, arXiv 1906.02849, src/main.py: Adam 1e-3 with betas 0.9 and 0.99, batches of 8 slices, 500 epochs, flips
and turns up to 30°, cross-entropy at eight heads with guide and reconstruction terms. Theirs halves the rate when it
sees no progress (the condition also holds in the first epoch): here it starts at the 5e-4 that follows. Data: slices of
CHAOS as images/ and masks/ with class numbers. Not run to the end here.
"""

# pyright: reportPrivateImportUsage=false
# (monai.transforms lists no public names)

# ruff: noqa: C408, F403  recipes are written with dict(), so that a setting looks as on the command line

from monai.transforms import RandAffined, RandFlipd
from torch.nn import CrossEntropyLoss
from torch.optim import Adam

from attn_core.engine import read_base

data = ""
fold = 0
network = "msa"
options = {}
in_channels = 1
out_channels = 5
classes = ["liver", "right kidney", "left kidney", "spleen"]
regions = None
order = []
ignore = None
window = (1, 256, 256)
spacing = (1.0, 1.0, 1.0)
scaling = ["zscore"]
epochs = 500
batch_size = 8
windows_per_case = 1
foreground = 0.0
learning_rate = 5e-4
geometry_tolerance = None
thick = True
both = ["image", "label"]
transforms = [
    dict(type=RandFlipd, keys=both, prob=0.5, spatial_axis=1),
    dict(type=RandFlipd, keys=both, prob=0.5, spatial_axis=2),
    dict(
        type=RandAffined,
        keys=both,
        prob=0.5,
        rotate_range=(0.52, 0.0, 0.0) if thick else (0.52, 0.52, 0.52),
        mode=("bilinear", "nearest"),
        padding_mode="zeros",
    ),
]
_criterion = dict(type=CrossEntropyLoss)

with read_base():
    from ._folder import *

optim_wrapper = dict(optimizer=dict(type=Adam, lr=learning_rate, betas=(0.9, 0.99)))
