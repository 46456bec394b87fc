"""MoH-LLaMA (1.9 M parameters, 4 of 8 heads always and 2 of the others) as a model of bytes.

Data: the interpreter's own library, split by file; it depends on the version of Python. Metric: bits per byte
(``bits_per_token``), beside what counts of three bytes in the training text give (``counted_bits``).
"""

# ruff: noqa: F403, F405  recipes are written with dict(), and read their bases with *

from attn_core.engine import read_base
from seq_models.models import create_model

with read_base():
    from ._short_text import *

model["net"] = dict(type=create_model, name="moh_bytes", **vocabulary)  # pyright: ignore[reportUnboundVariable]
