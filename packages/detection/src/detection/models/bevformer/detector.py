"""A camera-only detector in bird's-eye view whose features are lifted by DFA3D, or by its two-dimensional twin.

Papers: Li et al., BEVFormer, ECCV 2022, arXiv 2203.17270 (encoder); Li et al., DFA3D, ICCV 2023, arXiv 2307.12972
(lifting). Official code: https://github.com/IDEA-Research/3D-deformable-attention, folder ``BEVFormer_DFA3D``.

Same: grid queries with row and column embeddings; layers of deformable self-attention on the grid, camera
cross-attention (`detection.layers.dfa3d`) and feed-forward network, each followed by a layer norm; one depth head
beside it. Differences, and why: one frame (officially a queue of three or four), because nothing of the lifting depends
on the history; any timm backbone on one map (officially ResNet-101-DCN with FPN); CenterPoint's dense head (Yin et al.
2021, arXiv 2006.11275) instead of the DETR decoder with 900 queries, because it learns from hundreds of scenes. What
the official checkpoints and this model share is the lifting: `load_official` reads it, layer by layer.

``lifting`` chooses: ``"dfa3d"`` (depth predicted and supervised), ``"dfa2d"`` (no depth anywhere: BEVFormer's
attention), ``"dfa3d_gt"`` (depth of the ground truth, the paper's upper bound).

Checked in: ``models/bevformer/test_peer.py`` (a plain network), ``test_detector.py``, ``layers/test_dfa3d.py``.
Shapes: image (B, K, 3, Y, X), lidar2img (B, K, 4, 4) → heatmaps (B, classes, rows, columns), box codes (B, 10, …).
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from attn_core import deformable_attention, weights
from attn_core.catalog import Card, Entry
from attn_core.nn import Linear
from detection.layers.dfa3d import (
    Bound,
    CameraCrossAttention,
    DepthHead,
    depth_bins,
    known_depth,
    nearest_depth_bin,
    pillar_points,
    project,
)

Lifting = Literal["dfa2d", "dfa3d", "dfa3d_gt"]
BOX_CODE = 10  # Δx, Δy (cells), z, log l, log w, log h, sin yaw, cos yaw, vx, vy


class BEVOutput(NamedTuple):
    """What the detector gives: ``heatmap`` logits, box codes, and the depth logits if depth is predicted."""

    heatmap: Float[Tensor, "B K rows columns"]
    boxes: Float[Tensor, "B 10 rows columns"]
    depth_logits: Float[Tensor, "BK G y x"] | None


class GridSelfAttention(nn.Module):
    """Deformable self-attention of the cells of the bird's-eye view, residual included (BEVFormer without history)."""

    def __init__(self, dim: int, num_heads: int = 8, num_points: int = 4) -> None:
        super().__init__()
        self.num_heads, self.num_points = num_heads, num_points
        self.sampling_offsets = Linear(dim, num_heads * num_points * 2)
        self.attention_weights = Linear(dim, num_heads * num_points)
        self.value_proj = Linear(dim, dim)
        self.output_proj = Linear(dim, dim)
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        angle = torch.arange(num_heads) * (2 * torch.pi / num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        reach = torch.arange(1, num_points + 1).view(1, -1, 1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((direction.unsqueeze(1) * reach).flatten())
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, query: Float[Tensor, "B N C"], pos: Float[Tensor, "B N C"], size: tuple[int, int]
    ) -> Float[Tensor, "B N C"]:
        """N = rows · columns of ``size``."""
        rows, columns = size
        exact = torch.float64 if query.dtype == torch.float64 else torch.float32
        y = (torch.arange(rows, device=query.device, dtype=exact) + 0.5) / rows
        x = (torch.arange(columns, device=query.device, dtype=exact) + 0.5) / columns
        centers = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1).flip(-1)
        positioned = query + pos
        offsets = self.sampling_offsets(positioned).unflatten(-1, (self.num_heads, 1, self.num_points, 2)).to(exact)
        locations = centers.view(1, -1, 1, 1, 1, 2) + offsets / offsets.new_tensor([columns, rows])
        weights = self.attention_weights(positioned).unflatten(-1, (self.num_heads, 1, self.num_points)).softmax(-1)
        values = self.value_proj(query).unflatten(-1, (self.num_heads, -1))
        return query + self.output_proj(deformable_attention(values, [size], locations, weights))


