"""FAN-B-Hybrid with TAP and ADL on ImageNet-1k or any ImageFolder, the published recipe; not run; published: 84.3 %.

Data: ``<data_root>/train/<class>/*`` and ``<data_root>/val/<class>/*``; the val folder serves as test set, and nothing
is selected. Hardware of the authors: 64 GPUs, batch 4,096 in all
(``torchrun --nnodes 8 --nproc-per-node 8 -m vision_models train tap_imagenet --launcher pytorch``).
Other data: ``--data my/pictures``. RVT: ``--set variant=tap_rvt_base_plus --set drop_path=0.1 --set warmup=5 --set
erasing=0.25 --set batch=2048 --set rate=2e-3 --set eta_min=1e-5 --set ema=None``; its augmentation of single patches,
with a second pass, is left out.
Published: FAN-B-Hybrid 84.3 % top-1 and 43.7 % mean corruption error, RVT-B 83.1 and 44.7 %.
Schedule: 300 epochs, AdamW 4e-3, weight decay 0.05, 10 warm-up epochs, cosine to 1e-6, then 10 epochs at that rate,
RandAugment m9, mixup 0.8, CutMix 1.0, random erasing 0.3, label smoothing 0.1, stochastic depth 0.35, averaged weights
with decay 0.99996, ADL with weight 1 and threshold 2.
"""

# ruff: noqa: C408, F403, F405  recipes are written with dict(), so that a setting looks as on the command line
# pyright: reportUndefinedVariable=false, reportUnboundVariable=false

from attn_core.engine import read_base, warmup_cosine
from vision_models.tasks.robust import DiverseAttentionTask

variant = "tap_fan_base_hybrid"
drop_path = 0.35
warmup = 10
clip = None
ema = 4e-5
side = 224
crop_pct = 1.0
erasing = 0.3
diversity = 1.0
threshold = 2.0
eta_min = 1e-6

with read_base():
    from ._imagenet import *

batch = 4096
rate = 4e-3
cooldown = 10
model["type"] = DiverseAttentionTask
model["diversity"] = diversity
model["threshold"] = threshold
train_dataloader["dataset"]["erasing"] = erasing
train_dataloader["batch_size"] = batch
test_dataloader["batch_size"] = batch
optim_wrapper["optimizer"]["lr"] = rate
param_scheduler = warmup_cosine(epochs, warmup, eta_min=eta_min)
train_cfg = dict(max_epochs=epochs + cooldown)
