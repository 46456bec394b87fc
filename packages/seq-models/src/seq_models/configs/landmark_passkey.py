"""Landmark attention on a pass key hidden in bytes, tested at 960 bytes with two blocks retrieved.

Data: generated. For 600 steps each head reads the two blocks that its landmarks prefer, where they are, in 120 bytes
that state the key several times; 300 steps retrieve two blocks of 240 bytes, as in use. Metric: ``solved``, the share
of keys that are right in all digits. Test ``solved`` 1.0 with seed 0, in six minutes on one core.
"""

# ruff: noqa: C408  recipes are written with dict(), so that a setting looks as on the command line

from torch.optim import AdamW

from attn_core.engine import CosineAnnealingLR, LinearLR
from seq_models.data import Passkey
from seq_models.language.metrics import TokenScore
from seq_models.language.task import LanguageTask, RetrievalHook
from seq_models.models import create_model

steps = 900
warmup = 100
longer = 600
model = dict(type=LanguageTask, net=dict(type=create_model, name="landmark_passkey"))
train_dataloader = dict(dataset=dict(type=Passkey, split="train", length=120, reminders=8, size=100000), batch_size=16)
val_dataloader = dict(dataset=dict(type=Passkey, split="val", length=240, size=64), batch_size=32)
test_dataloader = dict(dataset=dict(type=Passkey, split="test", length=960, size=200), batch_size=20)
val_evaluator = dict(type=TokenScore)
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    clip_grad=dict(max_norm=1.0),
    # the embedding, which is also the head
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys={"embed_tokens": dict(lr_mult=2.0)}),
)
param_scheduler = [
    dict(type=LinearLR, start_factor=0.05, by_epoch=False, begin=0, end=warmup),
    dict(type=CosineAnnealingLR, by_epoch=False, begin=longer, end=steps, T_max=steps - longer, eta_min=1e-5),
]
train_cfg = dict(by_epoch=False, max_iters=steps, val_interval=125)
custom_hooks = [dict(type=RetrievalHook, begin=longer, length=240)]
