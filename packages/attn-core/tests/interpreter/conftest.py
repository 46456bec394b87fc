"""Triton kernels in Triton's interpreter: ``TRITON_INTERPRET=1 pytest packages/attn-core/tests/interpreter``.

Triton reads the variable when it is imported, so these tests need a process of their own;
``test_interpreter_suite.py`` starts one from the ordinary run. float32 and float16 only: the interpreter multiplies
bit patterns of bfloat16.
"""

import os
from collections.abc import Iterator

import pytest
import torch

from attn_core.testing import poisoned_memory
from attn_core.testing.interpreter import shorten

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*"]


if not collect_ignore_glob:
    shorten()


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan() -> Iterator[None]:
    torch.manual_seed(0)
    with poisoned_memory():
        yield
