"""What the recipes on CIFAR share; a recipe says ``classes`` and ``topk``, then reads this."""

# ruff: noqa: C408  dict(), as on the command line; names that the recipe gives
# pyright: reportUndefinedVariable=false, reportUnboundVariable=false

from torch.optim import AdamW

from attn_core.engine import Accuracy, ClassificationTask, EMAHook, warmup_cosine
from vision_models.data import Cifar
from vision_models.models.biformer import BiFormer

data_root = "data"
epochs = 200
warmup = 5
# 64 px: stage maps of 16, 8, 4 and 2 tokens per side
size = 64
model = dict(
    type=ClassificationTask,
    net=dict(
        type=BiFormer,
        num_classes=classes,
        depths=(2, 2, 4, 1),
        dims=(48, 96, 160, 256),
        head_dim=16,
        n_win=(4, 4, 2, 1),
        topks=(2, 4, 4, -2),
        drop_path_rate=0.1,
    ),
    label_smoothing=0.1,
    mixup=0.2,
    cutmix=1.0,
)
part = dict(type=Cifar, root=data_root, classes=classes, size=size)
train_dataloader = dict(
    dataset=dict(**part, split="train", augment=True), batch_size=128, num_workers=8, drop_last=True
)
val_dataloader = dict(dataset=dict(**part, split="val"), batch_size=256, num_workers=4)
test_dataloader = dict(dataset=dict(**part, split="test"), batch_size=256, num_workers=4)
val_evaluator = dict(type=Accuracy, topk=topk)
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = warmup_cosine(epochs, warmup, start_factor=0.01)
train_cfg = dict(max_epochs=epochs, val_interval=2)
default_hooks = dict(checkpoint=dict(best="accuracy", every_epochs=10, keep=2))
custom_hooks = [dict(type=EMAHook, momentum=0.001)]
