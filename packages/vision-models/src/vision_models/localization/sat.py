"""SAT: a token of a vision transformer that learns where the object is, from labels of whole pictures.

Paper: Wu, Zhai, Cao, Luo, Zha, Spatial-Aware Token for Weakly Supervised Object Localization, ICCV 2023, arXiv
2303.10438. Official code: wpy1999/SAT, ``Model/SAT.py``, whose README allows research alone.

The same: every number, with official weights through :func:`load_official`. In the last blocks the logits of the
spatial token's query, averaged over heads and put through a sigmoid, gate every token's value; the mean of these
gates is the map of the object. The class token takes part and is read by nothing: a 3×3 convolution over the patches,
averaged over the map, makes the logits.

What differs: any image, patch and depth (officially 14×14 patches, the blocks from the tenth on); images of another
size than built for stretch the position table. Attention times gate times values is attention times gated values, so
that nothing of N×N is held, and the gates need the one row of logits that they are made of. ``last_k=0`` gates
nothing, which leaves the DeiT with a convolution as its head that class activation maps are drawn from.

Numbers are checked in ``tests/localization/test_sat.py`` against a plain network. Image (B, C, Y, X) → logits (B, K).
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from attn_core import attention as attend
from attn_core import weights
from attn_core.catalog import Card, Entry
from vision_models.initialization import trunc_normal_
from vision_models.layers.token_maps import Linear, Mlp, init_linear
from vision_models.layers.tokens import with_position
from vision_models.localization import create_localizer

EPS = 1e-6


class Located(NamedTuple):
    """What a picture holds, and where.

    Attributes:
        logits: (B, K).
        map: (B, y, x), of the object in [0, 1]; None without gates.
        classes: (B, K, y, x), of each class before averaging: class activation maps.
    """

    logits: Tensor
    map: Tensor | None
    classes: Tensor


class GatedAttention(nn.Module):
    """Softmax attention between projections; the last token's query can gate the values of all. (B, N, dim) → same."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool, gated: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.gated = gated
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens, and the gates (B, N) if there are any."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        gates = None
        if self.gated:
            logits = (q[:, :, -1:] @ k.mT).squeeze(2) * q.shape[-1] ** -0.5
            gates = logits.mean(1).sigmoid()
            v = v * gates[:, None, :, None]
        out = attend(q, k, v)[0]
        return self.proj(out.transpose(1, 2).flatten(2)), gates


class Block(nn.Module):
    """Attention, MLP, each with a residual. (B, N, dim) → same, and the gates."""

    def __init__(self, dim: int, attn: GatedAttention, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = attn
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, N, dim) → same, and the gates (B, N) of a gated block."""
        attended, gates = self.attn(self.norm1(x))
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x))), gates


class PatchEmbed(nn.Module):
    """Patches, a rest being cut off. (B, C, Y, X) → (B, dim, y, x)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, Y, X) → (B, dim, y, x)."""
        return self.proj(x)


class SAT(nn.Module):
    """DeiT with a spatial token.

    Args:
        img_size: the square that the position table is made for; other images work.
        last_k: gated blocks, counted from the last; 0: none, and no map.

    Raises: ValueError: numbers that do not fit each other.
    """

    def __init__(
        self,
        depth: int = 12,
        embed_dim: int = 384,
        num_heads: int = 6,
        *,
        last_k: int = 3,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"SAT: num_heads must divide embed_dim={embed_dim}, got num_heads={num_heads}")
        if not 0 <= last_k <= depth:
            raise ValueError(f"SAT: last_k must be from 0 to depth={depth}, got last_k={last_k}")
        if img_size < patch_size:
            raise ValueError(f"SAT: img_size must be at least patch_size={patch_size}, got img_size={img_size}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.patch_size = patch_size
        self.grid = (img_size // patch_size, img_size // patch_size)
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        self.loc_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        count = 1 + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, count, embed_dim), std=0.02))
        self.loc_embed = nn.Parameter(trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                GatedAttention(embed_dim, num_heads, qkv_bias=qkv_bias, gated=i >= depth - last_k),
                mlp_ratio,
                rate,
            )
            for i, rate in enumerate(rates)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=EPS)
        self.head = nn.Conv2d(embed_dim, num_classes, 3, padding=1)
        self.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay would harm, beyond biases and norms."""
        return {"pos_embed", "cls_token", "loc_embed", "loc_token"}

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """What enters the first block, (B, 1 + y·x + 1, dim), and rows and columns of the patches."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"SAT: images must be (B, {self.in_chans}, Y, X), got {tuple(x.shape)}")
        if min(x.shape[2:]) < self.patch_size:
            raise ValueError(f"SAT: image {x.shape[2]}×{x.shape[3]} is smaller than a patch of {self.patch_size}²")
        x = self.patch_embed(x)
        grid = (x.shape[2], x.shape[3])
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
        x = with_position(x, self.pos_embed, self.grid, grid)
        spatial = (self.loc_token + self.loc_embed).expand(x.shape[0], -1, -1)
        return torch.cat([x, spatial], 1), grid

    def located(self, x: Tensor) -> Located:
        """Images (B, C, Y, X) → logits, the object's map, the classes' maps."""
        x, grid = self.tokens(x)
        gates = []
        for block in self.blocks:
            x, gate = block(x)
            if gate is not None:
                gates.append(gate)
        patches = self.norm(x)[:, 1:-1].transpose(1, 2).unflatten(2, grid)
        classes = self.head(patches)
        found = torch.stack(gates).mean(0)[:, 1:-1].unflatten(1, grid) if gates else None
        return Located(classes.mean((2, 3)), found, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, Y, X) → logits (B, K)."""
        return self.located(x).logits


