"""BiFormer (0.6 M parameters) on scikit-learn's 1,797 handwritten digits; the default of ``vision-models train``.

Test accuracy 99.16 % with seed 0 and 99.44 % with seeds 1 to 4; shorter schedules (12, 16, 20, 25 epochs) fall to
98.89 % with some seed. Augmentation and mixup were chosen by cross-validation on the training and validation parts
(four folds of 288 images, 90 epochs): 11 errors with twice the rotation, shift and scale and without mixup, 8 with
mixup, 3 with milder augmentation and mixup.
"""

# ruff: noqa: C408, F403  recipes are written with dict(), so that a setting looks as on the command line

from attn_core.engine import read_base
from vision_models.models.biformer import BiFormer

epochs = 30
net = dict(
    type=BiFormer,
    in_chans=1,
    num_classes=10,
    depths=(1, 2, 2, 1),
    dims=(32, 64, 96, 128),
    head_dim=16,
    n_win=(4, 4, 2, 1),
    topks=(4, 8, 4, -2),
    drop_path_rate=0.1,
)

with read_base():
    from ._digits import *
