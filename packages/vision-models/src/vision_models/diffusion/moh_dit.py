"""MoH-DiT, a diffusion transformer whose tokens choose their heads, as a model of diffusers; and plain DiT.

Papers: Jin et al., MoH, 2024, arXiv 2410.11842; Peebles and Xie, DiT, ICCV 2023, arXiv 2212.09748. Official code:
SkyworkAI/MoH, ``MoH-DiT/models.py``.

The same as there: every number, the parameters' names but for ``router``. The number of heads may differ from block to
block, and their width is then free.

What differs: it is a ``ModelMixin`` of diffusers (``save_pretrained``, ``from_pretrained``, ``DiTPipeline``), called as
``DiTTransformer2DModel``. Any size works: positions are sines of the place, and are computed for it. Heads that a token
did not choose are not computed for it from 768 tokens on. A single shared head needs no gate, where the official code
fails.

Numbers are checked in ``tests/diffusion/test_moh_dit.py`` against a plain network.

Shapes: hidden_states (B, in_channels, Y, X), timestep (B,), class_labels (B,) → sample (B, out_channels, Y, X).
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin  # pyright: ignore[reportPrivateImportUsage]
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from attn_core import weights
from attn_core.catalog import did_you_mean
from attn_core.weights import KeyMap
from vision_models.layers.mixture_of_heads import RoutedSelfAttention, heads_of_blocks
from vision_models.layers.token_maps import Linear
from vision_models.models.deit import SelfAttention

EPS = 1e-6
FREQUENCIES = 256  # sines and cosines of a time
SLOWEST = 10_000.0


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normed tokens (B, N, C), scaled and shifted by what the time and the class say (B, C)."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def positions(width: int, height: int, columns: int) -> Tensor:
    """(1, height·columns, width): sines and cosines of the column, then of the row."""
    speed = SLOWEST ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, across = (torch.arange(n, dtype=torch.float64)[:, None] * speed for n in (height, columns))
    row, column = (torch.cat([angle.sin(), angle.cos()], 1) for angle in (rows, across))
    both = torch.broadcast_tensors(column[None], row[:, None])
    return torch.cat(both, 2).flatten(0, 1)[None]


class TimeEmbedder(nn.Module):
    """(B,) times → (B, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, time: Tensor) -> Tensor:
        """(B,) → (B, dim)."""
        half, own = FREQUENCIES // 2, self.mlp[0].weight.dtype
        exact = torch.promote_types(own, torch.float32)  # 16 bits do not tell 1,000 times apart  # pyright: ignore[reportArgumentType]
        speed = torch.exp(-math.log(SLOWEST) / half * torch.arange(half, dtype=exact, device=time.device))  # pyright: ignore[reportArgumentType]
        angle = time[:, None].to(exact) * speed
        return self.mlp(torch.cat([angle.cos(), angle.sin()], 1).to(own))  # pyright: ignore[reportArgumentType, reportCallIssue]


class LabelEmbedder(nn.Module):
    """(B,) classes → (B, dim); the last row of the table stands for no class."""

    def __init__(self, num_classes: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), dim)
        self.num_classes = num_classes
        self.dropout = dropout

    def forward(self, label: Tensor) -> Tensor:
        """(B,) → (B, dim); training leaves out some labels."""
        if self.training and self.dropout > 0:
            label = torch.where(torch.rand(label.shape, device=label.device) < self.dropout, self.num_classes, label)
        return self.embedding_table(label)


class Mlp(nn.Module):
    """Linear, GELU by a tangent, linear. (B, N, dim) → same."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) → same."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (B, dim). (B, N, dim) → same."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = attn
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, N, dim) → same."""
        shift, scale, gate, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, 1)
        x = x + gate[:, None] * self.attn(modulated(x, shift, scale), None)
        return x + gate2[:, None] * self.mlp(modulated(x, shift2, scale2))


