"""BiFormer-S on ImageNet-1k or any ImageFolder, the published recipe; not run here; published: 83.8 %.

Data: ``<data_root>/train/<class>/*`` and ``<data_root>/val/<class>/*``; the val folder serves as test set, and nothing
is selected: the last averaged weights are kept. Hardware of the paper: 8 V100, batch 1,024 in all
(``torchrun --nproc-per-node 8 -m vision_models train biformer_imagenet --launcher pytorch``).
Other data: ``--data my/pictures``; other sizes: ``--set variant=biformer_tiny``.
Published top-1 at 224²: tiny 81.4, small 83.8, base 84.3 %.
Schedule: 300 epochs, AdamW 5e-4·batch/512, weight decay 0.05, 5 warm-up epochs, cosine to 1e-5, RandAugment m9, mixup
0.8, CutMix 1.0, random erasing 0.25, label smoothing 0.1, repeated augmentation, EMA 0.99996.
"""

# ruff: noqa: C408, F403  recipes are written with dict(), so that a setting looks as on the command line

from attn_core.engine import read_base
from vision_models.data.repeated import RepeatedAugmentation

variant = "biformer_small"
drop_path = 0.15
warmup = 5
clip = None
ema = 4e-5
side = 224
crop_pct = 0.875

with read_base():
    from ._imagenet import *

train_dataloader["sampler"] = dict(type=RepeatedAugmentation, repeats=3)  # noqa: F405  # pyright: ignore[reportUnboundVariable]
