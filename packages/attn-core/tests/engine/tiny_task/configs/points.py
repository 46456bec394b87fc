"""Points in the plane: 6 epochs of 6 batches, under a second."""
# ruff: noqa: C408

from tiny_task import Net, Points
from torch.optim import AdamW

from attn_core.engine import Accuracy, ClassificationTask, CosineAnnealingLR, EMAHook, LinearLR

epochs = 6
size = 48

model = dict(type=ClassificationTask, net=dict(type=Net, width=8, dropout=0.2), label_smoothing=0.1)
train_dataloader = dict(dataset=dict(type=Points, split="train", size=size), batch_size=8, num_workers=0)
val_dataloader = dict(dataset=dict(type=Points, split="val", size=20), batch_size=8)
test_dataloader = dict(dataset=dict(type=Points, split="test", size=20), batch_size=8)
val_evaluator = dict(type=Accuracy)
optim_wrapper = dict(optimizer=dict(type=AdamW, lr=1e-2, weight_decay=0.05), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type=LinearLR, start_factor=0.1, by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(type=CosineAnnealingLR, by_epoch=True, begin=0, end=epochs, T_max=epochs + 1),
]
train_cfg = dict(max_epochs=epochs, val_interval=1)
default_hooks = dict(checkpoint=dict(best="accuracy", every_steps=4, keep=3), metrics=dict(every_steps=3))
custom_hooks = [dict(type=EMAHook, momentum=0.1)]
