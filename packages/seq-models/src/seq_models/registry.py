"""``create_model`` in mmengine's registry, under the scope ``seq_models``; importing this module registers it."""

from mmengine.registry import MODELS as ROOT
from mmengine.registry import Registry

from .models import create_model

MODELS = Registry("model", parent=ROOT, scope="seq_models", locations=["seq_models.registry"])
MODELS.register_module(name="create_model", module=create_model)  # pyright: ignore[reportArgumentType]
