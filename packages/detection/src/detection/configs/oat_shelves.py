"""OAT (0.6 M parameters) on shelves of 3 × 9 digits that a program searches.

Data: 800 shelves, validated on 150, tested on 200 with other digits. Next-object accuracies of the baselines and of the
program itself (``possible``) stand beside the network's. Measured on test (seed 0, 213 core-seconds): 38.5 %, above the
most similar object (14.7 %) and chance (10.6 %), below the nearest one (41.5 %); possible are 59.7 %. The five shares
of behavior differ from the program's by 48 % on average.
"""

# ruff: noqa: C408  recipes are written with dict(), so that a setting looks as on the command line

from torch.optim import AdamW

from attn_core.engine import warmup_cosine
from detection.scanpaths.oat import OAT
from detection.scanpaths.shelves import DigitShelves, collate_shelves
from detection.scanpaths.task import ScanpathScores, ScanpathTask

epochs = 24
warmup = 2
batch = 20
model = dict(
    type=ScanpathTask,
    net=dict(
        type=OAT,
        rows=3,
        columns=9,
        crop_size=(32, 24),
        pyramid=2,
        dim=128,
        ffn_dim=128,
        encoder_layers=2,
        decoder_layers=2,
    ),
    samples=5,
)
train_dataloader = dict(
    dataset=dict(type=DigitShelves, split="train"),
    batch_size=batch,
    shuffle=True,
    drop_last=True,
    collate_fn=collate_shelves,
)
val_dataloader = dict(dataset=dict(type=DigitShelves, split="val"), batch_size=50, collate_fn=collate_shelves)
test_dataloader = dict(dataset=dict(type=DigitShelves, split="test"), batch_size=50, collate_fn=collate_shelves)
val_evaluator = dict(type=ScanpathScores)
test_evaluator = dict(type=ScanpathScores)
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=1e-3, weight_decay=0.01),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = warmup_cosine(epochs, warmup, start_factor=0.1, eta_min=1e-5)
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=8)
default_hooks = dict(checkpoint=dict(best="next_accuracy", every_epochs=8, keep=2))
