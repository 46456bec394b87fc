"""MoH-ViT-S, 80 % of the heads, on ImageNet-1k or any ImageFolder, the published recipe; not run here.

Data: ``<data_root>/train/<class>/*`` and ``<data_root>/val/<class>/*``; the val folder serves as test set, and nothing
is selected. Hardware of the authors: 8 GPUs, batch 1,024 in all
(``torchrun --nproc-per-node 8 -m vision_models train moh_imagenet --launcher pytorch``).
Other data: ``--data my/pictures``; other sizes: ``--set variant=moh_transnext_base_75 --set drop_path=0.6``; plain
TransNeXt with drop_path micro 0.15, tiny 0.25, small 0.45, base 0.6; DeiT as host:
``--set variant=moh_vit_small_75 --set drop_path=0.1``.
Published top-1 of TransNeXt: micro 82.5, tiny 84.0, small 84.7, base 84.8 %.
Schedule: 300 epochs, AdamW 1e-3 at batch 1,024, weight decay 0.05 (none for position networks, temperatures and query
embeddings), 5 warm-up epochs, cosine to 1e-5, then 10 epochs at that rate, RandAugment m9, mixup 0.8, CutMix 1.0,
random erasing 0.25, label smoothing 0.1, gradients clipped at 1; 0.01 of the routers' balance joins the loss.
"""

# ruff: noqa: C408, F403, F405  recipes are written with dict(), so that a setting looks as on the command line
# pyright: reportUndefinedVariable=false, reportUnboundVariable=false

from attn_core.engine import read_base, warmup_cosine
from vision_models.tasks.mixture_of_heads import MixtureOfHeadsTask

variant = "moh_transnext_small_80"
drop_path = 0.45
warmup = 5
clip = 1.0
ema = None
side = 224
crop_pct = 0.875

with read_base():
    from ._imagenet import *

cooldown = 10
model = {**model, "type": MixtureOfHeadsTask}
param_scheduler = warmup_cosine(epochs, warmup, eta_min=1e-5)
train_cfg = dict(max_epochs=epochs + cooldown)
