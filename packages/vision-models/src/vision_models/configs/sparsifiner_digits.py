"""Sparsifiner, a quarter of the keys, on scikit-learn's 1,797 handwritten digits, a student of a DeiT trained before.

One run: 45 epochs of the DeiT, 5 in which the guesses are fitted to its attention, 25 of the student. The student that
reads all keys, which loses nothing but what another training of as many steps changes: ``--set model.net.keep=1.0``.
Not measured yet.
"""

# ruff: noqa: C408, F403, F405  recipes are written with dict(), so that a setting looks as on the command line
# pyright: reportUndefinedVariable=false, reportUnboundVariable=false

from attn_core.engine import read_base
from vision_models.models.deit import DeiT
from vision_models.models.sparsifiner import Sparsifiner
from vision_models.tasks.sparsifiner import SparsifinerTask

epochs = 75
side = 20
batches = 19  # of an epoch
teacher = dict(type=DeiT, in_chans=1, num_classes=10, depth=4, embed_dim=64, num_heads=4, patch_size=4, img_size=side)
net = dict(
    type=Sparsifiner,
    in_chans=1,
    num_classes=10,
    depth=4,
    embed_dim=64,
    num_heads=4,
    patch_size=4,
    img_size=side,
    keep=0.25,
    rank=8,
    drop_path_rate=0.0,
)

with read_base():
    from ._digits import *

model = dict(
    type=SparsifinerTask,
    net=net,
    teacher=teacher,
    teacher_steps=45 * batches,
    guess_steps=5 * batches,
    label_smoothing=0.1,
    mixup=0.2,
)
for loader in (train_dataloader, val_dataloader, test_dataloader):
    loader["dataset"]["size"] = side
