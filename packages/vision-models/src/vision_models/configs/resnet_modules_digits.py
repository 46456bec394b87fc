"""A small ResNet with a module at the end of each branch, on scikit-learn's 1,797 handwritten digits; four epochs.

``--set module=ela``, ``ulsam``, ``gaam``, ``little_attention``, timm's ``se`` or ``eca``; without it nothing is added.
``--set where=blocks`` adds it behind the additions. 0.12 M parameters, maps of 8² and 4².
"""

# ruff: noqa: C408, F403  recipes are written with dict(), so that a setting looks as on the command line

from attn_core.engine import read_base
from vision_models.insertion import with_module

epochs = 4
module = None
where = "branches"
net = dict(
    type=with_module,
    name="test_resnet",
    module=module,
    where=where,
    input_size=(1, 32, 32),
    settings=dict(in_chans=1, num_classes=10, output_stride=8, channels=(16, 24, 32, 48), stem_width=8),
)

with read_base():
    from ._digits import *
