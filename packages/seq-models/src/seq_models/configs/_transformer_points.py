"""The pointer recipes with a transformer as encoder: its size, and a linear schedule with a warm-up."""

# ruff: noqa: C408, F403, F405  recipes are written with dict(), and read their bases with *
# pyright: reportUndefinedVariable=false, reportUnboundVariable=false

from attn_core.engine import LinearLR, read_base

warmup = 50
hidden = 64
lr = 3e-3

with read_base():
    from ._points import *

model["net"] |= dict(encoder="transformer", encoder_layers=2, encoder_heads=4, init_range=None)
param_scheduler = [
    dict(type=LinearLR, start_factor=1 / warmup, by_epoch=False, begin=0, end=warmup),
    dict(type=LinearLR, start_factor=1.0, end_factor=1e-3, by_epoch=False, begin=warmup, end=steps),
]
