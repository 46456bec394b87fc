"""Plain-DETR with Swin V2-S on COCO, mim_pt_boxrpe_reparam; not run here; published: AP 50.9.

Data: ``<data_root>/annotations/instances_{train,val}2017.json`` and ``<data_root>/{train,val}2017``, or Roboflow's
folders; ``--set data_root=...``. Start from SimMIM's Swin V2-S (window 12): ``--set model.net.weights=FILE``.
mim_pt_boxrpe, published AP 48.7: ``--set variant=plain_detr_swin_v2_small_mim``.
Schedule: 12 epochs of 16 pictures in all, 2 on each of 8 GPUs: ``torchrun --nproc-per-node 8 -m detection train
plain_detr_coco --launcher pytorch``. AdamW 2e-4, layer decay 0.9, ×0.1 after 11 epochs, gradient norm 0.1.
"""

# ruff: noqa: C408, F403, F405  recipes are written with dict(), and read their bases with *
# pyright: reportUnboundVariable=false

from attn_core.engine import read_base

variant = "plain_detr_swin_v2_small_mim_reparam"

with read_base():
    from ._coco import *

optim_wrapper["paramwise_cfg"] = dict(decay_rate=0.9)
