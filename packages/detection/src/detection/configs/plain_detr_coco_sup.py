"""Plain-DETR with Swin V2-S on COCO, sup_pt_boxrpe; not run here; published: AP 46.1.

Data: ``<data_root>/annotations/instances_{train,val}2017.json`` and ``<data_root>/{train,val}2017``, or Roboflow's
folders; ``--set data_root=...``. Start from a supervised Swin V2-S (window 16): ``--set model.net.weights=FILE``.
sup_pt_ape without box bias, published AP 37.2: ``--set variant=plain_detr_swin_v2_small_ape``.
Schedule: 12 epochs of 16 pictures in all, 2 on each of 8 GPUs: ``torchrun --nproc-per-node 8 -m detection train
plain_detr_coco_sup --launcher pytorch``. AdamW 2e-4, backbone 2e-5, ×0.1 after 11 epochs, gradient norm 0.1.
"""

# ruff: noqa: C408, F403, F405  recipes are written with dict(), and read their bases with *
# pyright: reportUnboundVariable=false

from attn_core.engine import read_base

variant = "plain_detr_swin_v2_small_sup"

with read_base():
    from ._coco import *

optim_wrapper["paramwise_cfg"] = dict(custom_keys={"body.": dict(lr_mult=0.1)})
