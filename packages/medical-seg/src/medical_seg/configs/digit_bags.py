"""ACMIL on bags of 30 to 50 handwritten digits, positive if one or two are nines.

Other networks: ``--set network=acmil_mha``, ``abmil``, ``mean_pooling``, ``max_pooling``.
"""

# ruff: noqa: C408  recipes are written with dict(), so that a setting looks as on the command line

from torch.optim import AdamW

from attn_core.engine import CosineAnnealingLR
from medical_seg.slides.batches import padded
from medical_seg.slides.digit_bags import DigitBags
from medical_seg.slides.metrics import SlideFigures
from medical_seg.slides.task import SlideTask

network = "acmil_ga"
options = dict(width=64)
epochs = 30
learning_rate = 1e-3
model = dict(type=SlideTask, network=network, in_channels=64, out_channels=2, options=options)
train_dataloader = dict(dataset=dict(type=DigitBags, split="train"), batch_size=4, collate_fn=dict(type=padded))
val_dataloader = dict(dataset=dict(type=DigitBags, split="val"), batch_size=50, collate_fn=dict(type=padded))
test_dataloader = dict(dataset=dict(type=DigitBags, split="test"), batch_size=50, collate_fn=dict(type=padded))
val_evaluator = test_evaluator = dict(type=SlideFigures, classes=["no nine", "nine"])
optim_wrapper = dict(optimizer=dict(type=AdamW, lr=learning_rate, weight_decay=0.01, fused=True))
param_scheduler = [
    dict(type=CosineAnnealingLR, T_max=epochs, eta_min=0.0, by_epoch=True, begin=0, end=epochs,
         convert_to_iter_based=True),
]  # fmt: skip
train_cfg = dict(max_epochs=epochs, val_interval=10)
default_hooks = dict(checkpoint=dict(every_epochs=10, keep=1, best="f1_macro_and_auc"))