class FinalLayer(nn.Module):
    """(B, N, dim) → (B, N, out)."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, N, dim) → (B, N, out)."""
        return self.linear(modulated(x, *self.adaLN_modulation(condition).chunk(2, 1)))


class PatchEmbed(nn.Module):
    """(B, C, Y, X) → (B, dim, Y/patch, X/patch)."""

    def __init__(self, in_channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, Y, X) → (B, dim, Y/patch, X/patch)."""
        return self.proj(x)


class MoHDiT(ModelMixin, ConfigMixin):
    """The network that predicts noise, and how uncertain a step back is.

    Args:
        sample_size: side of the latents of the training; other sizes work.
        out_channels: twice ``in_channels`` where the variance of a step is learned, else the same.
        num_heads: of all blocks or each; head_dim: their width, needed where they do not add up to ``hidden_size``.
        shared_heads, routed_heads: of all blocks or each; None: plain DiT.
        class_dropout: share of the labels that training replaces by no class, label ``num_classes``.

    Raises:
        ValueError: options that contradict each other or the width.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int = 8,
        hidden_size: int = 1152,
        num_layers: int = 28,
        num_heads: int | Sequence[int] = 16,
        head_dim: int | None = None,
        shared_heads: int | Sequence[int] | None = None,
        routed_heads: int | Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        every = (num_heads,) * num_layers if isinstance(num_heads, int) else tuple(num_heads)
        if len(every) != num_layers:
            raise ValueError(f"MoHDiT: num_heads must be one number or {num_layers}, got {num_heads}")
        if hidden_size % 4:
            raise ValueError(f"MoHDiT: hidden_size must be a multiple of 4, got hidden_size={hidden_size}")
        if head_dim is None and any(hidden_size % count for count in every):
            raise ValueError(
                f"MoHDiT: num_heads must divide hidden_size {hidden_size}, or give head_dim, got {num_heads}"
            )
        if sample_size % patch_size:
            raise ValueError(f"MoHDiT: patch_size must divide sample_size {sample_size}, got patch_size={patch_size}")
        heads = heads_of_blocks("MoHDiT", shared_heads, routed_heads, num_layers)
        if heads[0] is None and head_dim is not None:
            raise ValueError(f"MoHDiT: head_dim belongs to shared_heads and routed_heads, got head_dim={head_dim}")
        self.patch_size = patch_size
        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self.t_embedder = TimeEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout)
        side = sample_size // patch_size
        self.pos_embed = nn.Parameter(positions(hidden_size, side, side).float(), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(
                hidden_size,
                SelfAttention(hidden_size, count, True)
                if own is None
                else RoutedSelfAttention(hidden_size, count, *own, head_dim=head_dim),
                mlp_ratio,
            )
            for count, own in zip(every, heads, strict=True)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * out_channels)
        self.apply(_init)
        for block in self.blocks:  # at the start a block changes nothing, and the result is 0
            _clear(block.adaLN_modulation[1])  # pyright: ignore[reportArgumentType, reportIndexIssue]
        _clear(self.final_layer.adaLN_modulation[1])
        _clear(self.final_layer.linear)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """As ``DiTTransformer2DModel``.

        Raises: ValueError: latents of other channels, or of a size that patches do not fill.
        """
        p, channels = self.patch_size, self.x_embedder.proj.in_channels
        batch, given, height, width = hidden_states.shape
        if given != channels or height % p or width % p:
            raise ValueError(
                f"MoHDiT: hidden_states must be (B, {channels}, Y, X) with Y and X multiples of {p}, "
                f"got {tuple(hidden_states.shape)}"
            )
        x = self.x_embedder(hidden_states).flatten(2).mT
        rows, columns = height // p, width // p
        table = self.pos_embed
        if rows * columns != table.shape[1] or rows != columns:
            table = positions(table.shape[2], rows, columns).to(table)
        x = x + table
        condition = self.t_embedder(timestep) + self.y_embedder(class_labels)
        for block in self.blocks:
            x = block(x, condition)
        x = self.final_layer(x, condition).view(batch, rows, columns, p, p, -1)
        sample = x.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)  # pyright: ignore[reportArgumentType]


