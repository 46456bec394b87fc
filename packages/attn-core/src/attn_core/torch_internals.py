# pyright: reportAttributeAccessIssue=false
"""Every private name of torch that the core asks, in one place; ``tests/test_torch_internals.py`` tries each.

When torch renames one of them, this file and its test are what changes.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

# Tensors that hold their own numbers: a subclass may want to see what is done to it.
ORDINARY = (Tensor, nn.Parameter)

_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_mode: Any = torch._C._get_dispatch_mode
_fake_key: Any = torch._C._TorchDispatchModeKey.FAKE
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing_state = torch._C._get_tracing_state
_any_autocast = torch._C._is_any_autocast_enabled
_forward_ad: Any = torch.autograd.forward_ad

# Private operator of torch (Inductor calls it); absent or changed, F.linear serves.
_pointwise: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
linear_pointwise = None if _pointwise is None else _pointwise.default

# The same operators by way of torch's own bindings where there are some: half the time of the way through torch.ops.
_aten = torch.ops.aten
flash_cpu: Any = getattr(
    torch, "_scaled_dot_product_flash_attention_for_cpu", _aten._scaled_dot_product_flash_attention_for_cpu.default
)
gelu_: Any = getattr(torch._C._nn, "gelu_", _aten.gelu_)


def is_watched() -> bool:
    """Whether something wants to see each operator of this call: a transform, forward mode, a mode, a tracer."""
    return (
        _transforms_active()
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _tracing_state() is not None
        or _forward_ad._current_level >= 0
    )


def is_transformed() -> bool:
    """Whether tensors may be something else than their numbers: functorch's wrappers, or fake ones."""
    return _transforms_active() or _dispatch_mode(_fake_key) is not None


def is_ordinary(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a plain tensor with numbers in it: no subclass, not on the meta device."""
    return type(tensor) in ORDINARY and not tensor.is_meta


def is_autocast_on() -> bool:
    """Whether autocast is enabled for any kind of device."""
    return _any_autocast()


def without_autocast() -> AbstractContextManager[Any]:
    """Context in which operators run in the dtypes they are given."""
    return torch._C._DisableAutocast()
