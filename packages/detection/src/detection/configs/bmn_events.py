"""BMN on generated videos of class scores (``class_streams``), minutes on a CPU.

``--set csa=sum`` adds class-semantics attention (or ``mean``, ``max``), ``--set se=True`` squeeze and excitation.

Not measured at this size; one run of a wider network (width and pair_width 64, map_width 32, bins 16, 12 epochs, weight
decay 1e-4), seed 0, had AUC 77.7, AR@1 31.9, AR@100 82.7 and average mAP 47.6 on test, in 158 s of processor time.
"""

# ruff: noqa: C408  recipes are written with dict()

from torch.optim import AdamW

from attn_core.engine import warmup_cosine
from detection.data.events import ClassStreams, collate_events
from detection.metrics.events import EventScores
from detection.models.bmn.network import BMN
from detection.tasks.events import EventTask

epochs = 9
warmup = 1
batch = 16
csa = None  # "sum", "mean" or "max": class-semantics attention
se = False
model = dict(
    type=EventTask,
    net=dict(
        type=BMN,
        features=16,
        steps=32,
        width=48,
        pair_width=48,
        map_width=24,
        bins=8,
        csa=csa,
        se=se,
    ),
    classes=8,
)
train_dataloader = dict(
    dataset=dict(type=ClassStreams, split="train"),
    batch_size=batch,
    shuffle=True,
    drop_last=True,
    collate_fn=collate_events,
)
val_dataloader = dict(dataset=dict(type=ClassStreams, split="val"), batch_size=50, collate_fn=collate_events)
test_dataloader = dict(dataset=dict(type=ClassStreams, split="test"), batch_size=50, collate_fn=collate_events)
val_evaluator = dict(type=EventScores)
test_evaluator = dict(type=EventScores)
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=2e-3, weight_decay=0.01),
    clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = warmup_cosine(epochs, warmup, start_factor=0.1, eta_min=1e-5)
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=3)
default_hooks = dict(checkpoint=dict(best="AUC", every_epochs=3, keep=2))
