"""SAT on digits pasted on 64² canvases: trained on labels alone, tested on boxes.

Class activation maps of the same network without the token: ``--set last_k=0 --set map=cam``; attention rollout:
``--set last_k=0 --set map=rollout``.
"""

# ruff: noqa: C408  recipes are written with dict(), so that a setting looks as on the command line

from torch.optim import AdamW

from attn_core.engine import EMAHook, warmup_cosine
from vision_models.data.pasted_digits import PastedDigits
from vision_models.localization.metrics import Localization
from vision_models.localization.sat import SAT
from vision_models.localization.task import LocalizationTask

epochs = 20
warmup = 2
last_k = 2
map = "token"
area = 0.12
model = dict(
    type=LocalizationTask,
    net=dict(
        type=SAT,
        depth=4,
        embed_dim=64,
        num_heads=4,
        last_k=last_k,
        img_size=64,
        patch_size=8,
        in_chans=1,
        num_classes=10,
        mlp_ratio=2.0,
    ),
    map=map,
    area=area,
    label_smoothing=0.1,
)
train_dataloader = dict(dataset=dict(type=PastedDigits, split="train"), batch_size=64, drop_last=True)
test_dataloader = dict(dataset=dict(type=PastedDigits, split="test"), batch_size=128)
test_evaluator = dict(type=Localization)
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=2e-3, weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = warmup_cosine(epochs, warmup, start_factor=0.05)
train_cfg = dict(max_epochs=epochs)
custom_hooks = [dict(type=EMAHook, momentum=0.02)]
