"""One registry scope per task package, beside mmengine's other children and never in its root."""

import importlib
import importlib.util

from mmengine import registry as roots
from mmengine.registry import Registry


def open_scope(module: str) -> None:
    """Give a package's scope a child of each of mmengine's registries.

    Args:
        module: Import name of the package, which is the name of its scope. Registries that it makes itself, in
            ``<module>.registry`` where mmengine looks for them, stay.
    """
    importlib.import_module(module)
    if importlib.util.find_spec(f"{module}.registry") is not None:
        importlib.import_module(f"{module}.registry")
    for value in list(vars(roots).values()):
        if isinstance(value, Registry) and value.parent is None and module not in value.children:
            Registry(value.name, parent=value, scope=module, locations=[module])
