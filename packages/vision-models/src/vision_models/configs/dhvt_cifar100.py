"""DHVT-Small on CIFAR-100 from scratch, patches of 2, the published recipe; not run here; published: 85.68 %.

Data: unpack cifar-100-python.tar.gz (or put it as it is) under ``data``; 45,000 train, 5,000 val, 10,000 test images,
where the authors train on all 50,000. Hardware of the authors: 2 GPUs, batch 512 in all
(``torchrun --nproc-per-node 2 -m vision_models train dhvt_cifar100 --launcher pytorch``).
Other sizes: ``--set variant=dhvt_tiny_cifar_p4``.
Schedule: 300 epochs, AdamW 1e-3, weight decay 0.05, 5 warm-up epochs, cosine to 1e-5 and 10 epochs at that rate,
RandAugment m9, mixup 0.8, CutMix 1.0, random erasing 0.25, label smoothing 0.1, stochastic depth 0.1; nothing is
selected.
"""

# ruff: noqa: C408  recipes are written with dict(), so that a setting looks as on the command line

from torch.optim import AdamW

from attn_core.engine import Accuracy, ClassificationTask, warmup_cosine
from vision_models.data import Cifar
from vision_models.models import create_model

variant = "dhvt_small_cifar_p2"
data_root = "data"
classes = 100
epochs = 300
cooldown = 10
warmup = 5
batch = 512
rate = 1e-3
model = dict(
    type=ClassificationTask,
    net=dict(type=create_model, name=variant, num_classes=classes, drop_path_rate=0.1),
    label_smoothing=0.1,
    mixup=0.8,
    cutmix=1.0,
)
part = dict(type=Cifar, root=data_root, classes=classes)
train_dataloader = dict(
    dataset=dict(**part, split="train", augment=True), batch_size=batch, num_workers=8, drop_last=True
)
val_dataloader = dict(dataset=dict(**part, split="val"), batch_size=batch, num_workers=4)
test_dataloader = dict(dataset=dict(**part, split="test"), batch_size=batch, num_workers=4)
val_evaluator = dict(type=Accuracy, topk=(1, 5))
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=rate, weight_decay=0.05, eps=1e-8),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = warmup_cosine(epochs, warmup, eta_min=1e-5)
train_cfg = dict(max_epochs=epochs + cooldown, val_interval=10)
default_hooks = dict(checkpoint=dict(every_epochs=10, keep=2))
