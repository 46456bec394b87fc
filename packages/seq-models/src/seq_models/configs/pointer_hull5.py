"""Pointer Network, convex hulls of 5 points: generated data, transformer encoder, H=64.

Answers name no point twice (``constraint="distinct"``); the paper's are free. Test ``exact`` 0.966 with seed 0, in 105
seconds on one core.
"""

# ruff: noqa: C408, F403, F405  recipes are written with dict(), and read their bases with *
# pyright: reportUnboundVariable=false

from attn_core.engine import read_base
from seq_models.pointing.metrics import HullScore

_task = "hull"
_score = HullScore
steps = 4000
n = 5

with read_base():
    from ._transformer_points import *

model["constraint"] = "distinct"
train_cfg = dict(by_epoch=False, max_iters=steps, val_interval=1000)
