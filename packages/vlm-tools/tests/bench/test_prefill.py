"""No map of attention is allocated in the prefill of VAR, ACT and PAI."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vlm_tools import ACT, PAI, VAR, Method, intervene
from vlm_tools.bench.prefill import HEADS, long_prompt


class _Largest(TorchDispatchMode):
    """Largest number of elements of any result."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return out


def test_more_tokens_behind_the_image_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot have 2000 behind it"):
        long_prompt(1400, 2000)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [lambda: VAR(dims=(0, 1), tau=3.0), lambda: ACT(heads={2: [0, 1]}), lambda: PAI(gamma=1.0)],
    ids=["var", "act", "pai"],
)
def test_prefill_of_4096_tokens_allocates_no_map(method: Callable[[], Method]) -> None:
    tokens = 4096
    model, inputs = long_prompt(tokens)
    with torch.no_grad(), intervene(model, method()), _Largest() as seen:
        model(**inputs, use_cache=False, logits_to_keep=1)
    assert seen.elements < HEADS * tokens * tokens / 4
