"""DFA3D: 3D deformable attention for lifting image features into a bird's-eye view.

Paper: Li et al., DFA3D: 3D Deformable Attention For 2D-to-3D Feature Lifting, ICCV 2023, arXiv 2307.12972.
Official code: https://github.com/IDEA-Research/3D-deformable-attention, files
``BEVFormer_DFA3D/projects/mmdet3d_plugin/bevformer/modules/spatial_cross_attention.py``, ``modules/encoder.py`` and
``dense_heads/depth_head.py`` (IDEA License 1.0; this is a re-implementation).

Same: attention module, camera cross-attention, projection and depth head, with parameters under the official names
(``load_official`` in `detection.models.bevformer.detector` reads them). Points of a query: P samples are split as (P /
Z, Z) over the Z anchors of its pillar, anchor index fastest; a sample is placed at (x, y, d), offsets divided by (w, h,
D).

Differences, and why: the operator is :func:`attn_core.deformable_attention` with ``depth``, which runs on a CPU, keeps
the gradient of x and y that the official one-call function loses in a copy, and reads one depth distribution for all
heads. Each sample of a batch uses its own visibility mask (officially that of the first). The learned filler for
samples without depth (``use_empty``, off in every released configuration) is left out.

Checked in: ``layers/test_dfa3d.py`` (operator and gradients against float64 loops; module, projection, labels, depth
net).

Shapes: value (B·K, S, C) of K cameras, depth (B·K, S, D), queries (B, N, C) → (B, N, C).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from attn_core import deformable_attention
from attn_core.nn import Linear

Bound = tuple[float, float, float]


def depth_bins(bound: Bound) -> int:
    """Number of bins of a depth range (start, stop, step) in meters; bin k covers [start + k·step, start + (k+1)·step).

    Raises: ValueError if the range is empty or no multiple of the step.
    """
    start, stop, step = bound
    count = round((stop - start) / step) if step > 0 else 0
    if count < 1 or abs(start + count * step - stop) > 1e-6 * max(1.0, abs(stop)):
        raise ValueError(f"depth_bins: bound must be (start, stop, step) with whole bins, got bound={tuple(bound)}")
    return count


def pillar_points(
    bev_size: tuple[int, int], num_anchors: int, region: Sequence[float], *, anchor_margin: float = 0.5
) -> Float[Tensor, "N Z 3"]:
    """Centers of the cells of a bird's-eye view, ``num_anchors`` heights each, in meters; N = rows · columns, y slow.

    Args:
        bev_size: (rows along y, columns along x).
        num_anchors: heights, from ``anchor_margin`` m above the bottom of the region to as much below its top.
        region: (x0, y0, z0, x1, y1, z1) in meters.
        anchor_margin: meters.

    Raises: ValueError for an empty region.
    """
    x0, y0, z0, x1, y1, z1 = region
    if not (x0 < x1 and y0 < y1 and z0 < z1):
        raise ValueError(f"pillar_points: region must be (x0, y0, z0, x1, y1, z1), growing, got region={tuple(region)}")
    rows, columns = bev_size
    x = x0 + (torch.arange(columns) + 0.5) / columns * (x1 - x0)
    y = y0 + (torch.arange(rows) + 0.5) / rows * (y1 - y0)
    z = torch.linspace(z0 + anchor_margin, z1 - anchor_margin, num_anchors)
    grid = torch.stack(torch.meshgrid(y, x, z, indexing="ij"), -1)
    return grid[..., [1, 0, 2]].flatten(0, 1)


def project(
    points: Float[Tensor, "N Z 3"],
    lidar2img: Float[Tensor, "B K 4 4"],
    image_size: tuple[int, int],
    bound: Bound,
) -> tuple[Float[Tensor, "B K N Z 3"], Bool[Tensor, "B K N Z"]]:
    """Where K cameras see points: (u, v, d), each in [0, 1] inside the image and the depth range, and which they see.

    d = (z − start) / (stop − start) with z the depth along the camera's axis, not the length of the ray. A point is
    seen if it lies in front of the camera and strictly inside the image; the depth range does not count.

    Args:
        lidar2img: float32 or float64, as projection needs.
        image_size: (height, width) in pixels.
        bound: (start, stop, step) of the depth bins in meters.
    """
    homogeneous = F.pad(points, (0, 1), value=1.0).to(lidar2img)
    seen = torch.einsum("bkij,nzj->bknzi", lidar2img, homogeneous)
    depth = seen[..., 2]
    size = seen.new_tensor([image_size[1], image_size[0]])
    pixels = seen[..., :2] / depth.clamp(min=1e-5).unsqueeze(-1) / size
    visible = (depth > 1e-5) & ((pixels > 0) & (pixels < 1)).all(-1)
    return torch.cat([pixels, ((depth - bound[0]) / (bound[1] - bound[0])).unsqueeze(-1)], -1), visible


class DeformableLifting(nn.Module):
    """Deformable attention from bird's-eye-view queries to image features, weighted by depth if there is any.

    Officially ``MSDeformableAttention3D_DFA3D``, and ``MSDeformableAttention3D`` with ``depth=False``.

    Args:
        dim: channels C. num_heads, num_levels, num_points: H, L maps and P samples in each.
        depth: learn depth offsets and read a depth distribution; False is the two-dimensional twin.

    Raises: ValueError if the heads do not divide the channels, or the anchors the points.
    """

    def __init__(
        self, dim: int = 256, num_heads: int = 8, num_levels: int = 4, num_points: int = 8, *, depth: bool = True
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"DeformableLifting: num_heads={num_heads} must divide dim={dim}")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = Linear(dim, samples * 2)
        self.attention_weights = Linear(dim, samples)
        self.value_proj = Linear(dim, dim)
        self.sampling_offsets_depth = Linear(dim, samples) if depth else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head m looks into direction 2πm/H, its point p as far as p + 1 cells; all samples weigh the same."""
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        reach = torch.arange(1, self.num_points + 1).view(-1, 1)
        planar = (direction / direction.abs().amax(-1, keepdim=True)).view(-1, 1, 1, 2) * reach
        for layer, start in (
            (self.sampling_offsets, planar),
            (self.sampling_offsets_depth, (direction.sum(-1) / 2).view(-1, 1, 1, 1) * reach),
        ):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                with torch.no_grad():
                    layer.bias.copy_(start.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.zeros_(self.value_proj.bias)

    def forward(
        self,
        query: Float[Tensor, "B N C"],
        value: Float[Tensor, "B S C"],
        spatial_shapes: Sequence[tuple[int, int]],
        reference: Float[Tensor, "B N Z 3"],
        depth: Float[Tensor, "B S D"] | None = None,
    ) -> Float[Tensor, "B N C"]:
        """Read the maps around the projected anchors; ``reference`` as `project` gives it, ``depth`` for depth=True."""
        anchors = reference.shape[2]
        if self.num_points % anchors:
            raise ValueError(f"DeformableLifting: {anchors} anchors must divide num_points={self.num_points}")
        if (depth is None) != (self.sampling_offsets_depth is None):
            raise ValueError(
                "DeformableLifting: "
                + ("depth=None, but it was built with depth=True" if depth is None else "depth given, built without")
            )
        exact = torch.float64 if query.dtype == torch.float64 else torch.float32
        layout = (self.num_heads, self.num_levels, self.num_points)
        cells = [[w, h] for h, w in spatial_shapes]
        offsets = self.sampling_offsets(query).unflatten(-1, (*layout, 2)).to(exact)
        if depth is not None and self.sampling_offsets_depth is not None:
            along = self.sampling_offsets_depth(query).unflatten(-1, (*layout, 1)).to(exact)
            offsets = torch.cat([offsets, along], -1)
            cells = [[*size, depth.shape[-1]] for size in cells]
        axes = offsets.shape[-1]
        offsets = offsets / torch.tensor(cells, dtype=exact, device=query.device).view(1, 1, 1, -1, 1, axes)
        # P samples as (P / Z, Z): the anchor index runs fastest.
        offsets = offsets.unflatten(4, (-1, anchors))
        locations = (reference[:, :, None, None, None, :, :axes].to(exact) + offsets).flatten(4, 5)
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1)).softmax(-1)
        values = self.value_proj(value).unflatten(-1, (self.num_heads, -1))
        shared = None if depth is None else depth.to(values.dtype).unsqueeze(2).expand(-1, -1, self.num_heads, -1)
        return deformable_attention(values, spatial_shapes, locations, weights.unflatten(-1, layout[1:]), shared)


