"""DaViT (0.6 M parameters) on scikit-learn's 1,797 handwritten digits, trained as BiFormer is."""

# ruff: noqa: C408  recipes are written with dict(), so that a setting looks as on the command line

from mmengine.config import read_base

from attn_core.engine import ClassificationTask
from vision_models.davit import DaViT

with read_base():
    from .biformer_digits import *  # noqa: F403

model = dict(
    type=ClassificationTask,
    net=dict(
        type=DaViT,
        in_chans=1,
        num_classes=10,
        depths=(1, 1, 1),
        dims=(32, 64, 96),
        num_heads=(2, 4, 6),
        window_size=4,
        drop_path_rate=0.1,
    ),
    label_smoothing=0.1,
    mixup=0.2,
)
