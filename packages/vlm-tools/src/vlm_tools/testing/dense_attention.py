"""Generation with dense attention maps that a function may edit: what methods are compared with in tests."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "vlm_tools_dense"
# (scores of one layer, −inf where hidden; number of the layer; residual stream that enters it) → probabilities
Edit = Callable[[Float[Tensor, "1 H N M"], int, Float[Tensor, "1 N C"]], Float[Tensor, "1 H N M"]]


@contextmanager
def edited_maps(model: Any, edit: Edit) -> Iterator[None]:
    """Inside the block the text decoder computes whole maps of one prompt without padding; ``edit`` is the softmax.

    A plain formulation, kept apart from `vlm_tools.intervention`: grouped heads are repeated, nothing is fused.
    """
    entering: dict[int, Tensor] = {}
    decoder = model.get_decoder()

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        number: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
        share, (rows, columns) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
        scores = torch.einsum("bhnd,bhmd->bhnm", query, key.repeat_interleave(share, 1)) * options["scaling"]
        hidden = torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1) if mask is None else ~mask
        p = edit(scores.masked_fill(hidden, -torch.inf), number, entering[number])
        return torch.einsum("bhnm,bhmd->bnhd", p, value.repeat_interleave(share, 1)).contiguous(), None

    def keep(number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering[number] = args[0] if args else kwargs["hidden_states"]

        return hook

    AttentionInterface.register(NAME, attention)  # pyright: ignore[reportArgumentType]
    AttentionMaskInterface.register(NAME, sdpa_mask)
    handles = [layer.register_forward_pre_hook(keep(n), with_kwargs=True) for n, layer in enumerate(decoder.layers)]
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(NAME)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)
        for handle in handles:
            handle.remove()
