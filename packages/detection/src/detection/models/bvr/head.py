"""BVR: bridging visual representations. A dense detector's features attend to corners and centers of objects.

Paper: Chi et al., RelationNet++: Bridging Visual Representations for Object Detection via Transformer Decoder, NeurIPS
2020, arXiv 2010.15831. Official code: https://github.com/microsoft/RelationNet2 (MIT), files
``code/models/dense_heads/{bvr_head,keypoint_head}.py``, ``code/models/utils/bvr_transformer`` and
``code/core/bbox/assigners/point_kpt_assigner.py``.

Same: keypoint head, selection of keys (a cell may come once for every class), shared 401×401 table of relative
positions read bilinearly with ``align_corners=False`` (an offset r reads the value of 1.0025·r), logarithm after the
interpolation, the stride of the first level as unit of every level, ReLU on the sum of feature and attention, targets
on all levels, losses. Parameters have the official names below ``bbox_head.``.

Differences, and why: the sine embedding of the table (157 MiB, officially a buffer in every checkpoint) is separable in
x and y, so the table is the outer sum of two 401×8 ones; ``base_embedding`` of a checkpoint is ignored. Queries are
processed in tiles that are recomputed in the backward pass, so that neither the positions nor the scores of all queries
and keys are in memory. Images without objects give finite losses. Heads are wrapped through an explicit protocol
(`HostHead`), not by replacing methods.

Checked in: ``models/bvr/test_peer.py`` (a plain network), ``test_head.py``. Shapes: feature maps (B, C, y, x) of L
levels in, the same out.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attn_core import attention
from detection.layers.pyramid import Maps, group_norm

PointType = Literal["top_left_corner", "bottom_right_corner", "center"]
Geometry = Literal["shared", "towers", "sets"]
POINT_TYPES: tuple[PointType, ...] = ("top_left_corner", "bottom_right_corner", "center")


class HostHead(Protocol):
    """What BVR needs of a head: its two towers, and its predictions from their outputs."""

    def forward_features(self, features: Maps) -> tuple[Maps, Maps]:
        """Outputs of the classification and of the regression tower."""
        ...

    def forward_predictions(self, cls_features: Maps, reg_features: Maps) -> dict[str, Tensor]:
        """The dict that the detector expects of its head."""
        ...

    def compute_loss(
        self, targets: list[dict[str, Tensor]], head_outputs: dict[str, Any], anchors: Maps, matched_idxs: Maps
    ) -> dict[str, Tensor]:
        """Losses of the host."""
        ...


class Keys(NamedTuple):
    """Selected keypoints: features (B, K, C), positions (B, K, 2) in pixels (x, y), scores (B, K)."""

    features: Float[Tensor, "B K C"]
    positions: Float[Tensor, "B K 2"]
    scores: Float[Tensor, "B K"]


class ConvModule(nn.Module):
    """3×3 or 1×1 convolution, group norm if asked for, ReLU; parameters under mmcv's names ``conv`` and ``gn``."""

    def __init__(self, in_channels: int, channels: int, kernel: int = 3, *, norm: bool, relu: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=not norm)
        self.gn = group_norm(channels) if norm else None
        self.relu = relu
        nn.init.normal_(self.conv.weight, std=0.01)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Float[Tensor, "B C y x"]) -> Float[Tensor, "B C y x"]:
        """Convolution, then group norm and ReLU where the layer has them."""
        x = self.conv(x)
        x = x if self.gn is None else self.gn(x)
        return F.relu(x) if self.relu else x


