"""Adding modules to networks of timm: ``modules`` builds them in and measures them, ``places`` finds where."""

from .modules import Inserted, insert, list_modules, with_module

__all__ = ["Inserted", "insert", "list_modules", "with_module"]
