"""What the recipes on ImageNet-1k share: 300 epochs of AdamW with RandAugment m9, mixup 0.8, CutMix 1.0, erasing 0.25.

A recipe says ``variant``, ``drop_path``, ``warmup``, ``clip`` and ``ema`` (None for none), ``side`` and ``crop_pct``,
then reads this. The test part (or else ``val``) is tested once; nothing is selected.
"""

# ruff: noqa: C408  dict(), as on the command line; names that the recipe gives
# pyright: reportUndefinedVariable=false, reportUnboundVariable=false

from torch.optim import AdamW

from attn_core.engine import Accuracy, ClassificationTask, EMAHook, warmup_cosine
from vision_models.data import ImageFolder
from vision_models.models import create_model

data_root = "data/imagenet"
classes = 1000
epochs = 300
batch = 1024
rate = 1e-3  # 5e-4 · batch / 512
model = dict(
    type=ClassificationTask,
    net=dict(type=create_model, name=variant, num_classes=classes, drop_path_rate=drop_path),
    label_smoothing=0.1,
    mixup=0.8,
    cutmix=1.0,
)
pictures = dict(type=ImageFolder, root=data_root, num_classes=classes, size=side)
train_dataloader = dict(
    dataset=dict(**pictures, split="train", augment=True), batch_size=batch, num_workers=12, drop_last=True
)
test_dataloader = dict(dataset=dict(**pictures, split="test", crop_pct=crop_pct), batch_size=batch, num_workers=12)
test_evaluator = dict(type=Accuracy, topk=(1, 5))
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=rate, weight_decay=0.05, eps=1e-8),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
if clip is not None:
    optim_wrapper["clip_grad"] = dict(max_norm=clip)
param_scheduler = warmup_cosine(epochs, warmup)
train_cfg = dict(max_epochs=epochs)
default_hooks = dict(checkpoint=dict(every_epochs=5, keep=2))
custom_hooks = [dict(type=EMAHook, momentum=ema)] if ema is not None else []
