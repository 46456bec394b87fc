"""What the recipes on handwritten digits share; a recipe says ``net`` and ``epochs``, then reads this."""

# ruff: noqa: C408  dict(), as on the command line; names that the recipe gives
# pyright: reportUndefinedVariable=false, reportUnboundVariable=false

from torch.optim import AdamW

from attn_core.engine import Accuracy, ClassificationTask, EMAHook, warmup_cosine
from vision_models.data import Digits

warmup = 2
model = dict(type=ClassificationTask, net=net, label_smoothing=0.1, mixup=0.2)
train_dataloader = dict(dataset=dict(type=Digits, split="train", augment=True), batch_size=64, drop_last=True)
val_dataloader = dict(dataset=dict(type=Digits, split="val"), batch_size=256)
test_dataloader = dict(dataset=dict(type=Digits, split="test"), batch_size=256)
val_evaluator = dict(type=Accuracy)
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=2e-3, weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = warmup_cosine(epochs, warmup, start_factor=0.05)
train_cfg = dict(max_epochs=epochs, val_interval=10)
# The averaged weights of the last epoch are kept: 179 images cannot rank weights that make one error each.
default_hooks = dict(checkpoint=dict(every_epochs=10, keep=1))
custom_hooks = [dict(type=EMAHook, momentum=0.02)]
