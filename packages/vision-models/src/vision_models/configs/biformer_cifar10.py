"""BiFormer (2.5 M parameters) on CIFAR-10 from its official archive; not run here, no published figure.

Data: unpack cifar-10-python.tar.gz (or put it as it is) under ``data``; 45,000 train, 5,000 val, 10,000 test images.
Hardware: one GPU, batch 128; on a CPU a day. Schedule: 200 epochs of AdamW, as Swin-like models are trained on it.
"""

# ruff: noqa: C408  recipes are written with dict(), so that a setting looks as on the command line

from torch.optim import AdamW

from attn_core.engine import Accuracy, ClassificationTask, CosineAnnealingLR, EMAHook, LinearLR
from vision_models.data import Cifar
from vision_models.models.biformer import BiFormer

data_root = "data"
classes = 10
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
train_dataloader = dict(
    dataset=dict(type=Cifar, root=data_root, split="train", classes=classes, size=size, augment=True),
    batch_size=128,
    num_workers=8,
    drop_last=True,
)
val_dataloader = dict(
    dataset=dict(type=Cifar, root=data_root, split="val", classes=classes, size=size), batch_size=256, num_workers=4
)
test_dataloader = dict(
    dataset=dict(type=Cifar, root=data_root, split="test", classes=classes, size=size), batch_size=256, num_workers=4
)
val_evaluator = dict(type=Accuracy)
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = [
    dict(type=LinearLR, start_factor=0.01, by_epoch=True, begin=0, end=warmup, convert_to_iter_based=True),
    dict(
        type=CosineAnnealingLR,
        by_epoch=True,
        begin=warmup,
        end=epochs,
        T_max=epochs - warmup,
        eta_min=1e-5,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=2)
default_hooks = dict(checkpoint=dict(best="accuracy", every_epochs=10, keep=2))
custom_hooks = [dict(type=EMAHook, momentum=0.001)]
