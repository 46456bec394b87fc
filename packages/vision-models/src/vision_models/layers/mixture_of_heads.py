"""Mixture of heads: attention in which each token takes some heads always and chooses among the others.

Paper: Jin et al., MoH: Multi-Head Attention as Mixture-of-Head Attention, 2024, arXiv 2410.11842. Official code:
SkyworkAI/MoH (``MoH-ViT/attention.py``, ``MoH-DiT/models.py``).

The same as there: every number, the factors of the code included. What differs: heads that a token did not choose are
not computed for it (:func:`attn_core.routed_heads`), where the official code multiplies them by 0; the balance of the
routers is what they return, and is collected for one network (:func:`attn_core.nn.balance_losses`), where the official
one is a list of the class. ``models/deit.py`` and ``models/transnext.py`` are hosts; timm's ViT becomes one by
:func:`with_routed_heads`.

Numbers are checked in ``tests/layers/test_mixture_of_heads.py`` against plain networks.

Shapes: x (B, N, dim) → same.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from timm.models import generate_default_cfgs, register_notrace_module
from torch import Tensor, nn

from attn_core import routed_heads
from attn_core.catalog import Card
from attn_core.nn import HeadRouter
from vision_models.layers.token_maps import Linear
from vision_models.registration import pretrained_cfg

Host = TypeVar("Host", bound=nn.Module)
Heads = tuple[int, int]  # shared by all tokens, and chosen by each


def heads_of_blocks(
    family: str, shared: int | Sequence[int] | None, routed: int | Sequence[int] | None, count: int
) -> list[Heads | None]:
    """Shared and routed heads of each of ``count`` blocks or stages; None: plain attention.

    Raises: ValueError: one of both is missing, or their entries are not ``count``.
    """
    if shared is None and routed is None:
        return [None] * count
    if shared is None or routed is None:
        raise ValueError(f"{family}: shared_heads and routed_heads go together, got {shared} and {routed}")
    every = [(numbers,) * count if isinstance(numbers, int) else tuple(numbers) for numbers in (shared, routed)]
    if {len(numbers) for numbers in every} != {count}:
        raise ValueError(
            f"{family}: shared_heads and routed_heads must be one number or {count}, got {shared} and {routed}"
        )
    return list(zip(*every, strict=True))


@register_notrace_module  # which pairs are computed depends on their gates, which FX must not follow
class RoutedSelfAttention(nn.Module):
    """Softmax attention between projections, a gate for each token and head. (B, N, dim) → same.

    Args:
        shared, routed: heads that every token takes, and how many of the others it chooses.
        head_dim: width of a head; by default all heads together are as wide as the tokens.

    Raises: ValueError: the heads do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        shared: int,
        routed: int,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        **dd: Any,
    ) -> None:
        super().__init__()
        width = num_heads * (dim // num_heads if head_dim is None else head_dim)
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * width, bias=qkv_bias, **dd)
        self.router = HeadRouter(dim, num_heads, shared, routed, **dd)
        self.proj = Linear(width, dim, **dd)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None, **settings: Any) -> Tensor:  # noqa: ARG002  DeiT tells the grid
        """(B, N, dim) → same; ``settings`` are what timm's blocks hand on, a mask (refused) and causality."""
        if settings.get("attn_mask") is not None or settings.get("is_causal"):
            raise ValueError("RoutedSelfAttention: there is no attention mask and no causality; pass none")
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = routed_heads(q, k, v, self.router(x).gates)
        return self.proj(out.transpose(1, 2).flatten(2))


def with_routed_heads(vit: Host, shared: int | Sequence[int], routed: int | Sequence[int]) -> Host:
    """Mixture of heads in place of the attention of a timm ViT, in place, with its weights and new routers.

    Args:
        vit: a network whose ``blocks`` have timm's ``Attention``, such as DeiT, ViT, DINO, CLIP's.
        shared, routed: heads of all blocks, or of each.

    Raises: ValueError: blocks of another kind, or heads that do not fit.
    """
    blocks: Any = getattr(vit, "blocks", None)
    if blocks is None or not all(hasattr(block, "attn") for block in blocks):
        raise ValueError(f"with_routed_heads: {type(vit).__name__} has no blocks with attention; pass a ViT of timm's")
    for block, heads in zip(blocks, heads_of_blocks("with_routed_heads", shared, routed, len(blocks)), strict=True):
        old = block.attn
        parts = {name for name, part in old.named_children() if not isinstance(part, (nn.Identity, nn.Dropout))}
        if parts != {"qkv", "proj"} or heads is None or any(m.p for m in old.modules() if isinstance(m, nn.Dropout)):
            raise ValueError(
                f"with_routed_heads: {type(old).__name__} has {', '.join(sorted(parts))}; only attention of qkv and "
                "proj, without norms and dropout, is known"
            )
        dd = {"device": old.qkv.weight.device, "dtype": old.qkv.weight.dtype}
        new = RoutedSelfAttention(
            old.qkv.in_features, old.num_heads, *heads, head_dim=old.head_dim, qkv_bias=old.qkv.bias is not None, **dd
        )
        new.qkv.load_state_dict(old.qkv.state_dict())  # pyright: ignore[reportAttributeAccessIssue]
        new.proj.load_state_dict(old.proj.state_dict())  # pyright: ignore[reportAttributeAccessIssue]
        block.attn = new.train(old.training)
    return vit


MOH = Card(
    family="Mixture of heads",
    paper="2410.11842",
    code="https://github.com/SkyworkAI/MoH",
    license="Apache-2.0",
    test="layers/test_mixture_of_heads.py",
)


def moh_cfgs(variants: Mapping[str, Mapping[str, Any]], **entries: Any) -> dict[str, Any]:
    """timm's settings of all variants of a host."""
    cfgs = {
        name: pretrained_cfg(
            options.get("img_size", 224),
            license="apache-2.0",
            paper_ids=f"arXiv:{MOH.paper}",
            origin_url=MOH.code,
            **entries,
        )
        for name, options in variants.items()
    }
    return generate_default_cfgs(cfgs)  # pyright: ignore[reportArgumentType]