def _init(module: nn.Module) -> None:
    """Xavier weights of linear layers and patches, zero biases, small normal ones of what becomes the condition."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, TimeEmbedder):
        for layer in (module.mlp[0], module.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)  # pyright: ignore[reportArgumentType]


def _clear(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


KEY_MAP: KeyMap = {"moh": ((r"\.attn\.router\.", ".attn."),)}


def load_official(model: MoHDiT, source: Mapping[str, Any] | str | Path, *, ema: bool = False) -> MoHDiT:
    """Copy an official checkpoint into ``model``, every parameter or none.

    Args:
        source: a file, ``hf://owner/repo/file``, or what such a file holds. ema: take the averaged weights.

    Raises: ValueError: the file is no checkpoint, or names and shapes do not fit; the message lists them.
    """
    checkpoint = weights.read(source, ema=ema)
    return weights.fill(model, checkpoint, weights.fitting_names(model, KEY_MAP, checkpoint))


def _each(*parts: tuple[int, int]) -> list[int]:
    """(count, value) pairs → values."""
    return [value for count, value in parts for _ in range(count)]


_XL: dict[str, Any] = {"num_heads": _each((9, 8), (10, 16), (9, 24)), "head_dim": 72}
_L: dict[str, Any] = {
    "hidden_size": 1024,
    "num_layers": 24,
    "num_heads": _each((8, 8), (8, 16), (8, 24)),
    "head_dim": 64,
}
_B: dict[str, Any] = {"hidden_size": 768, "num_layers": 12, "num_heads": 12}
_S: dict[str, Any] = {"hidden_size": 384, "num_layers": 12, "num_heads": 6}
VARIANTS: dict[str, dict[str, Any]] = {
    "moh_dit_xl_2_90": {**_XL, "shared_heads": _each((9, 8), (19, 16)), "routed_heads": _each((19, 0), (9, 3))},
    "moh_dit_xl_2_75": {**_XL, "shared_heads": _each((9, 8), (10, 10), (9, 14)),
                        "routed_heads": _each((9, 0), (19, 2))},
    "moh_dit_l_2_90": {**_L, "shared_heads": _each((8, 8), (16, 16)), "routed_heads": _each((16, 0), (8, 3))},
    "moh_dit_l_2_75": {**_L, "shared_heads": _each((16, 8), (8, 12)), "routed_heads": _each((8, 0), (16, 4))},
    "moh_dit_b_2_90": {**_B, "shared_heads": _each((5, 6), (5, 7), (2, 12)), "routed_heads": _each((10, 4), (2, 0))},
    "moh_dit_b_2_75": {**_B, "shared_heads": _each((2, 4), (8, 6), (2, 12)),
                       "routed_heads": _each((2, 2), (8, 3), (2, 0))},
    "moh_dit_s_2_90": {**_S, "shared_heads": _each((8, 3), (4, 6)), "routed_heads": _each((8, 2), (4, 0))},
    "moh_dit_s_2_75": {**_S, "shared_heads": _each((2, 2), (8, 3), (2, 6)),
                       "routed_heads": _each((6, 1), (4, 2), (2, 0))},
    "dit_xl_2": {"num_heads": 16},
    "dit_l_2": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16},
    "dit_b_2": _B,
    "dit_s_2": _S,
}  # fmt: skip


def create_transformer(name: str, **options: Any) -> MoHDiT:
    """A variant by name, ``options`` before its own.

    Raises: ValueError: unknown name, with the nearest known one; options that contradict each other.
    """
    if name not in VARIANTS:
        raise ValueError(f"create_transformer: unknown transformer {name!r}{did_you_mean(name, VARIANTS)}")
    return MoHDiT(**{**VARIANTS[name], **options})
