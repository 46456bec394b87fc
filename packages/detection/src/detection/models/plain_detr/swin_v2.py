"""Swin Transformer V2 with global blocks, Plain-DETR's backbone: the map of its last stage, stride 32.

Papers: Liu et al., CVPR 2022, arXiv 2111.09883; global blocks: Lin et al., ICCV 2023, arXiv 2308.01904. Official code:
https://github.com/impiga/Plain-DETR, ``models/swin_transformer_v2.py``.

The same: numbers and names of parameters. Unlike timm's Swin V2 it has norms with eps 1e-6, divides by norm + 5e-5 in
cosine attention, and its windows reach into zero padding unmasked. What differs: coordinate tables are no buffers of
the checkpoint, maps stay channels-last. Checked as the backbone of the models in
``models/plain_detr/test_detector.py``.

Shapes: (B, 3, Y, X) → (B, 8·embed_dim, ⌈Y/32⌉, ⌈X/32⌉).
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import DropPath, trunc_normal_  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attn_core import attention

EPS = 1e-6


def _offset_index(height: int, width: int) -> Tensor:
    """(N, N) row of the offset table for each pair of cells, N = height·width."""
    # What is made while a graph is traced stands for a tensor and must not be kept.
    return _made_index(height, width) if torch.compiler.is_compiling() else _kept_index(height, width)


@lru_cache(maxsize=32)
def _kept_index(height: int, width: int) -> Tensor:
    with torch.inference_mode(False):  # else a prediction would keep a table that no training could read
        return _made_index(height, width)


def _made_index(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y + height - 1) * (2 * width - 1) + x[:, None] - x + width - 1


class CosineAttention(nn.Module):
    """Scaled cosine attention with a bias from log-spaced offsets (Swin V2, eq. 2–4), within windows or over all.

    Args:
        pretrained_window: side of the windows in pre-training; offsets are divided by it less 1.

    Shapes: (B, height·width, dim) → same.
    """

    def __init__(self, dim: int, num_heads: int, pretrained_window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.pretrained_window = pretrained_window
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(inplace=True), nn.Linear(512, num_heads, bias=False))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def bias(self, height: int, width: int) -> Float[Tensor, "H N N"]:
        """16·sigmoid of the MLP of sign(o)·log₂(1 + |o|)/3, o = 8·offset/(pretrained window − 1)."""
        weight = self.qkv.weight
        axes = [torch.arange(1 - n, n, device=weight.device, dtype=weight.dtype) for n in (height, width)]
        offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1) / (self.pretrained_window - 1) * 8
        table = self.cpb_mlp(offsets.sign() * torch.log2(offsets.abs() + 1) / math.log2(8)).flatten(0, 1)
        index = _offset_index(height, width).to(weight.device)
        return 16 * torch.sigmoid(table[index].permute(2, 0, 1))

    def forward(
        self, x: Float[Tensor, "B N C"], size: tuple[int, int], mask: Float[Tensor, "W N N"] | None = None
    ) -> Float[Tensor, "B N C"]:
        """Windows as images of the batch; ``mask`` holds −inf between parts that the shift brought together."""
        count, tokens, dim = x.shape
        shift = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, shift).view(count, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scale = self.logit_scale.clamp(max=math.log(100)).exp()
        q = q / (q.norm(dim=-1, keepdim=True) + 5e-5) * scale
        k = k / (k.norm(dim=-1, keepdim=True) + 5e-5)
        bias = self.bias(*size)[None]
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(count // len(mask), 1, 1, 1)
        out = attention(q.to(v.dtype), k.to(v.dtype), v, scale=1.0, bias=bias.to(v.dtype))[0]
        return self.proj(out.transpose(1, 2).reshape(count, tokens, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * ratio))
        self.fc2 = nn.Linear(int(dim * ratio), dim)

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each normalized after it (res-post-norm); ``window=0`` attends to the whole map.

    Shapes: (B, y, x, dim) → same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        shift: int,
        pretrained_window: int,
        drop_path: float,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.window = window
        self.shift = shift
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = CosineAttention(dim, num_heads, pretrained_window)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, mlp_ratio)

    def forward(self, x: Float[Tensor, "B y x C"]) -> Float[Tensor, "B y x C"]:
        """The map after attention and MLP, each normed before it is added."""
        mixed = self._windows(x) if self.window else self.attn(x.flatten(1, 2), (x.shape[1], x.shape[2])).view_as(x)
        x = x + self.drop_path(self.norm1(mixed))
        return x + self.drop_path(self.norm2(self.mlp(x)))

    def _windows(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        side, shift = self.window, self.shift
        padded = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        rows, columns = padded.shape[1] // side, padded.shape[2] // side
        mask = None
        if shift:
            padded = padded.roll((-shift, -shift), (1, 2))
            mask = self._border_mask(padded)
        windows = padded.view(batch, rows, side, columns, side, dim).transpose(2, 3).reshape(-1, side * side, dim)
        out = self.attn(windows, (side, side), mask)
        out = out.view(batch, rows, columns, side, side, dim).transpose(2, 3).reshape(padded.shape)
        if shift:
            out = out.roll((shift, shift), (1, 2))
        return out[:, :height, :width]

    def _border_mask(self, x: Tensor) -> Float[Tensor, "W N N"]:
        """−100 between cells that only the cyclic shift has made neighbors."""
        side, shift = self.window, self.shift

        def came_round(length: int) -> Tensor:
            return (torch.arange(length, device=x.device) >= length - shift).long()

        height, width = x.shape[1:3]
        region = came_round(height)[:, None] * 2 + came_round(width)
        region = region.view(height // side, side, width // side, side).transpose(1, 2).reshape(-1, side * side)
        return -100.0 * (region[:, :, None] != region[:, None]).to(x.dtype)


class PatchMerging(nn.Module):
    """2×2 cells into one of twice the channels; odd maps are padded with zeros."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim, eps=EPS)

    def forward(self, x: Float[Tensor, "B y x C"]) -> Tensor:
        """(B, y, x, C) → (B, ⌈y/2⌉, ⌈x/2⌉, 2·C)."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.norm(self.reduction(torch.cat(parts, -1)))


class SwinStage(nn.Module):
    def __init__(self, blocks: list[Block], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class PatchEmbed(nn.Module):
    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 4, stride=4)
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B y x D"]:
        """Images of any size, padded on the right and below to multiples of 4."""
        x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class SwinV2(nn.Module):
    """Four stages of doubling width.

    Args:
        window: side of the windows; every second block's are shifted by half of it.
        pretrained_window: side in pre-training, per stage.
        global_blocks: numbers of the blocks that attend to the whole map, per stage.
        grad_checkpointing: recompute each block in the backward pass.

    Raises: ValueError if lists have other lengths than ``depths``.
    """

    stride = 32

    def __init__(
        self,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 16,
        pretrained_window: Sequence[int] = (16, 16, 16, 8),
        global_blocks: Sequence[Sequence[int]] = ((), (), (), (0, 1)),
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        in_chans: int = 3,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        for name, given in (
            ("num_heads", num_heads),
            ("pretrained_window", pretrained_window),
            ("global_blocks", global_blocks),
        ):
            if len(given) != len(depths):
                raise ValueError(f"SwinV2: {name}={given} must have one entry per stage, depths={tuple(depths)}")
        self.grad_checkpointing = grad_checkpointing
        self.channels = embed_dim * 2 ** (len(depths) - 1)
        self.patch_embed = PatchEmbed(in_chans, embed_dim)
        rates = iter(drop_path * block / max(1, sum(depths) - 1) for block in range(sum(depths)))
        self.layers = nn.ModuleList()
        for stage, depth in enumerate(depths):
            dim = embed_dim * 2**stage
            blocks = [
                Block(
                    dim,
                    num_heads[stage],
                    0 if i in global_blocks[stage] else window,
                    window // 2 if i % 2 else 0,
                    pretrained_window[stage],
                    next(rates),
                    mlp_ratio,
                )
                for i in range(depth)
            ]
            self.layers.append(SwinStage(blocks, PatchMerging(dim) if stage < len(depths) - 1 else None))
        self.norm3 = nn.LayerNorm(self.channels, eps=EPS)
        self.apply(_init)
        for module in self.modules():
            if isinstance(module, Block):  # each block begins as the identity
                nn.init.zeros_(module.norm1.weight)
                nn.init.zeros_(module.norm2.weight)

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B D y x"]:
        """Images → the last stage's normed map."""
        x = self.patch_embed(x)
        for stage in self.layers:
            for block in stage.blocks:  # pyright: ignore[reportGeneralTypeIssues]
                if self.grad_checkpointing and self.training:
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            if stage.downsample is not None:
                x = stage.downsample(x)  # pyright: ignore[reportCallIssue]
        return self.norm3(x).permute(0, 3, 1, 2)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def swin_v2_small(pretrained_window: int = 16, *, drop_path: float = 0.1, grad_checkpointing: bool = False) -> SwinV2:
    """49 M parameters: Plain-DETR's, with windows of 16 after pre-training at 16 (supervised) or 12 (SimMIM)."""
    windows = (pretrained_window,) * 3 + (pretrained_window // 2,)
    return SwinV2(pretrained_window=windows, drop_path=drop_path, grad_checkpointing=grad_checkpointing)


def swin_v2_large(pretrained_window: int = 12, *, drop_path: float = 0.1, grad_checkpointing: bool = False) -> SwinV2:
    """195 M parameters: the paper's largest."""
    return SwinV2(
        embed_dim=192,
        num_heads=(6, 12, 24, 48),
        pretrained_window=(pretrained_window,) * 3 + (pretrained_window // 2,),
        drop_path=drop_path,
        grad_checkpointing=grad_checkpointing,
    )
