"""InLine-Swin-T on ImageNet-1k or any ImageFolder, the published recipe; not run here; published: 82.4 %.

Data: ``<data_root>/train/<class>/*`` and ``<data_root>/val/<class>/*``; the val folder serves as test set, and nothing
is selected. Hardware of the authors: 8 GPUs, batch 1,024 in all
(``torchrun --nproc-per-node 8 -m vision_models train inline_imagenet --launcher pytorch``).
Other data: ``--set data_root=my/pictures --set classes=12``; other models: ``--set variant=inline_pvt_tiny``, with the
official settings that differ from Swin-T's: drop_path DeiT and PVT-T/S 0.1, PVT-M/L and Swin-S 0.3, CSwin-T 0.2,
CSwin-S 0.4, Swin-B and CSwin-B 0.5; clip: 1.0 for PVT-M/L, none for PVT-T/S and CSwin; warmup 5 for PVT; CSwin keeps
averaged weights (decay 0.99984, B 0.99992), and CSwin-B decays weights by 0.1.
Published top-1: DeiT-T/S/B 74.5/80.2/82.3, PVT-T/S/M/L 78.2/82.0/83.2/83.6,
Swin-T/S/B 82.4/83.6/84.1, CSwin-T/S/B 83.2/83.8/84.5 %.
Schedule: 300 epochs, AdamW 5e-4·batch/512, weight decay 0.05, 20 warm-up epochs, cosine to 1e-5, RandAugment m9, mixup
0.8, CutMix 1.0, random erasing 0.25, label smoothing 0.1, gradients clipped at 5. The authors evaluate on pictures
squeezed to 256×256 before the center is cut out; here the short side is resized to 256.
"""

# ruff: noqa: C408  recipes are written with dict(), so that a setting looks as on the command line

from torch.optim import AdamW

from attn_core.engine import Accuracy, ClassificationTask, CosineAnnealingLR, LinearLR
from vision_models.data import ImageFolder
from vision_models.models import create_model

data_root = "data/imagenet"
variant = "inline_swin_tiny"
classes = 1000
drop_path = 0.2
epochs = 300
warmup = 20
clip = 5.0
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
