"""SpectFormer on scikit-learn's 1,797 handwritten digits, trained as BiFormer is.

The same size with gates alone, which is GFNet: ``--set model.net.spectral=None --set model.net.depths=[5]``; with
attention alone: ``--set model.net.spectral=0``.
"""

# ruff: noqa: C408, F403  recipes are written with dict(), so that a setting looks as on the command line

from attn_core.engine import read_base
from vision_models.models.spectformer import SpectFormer

epochs = 16
net = dict(
    type=SpectFormer,
    in_chans=1,
    num_classes=10,
    depths=(4,),
    dims=(48,),
    spectral=1,
    num_heads=3,
    patch_size=4,
    img_size=32,
    drop_path_rate=0.1,
)

with read_base():
    from ._digits import *
