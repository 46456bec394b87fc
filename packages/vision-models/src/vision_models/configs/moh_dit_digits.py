"""MoH-DiT, a diffusion transformer with three quarters of its heads, on scikit-learn's 1,797 digits of 8×8 pixels.

Plain DiT: ``--set model.net.shared_heads=None --set model.net.routed_heads=None``. The test error is that of the
predicted noise, whose variance is 1, at eight strengths; ``predictions.png`` shows samples of each class.
Not measured yet.
"""

# ruff: noqa: C408, F403, F405  recipes are written with dict(), so that a setting looks as on the command line
# pyright: reportUndefinedVariable=false, reportUnboundVariable=false

from attn_core.engine import read_base
from vision_models.diffusion.moh_dit import MoHDiT
from vision_models.tasks.denoising import DenoisingTask, NoiseError

epochs = 60
side = 8
net = dict(
    type=MoHDiT,
    sample_size=side,
    patch_size=2,
    in_channels=1,
    out_channels=2,
    hidden_size=96,
    num_layers=4,
    num_heads=4,
    shared_heads=1,
    routed_heads=2,
    num_classes=10,
)

with read_base():
    from ._digits import *

model = dict(type=DenoisingTask, net=net)
train_dataloader["dataset"]["augment"] = False  # at 8×8 pixels warping blurs, and samples would be blurred as well
for loader in (train_dataloader, val_dataloader, test_dataloader):
    loader["dataset"]["size"] = side
val_evaluator = dict(type=NoiseError)
