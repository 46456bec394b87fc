"""Base of the recipes of text: bytes of the interpreter's library or of your own files; the recipe adds the network."""

# ruff: noqa: C408  recipes are written with dict(), so that a setting looks as on the command line

from torch.optim import AdamW

from attn_core.engine import warmup_cosine
from seq_models.data import ByteText
from seq_models.language.metrics import ByteScore
from seq_models.language.task import LanguageTask

steps = 600
warmup = 60
length = 256
texts = None  # files of your own: --text FILE
model = dict(type=LanguageTask)
train_dataloader = dict(dataset=dict(type=ByteText, split="train", length=length, text=texts), batch_size=8)
val_dataloader = dict(dataset=dict(type=ByteText, split="val", length=length, text=texts, limit=64), batch_size=32)
test_dataloader = dict(dataset=dict(type=ByteText, split="test", length=length, text=texts, limit=512), batch_size=32)
val_evaluator = dict(type=ByteScore, text=texts)
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
    clip_grad=dict(max_norm=1.0),
    # the embedding, which is also the head
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys={"embed_tokens": dict(lr_mult=2.0)}),
)
param_scheduler = warmup_cosine(steps, warmup, start_factor=0.05, eta_min=2e-5, in_steps=True)
train_cfg = dict(by_epoch=False, max_iters=steps, val_interval=200)
