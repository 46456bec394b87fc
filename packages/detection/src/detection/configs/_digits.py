"""What the recipes on digits_coco share; a recipe says ``epochs``, then reads this and adds model and training data."""

# ruff: noqa: C408  dict(), as on the command line; names that the recipe gives
# pyright: reportUndefinedVariable=false, reportUnboundVariable=false

from attn_core.engine import warmup_cosine
from detection.data import DigitsCoco, collate_detection
from detection.metrics.coco_map import CocoMap

warmup = 1
val_dataloader = dict(dataset=dict(type=DigitsCoco, split="val"), batch_size=25, collate_fn=collate_detection)
test_dataloader = dict(dataset=dict(type=DigitsCoco, split="test"), batch_size=25, collate_fn=collate_detection)
val_evaluator = dict(type=CocoMap)
test_evaluator = dict(type=CocoMap, per_class=True)
param_scheduler = warmup_cosine(epochs, warmup, start_factor=0.05)
