"""HaloNet-26t on ImageNet-1k or any ImageFolder, in the manner of the package's other recipes; not run here.

Data: ``<data_root>/train/<class>/*`` and ``<data_root>/val/<class>/*``; the val folder serves as test set, and nothing
is selected: the last averaged weights are kept. timm's weights, trained otherwise, reach 79.1 %; the paper's networks
(``--set variant=halonet_h4 --set side=384``) were trained for 350 epochs with batches of 4,096 and SGD, 77.9 to 84.9 %.
Schedule: 300 epochs, AdamW 5e-4·batch/512, weight decay 0.05, 5 warm-up epochs, cosine to 1e-5, RandAugment m9, mixup
0.8, CutMix 1.0, random erasing 0.25, label smoothing 0.1, EMA 0.99996.
"""

# ruff: noqa: C408  recipes are written with dict(), so that a setting looks as on the command line

from torch.optim import AdamW

from attn_core.engine import Accuracy, ClassificationTask, CosineAnnealingLR, EMAHook, LinearLR
from vision_models.data import ImageFolder
from vision_models.models import create_model

data_root = "data/imagenet"
variant = "halonet26t"
classes = 1000
side = 256
drop_path = 0.1
epochs = 300
warmup = 5
batch = 1024
rate = 1e-3  # 5e-4 · batch / 512
model = dict(
    type=ClassificationTask,
    net=dict(type=create_model, name=variant, num_classes=classes, drop_path_rate=drop_path),
    label_smoothing=0.1,
    mixup=0.8,
    cutmix=1.0,
)
train_dataloader = dict(
    dataset=dict(type=ImageFolder, root=data_root, split="train", num_classes=classes, size=side, augment=True),
    batch_size=batch,
    num_workers=12,
    drop_last=True,
)
test_dataloader = dict(
    dataset=dict(type=ImageFolder, root=data_root, split="test", num_classes=classes, size=side, crop_pct=0.95),
    batch_size=batch,
    num_workers=12,
)
test_evaluator = dict(type=Accuracy, topk=(1, 5))
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=rate, weight_decay=0.05, eps=1e-8),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-3, by_epoch=True, begin=0, end=warmup, convert_to_iter_based=True),
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
train_cfg = dict(by_epoch=True, max_epochs=epochs)
default_hooks = dict(checkpoint=dict(every_epochs=5, keep=2))
custom_hooks = [dict(type=EMAHook, momentum=4e-5)]
