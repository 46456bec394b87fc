"""Pointer Network, Delaunay triangulations of 5 points: generated data, transformer encoder, H=64.

The encoder knows the order of the points, which the answers follow. Test ``exact`` 0.816 and ``triangles`` 0.937 with
seed 0 (paper: 0.807, 0.930), in 21 minutes on one core; a schedule of 16,000 steps gives 0.723 and 0.904, one of 4,000
0.445 and 0.795.
"""

# ruff: noqa: C408, F403, F405  recipes are written with dict(), and read their bases with *
# pyright: reportUnboundVariable=false

from attn_core.engine import read_base
from seq_models.pointing.metrics import DelaunayScore

_task = "delaunay"
_score = DelaunayScore
steps = 36000
n = 5

with read_base():
    from ._transformer_points import *

model["net"]["encoder_positions"] = True
train_cfg = dict(by_epoch=False, max_iters=steps, val_interval=2000)
