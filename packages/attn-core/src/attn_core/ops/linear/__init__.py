"""Affine map with a fused activation, on the faster of torch's CPU matrix libraries."""

from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from attn_core.checks import DATA_DTYPES, check_choice, check_dtype, check_rank, check_same, check_size, remembered
from attn_core.dispatch import Backend, select, under_autocast

from . import reference, torch_backend

OPERATOR = "linear"


def linear(
    x: Float[Tensor, "*batch C_in"],
    weight: Float[Tensor, "C_out C_in"],
    bias: Float[Tensor, "C_out"] | None = None,
    activation: Literal["gelu"] | None = None,
    *,
    backend: Backend | None = None,
) -> Float[Tensor, "*batch C_out"]:
    """x·weightᵀ + bias, then exact (erf) GELU if asked; equal to ``torch.nn.functional.linear`` and ``gelu``.

    On x86 CPUs in float32 a fixed rule of processor and shape chooses between torch's library and oneDNN, which fuses
    the activation when no gradient is needed (see ``docs/reference/benchmarks.md``). Everywhere else, and under
    torch.compile, it is ``F.linear``: there is no Triton kernel, because the GPU libraries are at their floor.

    Raises:
        ValueError: shapes, dtypes or devices do not fit. RuntimeError: ``backend="triton"``.
    """
    x, weight, bias = under_autocast(x, weight, bias)
    taken = _road(x, weight, bias, activation)
    if select(OPERATOR, backend, x, triton_obstacle) == "reference":
        return reference.linear(x, weight, bias, activation)
    return torch_backend.linear(x, weight, bias, activation, taken)


@remembered
def _road(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> torch_backend.Road:
    """Check the arguments, and choose the library."""
    check_dtype(OPERATOR, "x", x, DATA_DTYPES)
    check_rank(OPERATOR, "weight", weight, "C_out C_in")
    check_same(OPERATOR, x, {"weight": weight, "bias": bias}, first_name="x")
    if x.ndim == 0:
        check_rank(OPERATOR, "x", x, "N C_in")
    check_size(OPERATOR, "x", x, -1, weight.shape[1], "the input width of weight")
    if bias is not None:
        check_rank(OPERATOR, "bias", bias, "C_out")
        check_size(OPERATOR, "bias", bias, 0, weight.shape[0], "the output width of weight")
    check_choice(OPERATOR, "activation", activation, (None, "gelu"))
    return torch_backend.road(x, weight, activation)


def triton_obstacle(**_: Any) -> str | None:
    """Why no Triton kernel takes any call."""
    return "linear has no Triton kernel, torch's own GPU libraries are faster"