class CameraCrossAttention(nn.Module):
    """Every query reads the cameras that see its pillar, and averages them; residual included.

    Officially ``SpatialCrossAttention_DFA3D``. Only queries that a camera sees are computed for it.

    Args:
        dim, num_heads, num_levels, num_points, depth: of `DeformableLifting`.
        dropout: on the output.
    """

    def __init__(
        self,
        dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 8,
        *,
        depth: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.deformable_attention = DeformableLifting(dim, num_heads, num_levels, num_points, depth=depth)
        self.output_proj = Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.output_proj.weight)
        nn.init.zeros_(self.output_proj.bias)

    def forward(
        self,
        query: Float[Tensor, "B N C"],
        value: Float[Tensor, "BK S C"],
        spatial_shapes: Sequence[tuple[int, int]],
        reference: Float[Tensor, "B K N Z 3"],
        visible: Bool[Tensor, "B K N Z"],
        depth: Float[Tensor, "BK S D"] | None = None,
    ) -> Float[Tensor, "B N C"]:
        """``query`` plus what the cameras show; value and depth hold the K cameras of each sample in turn."""
        batch, cameras = reference.shape[:2]
        hit = visible.any(-1)  # (B, K, N)
        longest = int(hit.sum(-1).max().clamp(min=1)) if batch else 1
        # the queries that a camera sees, first ones first, padded with others that do not count
        chosen = hit.flatten(0, 1).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
        counts = hit.flatten(0, 1).gather(1, chosen)  # (B·K, longest)
        source = query.repeat_interleave(cameras, 0)
        rows = chosen.unsqueeze(-1).expand(-1, -1, query.shape[-1])
        spots = reference.flatten(0, 1).flatten(2)
        spots = spots.gather(1, chosen.unsqueeze(-1).expand(-1, -1, spots.shape[-1]))
        read = self.deformable_attention(
            source.gather(1, rows), value, spatial_shapes, spots.unflatten(-1, reference.shape[-2:]), depth
        )
        read = read * counts.unsqueeze(-1)
        slots = read.new_zeros(query.shape)
        slots = slots.scatter_add(
            1, rows.unflatten(0, (batch, cameras)).flatten(1, 2), read.unflatten(0, (batch, cameras)).flatten(1, 2)
        )
        slots = slots / hit.sum(1).clamp(min=1).unsqueeze(-1)
        return query + self.dropout(self.output_proj(slots))


