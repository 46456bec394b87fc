"""ACMIL-GA as its paper trains it on CAMELYON16: slides train acmil_camelyon16 -d FEATURES --splits SPLITS --split 1.

Zhang et al., arXiv 2311.07125, config/camelyon_config.yml: five branches, six of the ten most attended instances masked
(``--n_token 5 --n_masked_patch 10 --mask_drop 0.6``), AdamW 1e-4 with weight decay 1e-5, one bag a step, 50 epochs. The
authors select weights by accuracy (as micro F1) and AUC: here by macro F1 and AUC. Features are not published; their
splits stand in the official repository, ``splits/camelyon``. Not run here.
"""

# ruff: noqa: C408, F403  recipes are written with dict(), so that a setting looks as on the command line

from attn_core.engine import read_base

data = []
labels = None
split = 1
splits = None
merge = []
classes = ["0", "1"]
in_channels = 384
network = "acmil_ga"
options = dict(branches=5, masked=10, mask_drop=0.6)
most = None
epochs = 50
batch_size = 1
learning_rate = 1e-4

with read_base():
    from ._slides import *
