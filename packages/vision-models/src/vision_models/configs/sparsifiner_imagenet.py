"""Sparsifiner-S, a quarter of the keys, on ImageNet-1k or any ImageFolder, the published recipe; not run here.

Data: ``<data_root>/train/<class>/*`` and ``<data_root>/val/<class>/*``; the val folder serves as test set, and nothing
is selected. Hardware of the authors: 8 GPUs, batch 1,344 in all
(``torchrun --nproc-per-node 8 -m vision_models train sparsifiner_imagenet --launcher pytorch --set
model.teacher_weights=deit_small_patch16_224-cd65a155.pth``, the file of facebookresearch/deit).
Other data: ``--data my/pictures``, with a teacher trained on them; other shares: ``--set model.net.keep=0.1``.
Schedule: the student starts from the teacher's weights; 5 epochs fit the guesses, 45 the network, AdamW, weight decay
0.05, 3 warm-up epochs, cosine. The authors take 3e-4 to 2e-4 for the guesses and 8e-5 to 2e-6, with a warm-up of its
own, for the network; here one schedule from 3e-4 to 2e-6 serves both.
"""

# ruff: noqa: C408, F403, F405  recipes are written with dict(), so that a setting looks as on the command line
# pyright: reportUndefinedVariable=false, reportUnboundVariable=false

from attn_core.engine import read_base, warmup_cosine
from vision_models.models import create_model
from vision_models.models.deit import DeiT
from vision_models.tasks.sparsifiner import SparsifinerTask

variant = "sparsifiner_small"
drop_path = 0.0
warmup = 3
clip = None
ema = None
side = 224
crop_pct = 0.875

with read_base():
    from ._imagenet import *

batch = 1344
images = 1281167
model = dict(
    type=SparsifinerTask,
    net=dict(type=create_model, name=variant, num_classes=classes, drop_path_rate=drop_path),
    teacher=dict(type=DeiT, embed_dim=384, num_heads=6, num_classes=classes),
    teacher_weights="deit_small_patch16_224-cd65a155.pth",
    guess_steps=5 * (images // batch),
    label_smoothing=0.1,
    mixup=0.8,
    cutmix=1.0,
)
optim_wrapper["optimizer"]["lr"] = 3e-4
train_dataloader["batch_size"] = test_dataloader["batch_size"] = batch
param_scheduler = warmup_cosine(50, warmup, eta_min=2e-6)
train_cfg = dict(max_epochs=50)