def nearest_depth_bin(depth: Float[Tensor, "B Y X"], factor: int, bound: Bound) -> Int[Tensor, "B y x"]:
    """Bin of the nearest known depth in every cell of factor × factor pixels; −1 where none is known or in range.

    Args:
        depth: meters along the camera's axis, 0 where unknown.

    Raises: ValueError if factor does not divide the image.
    """
    height, width = depth.shape[1:]
    if height % factor or width % factor:
        raise ValueError(
            f"nearest_depth_bin: {height}×{width} pixels cannot be divided into cells of {factor}×{factor}"
        )
    known = torch.where(depth > 0, depth, math.inf)
    nearest = -F.max_pool2d(-known.unsqueeze(1), factor).squeeze(1)
    start, _, step = bound
    bins = (nearest - (start - step)) / step
    inside = (bins >= 1) & (bins < depth_bins(bound) + 1)
    return torch.where(inside, bins, 0).long() - 1


def known_depth(bins: Int[Tensor, "B y x"], count: int, *, tolerance: int = 2) -> Float[Tensor, "B D y x"]:
    """The depth distribution of ground truth (``DepthHead_GTDpt``): 1 within ``tolerance`` bins of the right one."""
    distance = (torch.arange(count, device=bins.device).view(1, -1, 1, 1) - bins.unsqueeze(1)).abs()
    return ((distance <= tolerance) & (bins.unsqueeze(1) >= 0)).float()


class DeformableConv(nn.Module):
    """3×3 convolution that learns where to read (mmcv's ``DCN``), without bias."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim // groups, 3, 3))
        self.conv_offset = nn.Conv2d(dim, 2 * 9, 3, padding=1)
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        """3×3 convolution that reads at learned offsets; the size stays."""
        return deform_conv2d(x, self.conv_offset(x), self.weight, padding=(1, 1))


class BasicBlock(nn.Module):
    """ResNet's block of two 3×3 convolutions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        """Two 3×3 convolutions beside the identity."""
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class AtrousBranch(nn.Module):
    """Dilated convolution, batch norm, ReLU."""

    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        kernel, padding = (1, 0) if dilation == 1 else (3, dilation)
        self.atrous_conv = nn.Conv2d(dim, dim, kernel, padding=padding, dilation=dilation, bias=False)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        """One dilated convolution, batch norm, ReLU."""
        return F.relu(self.bn(self.atrous_conv(x)))


