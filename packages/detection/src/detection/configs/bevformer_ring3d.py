"""BEVFormer with DFA3D on ring3d, synthetic scenes of six cameras; ``--set lifting=dfa2d`` is its 2-D twin.

Data: 160 samples of 40 scenes, validated on 40 samples of 10; 0.4 M parameters (0.3 M without depth). Time: 640 steps
in 214 to 239 core-seconds (164 to 178 for the twin). Measured, nuScenes-style mAP on the validation scenes, seeds 0, 1
and 2: 0.260, 0.292, 0.194 (twin 0.205, 0.225, 0.230). ``lifting=dfa3d_gt`` reads the true depth.
"""

# ruff: noqa: C408  recipes are written with dict(), so that a setting looks as on the command line

from torch.optim import AdamW

from attn_core.engine import warmup_cosine
from detection.data.ring3d import Ring3D, collate_scenes
from detection.metrics.bev_map import BEVAveragePrecision
from detection.models.bevformer.detector import BEVFormerDFA3D
from detection.tasks.bevformer import BEVDetectionTask

lifting = "dfa3d"
epochs = 8
warmup = 1
model = dict(
    type=BEVDetectionTask,
    net=dict(
        type=BEVFormerDFA3D,
        lifting=lifting,
        backbone="test_resnet",
        stride=8,
        dim=64,
        num_points=4,
        num_layers=2,
        depth_blocks=1,
        depth_context=None,
    ),
)
train_dataloader = dict(
    dataset=dict(type=Ring3D, split="train", mirror=True), batch_size=2, collate_fn=collate_scenes, shuffle=True
)
val_dataloader = dict(dataset=dict(type=Ring3D, split="val"), batch_size=4, collate_fn=collate_scenes)
test_dataloader = dict(dataset=dict(type=Ring3D, split="val"), batch_size=4, collate_fn=collate_scenes)
val_evaluator = dict(type=BEVAveragePrecision, classes=["car", "truck", "pedestrian"])
test_evaluator = dict(type=BEVAveragePrecision, classes=["car", "truck", "pedestrian"])
optim_wrapper = dict(
    optimizer=dict(type=AdamW, lr=1e-3, weight_decay=0.01, fused=True),
    clip_grad=dict(max_norm=35.0),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = warmup_cosine(epochs, warmup, start_factor=0.1, eta_min=1e-6)
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=epochs)
default_hooks = dict(checkpoint=dict(every_epochs=epochs, keep=1))
