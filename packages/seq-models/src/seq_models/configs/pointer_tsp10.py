"""Pointer Network, shortest tours of 10 cities: generated data, exact teacher, transformer encoder, H=64.

Time: 83 s of one processor thread. Metric: mean length over the optimal tours' 1.0107 on 10,000 test instances (length
2.897; the paper prints 2.88, and 2.87 for the optimum).
"""

# ruff: noqa: C408, F403, F405  recipes are written with dict(), and read their bases with *
# pyright: reportUnboundVariable=false

from attn_core.engine import read_base
from seq_models.pointing.metrics import TourScore

_task = "tsp"
_score = TourScore
steps = 1500
n = 10

with read_base():
    from ._transformer_points import *

model["constraint"] = "tour"
model["beam"] = 3
train_dataloader["dataset"]["batch"] = 64
train_cfg = dict(by_epoch=False, max_iters=steps, val_interval=500)
