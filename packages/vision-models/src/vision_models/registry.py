"""Our backbones in mmengine's registry, under the scope ``vision_models``; importing this module registers them."""

from mmengine.registry import MODELS as ROOT
from mmengine.registry import Registry

from .biformer import BiFormer, BiFormerDense
from .davit import DaViT
from .focalnet import FocalNet

MODELS = Registry("model", parent=ROOT, scope="vision_models", locations=["vision_models.registry"])
MODELS.register_module(module=BiFormer)
MODELS.register_module(module=BiFormerDense)
MODELS.register_module(module=DaViT)
MODELS.register_module(module=FocalNet)
