"""ACMIL on features of your own slides: slides train -d FEATURES.

AdamW, one bag a step, half a cosine over 50 epochs, as the authors train; the weights of the epoch with the largest sum
of macro F1 and macro AUC in validation are tested once. Masking of the most attended instances is off, as the authors
advise for newer encoders; ``acmil_camelyon16`` has the paper's settings.
"""

# ruff: noqa: F403  recipes are written with dict(), so that a setting looks as on the command line

from attn_core.engine import read_base

data = []
labels = None
split = 1
splits = None
merge = []
classes = ["0", "1"]
in_channels = 384
network = "acmil_ga"
options = {}
most = None
epochs = 50
batch_size = 1
learning_rate = 1e-4

with read_base():
    from ._slides import *
