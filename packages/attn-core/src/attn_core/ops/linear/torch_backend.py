"""``F.linear``, by way of oneDNN where that is the faster library: eager float32 on x86 CPUs.

Which one is a fixed rule of the processor and the shape, drawn from measurements on both kinds of processor (see
``docs/reference/benchmarks.md``): nothing is timed while a program runs, so a resumed run takes the same roads.
"""

import platform
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core import torch_internals

# "torch": F.linear, then GELU; "onednn": oneDNN's product, then GELU; "fused": both in one oneDNN call.
Road = Literal["torch", "onednn", "fused"]

_ON_X86 = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
_WIDE_VECTORS = "AVX512" in torch.backends.cpu.get_cpu_capability()
# Multiply-adds below which building oneDNN's primitive costs more than the product.
SMALL_PRODUCT = 2**25
# Without AVX-512 oneDNN wins where rows are many and their products short, and its fused GELU nowhere.
MANY_ROWS, SHORT_PRODUCT = 2048, 128


def choose(rows: int, width: int, out: int, activation: str | None, *, wide_vectors: bool = _WIDE_VECTORS) -> Road:
    """The faster road for a product (rows, width) × (width, out) on an x86 CPU with or without AVX-512."""
    if rows * width * out < SMALL_PRODUCT:
        return "torch"
    if wide_vectors:
        return "fused" if activation else "onednn"
    return "onednn" if rows >= MANY_ROWS and width <= SHORT_PRODUCT else "torch"


def road(x: Tensor, weight: Tensor, activation: str | None) -> Road:
    """The road of tensors like these."""
    if torch.compiler.is_compiling():
        return "torch"  # as below; asking for sizes would tie an exported graph to one side of the rule
    usable = _ON_X86 and torch_internals.linear_pointwise is not None and x.numel() > 0 and weight.numel() > 0
    if not usable or x.device.type != "cpu" or x.dtype != torch.float32:
        return "torch"
    out, width = weight.shape
    return choose(x.numel() // width, width, out, activation)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, taken: Road) -> Tensor:
    """Memory: the output, and the pre-activation if a gradient is needed."""
    if torch.compiler.is_compiling() or torch_internals.is_watched() or not _are_ordinary(x, weight):
        y = F.linear(x, weight, bias)
        return F.gelu(y) if activation == "gelu" else y
    derived = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if taken == "fused" and not derived:
        return _call(x, weight, bias, activation)
    if taken == "torch":
        y = F.linear(x, weight, bias)
    else:
        y = OneDNNLinear.apply(x, weight, bias) if derived else _call(x, weight, bias)
    if activation is None:
        return y
    # In place where nobody derives: a second array of the output's size costs up to a third of the time.
    return F.gelu(y) if derived else torch_internals.gelu_(y)


def _are_ordinary(x: Tensor, weight: Tensor) -> bool:
    return torch_internals.is_ordinary(x) and torch_internals.is_ordinary(weight)


def _call(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    assert torch_internals.linear_pointwise is not None
    # The unused algorithm must be "" without and "none" with an activation.
    kind, algorithm = ("none", "") if activation is None else (activation, "none")
    return torch_internals.linear_pointwise(x, weight, bias, kind, [], algorithm)


class OneDNNLinear(torch.autograd.Function):
    """x·Wᵀ + b whose product of dY and W takes the same road, and which is differentiable again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (…, C_in) → (…, C_out) by oneDNN, whatever the chosen road."""
        ctx.save_for_backward(x, weight)
        return _call(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias; each product by the library that is fastest at it."""
        (dy,) = grads
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = linear(dy, weight.t(), None, None, road(dy, weight.t(), None)) if needs_x else None
        # dW = dYᵀX sums over the tokens, where MKL is the faster one (126 against 191 ms over BiFormer-T's layers).
        dweight = rows.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None
        return dx, dweight, rows.sum(0) if needs_bias else None
