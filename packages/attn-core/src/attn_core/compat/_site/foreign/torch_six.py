"""torch._six, which torch removed in 2.0."""

import collections.abc as container_abcs
from math import inf, nan

string_classes = (str, bytes)
int_classes = int
PY3 = PY37 = True
FileNotFoundError = FileNotFoundError

__attn_core_compat__ = True

__all__ = ["PY3", "PY37", "FileNotFoundError", "container_abcs", "inf", "int_classes", "nan", "string_classes"]
