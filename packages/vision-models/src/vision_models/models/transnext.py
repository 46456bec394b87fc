"""TransNeXt, whose tokens see their neighbors and a pooled map in one softmax, and MoH-ViT, which routes its heads.

Papers: Shi, TransNeXt, CVPR 2024, arXiv 2311.17132; Jin et al., MoH, 2024, arXiv 2410.11842. Official code:
DaiShiResearch/TransNeXt, ``classification/transnext.py``; SkyworkAI/MoH, ``MoH-ViT``.

The same as there: every number. Queries and keys have length 1; a query gets a learned vector added and is scaled by a
temperature of its head and the logarithm of the number of keys. Keys of the 3×3 window and of the pooled map share one
softmax, to whose part in the window a projection of the query is added that no softmax bounds. With ``shared_heads``
and ``routed_heads`` a gate scales each head at each token (``layers/mixture_of_heads.py``).

What differs: any image size works; the official tables are made for one. The two parts of the softmax are joined by
their log-sum-exp, so that neither windows nor scores of the pooled map are copied, and no CUDA extension is needed.
Where all tokens see each other, heads that are off are not computed. Without routed heads a single shared head needs no
gate, where the official code wants one.

Numbers are checked in ``tests/models/test_transnext.py`` against a plain network.

Shapes: image (B, 3, Y, X) → logits (B, num_classes); maps (B, C_i, ⌈Y/s⌉, ⌈X/s⌉), s = 4, 8, 16, 32.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, LayerNorm2d
from timm.models import generate_default_cfgs, register_notrace_module
from torch import Tensor, nn

from attn_core import attention as attend
from attn_core import neighborhood_scores, neighborhood_values, routed_heads
from attn_core.catalog import Card
from attn_core.nn import HeadRouter
from attn_core.weights import KeyMap
from vision_models.backbone import Stage, StagedBackbone
from vision_models.initialization import trunc_normal_
from vision_models.layers.mixture_of_heads import MOH, Heads, heads_of_blocks
from vision_models.layers.token_maps import DepthwiseConv, Linear, init_linear
from vision_models.registration import pretrained_cfg, timm_entries

__all__ = ["TransNeXt"]

EPS = 1e-6
EMBED_EPS = 1e-5  # of the norms behind convolutions and the pooled map
STRIDE = 4
WINDOW = 3
REACH = 8.0  # coordinates are scaled so that the training image's side has this length
HIDDEN = 512  # of the network that makes biases of positions
SHARPNESS = 1 / 0.24  # of the softmax at the start


def pooled_side(side: int, ratio: int) -> int:
    """Cells of a pooled axis."""
    return max(side // ratio, 1)


def pooling(side: int, cells: int, like: Tensor) -> Tensor:
    """(cells, side): the means that adaptive pooling takes, as a matrix; a graph being exported has no sizes yet."""
    cell, place = torch.arange(cells, device=like.device)[:, None], torch.arange(side, device=like.device)
    first, end = cell * side // cells, -(-(cell + 1) * side // cells)
    inside = ((place >= first) & (place < end)).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


def steps(side: int, ratio: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """All distances from a cell of an axis to the middle of a pooled one, and the number of each (side, cells)."""
    place = torch.arange(side, device=device)
    if ratio == 1:
        return torch.arange(1 - side, side, device=device).float(), place[:, None] - place + (side - 1)
    cells = pooled_side(side, ratio)
    if not torch.compiler.is_exporting() and side % cells == 0:  # all pooled cells have one width
        width = side // cells
        last = width * (cells - 1)
        distances = torch.arange(-last, side, device=device).float() - (width - 1) / 2
        return distances, place[:, None] - width * torch.arange(cells, device=device) + last
    cell = torch.arange(cells, device=device)
    middle = cell * side // cells + -(-(cell + 1) * side // cells) - 1  # twice of it
    return torch.arange(-2 * side, 2 * side + 1, device=device) / 2, 2 * place[:, None] - middle + 2 * side


class PositionBias(nn.Module):
    """What joins scores of a map with its pooled map: a network of the distance, its logarithm taken.

    Args:
        ratio: how many times smaller a side of the pooled map is.
        side: of the map in training, for which distances are scaled.
    """

    def __init__(self, dim: int, num_heads: int, ratio: int, side: int, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.ratio = ratio
        self.side = side
        start = math.log(math.expm1(SHARPNESS))  # whose softplus that is
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), start, **dd))
        self.query_embedding = nn.Parameter(trunc_normal_(torch.empty(num_heads, 1, dim // num_heads, **dd), std=0.02))
        self.cpb_fc1 = Linear(2, HIDDEN, **dd)
        self.cpb_fc2 = Linear(HIDDEN, num_heads, **dd)

    def bias(self, height: int, width: int) -> Tensor:
        """(heads, N, M): of every cell to every pooled one."""
        weight = self.cpb_fc1.weight
        (down, row), (right, column) = (steps(side, self.ratio, weight.device) for side in (height, width))
        far = torch.stack(torch.broadcast_tensors(down[:, None], right), 2).to(
            torch.promote_types(weight.dtype, torch.float32)
        )
        far = far / max(self.side - 1, 1) * REACH
        far = far.sign() * (far.abs() + 1).log2() / math.log2(REACH)
        table = self.cpb_fc2(F.relu(self.cpb_fc1(far.to(weight.dtype))))
        number = row[:, None, :, None] * len(right) + column[:, None]
        return (
            table.flatten(0, 1).T[:, number.flatten()].unflatten(1, (height * width, number.shape[2] * number.shape[3]))
        )

    def scaled(self, q: Tensor, keys: Tensor) -> Tensor:
        """Queries (B, heads, N, D) of length 1 as the softmax takes them; keys: how many each sees, N or one."""
        return (q + self.query_embedding) * F.softplus(self.temperature) * keys.log()[:, None]


@register_notrace_module  # the bias depends on the size of the map, which FX must not follow
class MapAttention(PositionBias):
    """Cosine attention of the whole map. (B, Y, X, dim) → same."""

    def __init__(self, dim: int, num_heads: int, side: int, heads: Heads | None, *, qkv_bias: bool, **dd: Any) -> None:
        super().__init__(dim, num_heads, 1, side, **dd)
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.router = None if heads is None else HeadRouter(dim, num_heads, *heads, **dd)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        seen = tokens.new_ones(tokens.shape[1]).sum()[None]
        q, k = self.scaled(F.normalize(q, dim=-1), seen), F.normalize(k, dim=-1)
        bias = self.bias(x.shape[1], x.shape[2])[None]
        if self.router is None:
            out = attend(q, k, v, scale=1.0, bias=bias)[0]
        else:
            out = routed_heads(q, k, v, self.router(tokens).gates, scale=1.0, bias=bias)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


@register_notrace_module  # pools by the size of the map, which FX must not follow
class AggregatedAttention(PositionBias):
    """Cosine attention to the window around a token and to a pooled map, in one softmax. (B, Y, X, dim) → same."""

    def __init__(
        self, dim: int, num_heads: int, ratio: int, side: int, heads: Heads | None, *, qkv_bias: bool, **dd: Any
    ) -> None:
        super().__init__(dim, num_heads, ratio, side, **dd)
        self.q = Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.sr = Linear(dim, dim, **dd)
        self.norm = nn.LayerNorm(dim, eps=EMBED_EPS, **dd)
        slots = WINDOW * WINDOW
        self.relative_pos_bias_local = nn.Parameter(trunc_normal_(torch.empty(num_heads, slots, **dd), std=0.0004))
        tokens = torch.empty(num_heads, dim // num_heads, slots, **dd)
        self.learnable_tokens = nn.Parameter(trunc_normal_(tokens, std=0.02))
        self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, slots, **dd))
        self.router = None if heads is None else HeadRouter(dim, num_heads, *heads, **dd)

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[1], x.shape[2])
        q = F.normalize(self.q(x).flatten(1, 2).unflatten(2, (self.num_heads, -1)).transpose(1, 2), dim=-1)
        k, v = self.kv(x).unflatten(3, (2, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5).unbind(0)
        pooled = self.pooled(x)
        sharp = self.scaled(q, self.seen(x, pooled.shape[1]))
        k_pool, v_pool = self.kv(pooled).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        from_pool, lse_pool = attend(sharp, F.normalize(k_pool, dim=-1), v_pool, scale=1.0, bias=self.bias(*grid)[None])

        scores = neighborhood_scores(sharp.unflatten(2, grid), F.normalize(k, dim=-1), WINDOW, border="truncated")
        scores = (scores.flatten(2, 3) + self.relative_pos_bias_local[:, None]).to(lse_pool.dtype)
        lse = torch.logaddexp(scores.logsumexp(3), lse_pool)[..., None]
        weights = (scores - lse).exp().to(q.dtype) + q @ self.learnable_tokens + self.learnable_bias
        from_window = neighborhood_values(weights.unflatten(2, grid), v, WINDOW, border="truncated").flatten(2, 3)
        out = from_window + (lse_pool[..., None] - lse).exp().to(q.dtype) * from_pool
        out = out.transpose(1, 2)
        if self.router is not None:
            out = out * self.router(x.flatten(1, 2)).gates[..., None]
        return self.proj(out.reshape(x.shape))

    def pooled(self, x: Tensor) -> Tensor:
        """(B, Y, X, dim) → the tokens (B, M, dim) of the pooled map."""
        x = F.gelu(self.sr(x))
        rows, columns = (pooled_side(side, self.ratio) for side in x.shape[1:3])
        if torch.compiler.is_exporting():
            down, right = pooling(x.shape[1], rows, x), pooling(x.shape[2], columns, x)
            x = torch.einsum("py,byxc,qx->bpqc", down, x, right)
        else:
            x = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), (rows, columns)).permute(0, 2, 3, 1)
        return self.norm(x.flatten(1, 2))

    def seen(self, x: Tensor, pooled: int) -> Tensor:
        """(N,): keys that each token sees, those of its window inside the map and the pooled ones."""
        down, right = (torch.arange(side, device=x.device) for side in x.shape[1:3])
        rows, columns = (
            (at > 0).to(x.dtype) + (at < side - 1) + 1 for at, side in ((down, x.shape[1]), (right, x.shape[2]))
        )
        return (rows[:, None] * columns).flatten() + pooled


class GatedMlp(nn.Module):
    """Half of the hidden channels, through a depthwise convolution and GELU, gate the others. (B, Y, X, dim) → same."""

    def __init__(self, dim: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 2 * hidden, **dd)
        self.dwconv = DepthwiseConv(hidden, 3, **dd)
        self.fc2 = Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        gate, x = self.fc1(x).chunk(2, dim=3)
        return self.fc2(F.gelu(self.dwconv(gate)) * x)


class Block(nn.Module):
    """Attention, gated MLP, each with a residual. (B, Y, X, dim) → same."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float, **dd: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.mlp = GatedMlp(dim, int(2 * int(dim * mlp_ratio) / 3), **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Overlapping patches, then a norm. (B, C, Y, X) → (B, dim, ⌈Y/stride⌉, ⌈X/stride⌉)."""

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int, **dd: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride=stride, padding=kernel // 2, **dd)
        self.norm = LayerNorm2d(dim, eps=EMBED_EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class NormedStage(Stage):
    """A stage that ends with a norm, which the next one starts from."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module) -> None:
        super().__init__(downsample, blocks)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, Y, X) → (B, dim, Y', X')."""
        return self.norm(super().forward(x))


class TransNeXt(StagedBackbone):
    """The classification network and, through timm's feature interfaces, a backbone for any resolution.

    Args:
        depths, embed_dims, num_heads, mlp_ratios: of each stage; two thirds of the MLP's width are used.
        sr_ratios: how many times a side of the pooled map is smaller; 1: tokens see the whole map.
        shared_heads, routed_heads: of each stage: heads that every token takes, and how many it chooses among the
            others (mixture of heads). None: all heads of all tokens.
        img_size: side of the images that distances are scaled for, in training.

    Raises:
        ValueError: options that contradict each other or the widths.
    """

    undecayed = (".query_embedding", ".relative_pos_bias_local", ".temperature", "cpb_fc1.weight", "cpb_fc2.weight")

    def __init__(
        self,
        depths: Sequence[int] = (5, 5, 22, 5),
        embed_dims: Sequence[int] = (72, 144, 288, 576),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        *,
        shared_heads: int | Sequence[int] | None = None,
        routed_heads: int | Sequence[int] | None = None,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        given = {"embed_dims": embed_dims, "num_heads": num_heads, "mlp_ratios": mlp_ratios, "sr_ratios": sr_ratios}
        for argument, values in given.items():
            if len(values) != len(depths):
                raise ValueError(
                    f"TransNeXt: {argument} must have one entry for each of {len(depths)} stages, got {values}"
                )
        for dim, count, ratio in zip(embed_dims, num_heads, sr_ratios, strict=True):
            if dim % count:
                raise ValueError(f"TransNeXt: num_heads must divide the width of its stage, got {count} and {dim}")
            if ratio < 1:
                raise ValueError(f"TransNeXt: sr_ratios must be positive, got {ratio}")
        if img_size < 1:
            raise ValueError(f"TransNeXt: img_size must be positive, got img_size={img_size}")
        heads = heads_of_blocks("TransNeXt", shared_heads, routed_heads, len(depths))

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.feature_info = []
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()

        def block(stage: int) -> Block:
            dim, count, side = embed_dims[stage], num_heads[stage], img_size // (STRIDE << stage)
            if sr_ratios[stage] == 1:
                attn = MapAttention(dim, count, side, heads[stage], qkv_bias=qkv_bias, **dd)
            else:
                attn = AggregatedAttention(dim, count, sr_ratios[stage], side, heads[stage], qkv_bias=qkv_bias, **dd)
            return Block(dim, attn, mlp_ratios[stage], rates.pop(0), **dd)

        self.stem = PatchEmbed(in_chans, embed_dims[0], 2 * STRIDE - 1, STRIDE, **dd)
        stages: list[nn.Module] = []
        for i, depth in enumerate(depths):
            smaller = PatchEmbed(embed_dims[i - 1], embed_dims[i], 3, 2, **dd) if i else nn.Identity()
            norm = LayerNorm2d(embed_dims[i], eps=EPS, **dd) if i + 1 < len(depths) else nn.Identity()
            stages.append(NormedStage(smaller, [block(i) for _ in range(depth)], norm))
            self.feature_info.append({"num_chs": embed_dims[i], "reduction": STRIDE << i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(embed_dims[-1], eps=EPS, **dd)
        self.head = ClassifierHead(embed_dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.apply(init_weights)

    @property
    def fixed_size(self) -> str:
        """Why an exported graph serves one image size alone."""
        return "torch.export ties the table of distances to the size of the map"


def init_weights(module: nn.Module) -> None:
    """Truncated normal weights of linear layers, normal ones of convolutions by what they give to; zero biases."""
    init_linear(module)
    if isinstance(module, nn.Conv2d):
        gives = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / gives) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, AggregatedAttention):  # a convolution in the official code
        nn.init.normal_(module.sr.weight, std=(2 / module.sr.out_features) ** 0.5)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue, reportOperatorIssue]


_STAGES = tuple(
    pair
    for i in range(4)
    for pair in (
        (rf"^stages\.{i}\.downsample\.", f"patch_embed{i + 1}."),
        (rf"^stages\.{i}\.blocks\.", f"block{i + 1}."),
        (rf"^stages\.{i}\.norm\.", f"norm{i + 1}."),
    )
)
KEY_MAP: KeyMap = {
    "transnext": (
        (r"^norm\.", "norm4."),
        *_STAGES,
        (r"^stem\.", "patch_embed1."),
        (r"\.attn\.router\.", ".attn."),
        (r"\.dwconv\.", ".dwconv.dwconv."),
        (r"^head\.fc\.", "head."),
    )
}
TransNeXt.key_map = KEY_MAP

_SMALL: dict[str, Any] = {}
_TINY: dict[str, Any] = {"depths": (2, 2, 15, 2)}
_BASE: dict[str, Any] = {"depths": (5, 5, 23, 5), "embed_dims": (96, 192, 384, 768), "num_heads": (4, 8, 16, 32)}
_TEST: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dims": (12, 16, 24, 32), "num_heads": (2, 2, 3, 4),
                         "mlp_ratios": (2, 2, 2, 2), "img_size": 96}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "transnext_micro": {**_TINY, "embed_dims": (48, 96, 192, 384), "num_heads": (2, 4, 8, 16)},
    "transnext_micro_aaaa_256": {
        **_TINY,
        "embed_dims": (48, 96, 192, 384),
        "num_heads": (2, 4, 8, 16),
        "sr_ratios": (16, 8, 4, 2),
        "img_size": 256,
    },
    "transnext_tiny": _TINY,
    "transnext_small": _SMALL,
    "transnext_base": _BASE,
    "moh_transnext_small_80": {**_SMALL, "shared_heads": (3, 6, 3, 8), "routed_heads": (0, 0, 6, 12)},
    "moh_transnext_small_75": {**_SMALL, "shared_heads": (3, 6, 3, 4), "routed_heads": (0, 0, 6, 12)},
    "moh_transnext_base_75": {**_BASE, "shared_heads": (4, 8, 4, 5), "routed_heads": (0, 0, 8, 16)},
    "moh_transnext_base_50": {**_BASE, "shared_heads": (2, 2, 2, 4), "routed_heads": (2, 4, 6, 8)},
    "test_transnext": _TEST,
    "test_moh_transnext": {**_TEST, "shared_heads": (2, 1, 1, 2), "routed_heads": (0, 1, 1, 1)},
}

