"""DaViT-T on ImageNet-1k or any ImageFolder, the published recipe; not run here; published: 82.8 %.

Data: ``<data_root>/train/<class>/*`` and ``<data_root>/val/<class>/*``; the val folder serves as test set, and nothing
is selected. Hardware of the authors: 8 GPUs, batch 1,024 in all
(``torchrun --nproc-per-node 8 -m vision_models train davit_imagenet --launcher pytorch``).
Other data: ``--set data_root=my/pictures --set classes=12``; other sizes: ``--set variant=davit_small``, of which the
authors state no other settings. Published top-1: tiny 82.8, small 84.2, base 84.6 %.
Schedule, the defaults of their script: 300 epochs, AdamW 1e-3 at batch 1,024, weight decay 0.05, 5 warm-up epochs,
cosine to 1e-5, RandAugment m9, mixup 0.8, CutMix 1.0, random erasing 0.25, label smoothing 0.1, gradients clipped at 1.
"""

# ruff: noqa: C408  recipes are written with dict(), so that a setting looks as on the command line

from torch.optim import AdamW

from attn_core.engine import Accuracy, ClassificationTask, CosineAnnealingLR, LinearLR
from vision_models.data import ImageFolder
from vision_models.models import create_model

data_root = "data/imagenet"
variant = "davit_tiny"
classes = 1000
drop_path = 0.1
epochs = 300
warmup = 5
clip = 1.0
batch = 1024
rate = 1e-3
model = dict(
    type=ClassificationTask,
    net=dict(type=create_model, name=variant, num_classes=classes, drop_path_rate=drop_path),
    label_smoothing=0.1,
    mixup=0.8,
    cutmix=1.0,
)
train_dataloader = dict(
    dataset=dict(type=ImageFolder, root=data_root, split="train", num_classes=classes, augment=True),
    batch_size=batch,
    num_workers=12,
    drop_last=True,
)
test_dataloader = dict(
    dataset=dict(type=ImageFolder, root=data_root, split="test", num_classes=classes), batch_size=batch, num_workers=12
)
test_evaluator = dict(type=Accuracy, topk=(1, 5))
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=rate, weight_decay=0.05, eps=1e-8),
    clip_grad=dict(max_norm=clip),
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
