"""Sparsifiner: DeiT whose queries read the keys that a cheap low-rank guess of their attention puts first.

Paper: Wei et al., Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers, CVPR
2023, arXiv 2303.13755. Official code: lim142857/Sparsifiner, ``src/models/sparsifiner.py`` and ``src/losses.py``.

The same as there: every number. A predictor shared by the heads of a block projects queries and keys to half their
width, and keys further to a few summaries of all tokens; softmax over them (scaled by heads^−½, as in the code) weighs
learned bases, of which the eight heaviest count, with entries up to 0.02 cut off. The tokens with the largest sums are
kept; the class token reads all, and is read by those alone that keep it. The choice has no gradient.

What differs: the official code computes all N×N scores and masks them. Here guess, choice and attention go together
through a few queries at a time, so that nothing of size N×N is held, in training either, where lists of kept keys (two
bytes a key) are all that stays. On a GPU lists go to :func:`attn_core.block_attention`. Any image size works: the
predictor's tables are stretched along the tokens. Token pruning, which the official settings leave off, is missing.

Numbers are checked in ``tests/models/test_sparsifiner.py`` against a plain network with masks over all scores.

Shapes: image (B, 3, Y, X) → logits (B, num_classes); tokens (B, 1 + N, C), maps (B, C, ⌊Y/16⌋, ⌊X/16⌋).
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attn_core import attention as attend
from attn_core import block_attention
from attn_core.catalog import Card
from attn_core.weights import KeyMap
from vision_models.initialization import trunc_normal_
from vision_models.layers.token_maps import Linear, init_linear
from vision_models.models.deit import DeiT
from vision_models.registration import pretrained_cfg, timm_entries

__all__ = ["Sparsifiner"]

COEFFICIENTS = 8  # bases that count for a query
THRESHOLD = 0.02  # up to which entries of a basis are cut off
CHUNK_ELEMENTS = 2**19  # guessed scores held at a time: 2 MiB of float32
Grid = tuple[int, int]


def stretched(table: Tensor, built: Grid, grid: Grid) -> Tensor:
    """A table (1 + N, rank) of the grid ``built`` for another one, the row of the class token as it was."""
    if built == grid:
        return table
    cells = table[1:].T.unflatten(1, built)[None]
    return torch.cat([table[:1], F.interpolate(cells, size=grid, mode="bicubic")[0].flatten(1).T])


class MaskPredictor(nn.Module):
    """A guess of the attention of patches, and the keys that it puts first.

    Args:
        grid: rows and columns of patches that the tables are made for.
        rank: summaries of tokens, and bases.
    """

    def __init__(self, num_heads: int, head_dim: int, grid: Grid, rank: int, reduce: int, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.grid = grid
        self.proj_c_q = Linear(head_dim, head_dim // reduce, **dd)
        self.proj_c_k = Linear(head_dim, head_dim // reduce, **dd)
        tokens = 1 + grid[0] * grid[1]
        self.proj_n = nn.Parameter(trunc_normal_(torch.empty(tokens, rank, **dd), std=0.02))
        self.proj_back_n = nn.Parameter(trunc_normal_(torch.empty(tokens, rank, **dd), std=0.02))

    def coefficients(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Weights of the bases (B, heads, N, rank) for the queries of the patches; q, k (B, heads, 1 + N, D)."""
        summaries = stretched(self.proj_n, self.grid, grid)
        if grid != self.grid:  # as many tokens add up
            summaries = summaries * (len(self.proj_n) / len(summaries))
        keys = self.proj_c_k(k).mT @ summaries
        return (self.proj_c_q(q[:, :, 1:]) @ keys * self.num_heads**-0.5).softmax(3)

    def guess(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """The attention of patches (B, heads, N, 1 + N) that is trained to equal that of a teacher."""
        return self.coefficients(q, k, grid) @ stretched(self.proj_back_n, self.grid, grid).T

    def bases(self, grid: Grid) -> Tensor:
        """(rank, 1 + N) without signs and small entries."""
        size = stretched(self.proj_back_n, self.grid, grid).T.abs()
        return torch.where(size > THRESHOLD, size, 0.0)


def kept_keys(coefficients: Tensor, bases: Tensor, count: int) -> Tensor:
    """(B, heads, n, count): the keys with the largest sums of the bases that weigh most, in no order."""
    dtype = torch.promote_types(coefficients.dtype, torch.float32)
    weights, chosen = coefficients.to(dtype).topk(min(COEFFICIENTS, coefficients.shape[3]), 3)
    if torch.compiler.is_compiling():
        few = torch.zeros_like(coefficients, dtype=dtype).scatter(3, chosen, weights)
        sums = few @ bases.to(dtype)
    else:
        flat = (chosen.flatten(0, 2), bases.to(dtype))
        sums = F.embedding_bag(*flat, per_sample_weights=weights.flatten(0, 2), mode="sum")
        sums = sums.unflatten(0, chosen.shape[:3])
    return sums.topk(count, 3, sorted=False).indices


def listed(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    """Attention of queries (B, heads, n, D) to the keys that each lists (B, heads, n, count)."""
    bias = q.new_full((*q.shape[:3], k.shape[2]), -math.inf).scatter_(3, kept.long(), 0.0)
    return attend(q, k, v, bias=bias)[0]


@register_notrace_module  # counts keys and chunks by the size of the map, which FX must not follow
class SparseAttention(nn.Module):
    """Softmax attention to the keys that the predictor keeps, between projections. (B, 1 + N, dim) → same.

    Args:
        keep: share of all tokens that a patch reads, rounded up.
    """

    def __init__(
        self, dim: int, num_heads: int, grid: Grid, keep: float, rank: int, reduce: int, *, qkv_bias: bool, **dd: Any
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.keep = keep
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.mask_predictor = MaskPredictor(num_heads, dim // num_heads, grid, rank, reduce, **dd)
        self.proj = Linear(dim, dim, **dd)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, 1 + N, D)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, 1 + N, dim) → same."""
        q, k, v = self.projected(x)
        return self.proj(self.sparse(q, k, v, grid).transpose(1, 2).flatten(2))

    def sparse(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        """(B, heads, 1 + N, D): the class token reads all keys, patches those that they keep."""
        tokens = q.shape[2]
        count = math.ceil(self.keep * tokens)
        if count >= tokens:
            return attend(q, k, v)[0]
        with torch.no_grad():  # of a choice
            coefficients, bases = self.mask_predictor.coefficients(q, k, grid), self.mask_predictor.bases(grid)
        parts = [attend(q[:, :, :1], k, v)[0]]
        if q.device.type != "cpu" and not torch.compiler.is_compiling():
            return torch.cat([*parts, self._through_lists(q, k, v, kept_keys(coefficients, bases, count))], 2)
        whole = torch.compiler.is_compiling() or q.numel() == 0
        step = tokens if whole else max(1, CHUNK_ELEMENTS // (q.shape[0] * q.shape[1] * tokens))
        small = torch.int16 if tokens < 2**15 else torch.int32
        for queries, own in zip(q[:, :, 1:].split(step, 2), coefficients.split(step, 2), strict=True):
            kept = kept_keys(own, bases, count).to(small)
            if torch.is_grad_enabled() and q.requires_grad and not whole:  # the mask is built again, not kept
                parts.append(checkpoint(listed, queries, k, v, kept, use_reentrant=False, preserve_rng_state=False))  # pyright: ignore[reportArgumentType]
            else:
                parts.append(listed(queries, k, v, kept))
        return torch.cat(parts, 2)

    @staticmethod
    def _through_lists(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        """One block for each patch's query, whose only key block is its list."""
        patches = torch.arange(1, q.shape[2], device=q.device).view(1, 1, -1, 1)
        return block_attention(q, k, v, patches, kept)[0][:, :, 1:]


class Sparsifiner(DeiT):
    """The classification network; its features are the patches after each block, as maps.

    Args:
        keep: share of the keys that a patch reads; 1: all, which is DeiT.
        rank: bases of the guess; by default a sixth of the tokens at ``img_size``.
        reduce: how many times narrower queries and keys of the guess are.
        options: of :class:`DeiT`.

    Raises:
        ValueError: options that contradict each other or the width.
    """

    def __init__(
        self,
        depth: int = 12,
        embed_dim: int = 192,
        num_heads: int = 3,
        *,
        keep: float = 0.25,
        rank: int | None = None,
        reduce: int = 2,
        patch_size: int = 16,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            depth, embed_dim, num_heads, patch_size=patch_size, img_size=img_size, in_chans=in_chans,
            num_classes=num_classes, global_pool=global_pool, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias,
            drop_rate=drop_rate, drop_path_rate=drop_path_rate, device=device, dtype=dtype,
        )  # fmt: skip
        tokens = 1 + self.grid[0] * self.grid[1]
        rank = max(1, tokens // 6) if rank is None else rank
        if not 0 < keep <= 1:
            raise ValueError(f"Sparsifiner: keep must lie in (0, 1], got keep={keep}")
        if rank < 1:
            raise ValueError(f"Sparsifiner: rank must be positive, got rank={rank}")
        if not 1 <= reduce <= embed_dim // num_heads:
            raise ValueError(
                f"Sparsifiner: reduce must lie in 1…{embed_dim // num_heads}, the width of a head, got reduce={reduce}"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        for block in self.blocks:
            block.attn = SparseAttention(
                embed_dim, num_heads, self.grid, keep, rank, reduce, qkv_bias=qkv_bias, **dd
            ).apply(init_linear)

    @property
    def fixed_size(self) -> str:
        """Why an exported graph serves one image size alone."""
        return "the keys that a query keeps are counted"

    def guesses(self, x: Tensor) -> list[Tensor]:
        """What each block guesses of the attention of patches (B, heads, N, 1 + N), each block reading all keys."""
        x, grid = self.tokens(x)
        found = []
        for block in self.blocks:
            attn: Any = block.attn
            q, k, v = attn.projected(block.norm1(x))  # pyright: ignore[reportCallIssue]
            found.append(attn.mask_predictor.guess(q, k, grid))
            out = attn.proj(attend(q, k, v)[0].transpose(1, 2).flatten(2))
            x = x + block.drop_path1(out)  # pyright: ignore[reportCallIssue]
            x = x + block.drop_path2(block.mlp(block.norm2(x)))  # pyright: ignore[reportCallIssue]
        return found

    def fit_table(self, name: str, value: Tensor) -> Tensor:
        """A checkpoint's value of a parameter; tables of another grid stretched to ours."""
        if not name.endswith(("proj_n", "proj_back_n")):
            return super().fit_table(name, value)
        own, side = self.get_parameter(name), math.isqrt(len(value) - 1)
        if value.ndim != 2 or value.shape[1] != own.shape[1] or side * side != len(value) - 1:
            return value
        value = stretched(value, (side, side), self.grid)
        return value * ((side * side + 1) / len(value)) if name.endswith("proj_n") else value


KEY_MAP: KeyMap = {"sparsifiner": ()}
Sparsifiner.key_map = KEY_MAP

_SMALL: dict[str, Any] = {"embed_dim": 384, "num_heads": 6}
VARIANTS: dict[str, dict[str, Any]] = {
    "sparsifiner_tiny": {},
    "sparsifiner_small": _SMALL,
    "test_sparsifiner": {"depth": 4, "embed_dim": 48, "num_heads": 4, "img_size": 96},
}
SPARSIFINER = Card(
    family="Sparsifiner",
    paper="2303.13755",
    code="https://github.com/lim142857/Sparsifiner",
    license="MIT",
    test="models/test_sparsifiner.py",
)
CARDS = {
    "sparsifiner_tiny": SPARSIFINER("5.9 M parameters, a quarter of the keys"),
    "sparsifiner_small": SPARSIFINER("22.3 M parameters, a quarter of the keys"),
    "test_sparsifiner": SPARSIFINER("Small enough for tests (< 0.5 M parameters)"),
}
default_cfgs = generate_default_cfgs({
    name: pretrained_cfg(
        options.get("img_size", 224), first_conv="patch_embed.proj", classifier="head", pool_size=None, license="mit",
        paper_ids=f"arXiv:{SPARSIFINER.paper}", origin_url=SPARSIFINER.code,
    )
    for name, options in VARIANTS.items()
})  # fmt: skip
ENTRIES = timm_entries(
    Sparsifiner, VARIANTS, CARDS, default_cfgs, maps=lambda _: {"feature_cls": "getter", "out_indices": 3}
)
