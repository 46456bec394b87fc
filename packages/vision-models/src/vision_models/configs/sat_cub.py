"""SAT (DeiT-S) on CUB-200-2011, the published recipe; not run here; published: 98.45 % GT-known, 80.96 % top-1 Loc.

Data: ``--set data_root=CUB_200_2011``, as its archive unpacks; ``--set pretrained=deit_small.pth`` starts from DeiT's
weights, as published. 30 epochs of AdamW 1e-4 at batch 256, cosine to 1e-6, weight decay 0.05, drop path 0.1, area .25.
"""

# ruff: noqa: C408  recipes are written with dict(), so that a setting looks as on the command line

from torch.optim import AdamW

from attn_core.engine import warmup_cosine
from vision_models.data.located import CUB
from vision_models.localization.metrics import Localization
from vision_models.localization.sat import started_from
from vision_models.localization.task import LocalizationTask

data_root = "data/CUB_200_2011"
pretrained = None
epochs = 30
area = 0.25
rate = 1e-4
batch = 256
model = dict(
    type=LocalizationTask,
    net=dict(type=started_from, name="sat_small", weights=pretrained, num_classes=200, drop_path_rate=0.1),
    area=area,
)
train_dataloader = dict(dataset=dict(type=CUB, root=data_root, split="train"), batch_size=batch, num_workers=8)
test_dataloader = dict(dataset=dict(type=CUB, root=data_root, split="test"), batch_size=batch, num_workers=8)
test_evaluator = dict(type=Localization)
optim_wrapper = dict(optimizer=dict(type=AdamW, lr=rate, weight_decay=0.05))
param_scheduler = warmup_cosine(epochs, 0, eta_min=1e-6)
train_cfg = dict(max_epochs=epochs)
