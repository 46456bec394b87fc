"""Pointer Network, convex hulls of 5 points: generated data, transformer encoder, H=64.

Answers name no point twice (``constraint="distinct"``); the paper's are free. Test ``exact`` 0.966 with seed 0, in 105
seconds on one core.
"""

# ruff: noqa: C408  recipes are written with dict(), so that a setting looks as on the command line

from torch.optim import Adam

from attn_core.engine import LinearLR
from seq_models.data import PointBatches, only_item
from seq_models.models.pointer_network import PointerNetwork
from seq_models.pointing.metrics import HullScore
from seq_models.pointing.task import PointingTask

steps = 4000
warmup = 50
n = 5
hidden = 64
lr = 3e-3
model = dict(
    type=PointingTask,
    net=dict(
        type=PointerNetwork,
        hidden=hidden,
        encoder="transformer",
        encoder_layers=2,
        encoder_heads=4,
        init_range=None,
    ),
    constraint="distinct",
)
train_dataloader = dict(
    dataset=dict(type=PointBatches, task="hull", n=n, length=1000, batch=128),
    batch_size=1,
    collate_fn=dict(type=only_item),
)
val_dataloader = dict(
    dataset=dict(type=PointBatches, task="hull", n=n, split="val", length=2, batch=500),
    batch_size=1,
    collate_fn=dict(type=only_item),
)
test_dataloader = dict(
    dataset=dict(type=PointBatches, task="hull", n=n, split="test", length=20, batch=500),
    batch_size=1,
    collate_fn=dict(type=only_item),
)
val_evaluator = dict(type=HullScore)
optim_wrapper = dict(optimizer=dict(type=Adam, lr=lr, fused=True), clip_grad=dict(max_norm=2.0))
param_scheduler = [
    dict(type=LinearLR, start_factor=1 / warmup, by_epoch=False, begin=0, end=warmup),
    dict(type=LinearLR, start_factor=1.0, end_factor=1e-3, by_epoch=False, begin=warmup, end=steps),
]
train_cfg = dict(by_epoch=False, max_iters=steps, val_interval=1000)
default_hooks = dict(checkpoint=dict(keep=1))
