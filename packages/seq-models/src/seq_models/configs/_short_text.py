"""Base of the recipes of text with a third of the steps of ``_text``."""

# ruff: noqa: C408, F403  recipes are written with dict(), and read their bases with *

from attn_core.engine import read_base, warmup_cosine

with read_base():
    from ._text import *

steps = 200
warmup = 20
param_scheduler = warmup_cosine(steps, warmup, start_factor=0.05, eta_min=2e-5, in_steps=True)
train_cfg = dict(by_epoch=False, max_iters=steps, val_interval=100)
