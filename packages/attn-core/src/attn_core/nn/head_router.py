"""Mixture of heads: how much of each head a token takes, and which heads it leaves out.

Paper: Jin et al., MoH: Multi-Head Attention as Mixture-of-Head Attention, 2024, arXiv 2410.11842. Official code:
SkyworkAI/MoH, ``MoH-ViT/attention.py`` and ``MoH-DiT/models.py``, whose layers' names are kept. The factors that make
gates 1 on average are of the code; the paper's eq. 5 has none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


class HeadGates(NamedTuple):
    """Gates of all heads, the shared ones first, and how unevenly routed heads were chosen.

    Attributes:
        gates: (B, N, heads), 0 where a head is off, 1 on average.
        balance: E·Σ_e mean(p_e)·mean(chosen_e) over all tokens: the number of chosen heads if all E routed heads are
            chosen equally often, more if not. None where nothing is routed.
    """

    gates: Tensor
    balance: Tensor | None


def head_gates(
    x: Float[Tensor, "B N C"],
    routed: Float[Tensor, "B N E"] | None,
    shared: Float[Tensor, "B N S"] | None,
    between: Float[Tensor, "B N 2"] | None,
    num_shared: int,
    num_routed: int,
) -> HeadGates:
    """Gates from scores: softmax over the shared heads, the best ``num_routed`` of the routed ones, and both weighed.

    Args:
        x: tokens, for shape, dtype and device. routed, shared, between: their scores; None where there is nothing to
            choose.
        num_shared: heads that every token takes.
        num_routed: routed heads that a token takes; their gates are weights of a softmax, made to sum to it.
    """
    parts, balance = [], None
    if num_shared:
        score = x.new_zeros(*x.shape[:2], num_shared) if shared is None else shared
        parts.append(num_shared * score.softmax(2))
    if routed is not None and num_routed:
        p = routed.softmax(2)
        chosen = torch.zeros_like(p).scatter(2, p.topk(num_routed, 2).indices, 1.0)
        kept = p * chosen
        parts.append(num_routed * kept / kept.sum(2, keepdim=True).clamp(min=torch.finfo(p.dtype).eps))
        balance = routed.shape[2] * (p.mean((0, 1)) * chosen.mean((0, 1))).sum()
    if between is not None:
        weights = 2 * between.softmax(2)
        parts = [part * weights[:, :, i : i + 1] for i, part in enumerate(parts)]
    return HeadGates(torch.cat(parts, 2), balance)


class HeadRouter(nn.Module):
    """The gates of a layer's heads for its input (B, N, dim).

    Args:
        num_shared: first heads, on for every token.
        num_routed: heads that a token chooses among the others; 0: there are no others.

    Raises: ValueError: the numbers do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_shared: int,
        num_routed: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        others = num_heads - num_shared
        if not 0 <= num_shared <= num_heads:
            raise ValueError(f"HeadRouter: num_shared must lie in 0…{num_heads}, the heads, got {num_shared}")
        if num_routed > others or (num_routed < 1) != (others == 0) or num_routed < 0:
            rule = f"lie in 1…{others}, the heads that are not shared" if others else "be 0, since all heads are shared"
            raise ValueError(f"HeadRouter: num_routed must {rule}, got {num_routed}")
        self.num_shared = num_shared
        self.num_routed = num_routed

        def scores(count: int) -> nn.Linear:
            return nn.Linear(dim, count, bias=False, device=device, dtype=dtype)

        self.wg = scores(others) if others else None
        self.wg_0 = scores(2) if others and num_shared else None
        self.wg_1 = scores(num_shared) if num_shared > 1 else None

    def forward(self, x: Float[Tensor, "B N C"]) -> HeadGates:
        """(B, N, dim) → gates (B, N, num_heads), and their balance."""
        routed, shared, between = (None if layer is None else layer(x) for layer in (self.wg, self.wg_1, self.wg_0))
        return head_gates(x, routed, shared, between, self.num_shared, self.num_routed)

    def extra_repr(self) -> str:
        """The heads a token takes."""
        return f"num_shared={self.num_shared}, num_routed={self.num_routed}"


@contextmanager
def balance_losses(net: nn.Module) -> Iterator[list[Tensor]]:
    """A list that fills with the balance of every router of ``net`` that is called while the context is open.

    Close it before the backward pass, in which activation checkpointing calls routers a second time. Nothing stays in
    the network, and nothing comes from another one.
    """
    found: list[Tensor] = []

    def keep(_: nn.Module, __: object, result: HeadGates) -> None:
        if result.balance is not None:
            found.append(result.balance)

    handles = [module.register_forward_hook(keep) for module in net.modules() if isinstance(module, HeadRouter)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
