"""DHVT: a vision transformer for small data, with convolutions around its tokens and a token for each head.

Paper: Lu et al., Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets,
NeurIPS 2022, arXiv 2210.05958. Official code: ArieSeirack/DHVT, ``vision_transformer.py``.

The same as there: every number, and the parameters' names. Nothing tells a token its place but the overlapping patches
and the depthwise convolutions: there is no position table, not for the class token either. The head tokens of a block
are made of its own input, take part in its attention, and join the class token as their mean behind it.

What differs: any image size works, where the official code wants square maps; batch norms of patches are plain ones
(``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` brings the official ones back); images may have other channels than
three. The three ideas can be left out one by one, down to the plain vision transformer that the official file describes
but cannot build.

Numbers are checked in ``tests/models/test_dhvt.py`` against a plain network.

Shapes: image (B, 3, Y, X) → logits (B, num_classes); tokens (B, 1 + N, C), maps (B, C, ⌈Y/p⌉, ⌈X/p⌉), p = 2, 4 or 16.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

from itertools import pairwise
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from attn_core.catalog import Card
from attn_core.weights import KeyMap
from vision_models.backbone import TokenBackbone
from vision_models.initialization import trunc_normal_
from vision_models.layers.mixing import fit_table, image_grid
from vision_models.layers.token_maps import DepthwiseConv, Linear, Mlp, init_linear, pad_map
from vision_models.layers.tokens import token_attention, with_position
from vision_models.registration import pretrained_cfg, timm_entries

__all__ = ["DHVT"]

Stem = Literal["overlapping", "patch"]
FeedForward = Literal["daff", "mlp"]
EPS = 1e-6
HEAD_EPS = 1e-5
# Width of each convolution of stride 2 as a share of the tokens' width, for each patch size.
STEPS = {2: (1,), 4: (2, 1), 16: (8, 4, 2, 1)}


class Affine(nn.Module):
    """A factor and a shift for each channel of a map. (B, C, Y, X) → same."""

    def __init__(self, channels: int, **dd: Any) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1, 1, **dd))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1, **dd))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha + self.beta


class OverlappingPatches(nn.Module):
    """3×3 convolutions of stride 2 with batch norms, GELUs between them (SOPE). (B, 3, Y, X) → (B, dim, Y/p, X/p).

    The single convolution of patch size 2 has its GELU behind it.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int, **dd: Any) -> None:
        super().__init__()
        widths = [in_chans, *(dim // share for share in STEPS[patch_size])]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(widths)):
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False, **dd)
            layers += [nn.Sequential(conv, nn.BatchNorm2d(after, **dd))]
            if i + 2 < len(widths) or patch_size == 2:
                layers += [nn.GELU()]
        self.pre_affine = Affine(in_chans, **dd)
        self.proj = nn.Sequential(*layers)
        self.post_affine = Affine(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.post_affine(self.proj(self.pre_affine(x)))


class Patches(nn.Module):
    """Patches of the image padded to a multiple of them. (B, 3, Y, X) → (B, dim, Y/p, X/p)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, **dd: Any) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(pad_map(x, self.patch_size))


class HeadTokenAttention(nn.Module):
    """Attention among the tokens and, if ``head_tokens``, one token more for each head (HI-MHSA). (B, N, dim) → same.

    A head's token is the mean of its channels over all tokens, widened to ``dim``. It sees the others and is seen by
    them; what it reads is added, as the mean over heads, to the first token.
    """

    def __init__(self, dim: int, num_heads: int, *, head_tokens: bool = True, qkv_bias: bool = True, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_tokens = head_tokens
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)
        if head_tokens:
            width = dim // num_heads
            self.ht_proj = nn.Linear(width, dim, **dd)
            self.ht_norm = nn.LayerNorm(width, eps=HEAD_EPS, **dd)
            self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, num_heads, dim, **dd), std=0.02))

    def with_head_tokens(self, x: Tensor) -> Tensor:
        """(B, N, dim) → (B, N + heads, dim): the heads' tokens behind the others."""
        heads = self.ht_proj(x.mean(1).unflatten(1, (self.num_heads, -1)))
        # The norm is over a head's width, not over the token's.
        heads = F.gelu(self.ht_norm(heads.unflatten(2, (self.num_heads, -1)))).flatten(2)
        return torch.cat([x, heads + self.pos_embed], 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) → same."""
        if not self.head_tokens:
            return self.proj(token_attention(self.qkv(x), self.num_heads))
        out = self.proj(token_attention(self.qkv(self.with_head_tokens(x)), self.num_heads))
        tokens, heads = out[:, : x.shape[1]], out[:, x.shape[1] :]
        first = tokens[:, :1] + heads.mean(1, keepdim=True)
        return torch.cat([first, tokens[:, 1:]], 1)


class AggregatingFeedForward(nn.Module):
    """Convolutions for the patches, a gate made of their mean for the class token (DAFF). (B, 1 + N, dim) → same."""

    def __init__(self, dim: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, hidden, 1, **dd)
        self.bn1 = nn.BatchNorm2d(hidden, **dd)
        self.conv2 = DepthwiseConv(hidden, 3, **dd)
        self.bn2 = nn.BatchNorm2d(hidden, **dd)
        self.conv3 = nn.Conv2d(hidden, dim, 1, **dd)
        self.bn3 = nn.BatchNorm2d(dim, **dd)
        self.compress = nn.Linear(dim, dim // 4, **dd)
        self.excitation = nn.Linear(dim // 4, dim, **dd)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        cells = x[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)  # its memory is channels-last already
        cells = F.gelu(self.bn1(self.conv1(cells)))
        around = self.conv2(cells.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        cells = cells + F.gelu(self.bn2(around))
        cells = self.bn3(self.conv3(cells))
        gate = self.excitation(F.gelu(self.compress(cells.mean((2, 3)))))  # no sigmoid behind it
        return torch.cat([x[:, :1] * gate[:, None], cells.flatten(2).transpose(1, 2)], 1)


class Block(nn.Module):
    """Attention, feed-forward, each with a residual. (B, 1 + N, dim) → same."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float, **dd: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.mlp = mlp
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        out = self.norm2(x)
        out = self.mlp(out, grid) if isinstance(self.mlp, AggregatingFeedForward) else self.mlp(out)
        return x + self.drop_path2(out)


class DHVT(TokenBackbone):
    """The classification network; its features are the patches after each block, as maps.

    Args:
        patch_size: pixels between tokens: 2, 4 or 16 for overlapping patches, any for plain ones.
        stem: ``"overlapping"`` convolutions, or plain patches (``"patch"``) with a table of positions.
        head_tokens: whether each head brings a token of its own into attention.
        feed_forward: ``"daff"``, with convolutions and a gate for the class token, or ``"mlp"``.
        img_size: the image that the table of ``stem="patch"`` is made for; others stretch it.
        global_pool: what the classifier reads: ``"token"``, the ``"avg"`` of patches, or all with ``""``.

    Raises:
        ValueError: options that contradict each other or the width.
    """

    def __init__(
        self,
        depth: int = 12,
        embed_dim: int = 192,
        num_heads: int = 4,
        *,
        patch_size: int = 16,
        stem: Stem = "overlapping",
        head_tokens: bool = True,
        feed_forward: FeedForward = "daff",
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
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if stem not in get_args(Stem):
            raise ValueError(f"DHVT: stem must be 'overlapping' or 'patch', got stem={stem!r}")
        if feed_forward not in get_args(FeedForward):
            raise ValueError(f"DHVT: feed_forward must be 'daff' or 'mlp', got feed_forward={feed_forward!r}")
        if stem == "overlapping" and patch_size not in STEPS:
            raise ValueError(f"DHVT: patch_size of overlapping patches must be 2, 4 or 16, got patch_size={patch_size}")
        if patch_size < 1:
            raise ValueError(f"DHVT: patch_size must be positive, got patch_size={patch_size}")
        if embed_dim % num_heads:
            raise ValueError(f"DHVT: num_heads must divide embed_dim, got {num_heads} and {embed_dim}")
        image = image_grid("DHVT", img_size)

        self.in_chans = in_chans
        self.grid = (-(-image[0] // patch_size), -(-image[1] // patch_size))
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        hidden = int(embed_dim * mlp_ratio)

        def block(rate: float) -> Block:
            attn = HeadTokenAttention(embed_dim, num_heads, head_tokens=head_tokens, qkv_bias=qkv_bias, **dd)
            mlp = (AggregatingFeedForward if feed_forward == "daff" else Mlp)(embed_dim, hidden, **dd)
            return Block(embed_dim, attn, mlp, rate, **dd)

        patches = OverlappingPatches if stem == "overlapping" else Patches
        self.patch_embed = patches(in_chans, embed_dim, patch_size, **dd)
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, embed_dim, **dd), std=0.02))
        self.pos_embed = None
        if stem == "patch":
            table = torch.empty(1, 1 + self.grid[0] * self.grid[1], embed_dim, **dd)
            self.pos_embed = nn.Parameter(trunc_normal_(table, std=0.02))
        self.blocks = nn.ModuleList(block(rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=EPS, **dd)
        self.add_head(embed_dim, patch_size, num_classes, global_pool, drop_rate, **dd)
        self.apply(init_linear)

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """What enters the first block, and the rows and columns of its patches."""
        x = self.patch_embed(self.prepared(x))
        grid = (x.shape[2], x.shape[3])
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
        return (x if self.pos_embed is None else with_position(x, self.pos_embed, self.grid, grid)), grid

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed, as timm asks; head tokens' positions are, as officially."""
        return {"cls_token"} if self.pos_embed is None else {"cls_token", "pos_embed"}

    def fit_table(self, name: str, value: Tensor) -> Tensor:
        """A checkpoint's value of a parameter; a position table of another grid stretched to ours."""
        return fit_table(self, name, value) if name == "pos_embed" else value


KEY_MAP: KeyMap = {"dhvt": ()}  # our names are the official ones
DHVT.key_map = KEY_MAP

_CIFAR: dict[str, Any] = {"num_classes": 100, "img_size": 32}
_DOMAIN: dict[str, Any] = {"num_classes": 345}
_SMALL: dict[str, Any] = {"embed_dim": 384}
VARIANTS: dict[str, dict[str, Any]] = {
    "dhvt_tiny_cifar_p4": {**_CIFAR, "patch_size": 4},
    "dhvt_small_cifar_p4": {**_CIFAR, **_SMALL, "patch_size": 4, "num_heads": 8},
    "dhvt_tiny_cifar_p2": {**_CIFAR, "patch_size": 2},
    "dhvt_small_cifar_p2": {**_CIFAR, **_SMALL, "patch_size": 2, "num_heads": 8},
    "dhvt_tiny_domain_p16": _DOMAIN,
    "dhvt_small_domain_p16": {**_DOMAIN, **_SMALL, "num_heads": 6},
    "dhvt_tiny_imagenet_p16": {"num_heads": 3},
    "dhvt_small_imagenet_p16": {**_SMALL, "num_heads": 6},
    "test_dhvt": {"depth": 4, "embed_dim": 48},
}


def _cfg(name: str) -> dict[str, Any]:
    settings = VARIANTS[name]
    return pretrained_cfg(
        settings.get("img_size", 224),
        num_classes=settings.get("num_classes", 1000),
        pool_size=None,
        crop_pct=1.0 if "img_size" in settings else 0.875,
        first_conv="patch_embed.proj.0.0",
        classifier="head",
        license="apache-2.0",
        paper_ids=f"arXiv:{CARD.paper}",
        origin_url=CARD.code,
    )


CARD = Card(
    family="DHVT",
    paper="2210.05958",
    code="https://github.com/ArieSeirack/DHVT",
    license="Apache-2.0",
    test="models/test_dhvt.py",
)
CARDS = {
    "dhvt_tiny_cifar_p4": CARD("100 classes: 6.0 M parameters, 0.39 G multiply-adds at 32²"),
    "dhvt_small_cifar_p4": CARD("100 classes: 23.4 M parameters, 1.54 G multiply-adds at 32²"),
    "dhvt_tiny_cifar_p2": CARD("100 classes: 5.8 M parameters, 1.7 G multiply-adds at 32²"),
    "dhvt_small_cifar_p2": CARD("100 classes: 22.8 M parameters, 6.2 G multiply-adds at 32²", "CIFAR-100 85.68 %"),
    "dhvt_tiny_domain_p16": CARD("345 classes: 6.1 M parameters, 1.4 G multiply-adds at 224²"),
    "dhvt_small_domain_p16": CARD("345 classes: 23.8 M parameters, 5.1 G multiply-adds at 224²"),
    "dhvt_tiny_imagenet_p16": CARD("6.3 M parameters, 1.4 G multiply-adds at 224²", "top-1 77.6 %"),
    "dhvt_small_imagenet_p16": CARD("24.0 M parameters, 5.1 G multiply-adds at 224²", "top-1 82.3 %"),
    "test_dhvt": CARD("Small enough for tests (< 0.5 M parameters)"),
}
default_cfgs = generate_default_cfgs({name: _cfg(name) for name in VARIANTS})
ENTRIES = timm_entries(DHVT, VARIANTS, CARDS, default_cfgs, maps=lambda _: {"feature_cls": "getter", "out_indices": 3})
