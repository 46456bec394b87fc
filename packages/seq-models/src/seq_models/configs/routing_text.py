"""Routing Transformer (1.9 M parameters) as a model of bytes.

Data: the interpreter's own library, split by file; it depends on the version of Python. Metric: bits per byte
(``bits_per_token``), beside what counts of three bytes in the training text give (``counted_bits``). Test 2.13 and 2.65
with seed 0, in six minutes on one core.
"""

# ruff: noqa: C408  recipes are written with dict(), so that a setting looks as on the command line

from torch.optim import AdamW

from attn_core.engine import CosineAnnealingLR, LinearLR
from seq_models.data import ByteText
from seq_models.language.metrics import ByteScore
from seq_models.language.task import LanguageTask
from seq_models.models import create_model

steps = 600
warmup = 60
length = 256
texts = None  # files of your own: --text FILE
model = dict(type=LanguageTask, net=dict(type=create_model, name="routing_bytes"))
train_dataloader = dict(dataset=dict(type=ByteText, split="train", length=length, text=texts), batch_size=8)
val_dataloader = dict(dataset=dict(type=ByteText, split="val", length=length, text=texts, limit=64), batch_size=32)
test_dataloader = dict(dataset=dict(type=ByteText, split="test", length=length, text=texts, limit=512), batch_size=32)
val_evaluator = dict(type=ByteScore, text=texts)
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = [
    dict(type=LinearLR, start_factor=0.05, by_epoch=False, begin=0, end=warmup),
    dict(type=CosineAnnealingLR, by_epoch=False, begin=warmup, end=steps, T_max=steps - warmup, eta_min=2e-5),
]
train_cfg = dict(by_epoch=False, max_iters=steps, val_interval=200)
