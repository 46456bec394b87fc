"""What a test of an operator needs: the tolerance table, the comparison, and seeded cases of every operator.

Public, so that packages built on attn-core judge their own operators by the same table.
"""

from .cases import cases_of, every_case
from .definitions import DEFINITIONS
from .harness import (
    TOLERANCE,
    Case,
    assert_matches_reference,
    errors,
    gradients,
    leaves,
    peak_memory,
    poisoned_memory,
    relative_error,
    restrided,
    run,
    tensor,
)
from .products import product_cases

__all__ = [
    "DEFINITIONS",
    "TOLERANCE",
    "Case",
    "assert_matches_reference",
    "cases_of",
    "errors",
    "every_case",
    "gradients",
    "leaves",
    "peak_memory",
    "poisoned_memory",
    "product_cases",
    "relative_error",
    "restrided",
    "run",
    "tensor",
]
