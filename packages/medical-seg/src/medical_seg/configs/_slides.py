"""What the recipes on slides share: each gives the names that are read here, then reads this."""

# ruff: noqa: C408  dict(), as on the command line; names that the recipe gives
# pyright: reportUndefinedVariable=false, reportUnboundVariable=false

from torch.optim import AdamW

from attn_core.engine import CosineAnnealingLR
from medical_seg.slides.bags import SlideBags
from medical_seg.slides.batches import padded
from medical_seg.slides.metrics import SlideFigures
from medical_seg.slides.task import SlideTask

model = dict(type=SlideTask, network=network, in_channels=in_channels, out_channels=len(classes), options=options)
_slides = dict(type=SlideBags, data=data, labels=labels, split=split, splits=splits, merge=merge)
train_dataloader = dict(
    dataset=dict(**_slides, part="train", most=most),
    batch_size=batch_size,
    drop_last=True,
    collate_fn=dict(type=padded),
)
val_dataloader = dict(dataset=dict(**_slides, part="val"), batch_size=1, collate_fn=dict(type=padded))
test_dataloader = dict(dataset=dict(**_slides, part="test"), batch_size=1, collate_fn=dict(type=padded))
val_evaluator = test_evaluator = dict(type=SlideFigures, classes=classes)
optim_wrapper = dict(optimizer=dict(type=AdamW, lr=learning_rate, weight_decay=1e-5))
param_scheduler = [
    dict(type=CosineAnnealingLR, T_max=epochs, eta_min=0.0, by_epoch=True, begin=0, end=epochs,
         convert_to_iter_based=True),
]  # fmt: skip
train_cfg = dict(max_epochs=epochs)
default_hooks = dict(checkpoint=dict(keep=1, best="f1_macro_and_auc"))
