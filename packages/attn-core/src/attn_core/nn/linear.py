"""``nn.Linear`` on :func:`attn_core.linear`."""

from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from attn_core.ops.linear import linear


class Linear(nn.Linear):
    """Same parameters, keys and result as ``nn.Linear``, followed by ``activation`` if given.

    Shapes: x (…, in_features) → (…, out_features).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: Literal["gelu"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **kwargs)
        self.activation: Literal["gelu"] | None = activation

    def forward(self, input: Float[Tensor, "*batch C_in"]) -> Float[Tensor, "*batch C_out"]:
        return linear(input, self.weight, self.bias, self.activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation}" if self.activation else "")