class AtrousPyramid(nn.Module):
    """ASPP of DeepLab v3 with dilations 1, 6, 12, 18 and the mean of the map, without dropout."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.aspp1, self.aspp2, self.aspp3, self.aspp4 = (AtrousBranch(dim, dilation) for dilation in (1, 6, 12, 18))
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU()
        )
        self.conv1 = nn.Conv2d(5 * dim, dim, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        """Four dilations and the mean of the map, joined by a 1×1 convolution."""
        mean = self.global_avg_pool(x).expand(-1, -1, *x.shape[2:])
        maps = [self.aspp1(x), self.aspp2(x), self.aspp3(x), self.aspp4(x), mean]
        return F.relu(self.bn1(self.conv1(torch.cat(maps, 1))))


class DepthHead(nn.Module):
    """Depth distribution of every cell of a feature map (``DepthHead_MLVGDpt``; ``DepthHead`` with no groups).

    Args:
        in_channels: of the feature map. dim: inside.
        bound: (start, stop, step) of the bins in meters.
        group_sizes: equally many groups of each size share one probability, near ones small; () gives every bin its
            own. A group's probability is repeated over its bins, not divided, so the distribution sums to more than 1.
        blocks: residual blocks. context: the dilated pyramid and the deformable convolution of the published head.
        loss_weight: of the supervision.

    Shapes: x (B, in_channels, y, x) → group probabilities (B, G, y, x) → `distribution` (B, D, y, x).
    Raises: ValueError if the bins are no multiple of the sum of the group sizes.
    """

    def __init__(
        self,
        in_channels: int = 256,
        dim: int = 256,
        bound: Bound = (2.0, 58.0, 0.5),
        *,
        group_sizes: Sequence[int] = (2, 4, 8),
        blocks: int = 3,
        context: Literal["aspp_dcn"] | None = "aspp_dcn",
        loss_weight: float = 0.5,
    ) -> None:
        super().__init__()
        bins = depth_bins(bound)
        if group_sizes and bins % sum(group_sizes):
            raise ValueError(
                f"DepthHead: {bins} bins are no multiple of {sum(group_sizes)}, the sum of "
                f"group_sizes={tuple(group_sizes)}; use group_sizes=() for a probability of every bin"
            )
        per_size = bins // sum(group_sizes) if group_sizes else 0
        widths = [size for size in group_sizes for _ in range(per_size)] or [1] * bins
        self.register_buffer(
            "group_of_bin", torch.tensor([g for g, width in enumerate(widths) for _ in range(width)]), persistent=False
        )
        self.group_of_bin: Tensor
        self.bound = bound
        self.loss_weight = loss_weight
        self.reduce_conv = nn.Sequential(
            nn.Conv2d(in_channels, dim, 3, padding=1), nn.BatchNorm2d(dim), nn.ReLU(inplace=True)
        )
        layers: list[nn.Module] = [BasicBlock(dim) for _ in range(blocks)]
        if context is not None:
            layers += [AtrousPyramid(dim), DeformableConv(dim, groups=4)]
        self.depth_conv = nn.Sequential(*layers, nn.Conv2d(dim, len(widths), 1))

    def forward(self, x: Float[Tensor, "B C y x"]) -> Float[Tensor, "B G y x"]:
        """Logits of the groups."""
        return self.depth_conv(self.reduce_conv(x))

    def distribution(self, logits: Float[Tensor, "B G y x"]) -> Float[Tensor, "B D y x"]:
        """Weight of every bin: the softmax over groups, repeated over the bins of a group."""
        return logits.softmax(1).index_select(1, self.group_of_bin)

    def loss(self, logits: Float[Tensor, "B G y x"], bins: Int[Tensor, "B y x"]) -> Float[Tensor, ""]:
        """Binary cross-entropy of all groups, summed, per cell with a known depth; ``bins`` by `nearest_depth_bin`."""
        known = bins >= 0
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_p = exact.movedim(1, -1)[known].log_softmax(-1)
        target = self.group_of_bin[bins[known]].unsqueeze(-1)
        log_rest = torch.log1p(-log_p.exp().clamp(max=1 - 1e-7))
        right = log_p.gather(1, target).clamp(min=-100) - log_rest.gather(1, target)
        return -self.loss_weight * (log_rest.sum() + right.sum()) / known.sum().clamp(min=1)
