"""Pointer Network, convex hulls of 5 points with the paper's LSTM and free answers: generated data, H=128.

Metric: ``exact``. Not yet run to its end here.
"""

# ruff: noqa: C408, F403, F405  recipes are written with dict(), and read their bases with *
# pyright: reportUnboundVariable=false

from attn_core.engine import LinearLR, read_base
from seq_models.pointing.metrics import HullScore

_task = "hull"
_score = HullScore
steps = 30000
n = 5
hidden = 128
lr = 3e-3

with read_base():
    from ._points import *

train_dataloader["dataset"]["solved_ahead"] = 262_144
param_scheduler = [dict(type=LinearLR, start_factor=1.0, end_factor=1e-3, by_epoch=False, begin=0, end=steps)]
train_cfg = dict(by_epoch=False, max_iters=steps, val_interval=3000)
