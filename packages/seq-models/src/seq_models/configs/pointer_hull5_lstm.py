"""Pointer Network, convex hulls of 5 points with the paper's LSTM and free answers: generated data, H=128.

Metric: ``exact``. Not yet run to its end here.
"""

# ruff: noqa: C408  recipes are written with dict(), so that a setting looks as on the command line

from torch.optim import Adam

from attn_core.engine import LinearLR
from seq_models.data import PointBatches, only_item
from seq_models.models.pointer_network import PointerNetwork
from seq_models.pointing.metrics import HullScore
from seq_models.pointing.task import PointingTask

steps = 30000
n = 5
hidden = 128
lr = 3e-3
model = dict(
    type=PointingTask,
    net=dict(type=PointerNetwork, hidden=hidden),
)
train_dataloader = dict(
    dataset=dict(type=PointBatches, task="hull", n=n, length=1000, batch=128, solved_ahead=262_144),
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
param_scheduler = [dict(type=LinearLR, start_factor=1.0, end_factor=1e-3, by_epoch=False, begin=0, end=steps)]
train_cfg = dict(by_epoch=False, max_iters=steps, val_interval=3000)
default_hooks = dict(checkpoint=dict(keep=1))
