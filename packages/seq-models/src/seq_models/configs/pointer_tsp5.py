"""Pointer Network, shortest tours of 5 cities: generated data, exact teacher, transformer encoder, H=64.

Time: 37 s of one processor thread. Metric: mean length over the optimal tours' 1.0014 on 10,000 test instances (length
2.129; the paper, trained with an LSTM encoder, prints 2.12, which is also its optimum).
"""

# ruff: noqa: C408, F403, F405  recipes are written with dict(), and read their bases with *
# pyright: reportUnboundVariable=false

from attn_core.engine import read_base
from seq_models.pointing.metrics import TourScore

_task = "tsp"
_score = TourScore
steps = 1000
n = 5

with read_base():
    from ._transformer_points import *

model["constraint"] = "tour"
model["beam"] = 3
train_cfg = dict(by_epoch=False, max_iters=steps, val_interval=500)
