"""Triton kernels in Triton's interpreter: ``TRITON_INTERPRET=1 pytest packages/attn-core/tests/interpreter``.

Triton reads the variable when it is imported, so these tests need a process of their own;
``test_interpreter_suite.py`` starts one from the ordinary run. float32 and float16 only: the interpreter multiplies
bit patterns of bfloat16.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from attn_core.testing import poisoned_memory

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*"]


def skip_repeated_patching() -> None:
    """Let kernels call functions without patching ``triton.language`` again at every call.

    Starting a kernel has patched it already. The repetition is correct but takes two thirds of the suite's time.
    """
    from triton.runtime.interpreter import InterpretedFunction

    original = InterpretedFunction.__call__
    patched: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module.startswith("attn_core") or module in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(module)
        return original(self, *args, **kwargs)

    InterpretedFunction.__call__ = call


if not collect_ignore_glob:
    skip_repeated_patching()


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan() -> Iterator[None]:
    torch.manual_seed(0)
    with poisoned_memory():
        yield