def load_official(model: SAT, source: Mapping[str, Any] | str | Path, *, ignore: Sequence[str] = ()) -> SAT:
    """Copy the authors' checkpoint, every parameter or none; position tables of another size are stretched.

    Args:
        model: of the same variant.
        source: a file, or what it holds: a state dict, also inside ``model`` and with ``module.`` before its names.
        ignore: beginnings of our parameter names that may differ or be missing: ``("head", "loc_")`` for DeiT's.

    Raises: ValueError: names or shapes do not fit; the message lists them.
    """
    checkpoint = weights.read(source)
    # the kernel of the normalization loss, which we compute
    kept = {name: value for name, value in checkpoint.tensors.items() if name != "weight"}
    checkpoint = replace(checkpoint, tensors=kept)
    names = weights.fitting_names(model, {"sat": ()}, checkpoint)
    return weights.fill(model, checkpoint, names, ignore=ignore, fit=partial(_fitted, model))


def _fitted(model: SAT, name: str, value: Tensor) -> Tensor:
    """The position table of another square in the size of ours."""
    own = model.get_parameter(name)
    side = round((value.shape[1] - 1) ** 0.5) if name == "pos_embed" and value.ndim == 3 else 0
    if side == 0 or side * side != value.shape[1] - 1 or value.shape == own.shape:
        return value
    cells = value[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    cells = F.interpolate(cells, size=model.grid, mode="bicubic").flatten(2).transpose(1, 2)
    return torch.cat([value[:, :1], cells], 1)


def started_from(name: str, weights: str | None = None, **options: Any) -> SAT:
    """A network for recipes: with DeiT's weights, but for head and spatial token, or with fresh ones.

    Raises: ValueError: an unknown name or option; weights that do not fit.
    """
    net: Any = create_localizer(name, **options)
    return net if weights is None else load_official(net, weights, ignore=("head", "loc_token", "loc_embed"))


CARD = Card(
    family="SAT",
    paper="2303.10438",
    code="https://github.com/wpy1999/SAT",
    license="",
    test="localization/test_sat.py",
)
ENTRIES = [
    Entry("sat_tiny", partial(SAT, embed_dim=192, num_heads=3), CARD("DeiT-T with a spatial token"), (SAT,)),
    Entry("sat_small", SAT, CARD("DeiT-S with a spatial token", "GT-known 98.5 % CUB, 73.1 % ImageNet")),
    Entry("sat_base", partial(SAT, embed_dim=768, num_heads=12), CARD("DeiT-B with a spatial token"), (SAT,)),
]
