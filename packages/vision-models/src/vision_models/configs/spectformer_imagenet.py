"""SpectFormer-S on ImageNet-1k or any ImageFolder, the published recipe; not run here; published: 81.7 %.

Data: ``<data_root>/train/<class>/*`` and ``<data_root>/val/<class>/*``; the val folder serves as test set, and nothing
is selected. Hardware of the authors: 8 GPUs, batch 1,024 in all
(``torchrun --nproc-per-node 8 -m vision_models train spectformer_imagenet --launcher pytorch``).
Other data: ``--data my/pictures``; other sizes: ``--set variant=spectformer_b --set drop_path=0.25`` (ti, xs 0); GFNet:
``--set variant=gfnet_s``, its stages ``--set variant=gfnet_h_s --set drop_path=0.2`` (ti 0.1, b 0.4).
Hierarchical ones, ``--set variant=spectformer_h_s --set drop_path=0.1`` (b 0.1, l 0.3), were published after 310 epochs
with token labels of another network, which this recipe does not have.
Published top-1: ti 76.9, xs 80.2, s 81.7, b 82.1 %; GFNet ti 74.6, xs 78.6, s 80.0, b 80.7, h_ti 80.1, h_s 81.5,
h_b 82.9 %.
Schedule: 300 epochs, AdamW 5e-4·batch/512, weight decay 0.05, 5 warm-up epochs, cosine to 1e-5, RandAugment m9, mixup
0.8, CutMix 1.0, label smoothing 0.1, gradients clipped at 1, no random erasing.
"""

# ruff: noqa: F403, F405  the base gives what every recipe on these data has
# pyright: reportUndefinedVariable=false, reportUnboundVariable=false

from attn_core.engine import read_base

variant = "spectformer_s"
drop_path = 0.15
warmup = 5
clip = 1.0
ema = None
side = 224
crop_pct = 0.9

with read_base():
    from ._imagenet import *

train_dataloader["dataset"]["erasing"] = 0.0
