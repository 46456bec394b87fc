"""RAVLT-T on ImageNet-1k or any ImageFolder, the published recipe; not run here; published: 82.8 %.

Data: ``<data_root>/train/<class>/*`` and ``<data_root>/val/<class>/*``; the val folder serves as test set, and nothing
is selected: the last averaged weights are kept. Batch 1,024 in all. Other sizes: ``--set variant=ravlt_small --set
drop_path=0.15`` (base 0.4, large 0.55). Published top-1 at 224²: tiny 82.8, small 84.4, base 85.5, large 86.0 %.
Schedule: 300 epochs, AdamW 5e-4·batch/512, weight decay 0.05, 5 warm-up epochs, cosine to 1e-5, RandAugment m9, mixup
0.8, CutMix 1.0, random erasing 0.25, label smoothing 0.1, EMA 0.99996.
"""

# ruff: noqa: F403  the base gives what every recipe on these data has

from attn_core.engine import read_base

variant = "ravlt_tiny"
drop_path = 0.1
warmup = 5
clip = None
ema = 4e-5
side = 224
crop_pct = 0.875

with read_base():
    from ._imagenet import *
