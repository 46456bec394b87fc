"""What the pointer recipes share: each gives the names that are read here, then reads this."""

# ruff: noqa: C408  dict(), as on the command line; names that the recipe gives
# pyright: reportUndefinedVariable=false, reportUnboundVariable=false

from torch.optim import Adam

from seq_models.data import PointBatches, only_item
from seq_models.models.pointer_network import PointerNetwork
from seq_models.pointing.task import PointingTask

model = dict(type=PointingTask, net=dict(type=PointerNetwork, hidden=hidden))
_points = dict(type=PointBatches, task=_task, n=n)
_single = dict(batch_size=1, collate_fn=dict(type=only_item))  # an item of the data is a whole batch
train_dataloader = dict(dataset=dict(**_points, length=1000, batch=128), **_single)
val_dataloader = dict(dataset=dict(**_points, split="val", length=2, batch=500), **_single)
test_dataloader = dict(dataset=dict(**_points, split="test", length=20, batch=500), **_single)
val_evaluator = dict(type=_score)
optim_wrapper = dict(optimizer=dict(type=Adam, lr=lr, fused=True), clip_grad=dict(max_norm=2.0))
default_hooks = dict(checkpoint=dict(keep=1))