class LiftingLayer(nn.Module):
    """Self-attention on the grid, cross-attention to the cameras, feed-forward network; a layer norm after each."""

    def __init__(self, dim: int, num_heads: int, num_points: int, ffn_dim: int, dropout: float, *, depth: bool) -> None:
        super().__init__()
        cross = CameraCrossAttention(dim, num_heads, 1, num_points, depth=depth, dropout=dropout)
        self.attentions = nn.ModuleList([GridSelfAttention(dim, num_heads), cross])
        self.ffn = nn.Sequential(Linear(dim, ffn_dim), nn.ReLU(), nn.Dropout(dropout), Linear(ffn_dim, dim))
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(3)])

    def forward(
        self,
        grid: Tensor,
        pos: Tensor,
        size: tuple[int, int],
        value: Tensor,
        shape: tuple[int, int],
        *where: Tensor | None,
    ) -> Tensor:
        """The grid (B, N, C) after attention to itself, to the image features ``value``, and a feed-forward network."""
        reference, visible, depth = where
        grid = self.norms[0](self.attentions[0](grid, pos, size))
        grid = self.norms[1](self.attentions[1](grid, value, [shape], reference, visible, depth))
        return self.norms[2](grid + self.ffn(grid))


class BEVFormerDFA3D(nn.Module):
    """See the module.

    Args:
        num_classes: heatmaps.
        lifting: ``"dfa3d"``, ``"dfa2d"`` or ``"dfa3d_gt"``; nothing else of the model changes with it.
        backbone: name of a timm model without weights; its map with ``stride`` is taken. stride: of that map.
        dim, num_heads, num_points, num_layers, ffn_dim, dropout: of the layers.
        bev_size: (rows along y, columns along x). num_anchors: heights of a pillar; must divide ``num_points``.
        region: (x0, y0, z0, x1, y1, z1) in m. depth_bound: (start, stop, step) of the depth bins in m.
        depth_dim, depth_blocks, depth_groups, depth_context: of the `detection.layers.dfa3d.DepthHead`.

    Raises: ValueError for an unknown lifting, or a backbone without a map of that stride.
    """

    mean, std = (0.5,) * 3, (0.25,) * 3  # by which pictures are normalized

    def __init__(
        self,
        num_classes: int = 3,
        *,
        lifting: Lifting = "dfa3d",
        backbone: str = "resnet18",
        stride: int = 16,
        dim: int = 128,
        num_heads: int = 8,
        num_points: int = 8,
        num_layers: int = 3,
        ffn_dim: int | None = None,
        dropout: float = 0.1,
        bev_size: tuple[int, int] = (32, 32),
        num_anchors: int = 4,
        region: Sequence[float] = (-32.0, -32.0, -5.0, 32.0, 32.0, 3.0),
        depth_bound: Bound = (1.0, 41.0, 0.5),
        depth_dim: int | None = None,
        depth_blocks: int = 3,
        depth_groups: Sequence[int] = (),
        depth_context: Literal["aspp_dcn"] | None = "aspp_dcn",
    ) -> None:
        super().__init__()
        if lifting not in ("dfa2d", "dfa3d", "dfa3d_gt"):
            raise ValueError(f"BEVFormerDFA3D: lifting must be 'dfa2d', 'dfa3d' or 'dfa3d_gt', got lifting={lifting!r}")
        self.lifting: Lifting = lifting
        self.stride = stride
        self.bev_size = (bev_size[0], bev_size[1])
        self.region = tuple(float(edge) for edge in region)
        self.depth_bound: Bound = (depth_bound[0], depth_bound[1], depth_bound[2])
        self.num_classes = num_classes
        maps = timm.create_model(backbone, features_only=True)
        reductions = maps.feature_info.reduction()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        if stride not in reductions:
            raise ValueError(
                f"BEVFormerDFA3D: backbone {backbone!r} has maps with strides {reductions}, got stride={stride}"
            )
        level = reductions.index(stride)
        self.img_backbone = timm.create_model(backbone, features_only=True, out_indices=(level,))
        channels = self.img_backbone.feature_info.channels()[0]  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        self.img_neck = nn.Sequential(nn.Conv2d(channels, dim, 1), nn.GroupNorm(8, dim))
        self.pts_dpt_head = None
        if lifting == "dfa3d":
            self.pts_dpt_head = DepthHead(
                dim,
                depth_dim or dim,
                self.depth_bound,
                group_sizes=depth_groups,
                blocks=depth_blocks,
                context=depth_context,
            )
        rows, columns = self.bev_size
        self.bev_embedding = nn.Parameter(torch.randn(rows * columns, dim) * 0.02)
        self.row_embedding = nn.Parameter(torch.rand(rows, dim // 2))
        self.column_embedding = nn.Parameter(torch.rand(columns, dim - dim // 2))
        self.register_buffer("pillars", pillar_points(self.bev_size, num_anchors, self.region), persistent=False)
        self.pillars: Tensor
        self.layers = nn.ModuleList(
            LiftingLayer(dim, num_heads, num_points, ffn_dim or 2 * dim, dropout, depth=lifting != "dfa2d")
            for _ in range(num_layers)
        )
        self.head_conv = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.GroupNorm(8, dim), nn.ReLU(inplace=True))
        self.heatmap = nn.Conv2d(dim, num_classes, 3, padding=1)
        self.boxes = nn.Conv2d(dim, BOX_CODE, 3, padding=1)
        nn.init.constant_(self.heatmap.bias, -2.19)  # pyright: ignore[reportArgumentType]  # probability 0.1

    def forward(
        self,
        image: Float[Tensor, "B K 3 Y X"],
        lidar2img: Float[Tensor, "B K 4 4"],
        depth: Float[Tensor, "B K Y X"] | None = None,
    ) -> BEVOutput:
        """Images in [0, 1]; ``depth`` in m along the camera's axis (0 unknown), read by ``"dfa3d_gt"`` only.

        Raises: ValueError if that lifting gets no depth.
        """
        batch, _, _, height, width = image.shape
        features = self.img_neck(self.img_backbone(image.flatten(0, 1) * 4 - 2)[-1])
        logits, weights = None, None
        if self.pts_dpt_head is not None:
            logits = self.pts_dpt_head(features)
            weights = self.pts_dpt_head.distribution(logits)
        elif self.lifting == "dfa3d_gt":
            if depth is None:
                raise ValueError("BEVFormerDFA3D: lifting='dfa3d_gt' needs depth, got depth=None")
            bins = nearest_depth_bin(depth.flatten(0, 1), self.stride, self.depth_bound)
            weights = known_depth(bins, depth_bins(self.depth_bound))
        reference, visible = project(self.pillars, lidar2img, (height, width), self.depth_bound)
        rows, columns = self.bev_size
        pos = torch.cat(
            [
                self.row_embedding.unsqueeze(1).expand(-1, columns, -1),
                self.column_embedding.unsqueeze(0).expand(rows, -1, -1),
            ],
            -1,
        ).flatten(0, 1)
        grid = self.bev_embedding.to(features).expand(batch, -1, -1)
        value = features.flatten(2).transpose(1, 2)
        shape = (features.shape[2], features.shape[3])
        flat = None if weights is None else weights.flatten(2).transpose(1, 2)
        for layer in self.layers:
            grid = layer(grid, pos.to(grid), self.bev_size, value, shape, reference, visible, flat)
        bev = self.head_conv(grid.transpose(1, 2).unflatten(2, self.bev_size))
        return BEVOutput(self.heatmap(bev), self.boxes(bev), logits)

    def decode(self, output: BEVOutput, *, top_k: int = 100) -> list[dict[str, Tensor]]:
        """The ``top_k`` peaks, best first: boxes (k, 9: x, y, z, l, w, h, yaw, vx, vy), scores, labels."""
        scores = output.heatmap.float().sigmoid()
        scores = scores * (F.max_pool2d(scores, 3, 1, 1) == scores)
        rows, columns = self.bev_size
        best, where = scores.flatten(1).topk(min(top_k, scores.shape[1:].numel()))
        labels, cell = where // (rows * columns), where % (rows * columns)
        code = output.boxes.float().flatten(2).gather(2, cell.unsqueeze(1).expand(-1, BOX_CODE, -1))
        x0, y0, _, x1, y1, _ = self.region
        x = x0 + (cell % columns + 0.5 + code[:, 0]) * ((x1 - x0) / columns)
        y = y0 + (cell // columns + 0.5 + code[:, 1]) * ((y1 - y0) / rows)
        size = code[:, 3:6].clamp(-5, 5).exp()
        yaw = torch.atan2(code[:, 6], code[:, 7])
        boxes = torch.stack([x, y, code[:, 2], *size.unbind(1), yaw, *code[:, 8:].unbind(1)], -1)
        return [{"boxes": b, "scores": s, "labels": k} for b, s, k in zip(boxes, best, labels, strict=True)]


_OFFICIAL = re.compile(r"pts_bbox_head\.transformer\.encoder\.layers\.(\d+)\.attentions\.1\.(.*)")


def load_official(
    model: BEVFormerDFA3D, source: Mapping[str, Any] | str | Path, *, ignore: Sequence[str] = ()
) -> BEVFormerDFA3D:
    """Take the lifting layers and the depth head of an official BEVFormer-DFA3D checkpoint, all of them or none.

    The rest (backbone, history, decoder) has no counterpart here and is left alone. Build the model with the official
    sizes first: small is ``dim=256, num_points=8, num_layers=3`` with one level, ``depth_bound=(2, 58, 0.5)``,
    ``depth_groups=(2, 4, 8)``.

    Args:
        source: a file, ``hf://owner/repo/file``, or what it holds. ignore: beginnings of our names that may differ.

    Raises: ValueError if the checkpoint holds no such layers, or they do not fit.
    """
    checkpoint = weights.read(source, prefixes=("module.",))
    if not any(_our_name(name) for name in checkpoint.tensors):
        raise ValueError(
            f"load_official: {checkpoint.source}: no key starts with pts_bbox_head.transformer.encoder.layers or "
            "pts_dpt_head"
        )
    others = [n for n in model.state_dict() if ".attentions.1." not in n and not n.startswith("pts_dpt_head.")]
    return weights.fill(model, checkpoint, _our_name, ignore=(*others, *ignore))


def _our_name(official: str) -> str | None:
    if match := _OFFICIAL.fullmatch(official):
        return f"layers.{match[1]}.attentions.1.{match[2]}"
    return official if official.startswith("pts_dpt_head.") else None


TEST: dict[str, Any] = {
    "backbone": "test_resnet",
    "dim": 16,
    "num_layers": 1,
    "num_points": 4,
    "num_heads": 2,
    "bev_size": (8, 8),
    "depth_blocks": 0,
    "depth_context": None,
}
CARD = Card(
    family="DFA3D",
    paper="2307.12972",
    code="https://github.com/IDEA-Research/3D-deformable-attention",
    license="IDEA License 1.0",
    test="models/bevformer/test_peer.py",
)
ENTRIES = [
    Entry("bevformer_dfa3d_resnet18", BEVFormerDFA3D, CARD("5.3 M parameters, ResNet-18, grid 32×32, depth predicted")),
    Entry(
        "bevformer_dfa2d_resnet18",
        partial(BEVFormerDFA3D, lifting="dfa2d"),
        CARD("3.6 M parameters, the same without depth: BEVFormer's own lifting"),
    ),
    Entry("test_bevformer_dfa3d", partial(BEVFormerDFA3D, **TEST), CARD("0.1 M parameters, for tests")),
]
