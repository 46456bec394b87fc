"""``nn.Linear`` on :func:`attn_core.linear`."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from attn_core.ops.linear import linear


class Linear(nn.Linear):
    """Same parameters, keys and result as ``nn.Linear``.

    Shapes: x (…, in_features) → (…, out_features), followed by ``activation`` if the call gives one.
    """

    def forward(
        self, input: Float[Tensor, "*batch C_in"], activation: Literal["gelu"] | None = None
    ) -> Float[Tensor, "*batch C_out"]:
        """activation(x·Wᵀ + b), fused where the machine gains by it."""
        return linear(input, self.weight, self.bias, activation)


def through_gelu(layer: nn.Module, x: Float[Tensor, "*batch C_in"]) -> Float[Tensor, "*batch C_out"]:
    """gelu(layer(x)), in one kernel where the layer is a :class:`Linear`.

    The activation belongs to the caller: what others put around a linear layer, such as LoRA, adds to its result and
    has to do so before the GELU.
    """
    return layer(x, "gelu") if isinstance(layer, Linear) else F.gelu(layer(x))
