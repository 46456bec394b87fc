"""SpectFormer: spectral gates in the first layers, attention in the others; and GFNet, which has gates alone.

Papers: Patro et al., SpectFormer: Frequency and Attention is what you need in a Vision Transformer, arXiv 2304.06446;
Rao et al., Global Filter Networks for Image Classification, NeurIPS 2021, arXiv 2107.00645. Official code:
badripatro/SpectFormers, ``vanilla_architecture/spectformer.py`` and ``hierarchical_architecture/spectformer.py``;
raoyongming/GFNet, ``gfnet.py``.

The same as there: every number. A spectral block of GFNet and of the plain SpectFormer has one residual around gate and
MLP, an attention block two. In the hierarchical network all blocks have two; norms behind its convolutions have an eps
of 1e-5, all others of 1e-6; its classifier reads a class token that starts as the mean and attends to the tokens once.

What differs: any image size works, with gates and position embeddings resized, where the official code fails. Heads
divide the width of ``spectformer_ti`` (4) and ``spectformer_b`` (8): the official file has 6 for all, which cannot run
there. The result of a gate has the dtype of its input.

Numbers are checked in ``tests/models/test_spectformer.py`` against a plain network, its gates as sums over shifts.

Shapes: image (B, 3, Y, X) → logits (B, num_classes); maps (B, C_i, ⌊Y/s⌋, ⌊X/s⌋) of the plain ones and of GFNet,
⌈Y/s⌉ of the hierarchical ones, with s = 4, 8, 16, 32 or 16 alone.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, LayerNorm2d
from timm.models import generate_default_cfgs, register_notrace_function
from torch import Tensor, nn

from attn_core import attention as attend
from attn_core.catalog import Card
from attn_core.weights import KeyMap
from vision_models.backbone import Stage, StagedBackbone
from vision_models.initialization import trunc_normal_
from vision_models.layers.spectral_gate import SpectralGate, resized_gate, spectrum
from vision_models.layers.token_maps import DepthwiseConv, Linear, Mlp, init_linear
from vision_models.registration import STAGES, pretrained_cfg, timm_entries

__all__ = ["SpectFormer", "SpectFormerH"]

EPS = 1e-6
CONV_EPS = 1e-5  # of norms behind convolutions in the hierarchical network


def heads_of(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) or (B, Y, X, C) → (B, heads, N, D)."""
    return x.flatten(1, -2).unflatten(2, (num_heads, x.shape[-1] // num_heads)).transpose(1, 2)


@register_notrace_function  # attention takes no proxies of FX
def mixed(q: Tensor, k: Tensor, v: Tensor, num_heads: int, like: Tensor) -> Tensor:
    """Softmax attention of tokens or maps with their heads side by side in the channels, in the shape of ``like``."""
    out, _ = attend(heads_of(q, num_heads), heads_of(k, num_heads), heads_of(v, num_heads))
    return out.transpose(1, 2).reshape(like.shape)


class Attention(nn.Module):
    """Softmax attention of the whole map. (B, Y, X, dim) → same."""

    def __init__(self, dim: int, num_heads: int, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(mixed(*self.projected(x), self.num_heads, x))

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, Y, X, dim)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return q, k, v


class SplitAttention(nn.Module):
    """The same with queries projected apart; x itself asks, or the first ``asking`` of its tokens. (…, dim) → same."""

    def __init__(self, dim: int, num_heads: int, asking: int | None = None, **dd: Any) -> None:
        super().__init__()
        self.num_heads, self.asking = num_heads, asking
        self.q = Linear(dim, dim, **dd)
        self.kv = Linear(dim, 2 * dim, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projected(x)
        return self.proj(mixed(q, k, v, self.num_heads, q))

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (…, dim)."""
        k, v = self.kv(x).chunk(2, dim=-1)
        return self.q(x if self.asking is None else x[:, : self.asking]), k, v


class SpectralBlock(nn.Module):
    """One residual around norm, gate, norm and MLP, perhaps scaled for each channel. (B, Y, X, dim) → same."""

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        mlp_ratio: float,
        layer_scale: float | None,
        drop_path: float,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.filter = SpectralGate(dim, grid, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale, **dd))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.mlp(self.norm2(self.filter(self.norm1(x))))
        return x + self.drop_path(out if self.gamma is None else self.gamma * out)


class Block(nn.Module):
    """Mixing of tokens, MLP, each with a residual. (B, Y, X, dim) → same."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float, **dd: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.mlp = mlp
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


@register_notrace_function  # compares sizes, which FX must not follow
def with_position(x: Tensor, table: Tensor, built: tuple[int, int]) -> Tensor:
    """The map (B, C, Y, X) plus the table (1, N, C) of the map ``built``, stretched to it."""
    cells = table.transpose(1, 2).unflatten(2, built)
    if torch.compiler.is_exporting() or x.shape[2] != built[0] or x.shape[3] != built[1]:
        cells = F.interpolate(cells, size=(x.shape[2], x.shape[3]), mode="bicubic")
    return x + cells


class PatchStem(nn.Module):
    """Patches, a rest being cut off, plus their positions. (B, 3, Y, X) → (B, dim, Y/patch, X/patch)."""

    def __init__(self, in_chans: int, dim: int, patch: int, grid: tuple[int, int], **dd: Any) -> None:
        super().__init__()
        self.grid = grid
        self.proj = nn.Conv2d(in_chans, dim, patch, stride=patch, **dd)
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, grid[0] * grid[1], dim, **dd), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        return with_position(self.proj(x), self.pos_embed, self.grid)


class PatchDown(nn.Module):
    """Four neighbors become one token, a rest being cut off. (B, C, Y, X) → (B, dim, Y/2, X/2)."""

    def __init__(self, in_dim: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, 2, stride=2, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def fit_position(stem: PatchStem, value: Tensor) -> Tensor:
    """A checkpoint's table (1, N, C) of a square map, stretched to ours."""
    side = math.isqrt(value.shape[1]) if value.ndim == 3 else 0
    if side * side != value.shape[1] or value.shape[2] != stem.pos_embed.shape[2] or (side, side) == stem.grid:
        return value
    cells = F.interpolate(value.transpose(1, 2).unflatten(2, (side, side)), size=stem.grid, mode="bicubic")
    return cells.flatten(2).transpose(1, 2)


def fit_gate(own: Any, value: Tensor) -> Tensor:
    """A checkpoint's weight (Y, Y/2 + 1, C, 2) of a square map, resized to ours."""
    if value.ndim != 4 or value.shape[1] != value.shape[0] // 2 + 1 or value.shape[2:] != own.complex_weight.shape[2:]:
        return value
    built = (value.shape[0], value.shape[0])
    return value if built == own.grid else torch.view_as_real(resized_gate(spectrum(value), built, own.grid))


class Spectral(StagedBackbone):
    """What both kinds of networks share: tables that fit checkpoints of another image size."""

    def fit_table(self, name: str, value: Tensor) -> Tensor:
        """A checkpoint's value of a parameter; gates and position embeddings of another size resized to ours."""
        own: Any = self.get_submodule(name.rpartition(".")[0]) if "." in name else self
        if name.endswith(".complex_weight"):
            return fit_gate(own, value)
        return fit_position(own, value) if name.endswith(".pos_embed") else value


class SpectFormer(Spectral):
    """SpectFormer with tokens of one size, and GFNet; a classification network, and by timm's feature interfaces more.

    Args:
        depths, dims: of each stage. One stage makes the isotropic network, whose blocks are stages to take maps from.
        spectral: how many of the first blocks have gates; the others have attention. None: all, which is GFNet.
        num_heads: of the attention, for all blocks.
        patch_size: side of a patch; later stages shrink the map by 2.
        layer_scale: start of the scales of spectral blocks; None: there are none.
        img_size: the image that gates and position embeddings are made for; other sizes resize them.

    Raises:
        ValueError: options that contradict each other or the widths.
    """

    undecayed = (".pos_embed", ".gamma")

    def __init__(
        self,
        depths: Sequence[int] = (19,),
        dims: Sequence[int] = (384,),
        *,
        spectral: int | None = 4,
        num_heads: int = 6,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if len(depths) != len(dims):
            raise ValueError(
                f"SpectFormer: depths and dims must have one entry for each stage, got {depths} and {dims}"
            )
        total = sum(depths)
        gates = total if spectral is None else spectral
        if not 0 <= gates <= total:
            raise ValueError(f"SpectFormer: spectral must lie in 0…{total}, the number of blocks, got {spectral}")
        if gates < total and any(dim % num_heads for dim in dims):
            raise ValueError(f"SpectFormer: num_heads must divide the widths {tuple(dims)}, got num_heads={num_heads}")
        isotropic = len(depths) == 1
        self.min_side = patch_size << (len(depths) - 1)
        if patch_size < 1 or img_size < self.min_side:
            raise ValueError(
                f"SpectFormer: img_size must be at least {self.min_side}, of which the last stage has one token, and "
                f"patch_size positive, got {img_size} and {patch_size}"
            )

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = []
        rates = torch.linspace(0, drop_path_rate, total, device="cpu").tolist()
        side = img_size // patch_size

        def block(dim: int, side: int) -> nn.Module:
            number, rate = total - len(rates), rates.pop(0)
            if number < gates:
                return SpectralBlock(dim, (side, side), mlp_ratio, layer_scale, rate, **dd)
            return Block(dim, Attention(dim, num_heads, **dd), Mlp(dim, int(dim * mlp_ratio), **dd), rate, **dd)

        self.stem = PatchStem(in_chans, dims[0], patch_size, (side, side), **dd)
        stages: list[nn.Module] = []
        if isotropic:
            stages = [Stage(nn.Identity(), [block(dims[0], side)]) for _ in range(total)]
        else:
            for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
                downsample = PatchDown(dims[i - 1], dim, **dd) if i else nn.Identity()
                stages.append(Stage(downsample, [block(dim, side >> i) for _ in range(depth)]))
        for i in range(len(stages)):
            width, stride = (dims[0], patch_size) if isotropic else (dims[i], patch_size << i)
            self.feature_info.append({"num_chs": width, "reduction": stride, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(dims[-1], eps=EPS, **dd)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.apply(init_linear)


class ConvStem(nn.Sequential):
    """Convolutions with batch norms at half the size, one to a quarter, a norm. (B, 3, Y, X) → (B, dim, Y/4, X/4)."""

    def __init__(self, in_chans: int, hidden: int, dim: int, **dd: Any) -> None:
        layers: list[nn.Module] = []
        for width, kernel, stride in ((in_chans, 7, 2), (hidden, 3, 1), (hidden, 3, 1)):
            layers += [nn.Conv2d(width, hidden, kernel, stride, kernel // 2, bias=False, **dd)]
            layers += [nn.BatchNorm2d(hidden, **dd), nn.ReLU()]
        super().__init__()
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(hidden, dim, 3, stride=2, padding=1, **dd)
        self.norm = LayerNorm2d(dim, eps=CONV_EPS, **dd)


class ConvDown(nn.Sequential):
    """A 3×3 convolution of stride 2, then a norm. (B, C, Y, X) → (B, dim, Y/2, X/2)."""

    def __init__(self, in_dim: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, **dd)
        self.norm = LayerNorm2d(dim, eps=CONV_EPS, **dd)


class ConvMlp(nn.Module):
    """Linear, depthwise 3×3 convolution, GELU, linear. (B, Y, X, dim) → same."""

    def __init__(self, dim: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden, **dd)
        self.dwconv = DepthwiseConv(hidden, 3, **dd)
        self.fc2 = Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x))))


class NormedStage(Stage):
    """A stage whose map is normed on its way out. (B, C, Y, X) → (B, dim, Y', X')."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module) -> None:
        super().__init__(downsample, blocks)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, Y, X) → (B, dim, Y', X')."""
        return self.norm(super().forward(x))


class ClassBlock(nn.Module):
    """A class token that starts as the mean and reads all tokens once. (B, N, dim) → (B, 1 + N, dim), it first."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, **dd: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.attn = SplitAttention(dim, num_heads, asking=1, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)

    def forward(self, x: Tensor) -> Tensor:
        token = x.mean(1, keepdim=True)
        token = token + self.attn(self.norm1(torch.cat([token, x], 1)))
        token = token + self.mlp(self.norm2(token))
        return torch.cat([token, x], 1)


class ClassHead(nn.Module):
    """Class token, norm, classifier, and the token-labelling classifier of patches. (B, C, Y, X) → (B, num_classes).

    Args:
        post: what puts a class token in front of the tokens (B, N, dim).
        pool: ``"token"``, or ``""`` for the normed map and classes at each of its tokens.
        aux: classify every token too; half of the best logits over them are added to those of the class token.
    """

    def __init__(
        self, dim: int, num_classes: int, post: nn.Module, *, pool: str, drop_rate: float, aux: bool, **dd: Any
    ) -> None:
        super().__init__()
        self.post, self.norm = post, nn.LayerNorm(dim, eps=EPS, **dd)
        self.pool, self.num_features, self.has_aux = pool, dim, aux
        self.drop = nn.Dropout(drop_rate)
        self.set_classes(num_classes, **dd)

    def set_classes(self, num_classes: int, **dd: Any) -> None:
        """New classifiers; none where ``num_classes`` is 0."""
        dim = self.num_features
        self.fc = nn.Linear(dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.aux = nn.Linear(dim, num_classes, **dd) if num_classes > 0 and self.has_aux else None
        self.apply_start()

    def apply_start(self) -> None:
        """Narrow classifiers without bias."""
        init_linear(self.fc)
        if self.aux is not None:
            init_linear(self.aux)

    def reset(
        self, num_classes: int, pool: str | None = None, *, reset_other: bool = False, in_features: int, **dd: Any
    ) -> None:
        """A new classifier; ``reset_other`` leaves it alone, for maps of ``in_features``."""
        if pool is not None:
            check_pool(pool)
            self.pool = pool
        if reset_other:
            self.post, self.norm, self.has_aux = None, nn.Identity(), False
            self.num_features = in_features
        self.set_classes(num_classes, **dd)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.pool == "" or self.post is None:
            tokens = self.drop(self.norm(x.permute(0, 2, 3, 1)))
            return (tokens if pre_logits else self.fc(tokens)).permute(0, 3, 1, 2)
        tokens = self.tokens(x)
        if pre_logits:
            return tokens[:, 0]
        logits = self.fc(tokens[:, 0])
        return logits if self.aux is None else logits + 0.5 * self.aux(tokens[:, 1:]).amax(1)

    def tokens(self, x: Tensor) -> Tensor:
        """The class token and the tokens of the map, normed (B, 1 + N, C)."""
        assert self.post is not None
        return self.drop(self.norm(self.post(x.flatten(2).transpose(1, 2))))


def check_pool(pool: str) -> None:
    """Raises: ValueError: no way for a classifier to read tokens."""
    if pool not in ("token", ""):
        raise ValueError(f"SpectFormerH: global_pool must be 'token' or '', got global_pool={pool!r}")


class SpectFormerH(Spectral):
    """The hierarchical SpectFormer, a classification network and, by timm's feature interfaces, a dense backbone.

    Maps of all stages but the last are normed on their way out, and so they enter the next.

    Args:
        depths, dims, num_heads, mlp_ratios: of each of four stages; heads are of those with attention.
        stem_dim: width of the convolutions before the first stage.
        spectral: how many of the first stages have gates; the others have attention.
        token_label: a second classifier for every token of the last map, as trained with token labelling.
        img_size: the image that gates are made for; other sizes resize them.
        global_pool: what the classifier reads: ``"token"``, the class token, or ``""``, the whole map.

    Raises:
        ValueError: options that contradict each other or the widths.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 3),
        dims: Sequence[int] = (64, 128, 320, 448),
        num_heads: Sequence[int] = (2, 4, 10, 14),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        *,
        stem_dim: int = 32,
        spectral: int = 2,
        token_label: bool = False,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if not len(depths) == len(dims) == len(num_heads) == len(mlp_ratios) == 4:
            raise ValueError(
                "SpectFormerH: depths, dims, num_heads and mlp_ratios must have one entry for each of four stages, got "
                f"{depths}, {dims}, {num_heads}, {mlp_ratios}"
            )
        if not 0 <= spectral <= 4:
            raise ValueError(f"SpectFormerH: spectral must lie in 0…4, the number of stages, got spectral={spectral}")
        for dim, heads in zip(dims[min(spectral, 3) :], num_heads[min(spectral, 3) :], strict=True):
            if dim % heads:
                raise ValueError(f"SpectFormerH: num_heads must divide the width of its stage, got {heads} and {dim}")
        if img_size < 1:
            raise ValueError(f"SpectFormerH: img_size must be positive, got img_size={img_size}")
        check_pool(global_pool)

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = []
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()

        def block(stage: int) -> Block:
            dim, side = dims[stage], -(-img_size // (4 << stage))
            gate = SpectralGate(dim, (side, side), **dd) if stage < spectral else None
            attn = SplitAttention(dim, num_heads[stage], **dd) if gate is None else gate
            return Block(dim, attn, ConvMlp(dim, int(dim * mlp_ratios[stage]), **dd), rates.pop(0), **dd)

        self.stem = ConvStem(in_chans, stem_dim, dims[0], **dd)
        stages: list[nn.Module] = []
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            downsample = ConvDown(dims[i - 1], dim, **dd) if i else nn.Identity()
            norm = LayerNorm2d(dim, eps=EPS, **dd) if i < 3 else nn.Identity()  # the last one's belongs to the head
            stages.append(NormedStage(downsample, [block(i) for _ in range(depth)], norm))
            self.feature_info.append({"num_chs": dim, "reduction": 4 << i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity()
        post = ClassBlock(dims[-1], num_heads[-1], mlp_ratios[-1], **dd)
        self.head = ClassHead(dims[-1], num_classes, post, pool=global_pool, drop_rate=drop_rate, aux=token_label, **dd)  # pyright: ignore[reportAttributeAccessIssue]
        self.apply(init_conv)
        self.apply(init_linear)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the layer groups for decay of the learning rate with depth, as timm asks; coarse: stages."""
        found = super().group_matcher(coarse)
        if not coarse:  # the norm of a stage goes with its blocks
            found["blocks"].insert(2, (r"^stages\.(\d+)\.norm", (9999,)))
        return found

    def forward_dense(self, x: Tensor, mix: tuple[int, int, int, int] | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the class token (B, classes) and of every token (B, Y·X, classes), for training by token labelling.

        Args:
            mix: (top, left, bottom, right) in tokens of the last map, rounded down: inside, every image is replaced by
                the one opposite in the batch, behind the stem, and the tokens' logits by those of that image.

        Raises: ValueError: the network was built without ``token_label``.
        """
        if self.head.aux is None or self.head.post is None:
            raise ValueError(
                "SpectFormerH.forward_dense: there is no classifier of tokens; build with token_label=True"
            )
        head: Any = self.head
        x = self.stem(self.prepared(x))
        x = exchanged(x, mix, 8)
        x = self.stages(x)
        tokens = head.tokens(x)
        dense = head.aux(tokens[:, 1:]).transpose(1, 2).unflatten(2, x.shape[2:])
        return head.fc(tokens[:, 0]), exchanged(dense, mix, 1).flatten(2).transpose(1, 2)


def exchanged(x: Tensor, box: tuple[int, int, int, int] | None, scale: int) -> Tensor:
    """The maps (B, C, Y, X) with a box, in cells of ``scale``, taken from the batch in opposite order."""
    if box is None:
        return x
    top, left, bottom, right = (scale * edge for edge in box)
    inside = torch.zeros(x.shape[2:], dtype=torch.bool, device=x.device)
    inside[top:bottom, left:right] = True
    return torch.where(inside, x.flip(0), x)


def init_conv(module: nn.Module) -> None:
    """Normal weights of variance 2 over the fan out, and zero biases."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_FC = (r"^head\.fc\.", "head.")
_PLAIN = ((r"^stem\.pos_embed", "pos_embed"), _FC)
KEY_MAP: KeyMap = {
    "isotropic": (*_PLAIN, (r"^stem\.proj\.", "patch_embed.proj."), (r"^stages\.(\d+)\.blocks\.0\.", r"blocks.\1.")),
    "pyramid": (
        *_PLAIN,
        (r"^stem\.proj\.", "patch_embed.0.proj."),
        (r"^stages\.(\d+)\.downsample\.proj\.", r"patch_embed.\1.proj."),
        (r"^stages\.(\d+)\.blocks\.", r"blocks.\1."),
    ),
}
# Stages count from 1 there.
KEY_MAP_H: KeyMap = {
    "hierarchical": (
        (r"^stem\.", "patch_embed1."),
        *((rf"^stages\.{i}\.downsample\.", f"patch_embed{i + 1}.") for i in range(1, 4)),
        *((rf"^stages\.{i}\.blocks\.", f"block{i + 1}.") for i in range(4)),
        *((rf"^stages\.{i}\.norm\.", f"norm{i + 1}.") for i in range(3)),
        (r"\.mlp\.dwconv\.", ".mlp.dwconv.dwconv."),
        (r"^head\.post\.", "post_network.0."),
        (r"^head\.norm\.", "norm4."),
        (r"^head\.aux\.", "aux_head."),
        _FC,
    ),
}
SpectFormer.key_map = KEY_MAP
SpectFormerH.key_map = KEY_MAP_H

_TI: dict[str, Any] = {"depths": (12,), "dims": (256,), "num_heads": 4}
_XS: dict[str, Any] = {"depths": (12,)}
_B: dict[str, Any] = {"dims": (512,), "num_heads": 8}
_GATES: dict[str, Any] = {"spectral": None}
_PYRAMID: dict[str, Any] = {**_GATES, "depths": (3, 3, 10, 3), "dims": (96, 192, 384, 768), "patch_size": 4}
_H: dict[str, Any] = {"depths": (3, 4, 12, 3), "dims": (64, 128, 320, 512), "num_heads": (2, 4, 10, 16), "stem_dim": 64}
_H_L: dict[str, Any] = {"depths": (3, 6, 18, 3), "dims": (96, 192, 384, 512), "num_heads": (3, 6, 12, 16),
                        "stem_dim": 64}  # fmt: skip
_TEST: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (12, 16, 24, 32), "img_size": 96}
VARIANTS: dict[str, dict[str, Any]] = {
    "spectformer_ti": _TI,
    "spectformer_xs": _XS,
    "spectformer_s": {},
    "spectformer_b": _B,
    "gfnet_ti": {**_TI, **_GATES},
    "gfnet_xs": {**_XS, **_GATES},
    "gfnet_s": _GATES,
    "gfnet_b": {**_B, **_GATES},
    "gfnet_h_ti": {**_PYRAMID, "dims": (64, 128, 256, 512), "layer_scale": 1e-3},
    "gfnet_h_s": {**_PYRAMID, "layer_scale": 1e-5},
    "gfnet_h_b": {**_PYRAMID, "depths": (3, 3, 27, 3), "layer_scale": 1e-6},
    "test_spectformer": {"depths": (4,), "dims": (48,), "spectral": 2, "num_heads": 4, "img_size": 96},
    "test_gfnet": {**_TEST, **_GATES, "patch_size": 4, "layer_scale": 0.5},
}
VARIANTS_H: dict[str, dict[str, Any]] = {
    "spectformer_h_s": {},
    "spectformer_h_b": _H,
    "spectformer_h_l": _H_L,
    "spectformer_h_s_tl": {"token_label": True},
    "spectformer_h_b_tl": {**_H, "token_label": True},
    "spectformer_h_l_tl": {**_H_L, "token_label": True},
    "test_spectformer_h": {
        **_TEST,
        "num_heads": (1, 2, 2, 4),
        "mlp_ratios": (2, 2, 2, 2),
        "stem_dim": 8,
        "token_label": True,
    },
}


def _cfg(name: str, card: Card) -> dict[str, Any]:
    hierarchical = name in VARIANTS_H
    isotropic = not hierarchical and len(VARIANTS[name].get("depths", (19,))) == 1
    size = 96 if name.startswith("test_") else 224
    return pretrained_cfg(
        size,
        crop_pct=0.9,
        first_conv="stem.conv.0" if hierarchical else "stem.proj",
        pool_size=(size // (16 if isotropic else 32),) * 2,
        license="mit" if "gfnet" in name else "",
        paper_ids=f"arXiv:{card.paper}",
        origin_url=card.code,
    )


SPECTFORMER = Card(
    family="SpectFormer",
    paper="2304.06446",
    code="https://github.com/badripatro/SpectFormers",
    license="",
    test="models/test_spectformer.py",
)
GFNET = Card(
    family="GFNet",
    paper="2107.00645",
    code="https://github.com/raoyongming/GFNet",
    license="MIT",
    test=SPECTFORMER.test,
)
_TL = "the same with token labelling"
CARDS = {
    "spectformer_ti": SPECTFORMER("9.2 M parameters, 1.8 G multiply-adds at 224²", "top-1 76.9 %"),
    "spectformer_xs": SPECTFORMER("20.0 M parameters, 4.0 G multiply-adds at 224²", "top-1 80.2 %"),
    "spectformer_s": SPECTFORMER("32.4 M parameters, 6.6 G multiply-adds at 224²", "top-1 81.7 %"),
    "spectformer_b": SPECTFORMER("57.2 M parameters, 11.6 G multiply-adds at 224²", "top-1 82.1 %"),
    "gfnet_ti": GFNET("14×14 tokens: 7.5 M parameters, 1.3 G multiply-adds at 224²", "top-1 74.6 %"),
    "gfnet_xs": GFNET("14×14 tokens: 16.0 M parameters, 2.8 G multiply-adds at 224²", "top-1 78.6 %"),
    "gfnet_s": GFNET("14×14 tokens: 25.0 M parameters, 4.5 G multiply-adds at 224²", "top-1 80.0 %"),
    "gfnet_b": GFNET("14×14 tokens: 43.0 M parameters, 7.9 G multiply-adds at 224²", "top-1 80.7 %"),
    "gfnet_h_ti": GFNET("15.0 M parameters, 2.0 G multiply-adds at 224²", "top-1 80.1 %"),
    "gfnet_h_s": GFNET("32.0 M parameters, 4.5 G multiply-adds at 224²", "top-1 81.5 %"),
    "gfnet_h_b": GFNET("54.0 M parameters, 8.4 G multiply-adds at 224²", "top-1 82.9 %"),
    "test_spectformer": SPECTFORMER("Small enough for tests (< 0.5 M parameters)"),
    "test_gfnet": GFNET("Small enough for tests (< 0.5 M parameters)"),
    "spectformer_h_s": SPECTFORMER("Four stages: 21.8 M parameters, 4.1 G multiply-adds at 224²"),
    "spectformer_h_b": SPECTFORMER("Four stages: 32.5 M parameters, 6.6 G multiply-adds at 224²"),
    "spectformer_h_l": SPECTFORMER("Four stages: 54.2 M parameters, 13.2 G multiply-adds at 224²"),
    "spectformer_h_s_tl": SPECTFORMER(f"{_TL}: 22.2 M parameters", "top-1 84.3 % (token labels)"),
    "spectformer_h_b_tl": SPECTFORMER(f"{_TL}: 33.1 M parameters"),
    "spectformer_h_l_tl": SPECTFORMER(f"{_TL}: 54.7 M parameters", "top-1 85.7 % (token labels)"),
    "test_spectformer_h": SPECTFORMER("Four stages: small enough for tests (< 0.5 M parameters)"),
}
default_cfgs = generate_default_cfgs({name: _cfg(name, CARDS[name]) for name in (*VARIANTS, *VARIANTS_H)})


def _maps(name: str) -> dict[str, Any]:
    count = len(VARIANTS.get(name, _TEST).get("depths", (19,)))
    return {**STAGES} if count > 1 else {"flatten_sequential": True, "out_indices": (-3, -2, -1)}


ENTRIES = [
    *timm_entries(SpectFormer, VARIANTS, CARDS, default_cfgs, maps=_maps),
    *timm_entries(SpectFormerH, VARIANTS_H, CARDS, default_cfgs),
]
