"""Puts the shims and repairs that a parent process chose in place; then runs the sitecustomize that this one hides."""

import importlib.machinery
import importlib.util
import os
import sys

import attn_core_repairs  # pyright: ignore[reportMissingImports]
import attn_core_shims  # pyright: ignore[reportMissingImports]

attn_core_shims.install_from_environment()
attn_core_repairs.install_from_environment()

_here = os.path.dirname(os.path.abspath(__file__))
_others = [entry for entry in sys.path if os.path.abspath(entry) != _here]
_spec = importlib.machinery.PathFinder.find_spec("sitecustomize", _others)
if _spec is not None and _spec.loader is not None:
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["sitecustomize"] = _module
    _spec.loader.exec_module(_module)
