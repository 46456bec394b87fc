"""HaloNet-26t on ImageNet-1k or any ImageFolder, in the manner of the package's other recipes; not run here.

Data: ``<data_root>/train/<class>/*`` and ``<data_root>/val/<class>/*``; the val folder serves as test set, and nothing
is selected: the last averaged weights are kept. timm's weights, trained otherwise, reach 79.1 %; the paper's networks
(``--set variant=halonet_h4 --set side=384``) were trained for 350 epochs with batches of 4,096 and SGD, 77.9 to 84.9 %.
Schedule: 300 epochs, AdamW 5e-4·batch/512, weight decay 0.05, 5 warm-up epochs, cosine to 1e-5, RandAugment m9, mixup
0.8, CutMix 1.0, random erasing 0.25, label smoothing 0.1, EMA 0.99996.
"""

# ruff: noqa: F403  the base gives what every recipe on these data has

from attn_core.engine import read_base

variant = "halonet26t"
drop_path = 0.1
warmup = 5
clip = None
ema = 4e-5
side = 256
crop_pct = 0.95

with read_base():
    from ._imagenet import *
