"""BiFormer as its official code formulates it: regions split by copies, keys and values gathered, scores in full.

The peer of the benchmark, and the slow formulation that tests compare with: it shares parameters and their names with
:mod:`vision_models.models.biformer`, and nothing of the path from the projection to the output.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_models.backbone import Stage, StagedBackbone
from vision_models.layers.bilevel_routing import RoutedAttention
from vision_models.layers.token_maps import Linear
from vision_models.models.biformer import BiFormer, FullAttention, Mlp


def gathered(model: StagedBackbone) -> StagedBackbone:
    """A copy of ``model`` with the same parameters in the official formulation; ``pad_mode="legacy"`` only.

    Raises:
        ValueError: another padding or ``n_win="auto"``, which the formulation does not know.
    """
    peer = copy.deepcopy(model)
    for module in peer.modules():
        if isinstance(module, RoutedAttention):
            if module.pad_mode != "legacy" or module.auto_side:
                raise ValueError("gathered: only pad_mode='legacy' with a fixed n_win has this formulation")
            module.__class__ = GatheredRouting
        elif isinstance(module, FullAttention):
            module.__class__ = PlainFullAttention
        elif isinstance(module, Mlp):
            module.__class__ = PlainMlp
        elif isinstance(module, Linear):
            module.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]
        elif isinstance(module, Stage):
            module.__class__ = PlainStage
        elif isinstance(module, BiFormer):
            module.__class__ = GatheredBiFormer
    return peer


class GatheredBiFormer(BiFormer):
    """The image stays in the memory order it came in, as in the official code."""

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, Y, X) → the normed map (B, C, Y/32, X/32)."""
        return self.norm(self.stages(self.stem(x)))


class PlainStage(Stage):
    """Permuted views instead of a copy in channels-last order."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, Y, X) → (B, dim, Y', X')."""
        return self.blocks(self.downsample(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GatheredRouting(RoutedAttention):
    """Equations 2–8, read literally: one copy of the routed keys and values for every region."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, C) → the same, through gathered copies of the k and v of every region's best regions."""
        batch, height, width, dim = x.shape
        side, heads = self.n_win, self.num_heads
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        h, w = x.shape[1] // side, x.shape[2] // side
        regions = x.view(batch, side, h, side, w, dim).transpose(2, 3).reshape(batch, side * side, h, w, dim)
        q, kv = self.qkv_linear(regions).split([self.qk_dim, self.qk_dim + dim], dim=-1)
        k, v = kv.split([self.qk_dim, dim], dim=-1)

        # region-to-region affinity and its best entries
        q_r, k_r = q.mean((2, 3)), k.mean((2, 3))
        if not self.diff_routing:
            q_r, k_r = q_r.detach(), k_r.detach()
        if self.router is not None:
            q_r, k_r = self.router(q_r), self.router(k_r)
        affinity, table = (self.scale * q_r @ k_r.transpose(1, 2)).topk(self.topk, dim=-1)

        # keys and values of the chosen regions, repeated for each region that chose them
        tokens = kv.flatten(0, 1).permute(0, 3, 1, 2)
        tokens = tokens if self.kv_pool is None else self.kv_pool(tokens)
        tokens = tokens.flatten(2).transpose(1, 2).unflatten(0, (batch, side * side))
        source = tokens.unsqueeze(1).expand(-1, side * side, -1, -1, -1)
        chosen = source.gather(2, table[..., None, None].expand(-1, -1, -1, *tokens.shape[2:]))
        if self.soft_routing:
            chosen = affinity.softmax(-1)[..., None, None] * chosen
        k_g, v_g = chosen.flatten(2, 3).split([self.qk_dim, dim], dim=-1)

        # attention within each region, one head after another in the last axis
        Q = q.flatten(2, 3).unflatten(-1, (heads, -1)).transpose(2, 3)
        K = k_g.unflatten(-1, (heads, -1)).permute(0, 1, 3, 4, 2)
        V = v_g.unflatten(-1, (heads, -1)).transpose(2, 3)
        out = ((Q * self.scale) @ K).softmax(-1) @ V
        out = out.transpose(2, 3).reshape(batch, side, side, h, w, dim).transpose(2, 3).reshape(x.shape)
        if self.lepe is not None:
            image = v.reshape(batch, side, side, h, w, dim).permute(0, 5, 1, 3, 2, 4).reshape(batch, dim, *x.shape[1:3])
            conv = F.conv2d(image, self.lepe.weight, self.lepe.bias, padding=self.lepe.padding, groups=dim)  # pyright: ignore[reportArgumentType, reportCallIssue]
            out = out + conv.permute(0, 2, 3, 1)
        return self.output_linear(out)[:, :height, :width]


class PlainFullAttention(FullAttention):
    """Softmax over all tokens with the N×N scores in memory."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, C) → the same; holds the scores of all pairs of tokens."""
        qkv = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
        scores = (q @ k.transpose(2, 3)) * (self.dim // self.num_heads) ** -0.5
        out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
        if self.lepe is not None:
            image = v.transpose(1, 2).reshape(x.shape) if self.lepe_on_value else x
            out = out + F.conv2d(  # pyright: ignore[reportCallIssue]
                image.permute(0, 3, 1, 2),
                self.lepe.weight,  # pyright: ignore[reportArgumentType]
                self.lepe.bias,  # pyright: ignore[reportArgumentType]
                padding=self.lepe.padding,  # pyright: ignore[reportArgumentType]
                groups=self.dim,
            ).permute(0, 2, 3, 1)
        return self.proj(out)


class PlainMlp(Mlp):
    """GELU as an operation of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, C) → the same."""
        x = self.fc1(x)
        if self.dwconv is not None:
            x = torch.permute(
                F.conv2d(x.permute(0, 3, 1, 2), self.dwconv.weight, self.dwconv.bias, padding=1, groups=x.shape[-1]),  # pyright: ignore[reportArgumentType, reportCallIssue]
                (0, 2, 3, 1),
            )
        return self.fc2(F.gelu(x))
