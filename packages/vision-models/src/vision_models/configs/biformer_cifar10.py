"""BiFormer (2.5 M parameters) on CIFAR-10 from its official archive; not run here, no published figure.

Data: unpack cifar-10-python.tar.gz (or put it as it is) under ``data``; 45,000 train, 5,000 val, 10,000 test images.
Hardware: one GPU, batch 128; on a CPU a day. Schedule: 200 epochs of AdamW, as Swin-like models are trained on it.
"""

# ruff: noqa: F403  the base gives what every recipe on these data has

from attn_core.engine import read_base

classes = 10
topk = (1,)

with read_base():
    from ._cifar import *
