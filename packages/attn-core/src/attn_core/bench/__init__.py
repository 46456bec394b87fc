"""Benchmarks of every operator beside its peers: ``python -m attn_core.bench --op attention``.

:func:`in_turns` is the one loop that times anything in the packages.
"""

from .timing import Measured, in_turns

__all__ = ["Measured", "in_turns"]
