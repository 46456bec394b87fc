"""This package's part of mmengine's registries, under the scope ``medical_seg``."""

from mmengine.registry import MODELS as ROOT
from mmengine.registry import Registry

from .agunet import AGUNet
from .daunet import DAUNet
from .multi_scale_attention import MultiScaleAttention

MODELS = Registry("model", parent=ROOT, scope="medical_seg", locations=["medical_seg.registry"])
MODELS.register_module(module=AGUNet)
MODELS.register_module(module=DAUNet)
MODELS.register_module(module=MultiScaleAttention)
