"""DaViT-T on ImageNet-1k or any ImageFolder, the published recipe; not run here; published: 82.8 %.

Data: ``<data_root>/train/<class>/*`` and ``<data_root>/val/<class>/*``; the val folder serves as test set, and nothing
is selected. Hardware of the authors: 8 GPUs, batch 1,024 in all
(``torchrun --nproc-per-node 8 -m vision_models train davit_imagenet --launcher pytorch``).
Other data: ``--data my/pictures``; other sizes: ``--set variant=davit_small``, of which the
authors state no other settings. Published top-1: tiny 82.8, small 84.2, base 84.6 %.
Schedule, the defaults of their script: 300 epochs, AdamW 1e-3 at batch 1,024, weight decay 0.05, 5 warm-up epochs,
cosine to 1e-5, RandAugment m9, mixup 0.8, CutMix 1.0, random erasing 0.25, label smoothing 0.1, gradients clipped at 1.
"""

# ruff: noqa: F403  the base gives what every recipe on these data has

from attn_core.engine import read_base

variant = "davit_tiny"
drop_path = 0.1
warmup = 5
clip = 1.0
ema = None
side = 224
crop_pct = 0.875

with read_base():
    from ._imagenet import *