class RelativeGeometry(nn.Module):
    """Bias of a head from the position of a key relative to a query, read from a learned table.

    Args:
        num_heads: columns of the table. dim: channels of the sine embedding that a linear map turns into the table.
        base_size: the table covers offsets −base_size/2 … base_size/2 units; beyond, its border holds.

    Raises: ValueError unless ``dim`` is a multiple of 4 and ``base_size`` even.
    """

    def __init__(self, num_heads: int = 8, dim: int = 256, base_size: int = 400) -> None:
        super().__init__()
        if dim % 4 or base_size % 2 or base_size < 2:
            raise ValueError(
                f"RelativeGeometry: dim must be a multiple of 4, base_size even; got dim={dim}, base_size={base_size}"
            )
        self.base_size = base_size
        self.embedding_transform = nn.Sequential(ConvModule(dim, num_heads, 1, norm=False, relu=False))
        steps = torch.arange(-(base_size // 2), base_size // 2 + 1, dtype=torch.float64)
        angle = steps.unsqueeze(1) / 1000 ** (4 / dim * torch.arange(dim // 4, dtype=torch.float64))
        self.register_buffer("waves", torch.cat([angle.sin(), angle.cos()], 1).float(), persistent=False)
        self.waves: Tensor

    def table(self) -> Float[Tensor, "H side side"]:
        """Values of all integer offsets, y before x."""
        conv: Any = self.embedding_transform[0].conv
        along_x, along_y = conv.weight.flatten(1).chunk(2, 1)
        x, y = along_x @ self.waves.T.to(along_x), along_y @ self.waves.T.to(along_y)
        return y.unsqueeze(2) + x.unsqueeze(1) + conv.bias.view(-1, 1, 1)

    def forward(
        self, offsets: Float[Tensor, "B N K 2"], table: Float[Tensor, "H side side"] | None = None
    ) -> Float[Tensor, "B H N K"]:
        """Log of the table at offsets (x, y) in units; values below 1e-6 count as 1e-6."""
        table = self.table() if table is None else table
        batch = offsets.shape[0]
        read = F.grid_sample(
            table.to(offsets.dtype).expand(batch, *table.shape),
            offsets / (self.base_size / 2),
            padding_mode="border",
            align_corners=False,
        )
        return read.clamp(min=1e-6).log()

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        state_dict.pop(prefix + "base_embedding", None)  # the official buffer; here it is computed
        super()._load_from_state_dict(state_dict, prefix, *args)


class KeyAttention(nn.Module):
    """Multi-head attention from all positions to the selected keys, parameters as in ``nn.MultiheadAttention``."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"KeyAttention: num_heads={num_heads} must divide dim={dim}")
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, query: Float[Tensor, "B N C"], key: Float[Tensor, "B K C"], bias: Float[Tensor, "B H N K"]
    ) -> Float[Tensor, "B N C"]:
        """Queries read the keys; ``bias`` (their geometry) is added to the scores."""
        dim = query.shape[-1]
        q = F.linear(query, self.in_proj_weight[:dim], self.in_proj_bias[:dim])
        k, v = F.linear(key, self.in_proj_weight[dim:], self.in_proj_bias[dim:]).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        out, _ = attention(q, k, v, bias=bias.to(q.dtype))
        return self.out_proj(out.transpose(1, 2).flatten(2))


class BVRTransformer(nn.Module):
    """q' = ReLU(q + Σ_g attention_g): features of all levels look at each set of keys.

    Args:
        dim, num_heads: of the attention. num_sets: of keys. base_size: of the `RelativeGeometry`.
        geometry: another transformer's, to share it; by default an own one.
        geometry_per_set: a `RelativeGeometry` for each set of keys instead of one for all.
        tile: queries at a time.
    """

    def __init__(
        self,
        dim: int = 256,
        num_heads: int = 8,
        num_sets: int = 1,
        *,
        base_size: int = 400,
        geometry: RelativeGeometry | None = None,
        geometry_per_set: bool = False,
        tile: int = 4096,
    ) -> None:
        super().__init__()
        self.decoder = nn.ModuleList([KeyAttention(dim, num_heads) for _ in range(num_sets)])
        self.relative_positional_encoding: Any = (
            nn.ModuleList([RelativeGeometry(num_heads, dim, base_size) for _ in range(num_sets)])
            if geometry_per_set
            else geometry or RelativeGeometry(num_heads, dim, base_size)
        )
        self.tile = tile

    def geometries(self) -> list[RelativeGeometry]:
        """The one of each set of keys."""
        own = self.relative_positional_encoding
        return list(own) if isinstance(own, nn.ModuleList) else [own] * len(self.decoder)  # pyright: ignore[reportReturnType]

    def tables(self) -> list[Float[Tensor, "H side side"]]:
        """The table of each set of keys; one that is shared is made once."""
        made = {geometry: geometry.table() for geometry in self.geometries()}
        return [made[geometry] for geometry in self.geometries()]

    def forward(self, maps: Maps, positions: Maps, keys: Sequence[Keys], unit: float) -> Maps:
        """Maps (B, C, y, x) with cell positions (y·x, 2) in pixels; ``unit`` pixels are one step of the table."""
        tables = self.tables()
        out = []
        for features, cells in zip(maps, positions, strict=True):
            query = features.flatten(2).transpose(1, 2)
            tiles = []
            for start in range(0, query.shape[1], self.tile):
                part, where = query[:, start : start + self.tile], cells[start : start + self.tile]
                if torch.is_grad_enabled() and query.shape[1] > self.tile:
                    tiles.append(checkpoint(self.attend, part, where, keys, unit, tables, use_reentrant=False))
                else:
                    tiles.append(self.attend(part, where, keys, unit, tables))
            out.append(torch.cat(tiles, 1).transpose(1, 2).unflatten(2, features.shape[2:]))
        return out

    def attend(
        self,
        query: Float[Tensor, "B N C"],
        cells: Float[Tensor, "N 2"],
        keys: Sequence[Keys],
        unit: float,
        tables: Sequence[Float[Tensor, "H side side"]] | None = None,
    ) -> Float[Tensor, "B N C"]:
        """The same for queries at any positions in pixels, not tiled; without keys ReLU alone."""
        tables = self.tables() if tables is None else tables
        total = query
        for layer, key, geometry, table in zip(self.decoder, keys, self.geometries(), tables, strict=True):
            if not key.features.shape[1]:
                continue
            offsets = (key.positions.unsqueeze(1) - cells.unsqueeze(1)) / unit
            bias = geometry(offsets, table)
            total = total + layer(query, key.features, bias)
        return F.relu(total)


class KeypointHead(nn.Module):
    """Heatmaps (one per class) and offsets of corners and centers on every level.

    Args:
        num_classes: heatmaps. dim: channels. strides: of the levels in pixels.
        stacked_convs: layers of a tower, one tower per point type. logits_convs: layers of each branch.
        norm: group norm after convolutions.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int = 256,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        *,
        stacked_convs: int = 2,
        logits_convs: int = 1,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.strides = tuple(strides)

        def tower(count: int) -> list[nn.Module]:
            return [ConvModule(dim, dim, norm=norm) for _ in range(count)]

        def branch(channels: int, bias: float) -> nn.ModuleList:
            last = nn.Conv2d(dim, channels, 3, padding=1)
            nn.init.normal_(last.weight, std=0.01)
            nn.init.constant_(last.bias, bias)  # pyright: ignore[reportArgumentType]
            return nn.ModuleList([*tower(logits_convs), last])

        rare = -math.log(99)  # probability 0.01
        self.keypoint_layers = nn.ModuleDict({kind: nn.ModuleList(tower(stacked_convs)) for kind in POINT_TYPES})
        self.keypoint_cls_heads = nn.ModuleDict({kind: branch(num_classes, rare) for kind in POINT_TYPES})
        self.keypoint_offset_heads = nn.ModuleDict({kind: branch(2, 0.0) for kind in POINT_TYPES})

    def forward(self, maps: Maps) -> tuple[dict[str, Maps], dict[str, Maps]]:
        """Logits and offsets (in strides) by point type, level by level."""
        logits: dict[str, Maps] = {kind: [] for kind in POINT_TYPES}
        offsets: dict[str, Maps] = {kind: [] for kind in POINT_TYPES}
        for kind in POINT_TYPES:
            for x in maps:
                feature = _chain(self.keypoint_layers[kind], x)
                logits[kind].append(_chain(self.keypoint_cls_heads[kind], feature))
                offsets[kind].append(_chain(self.keypoint_offset_heads[kind], feature))
        return logits, offsets

    def cell_positions(self, maps: Maps) -> Maps:
        """Pixel positions (y·x, 2: x, y) of the cells of every level: i·stride + stride // 2."""
        found = []
        for x, stride in zip(maps, self.strides, strict=True):
            rows, columns = (torch.arange(n, device=x.device) * stride + stride // 2 for n in x.shape[2:])
            grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
            found.append(grid.flatten(0, 1).flip(-1).to(x.dtype))
        return found

    def select(self, logits: Maps, offsets: Maps, features: Maps, *, per_level: int = 20, total: int = 50) -> Keys:
        """The best keys of one type: peaks of 3×3 cells, ``per_level`` of every level, of these ``total``.

        A cell comes once for every class in which it is a peak. Fewer keys if the levels have fewer cells.
        """
        parts: list[tuple[Tensor, ...]] = []
        for heat, shift, feature, cells, stride in zip(
            logits, offsets, features, self.cell_positions(logits), self.strides, strict=True
        ):
            scores = heat.sigmoid()
            scores = (scores * (F.max_pool2d(scores, 3, 1, 1) == scores)).flatten(2)
            count = min(per_level, scores.shape[2])
            best, cell = scores.topk(count)  # of every class, then of all: the order among equals is the official one
            best, which = best.flatten(1).topk(count)
            cell = cell.flatten(1).gather(1, which)
            moved = shift.flatten(2).transpose(1, 2).gather(1, cell.unsqueeze(-1).expand(-1, -1, 2))
            chosen = feature.flatten(2).transpose(1, 2)
            chosen = chosen.gather(1, cell.unsqueeze(-1).expand(-1, -1, chosen.shape[-1]))
            parts.append((chosen, cells[cell] + moved * stride, best))
        features_, positions, scores = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        best, which = scores.topk(min(total, scores.shape[1]))
        rows = which.unsqueeze(-1)
        return Keys(
            features_.gather(1, rows.expand(-1, -1, features_.shape[-1])),
            positions.gather(1, rows.expand(-1, -1, 2)),
            best,
        )

    def loss(
        self, logits: dict[str, Maps], offsets: dict[str, Maps], targets: Sequence[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """``loss_point_cls`` (Gaussian focal, 0.25) and ``loss_point_offset`` (smooth L1), per positive cell.

        ``targets`` hold ``boxes`` (n, 4: x1, y1, x2, y2) in pixels and ``labels`` (n,).
        """
        cells = self.cell_positions(logits[POINT_TYPES[0]])
        heat_loss, offset_loss, positives = 0.0, 0.0, 0.0
        for kind in POINT_TYPES:
            heat = torch.cat([x.flatten(2) for x in logits[kind]], 2).transpose(1, 2).float()
            shift = torch.cat([x.flatten(2) for x in offsets[kind]], 2).transpose(1, 2).float()
            for b, target in enumerate(targets):
                goal, shift_goal, mask = point_targets(
                    kind, target["boxes"], target["labels"], cells, self.strides, self.num_classes
                )
                heat_loss = heat_loss + gaussian_focal_loss(heat[b], goal)
                error = F.smooth_l1_loss(shift[b], shift_goal, reduction="none")
                offset_loss = offset_loss + (error * mask.unsqueeze(1)).sum()
                positives = positives + mask.sum()
        positives = torch.as_tensor(positives).clamp(min=1)
        return {"loss_point_cls": 0.25 * heat_loss / positives, "loss_point_offset": offset_loss / positives}


def _chain(layers: nn.Module, x: Tensor) -> Tensor:
    for layer in layers.children():
        x = layer(x)
    return x


def gaussian_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Sum of the focal loss of heatmaps: exponents 2 on the prediction, 4 on the target (CornerNet)."""
    p = logits.sigmoid()
    positive = -(p + 1e-12).log() * (1 - p) ** 2 * (target == 1)
    negative = -(1 - p + 1e-12).log() * p**2 * (1 - target) ** 4
    return (positive + negative).sum()


def gaussian_radius(height: Tensor, width: Tensor, overlap: float = 0.7) -> Tensor:
    """How far corners may move, in pixels, before the IoU falls below ``overlap`` (CornerNet, its published roots)."""
    side = height + width
    area = height * width
    candidates = []
    for a, b, c in (
        (1.0, side, area * (1 - overlap) / (1 + overlap)),
        (4.0, 2 * side, (1 - overlap) * area),
        (4 * overlap, -2 * overlap * side, (overlap - 1) * area),
    ):
        root = (b**2 - 4 * a * c).sqrt()
        candidates.append(((b - root) if a != 4 * overlap else (b + root)) / (2 * a))
    return torch.stack(candidates).amin(0)


def point_targets(
    kind: PointType,
    boxes: Float[Tensor, "n 4"],
    labels: Int[Tensor, " n"],
    cells: Sequence[Float[Tensor, "_ 2"]],
    strides: Sequence[int],
    num_classes: int,
) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N 2"], Float[Tensor, " N"]]:
    """Heat, offsets and mask of positive cells; every object counts on all levels, at the cell nearest to its point."""
    count = sum(len(level) for level in cells)
    heat = cells[0].new_zeros(count, num_classes)
    shift, mask = heat.new_zeros(count, 2), heat.new_zeros(count)
    if not len(boxes):
        return heat, shift, mask
    corners = {"top_left_corner": boxes[:, :2], "bottom_right_corner": boxes[:, 2:]}
    points = corners.get(kind, (boxes[:, :2] + boxes[:, 2:]) / 2)
    sigma = (2 * gaussian_radius(boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]) + 1) / 6
    start = 0
    for level, stride in zip(cells, strides, strict=True):
        nearest = (level.unsqueeze(1) - points).square().sum(-1).argmin(0)
        squares = (level.unsqueeze(1) - level[nearest]).square().sum(-1)
        best, which = torch.exp(-0.5 * squares / sigma**2).max(1)
        rows = slice(start, start + len(level))
        heat[rows] = heat[rows].scatter(1, labels[which].unsqueeze(1), best.unsqueeze(1))
        picked = nearest.unique()
        shift[start + picked] = (points[which[picked]] - level[picked]) / stride
        mask[start + picked] = 1
        start += len(level)
    return heat, shift, mask


class BVRHead(nn.Module):
    """A dense head whose features are enhanced by keypoints; it stands in for the head it wraps.

    Args:
        bbox_head: the host, a `HostHead`.
        num_classes, dim, strides: of the host.
        num_heads: of the attention. base_size: of the geometry table, 400 or (official X101 configurations) 300.
        geometry: ``"shared"`` is one table for both towers (official ATSS), ``"towers"`` one for each (the other
            official models), ``"sets"`` one for each set of keys (``shared_positional_encoding_inter=False``).
        logits_convs, norm: of the `KeypointHead`.
        per_level, total: number of keys.
    """

    def __init__(
        self,
        bbox_head: nn.Module,
        num_classes: int,
        dim: int = 256,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        *,
        num_heads: int = 8,
        base_size: int = 400,
        geometry: Geometry = "towers",
        logits_convs: int = 1,
        norm: bool = True,
        per_level: int = 20,
        total: int = 50,
    ) -> None:
        super().__init__()
        for method in ("forward_features", "forward_predictions", "compute_loss"):
            if not hasattr(bbox_head, method):
                raise ValueError(
                    f"BVRHead: bbox_head {type(bbox_head).__name__} has no {method}; wrap it in a HostHead, as "
                    "detection.models.bvr.hosts does for torchvision's heads"
                )
        self.bbox_head: Any = bbox_head
        self.keypoint_head = KeypointHead(num_classes, dim, strides, logits_convs=logits_convs, norm=norm)
        if geometry not in ("shared", "towers", "sets"):
            raise ValueError(f"BVRHead: geometry must be 'shared', 'towers' or 'sets', got geometry={geometry!r}")
        self.geometry: Geometry = geometry
        own: dict[str, Any] = {"base_size": base_size, "geometry_per_set": geometry == "sets"}
        self.cls_transformer = BVRTransformer(dim, num_heads, 1, **own)
        shared = self.cls_transformer.relative_positional_encoding if geometry == "shared" else None
        self.reg_transformer = BVRTransformer(dim, num_heads, 2, geometry=shared, **own)
        self.per_level, self.total = per_level, total

    def forward(self, features: Maps) -> dict[str, Any]:
        """What the host gives; in training also ``keypoint_logits`` and ``keypoint_offsets``."""
        cls_features, reg_features = self.bbox_head.forward_features(features)
        logits, offsets = self.keypoint_head(features)
        cells, unit = self.keypoint_head.cell_positions(features), float(self.keypoint_head.strides[0])

        def keys(kind: PointType, source: Maps) -> Keys:
            return self.keypoint_head.select(
                logits[kind], offsets[kind], source, per_level=self.per_level, total=self.total
            )

        corners = [keys("top_left_corner", reg_features), keys("bottom_right_corner", reg_features)]
        cls_features = self.cls_transformer(cls_features, cells, [keys("center", cls_features)], unit)
        reg_features = self.reg_transformer(reg_features, cells, corners, unit)
        outputs: dict[str, Any] = self.bbox_head.forward_predictions(cls_features, reg_features)
        if self.training:
            outputs |= {"keypoint_logits": logits, "keypoint_offsets": offsets}
        return outputs

    def compute_loss(
        self, targets: list[dict[str, Tensor]], head_outputs: dict[str, Any], anchors: Maps, matched_idxs: Maps
    ) -> dict[str, Tensor]:
        """Losses of the host, and ``loss_point_cls`` and ``loss_point_offset``."""
        losses = self.bbox_head.compute_loss(targets, head_outputs, anchors, matched_idxs)
        points = self.keypoint_head.loss(head_outputs["keypoint_logits"], head_outputs["keypoint_offsets"], targets)
        return losses | points
