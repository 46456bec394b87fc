"""Base of the recipes of text: bytes of the interpreter's library or of your own files; the recipe adds the network.

With a tokenizer (``--tokenizer``) your own text is read as its tokens, and the metric is ``bits_per_byte`` as well.
"""

# ruff: noqa: C408  recipes are written with dict(), so that a setting looks as on the command line

from torch.optim import AdamW

from attn_core.engine import warmup_cosine
from seq_models.data import ByteText, TokenText
from seq_models.language.metrics import ByteScore, TextScore
from seq_models.language.task import KeepTokenizer, LanguageTask

steps = 600
warmup = 60
length = 256
texts = None  # files of your own: --text FILE
tokenizer = None  # of Hugging Face, a file or a folder: --tokenizer FILE
vocab_size = 256  # --tokenizer counts its tokens
model = dict(type=LanguageTask)
vocabulary = dict(vocab_size=vocab_size)
_source = dict(type=ByteText, length=length, text=texts)
val_evaluator = dict(type=ByteScore, text=texts)
if tokenizer is not None:
    _source = dict(type=TokenText, length=length, text=texts, tokenizer=tokenizer)
    val_evaluator = dict(type=TextScore)
    custom_hooks = [dict(type=KeepTokenizer, tokenizer=tokenizer)]
train_dataloader = dict(dataset=dict(**_source, split="train"), batch_size=8)
val_dataloader = dict(dataset=dict(**_source, split="val", limit=64), batch_size=32)
test_dataloader = dict(dataset=dict(**_source, split="test", limit=512), batch_size=32)
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
    clip_grad=dict(max_norm=1.0),
    # the embedding, which is also the head
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys={"embed_tokens": dict(lr_mult=2.0)}),
)
param_scheduler = warmup_cosine(steps, warmup, start_factor=0.05, eta_min=2e-5, in_steps=True)
train_cfg = dict(by_epoch=False, max_iters=steps, val_interval=200)
