"""SAT (DeiT-S) on ImageNet-1k, the published recipe; not run here; published: 73.13 % GT-known, 60.15 % top-1 Loc.

Data: ``--set data_root=…`` with train and val in folders of classes, ``--set annotations=…`` with the XML files of
val's boxes; ``--set pretrained=deit_small.pth``. 5 epochs of AdamW 1.5e-5 at batch 512, area 0.35.
"""

# ruff: noqa: C408  recipes are written with dict(), so that a setting looks as on the command line

from torch.optim import AdamW

from attn_core.engine import warmup_cosine
from vision_models.data.located import ImageNetBoxes
from vision_models.localization.metrics import Localization
from vision_models.localization.sat import started_from
from vision_models.localization.task import LocalizationTask

data_root = "data/imagenet"
annotations = "data/imagenet/boxes"
pretrained = None
epochs = 5
area = 0.35
rate = 1.5e-5
batch = 512
model = dict(
    type=LocalizationTask,
    net=dict(type=started_from, name="sat_small", weights=pretrained, num_classes=1000, drop_path_rate=0.1),
    area=area,
)
train_dataloader = dict(
    dataset=dict(type=ImageNetBoxes, root=data_root, split="train"), batch_size=batch, num_workers=8
)
test_dataloader = dict(
    dataset=dict(type=ImageNetBoxes, root=data_root, split="val", annotations=annotations),
    batch_size=batch,
    num_workers=8,
)
test_evaluator = dict(type=Localization)
optim_wrapper = dict(optimizer=dict(type=AdamW, lr=rate, weight_decay=0.05))
param_scheduler = warmup_cosine(epochs, 0, eta_min=1e-6)
train_cfg = dict(max_epochs=epochs)
