"""Scatterbrain (1.8 M parameters, 32 latest bytes exactly and 32 random features) as a model of bytes.

Data: the interpreter's own library, split by file; it depends on the version of Python. Metric: bits per byte
(``bits_per_token``), beside what counts of three bytes in the training text give (``counted_bits``).
"""

# ruff: noqa: F403, F405  recipes are written with dict(), and read their bases with *

from attn_core.engine import read_base
from seq_models.models import create_model

with read_base():
    from ._short_text import *

model["net"] = dict(type=create_model, name="scatterbrain_bytes", **vocabulary)  # pyright: ignore[reportUnboundVariable]
