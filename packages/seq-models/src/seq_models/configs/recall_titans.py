"""Titans' memory alone on associative recall: 8 keys with their values among 64 tokens, width 64, two layers.

The memory is a matrix for each head; gradients are taken at the weights before every eighth token. The peer is plain
linear attention with the same convolutions, norms and steps: ``--set chunk_size=128 --set momentum=False --set
forgetting=False`` takes every gradient at the first weights W, so that a token adds θ·(value − W·key)·keyᵀ whatever the
memory holds. Data: generated. Metric: ``accuracy`` of the values.
Test ``accuracy`` 0.995 with seed 0, in two minutes on one core; the peer's is 0.264.
"""

# ruff: noqa: C408  recipes are written with dict(), so that a setting looks as on the command line

from torch.optim import AdamW

from attn_core.engine import warmup_cosine
from seq_models.data import AssociativeRecall
from seq_models.language.metrics import TokenScore
from seq_models.language.task import LanguageTask
from seq_models.models import create_model

steps = 500
warmup = 100
length = 64
pairs = 8
vocab_size = 64
lr = 3e-3
chunk_size = 8
momentum = True
forgetting = True
model = dict(
    type=LanguageTask,
    net=dict(
        type=create_model,
        name="test_titans_lmm",
        vocab_size=vocab_size,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        memory_depth=1,
        chunk_size=chunk_size,
        theta_max=1.0,
        momentum=momentum,
        forgetting=forgetting,
        mlp_size=128,
    ),
)
train_dataloader = dict(
    dataset=dict(type=AssociativeRecall, length=length, pairs=pairs, vocab_size=vocab_size, size=100000),
    batch_size=64,
)
val_dataloader = dict(
    dataset=dict(type=AssociativeRecall, split="val", length=length, pairs=pairs, vocab_size=vocab_size, size=256),
    batch_size=256,
)
test_dataloader = dict(
    dataset=dict(type=AssociativeRecall, split="test", length=length, pairs=pairs, vocab_size=vocab_size, size=2048),
    batch_size=256,
)
val_evaluator = dict(type=TokenScore)
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    clip_grad=dict(max_norm=1.0),
    # the embedding, which is also the head
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys={"embed_tokens": dict(lr_mult=2.0)}),
)
param_scheduler = warmup_cosine(steps, warmup, start_factor=0.05, eta_min=1e-5, in_steps=True)
train_cfg = dict(by_epoch=False, max_iters=steps, val_interval=100)
