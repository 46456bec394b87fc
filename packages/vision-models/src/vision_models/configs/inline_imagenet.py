"""InLine-Swin-T on ImageNet-1k or any ImageFolder, the published recipe; not run here; published: 82.4 %.

Data: ``<data_root>/train/<class>/*`` and ``<data_root>/val/<class>/*``; the val folder serves as test set, and nothing
is selected. Hardware of the authors: 8 GPUs, batch 1,024 in all
(``torchrun --nproc-per-node 8 -m vision_models train inline_imagenet --launcher pytorch``).
Other data: ``--data my/pictures``; other models: ``--set variant=inline_pvt_tiny``, with the
official settings that differ from Swin-T's: drop_path DeiT and PVT-T/S 0.1, PVT-M/L and Swin-S 0.3, CSwin-T 0.2,
CSwin-S 0.4, Swin-B and CSwin-B 0.5; clip: 1.0 for PVT-M/L, none for PVT-T/S and CSwin; warmup 5 for PVT; CSwin keeps
averaged weights (decay 0.99984, B 0.99992), and CSwin-B decays weights by 0.1.
Published top-1: DeiT-T/S/B 74.5/80.2/82.3, PVT-T/S/M/L 78.2/82.0/83.2/83.6,
Swin-T/S/B 82.4/83.6/84.1, CSwin-T/S/B 83.2/83.8/84.5 %.
Schedule: 300 epochs, AdamW 5e-4·batch/512, weight decay 0.05, 20 warm-up epochs, cosine to 1e-5, RandAugment m9, mixup
0.8, CutMix 1.0, random erasing 0.25, label smoothing 0.1, gradients clipped at 5. The authors evaluate on pictures
squeezed to 256×256 before the center is cut out; here the short side is resized to 256.
"""

# ruff: noqa: F403  the base gives what every recipe on these data has

from attn_core.engine import read_base

variant = "inline_swin_tiny"
drop_path = 0.2
warmup = 20
clip = 5.0
ema = None
side = 224
crop_pct = 0.875

with read_base():
    from ._imagenet import *