TRANSNEXT = Card(
    family="TransNeXt",
    paper="2311.17132",
    code="https://github.com/DaiShiResearch/TransNeXt",
    license="Apache-2.0",
    test="models/test_transnext.py",
)
CARDS = {
    "transnext_micro": TRANSNEXT("12.8 M parameters, 2.7 G multiply-adds at 224²", "top-1 82.5 %"),
    "transnext_micro_aaaa_256": TRANSNEXT("Windows in all stages, 256²: 13.1 M parameters", "top-1 82.6 %"),
    "transnext_tiny": TRANSNEXT("28.2 M parameters, 5.7 G multiply-adds at 224²", "top-1 84.0 %"),
    "transnext_small": TRANSNEXT("49.7 M parameters, 10.3 G multiply-adds at 224²", "top-1 84.7 %"),
    "transnext_base": TRANSNEXT("89.7 M parameters, 18.4 G multiply-adds at 224²", "top-1 84.8 %"),
    "moh_transnext_small_80": MOH("MoH-ViT-S, 80 % of the heads: 49.9 M parameters, 10.4 G multiply-adds at 224²"),
    "moh_transnext_small_75": MOH("MoH-ViT-S, 75 % of the heads: 49.9 M parameters"),
    "moh_transnext_base_75": MOH("MoH-ViT-B, 75 % of the heads: 90.0 M parameters, 18.4 G multiply-adds at 224²"),
    "moh_transnext_base_50": MOH("MoH-ViT-B, 50 % of the heads: 90.0 M parameters"),
    "test_transnext": TRANSNEXT("Small enough for tests (< 0.5 M parameters)"),
    "test_moh_transnext": MOH("Small enough for tests (< 0.5 M parameters)"),
}
CARDS = {name: replace(card, test=TRANSNEXT.test) for name, card in CARDS.items()}


def _cfg(name: str) -> dict[str, Any]:
    return pretrained_cfg(
        VARIANTS[name].get("img_size", 224),
        first_conv="stem.proj",
        license="apache-2.0",
        paper_ids=f"arXiv:{CARDS[name].paper}",
        origin_url=CARDS[name].code,
    )


default_cfgs = generate_default_cfgs({name: _cfg(name) for name in VARIANTS})
ENTRIES = timm_entries(TransNeXt, VARIANTS, CARDS, default_cfgs)
