"""What each state-space block costs, counted and not timed: the columns of the survey's table that machines share."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_core.flops import count_flops
from medical_seg.layers.state_space import create_block

DIM, SIDE = 64, 16  # of a plane


class Cost(NamedTuple):
    """Of one block on one sample.

    Attributes:
        parameters: their number.
        multiply_adds: of a forward pass.
        kept: bytes that wait for the backward pass, parameters not counted.
    """

    parameters: int
    multiply_adds: int
    kept: int


def cost(name: str, dim: int = DIM, side: int = SIDE) -> Cost:
    """Count a block on a plane of ``side`` × ``side`` tokens of ``dim`` channels in float32.

    Raises: ValueError: unknown block, with the nearest known one.
    """
    block = create_block(name, dim)
    x = torch.randn(1, side, side, dim, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # alive, so that no address is given out twice

    def keep(tensor: Tensor) -> Tensor:
        storage: Any = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x)
    block.requires_grad_(False)  # the counter follows a gradient into views, in vain
    quiet = x.detach()
    return Cost(sum(p.numel() for p in block.parameters()), count_flops(lambda: block(quiet)) // 2, sum(kept.values()))
