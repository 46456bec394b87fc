"""DeiT-S with the frozen last layer of Llama 7B on ImageNet-1k or any ImageFolder, as published; not run here.

Data: ``<data_root>/train/<class>/*`` and ``<data_root>/val/<class>/*``; the val folder serves as test set, and nothing
is selected. Hardware of the authors: 4 GPUs, batch 1,024 in all
(``torchrun --nproc-per-node 4 -m vision_models train frozen_llm_imagenet --launcher pytorch``).
The layer: ``--set language=consolidated.00.pth`` of Llama 7B, or ``hf://`` and its last file; a random one without.
The other controls: ``--set frozen=False``, ``--set language_depth=0``. Other data: ``--data my/pictures``. Published:
80.7 % with the layer, 80.1 % for DeiT-S alone.
Schedule: 300 epochs, AdamW 1e-3 at batch 1,024, weight decay 0.05, 20 warm-up epochs, cosine to 1e-5 and 10 epochs at
that rate, RandAugment m9, mixup 0.8, CutMix 1.0, random erasing 0.25, label smoothing 0.1, stochastic depth 0.1,
averaged weights.
"""

# ruff: noqa: C408, F403, F405  recipes are written with dict(), so that a setting looks as on the command line
# pyright: reportUndefinedVariable=false, reportUnboundVariable=false

from attn_core.engine import read_base, warmup_cosine
from vision_models.models.frozen_llm import with_language

variant = "vit_llama_small"
drop_path = 0.1
warmup = 20
clip = None
ema = 4e-5
side = 224
crop_pct = 0.875
language = None
language_depth = 1
frozen = True

with read_base():
    from ._imagenet import *

cooldown = 10
model["net"] = dict(
    type=with_language,
    language=language,
    embed_dim=384,
    num_heads=6,
    language_depth=language_depth,
    frozen=frozen,
    num_classes=classes,
    drop_path_rate=drop_path,
)
param_scheduler = warmup_cosine(epochs, warmup, eta_min=1e-5)
train_cfg = dict(max_epochs=epochs + cooldown)
