"""MambaOut-Tiny on ImageNet-1k or any ImageFolder, the published recipe; not run here; published: 82.7 %.

Data: ``<data_root>/train/<class>/*`` and ``<data_root>/val/<class>/*``; the val folder serves as test set, and nothing
is selected. Hardware of the authors: 8 GPUs, batch 4,096 in all, four steps accumulated
(``torchrun --nproc-per-node 8 -m vision_models train mambaout_imagenet --launcher pytorch``; for smaller batches
``--set batch=1024 --set rate=1e-3``).
Other data: ``--data my/pictures``; other sizes: ``--set variant=mambaout_femto --set drop_path=0.025`` (kobe 0.025,
small 0.4, base 0.6). With the state-space model put back: ``--set model.net.ssm=True``.
Published top-1: femto 78.9, kobe 80.0, tiny 82.7, small 84.1, base 84.2 %.
Schedule: 300 epochs, AdamW 4e-3 at batch 4,096, weight decay 0.05, 20 warm-up epochs, cosine to 1e-5, RandAugment m9,
mixup 0.8, CutMix 1.0, random erasing 0.25, label smoothing 0.1.
"""

# ruff: noqa: F403, F405  recipes are written with dict(), so that a setting looks as on the command line
# pyright: reportUndefinedVariable=false, reportUnboundVariable=false

from attn_core.engine import read_base, warmup_cosine

variant = "mambaout_tiny"
drop_path = 0.2
warmup = 20
clip = None
ema = None
side = 224
crop_pct = 1.0

with read_base():
    from ._imagenet import *

batch = 4096
rate = 4e-3
train_dataloader["batch_size"] = batch
optim_wrapper["optimizer"]["lr"] = rate
param_scheduler = warmup_cosine(epochs, warmup, eta_min=1e-5)
