"""DHVT-Tiny on ImageNet-1k or any ImageFolder, from scratch, the published recipe; not run here; published: 77.6 %.

Data: ``<data_root>/train/<class>/*`` and ``<data_root>/val/<class>/*``; the val folder serves as test set, and nothing
is selected. Hardware of the authors: 2 GPUs, batch 256 in all
(``torchrun --nproc-per-node 2 -m vision_models train dhvt_imagenet --launcher pytorch``).
Other data: ``--data my/pictures``; DomainNet: ``--set variant=dhvt_tiny_domain_p16 --set classes=345 --set warmup=20
--set rate=5e-4``; other sizes: ``--set variant=dhvt_small_imagenet_p16``. Published top-1: tiny 77.6, small 82.3 %.
Schedule: 300 epochs, AdamW 5e-4·batch/512, weight decay 0.05, 10 warm-up epochs, cosine to 1e-5 and 10 epochs at that
rate, RandAugment m9, mixup 0.8, CutMix 1.0, random erasing 0.25, label smoothing 0.1, stochastic depth 0.1.
"""

# ruff: noqa: C408, F403, F405  recipes are written with dict(), so that a setting looks as on the command line
# pyright: reportUndefinedVariable=false, reportUnboundVariable=false

from attn_core.engine import read_base, warmup_cosine

variant = "dhvt_tiny_imagenet_p16"
drop_path = 0.1
warmup = 10
clip = None
ema = None
side = 224
crop_pct = 0.875

with read_base():
    from ._imagenet import *

batch = 256
rate = 2.5e-4
cooldown = 10
train_dataloader["batch_size"] = batch
test_dataloader["batch_size"] = batch
optim_wrapper["optimizer"]["lr"] = rate
param_scheduler = warmup_cosine(epochs, warmup, eta_min=1e-5)
train_cfg = dict(max_epochs=epochs + cooldown)
