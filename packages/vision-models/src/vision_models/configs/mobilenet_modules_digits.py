"""MobileNet-V2 at 0.35 of its width with a module at the end of each branch, on scikit-learn's digits; four epochs.

``--set module=ela`` and others as in ``resnet_modules_digits``. 0.41 M parameters, maps of 8² to 1².
"""

# ruff: noqa: C408, F403  recipes are written with dict(), so that a setting looks as on the command line

from attn_core.engine import read_base
from vision_models.insertion import with_module

epochs = 4
module = None
where = "branches"
net = dict(
    type=with_module,
    name="mobilenetv2_035",
    module=module,
    where=where,
    input_size=(1, 32, 32),
    settings=dict(in_chans=1, num_classes=10),
)

with read_base():
    from ._digits import *
