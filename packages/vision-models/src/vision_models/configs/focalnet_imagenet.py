"""FocalNet-T (small receptive field) on ImageNet-1k or any ImageFolder, the published recipe; not run here; published:
82.1 %.

Data: ``<data_root>/train/<class>/*`` and ``<data_root>/val/<class>/*``; the val folder serves as test set, and nothing
is selected. Hardware of the authors: 8 GPUs, batch 1,024 in all
(``torchrun --nproc-per-node 8 -m vision_models train focalnet_imagenet --launcher pytorch``).
Other data: ``--data my/pictures``; other models: ``--set variant=focalnet_base_lrf --set
drop_path=0.5`` (small 0.3, isotropic 0.2). Published top-1: tiny 82.1/82.3, small 83.4/83.5, base 83.7/83.9 with
small/large receptive field, isotropic tiny, small, base 74.1, 80.9, 82.4 %.
Schedule, as in the paper: 300 epochs, AdamW 1e-3 at batch 1,024, weight decay 0.05, 20 warm-up epochs, cosine to 1e-5,
RandAugment m9, mixup 0.8, CutMix 1.0, random erasing 0.25, label smoothing 0.1, gradients clipped at 5. The released
configuration files say 1e-4 per 512 pictures and 5 warm-up epochs.
"""

# ruff: noqa: F403  the base gives what every recipe on these data has

from attn_core.engine import read_base

variant = "focalnet_tiny_srf"
drop_path = 0.2
warmup = 20
clip = 5.0
ema = None
side = 224
crop_pct = 0.875

with read_base():
    from ._imagenet import *
