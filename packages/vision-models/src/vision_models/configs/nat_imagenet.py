"""NAT-Mini on ImageNet-1k or any ImageFolder, the published recipe; not run here; published: 81.8 %.

Data: ``<data_root>/train/<class>/*`` and ``<data_root>/val/<class>/*``; the val folder serves as test set, and nothing
is selected. Hardware of the authors: 8 GPUs, batch 1,024 in all
(``torchrun --nproc-per-node 8 -m vision_models train nat_imagenet --launcher pytorch``).
Other data: ``--data my/pictures``; other sizes: ``--set variant=nat_small --set drop_path=0.3`` (tiny 0.2, base 0.5);
dilated and isotropic ones likewise: ``--set variant=dinat_mini`` (``dinat_s_tiny``, ``dinat_iso_small`` with 0.1, …).
Published top-1: mini 81.8, tiny 83.2, small 83.7, base 84.3 %; DiNAT 81.8, 82.7, 83.8, 84.4 %.
Schedule: 300 epochs, AdamW 1e-3 at batch 1,024, weight decay 0.05 (none for position tables), 20 warm-up epochs, cosine
to 5e-6, then 10 epochs at that rate, RandAugment m9, mixup 0.8, CutMix 1.0, random erasing 0.25, label smoothing 0.1,
gradients clipped at 5.
"""

# ruff: noqa: C408, F403, F405  recipes are written with dict(), so that a setting looks as on the command line
# pyright: reportUndefinedVariable=false, reportUnboundVariable=false

from attn_core.engine import read_base, warmup_cosine

variant = "nat_mini"
drop_path = 0.2
warmup = 20
clip = 5.0
ema = None
side = 224
crop_pct = 0.875

with read_base():
    from ._imagenet import *

cooldown = 10
param_scheduler = warmup_cosine(epochs, warmup, eta_min=5e-6)
train_cfg = dict(max_epochs=epochs + cooldown)
