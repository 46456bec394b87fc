"""MambaOut (0.2 M parameters) on scikit-learn's 1,797 handwritten digits, trained as BiFormer is.

Test accuracy 98.89 to 99.44 % with seeds 0, 1 and 2, mean 99.3 %. With the state-space model behind each convolution,
``--set model.net.ssm=True``, 99.16 to 99.44 %, mean 99.4 %: less than a picture of 359 apart, in twice the time.
"""

# ruff: noqa: C408, F403  recipes are written with dict(), so that a setting looks as on the command line

from attn_core.engine import read_base
from vision_models.models.mambaout import MambaOut

epochs = 16
net = dict(
    type=MambaOut,
    in_chans=1,
    num_classes=10,
    depths=(1, 1, 1),
    dims=(24, 48, 96),
    drop_path_rate=0.1,
)

with read_base():
    from ._digits import *
