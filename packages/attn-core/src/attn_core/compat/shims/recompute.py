"""Raw backward entries: called where autograd has switched itself off, they give gradients and touch no ``.grad``."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attn_core.kernels.registration import OPERATORS


def gradients(
    function: Callable[..., Any], tensors: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of ``function(*tensors)`` for those of its outputs, by running it again; None for absent tensors."""
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
        outputs = function(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    wanted = [leaf for leaf in leaves if leaf is not None]
    outs, incoming = [out for out, _ in pairs], [grad.to(out.dtype) for out, grad in pairs]
    found = list(torch.autograd.grad(outs, wanted, incoming, allow_unused=True))
    return [None if leaf is None else _or_zero(found.pop(0), leaf) for leaf in leaves]


def _or_zero(grad: Tensor | None, leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if grad is None else grad


def operator_gradients(
    name: str, backend: str, grad: Tensor, kept: tuple[Tensor, ...], arguments: Any, needs: Sequence[bool]
) -> list[Tensor]:
    """A registered operator's own backward, without its forward; gradients of the arguments that ``needs`` names."""
    with warnings.catch_warnings():
        # torch's engine keeps it from users, who could do nothing about it; nobody does so for a direct call.
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return OPERATORS[f"{name}_{backend}"].run_backward((grad,), kept, arguments, needs)


def fill(targets: Sequence[Tensor | None], values: Sequence[Tensor | None]) -> None:
    """Write gradients into the tensors that a caller made for them."""
    for target, value in zip(targets, values, strict=True):
        if target is not None and value is not None:
            target.copy_(value.view(target.shape) if value.shape != target.shape else value)
