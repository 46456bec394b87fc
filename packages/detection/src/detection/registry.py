"""Detectors in mmengine's registry, under the scope ``detection``; importing this module registers them.

Recipes hold classes, which mmengine finds without a registry; names such as ``type="PlainDETR"`` are for configurations
in text.
"""

from mmengine.registry import MODELS as ROOT
from mmengine.registry import Registry

from .bevformer_dfa3d import BEVFormerDFA3D
from .bevformer_task import BEVDetectionTask
from .detection_task import DetectionTask
from .plain_detr import PlainDETR
from .swin_v2 import SwinV2

MODELS = Registry("model", parent=ROOT, scope="detection", locations=["detection.registry"])
MODELS.register_module(module=BEVDetectionTask)
MODELS.register_module(module=BEVFormerDFA3D)
MODELS.register_module(module=DetectionTask)
MODELS.register_module(module=PlainDETR)
MODELS.register_module(module=SwinV2)
