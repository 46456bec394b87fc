"""Plain-DETR: a detection transformer with one map, no encoder and global cross-attention with a box bias.

Paper: Lin et al., DETR Doesn't Need Multi-Scale or Locality Design, ICCV 2023, arXiv 2308.01904; hybrid matching: arXiv
2207.13080. Official code: https://github.com/impiga/Plain-DETR, ``models/detr.py`` and ``models/transformer.py``.

The same: outputs, losses and initialization of the released models, box reparametrization included; ranking of
proposals by the first class; one final norm shared by all layers.

What differs. A padded batch gives each picture exactly what it gets alone (``padding="exact"``): the backbone sees
pictures without padding, group norm and proposals ignore it and attention hides it; the official −100 and the windows
that reach into padding cost its first three models AP in batches (``padding="official"`` reproduces that). The number
of queries follows ``training``. Self-attention runs within each group of queries, where the official code computes all
pairs and masks. Sizes are Python ints, so that export and torch.compile work.

Checked in: ``models/plain_detr/test_peer.py`` (a plain network), ``test_detector.py`` and
``losses/test_set_criterion.py``. Shapes: pictures (3, Y, X) in [0, 1] → boxes.
"""

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.layers import freeze_batch_norm_2d, trunc_normal_  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from attn_core import attention, weights
from attn_core.catalog import Card, Entry, did_you_mean
from detection.boxes import apply_deltas, cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from detection.layers.box_rpb import BoxRPBAttention, PositionBias
from detection.losses import HybridCriterion
from detection.models.plain_detr.swin_v2 import SwinV2, swin_v2_large, swin_v2_small
from detection.post_process import top_scores

QueryContent = Literal["learned", "positions", "features"]
SWINS = {"swin_v2_small": swin_v2_small, "swin_v2_large": swin_v2_large}
Sizes = list[tuple[int, int]]


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of (B, C, y, x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(channels)

    def forward(self, x: Float[Tensor, "B C y x"]) -> Float[Tensor, "B C y x"]:
        """Norm over the channels of each cell."""
        return self.ln(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TimmBackbone(nn.Module):
    """The last map of a timm or vision-models backbone. ``channels`` and ``stride`` say what it gives.

    Args:
        frozen_norm: batch norms keep their statistics and weights, as the official ResNets do; False to train from
            scratch.
        stride: take the map of this stride instead of the last.
        pretrained: load timm's weights.
        drop_path: rate of stochastic depth.
        options: further arguments of the backbone, such as ``{"channels": (32, 64, 128, 256)}`` of a narrow ResNet.

    Raises: ValueError for a name that neither library knows, or a stride that the backbone does not have.
    """

    def __init__(
        self,
        name: str,
        *,
        frozen_norm: bool = True,
        stride: int | None = None,
        pretrained: bool = False,
        drop_path: float = 0.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        import vision_models  # noqa: F401  # adds its backbones to timm's list

        if not timm.is_model(name):
            near = did_you_mean(name, [*SWINS, *timm.list_models()])
            raise ValueError(f"PlainDETR: unknown backbone {name!r}{near}")
        own: dict[str, Any] = {**(options or {}), **({"drop_path_rate": drop_path} if drop_path else {})}
        maps: Any = timm.create_model(name, features_only=True, **own)
        strides = maps.feature_info.reduction()
        if stride is not None and stride not in strides:
            raise ValueError(f"PlainDETR: backbone {name!r} has maps of the strides {strides}, got stride={stride}")
        # The deepest map of the stride: all maps of a ViT have the same.
        place = len(strides) - 1 if stride is None else len(strides) - 1 - strides[::-1].index(stride)
        index = maps.feature_info.out_indices[place]
        body: Any = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=(index,), **own)
        self.body: Any = freeze_batch_norm_2d(body) if frozen_norm else body
        self.channels: int = body.feature_info.channels()[-1]
        self.stride: int = body.feature_info.reduction()[-1]

    def forward(self, x: Float[Tensor, "B 3 Y X"]) -> Float[Tensor, "B C y x"]:
        """The last map of the network, channels first whatever the layout of its own."""
        x = self.body(x)[-1]
        return x if x.shape[1] == self.channels else x.permute(0, 3, 1, 2)


class SelfAttention(nn.Module):
    """Multi-head attention, with the parameters of ``nn.MultiheadAttention``. (B, N, C) → same."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, position: Tensor, groups: Sequence[int]) -> Tensor:
        """Queries attend within their group; ``groups`` are the groups' lengths."""
        weight_qk, weight_v = self.in_proj_weight.tensor_split([2 * x.shape[-1]])
        bias_qk, bias_v = self.in_proj_bias.tensor_split([2 * x.shape[-1]])
        q, k = F.linear(x + position, weight_qk, bias_qk).chunk(2, -1)
        v = F.linear(x, weight_v, bias_v)
        heads = [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).split(list(groups), 2) for part in (q, k, v)]
        out = torch.cat([attention(*group)[0] for group in zip(*heads, strict=True)], 2)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Self-attention, BoxRPB cross-attention, MLP, each with its norm before it."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, cross_attn: BoxRPBAttention) -> None:
        super().__init__()
        self.cross_attn = cross_attn
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = SelfAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        position: Float[Tensor, "B N C"],
        groups: Sequence[int],
        boxes: Float[Tensor, "B N 4"],
        key: Float[Tensor, "B M C"],
        value: Float[Tensor, "B M C"],
        size: tuple[int, int],
        visible: Bool[Tensor, "B M"] | None,
        soft_mask: bool,
    ) -> Float[Tensor, "B N C"]:
        """Queries after attention within ``groups``, to the map of ``size`` (biased by ``boxes``), and the MLP."""
        x = x + self.self_attn(self.norm2(x), position, groups)
        query = self.norm1(x) + position
        x = x + self.cross_attn(query, boxes, key, value, size, visible=visible, soft_mask=soft_mask)
        return x + self.linear2(F.relu(self.linear1(self.norm3(x))))


class BoxHead(nn.Module):
    """Three linear layers; the last begins with zeros, so that boxes begin as their references."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, 4)])
        nn.init.zeros_(self.layers[-1].weight)  # pyright: ignore[reportArgumentType]
        nn.init.zeros_(self.layers[-1].bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N 4"]:
        """Box deltas (before the sigmoid or the decoding)."""
        return self.layers[2](F.relu(self.layers[1](F.relu(self.layers[0](x)))))


def resampler(dim: int, source: int, target: int, *, halve: bool = False) -> nn.Module:
    """Convolutions from one stride to another, each by 2, with norm and GELU between them.

    Raises: ValueError if the strides differ by another factor than a power of two.
    """
    steps = math.log2(source / target)
    if steps != int(steps):
        raise ValueError(f"PlainDETR: stride {target} cannot be made from stride {source} in steps of 2")
    layers: list[nn.Module] = []
    for step in range(abs(int(steps))):
        out = dim // 2 if halve else dim
        layers += [LayerNorm2d(dim), nn.GELU()] if step else []
        layers.append((nn.ConvTranspose2d if steps > 0 else nn.Conv2d)(dim, out, 2, stride=2))
        dim = out
    return nn.Sequential(*layers) if layers else nn.Identity()


class PlainDETR(nn.Module):
    """Plain-DETR on any backbone, through torchvision's protocol.

    Training mode: ``net(images, targets)`` → losses; targets hold ``boxes`` (N, 4) xyxy in pixels and ``labels``. Eval
    mode: ``net(images)`` → per picture ``boxes`` xyxy in pixels of that picture, ``scores``, ``labels``, best first.

    Args:
        backbone: ``"swin_v2_small"``, ``"swin_v2_large"``, a name of timm or vision-models, or a module with
            ``channels`` and ``stride`` that gives one map.
        backbone_options: of its builder.
        num_classes: outputs; 91 for COCO's own ids.
        upsample_stride: the backbone's map is brought to this stride by transposed convolutions.
        queries, queries_many: of the one-to-one group, and of the group that learns with every object repeated
            ``repeats`` times and is not used in inference.
        position_bias, rpb_hidden_dim: see `BoxRPBAttention`.
        reparam: boxes in pixels, refined as in R-CNN, instead of in [0, 1] through sigmoids.
        proposal_strides: of the maps that proposals come from; all are made from the one map.
        proposal_size: side of proposals at the first of these: a share of the image, or pixels with ``reparam``.
            Doubles with each next. By default 0.05 or 50.
        look_forward_twice: gradients of a layer's boxes reach the layer before.
        query_content: ``"learned"`` (mixed selection: only the positions of the queries come from the proposals),
            ``"positions"`` (content from the proposals' coordinates, too) or ``"features"`` (content is the feature of
            the proposal's cell, as in Efficient DETR, arXiv 2104.01318), which learns faster on few pictures.
        proposal_classes: proposals learn all classes and are ranked by the best one, as in DINO; officially they only
            tell objects from background, with the first class's output.
        match_anchors: in training, proposals are matched with objects by their anchors, so that an object's cell stays
            the same; officially by what they predict. Only with ``reparam``.
        class_weight: of the class losses.
        padding: see the module.
        top_k: boxes per picture.
        mean, std: of the pictures' channels.

    Raises: ValueError for sizes that do not fit, wrong options, missing or malformed targets.
    """

    # Whole: each of its options is checked and used once; parts would relay them.
    def __init__(
        self,
        backbone: str | nn.Module = "swin_v2_small",
        num_classes: int = 91,
        *,
        backbone_options: Mapping[str, Any] | None = None,
        dim: int = 256,
        num_heads: int = 8,
        ffn_dim: int = 2048,
        num_layers: int = 6,
        upsample_stride: int = 16,
        queries: int = 300,
        queries_many: int = 1500,
        repeats: int = 6,
        many_weight: float = 1.0,
        position_bias: PositionBias = "linear",
        rpb_hidden_dim: int = 512,
        reparam: bool = False,
        proposal_strides: Sequence[int] = (8, 16, 32, 64),
        proposal_size: float | None = None,
        look_forward_twice: bool = True,
        query_content: QueryContent = "learned",
        proposal_classes: bool = False,
        match_anchors: bool = False,
        class_weight: float = 2.0,
        padding: Literal["exact", "official"] = "exact",
        top_k: int = 100,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        if padding not in ("exact", "official"):
            raise ValueError(f"PlainDETR: padding must be 'exact' or 'official', got padding={padding!r}")
        if query_content not in ("learned", "positions", "features"):
            raise ValueError(
                f"PlainDETR: query_content must be 'learned', 'positions' or 'features', got "
                f"query_content={query_content!r}"
            )
        if num_classes < 1 or queries < 1 or queries_many < 0:
            raise ValueError(
                f"PlainDETR: num_classes={num_classes}, queries={queries} must be positive and "
                f"queries_many={queries_many} not negative"
            )
        if match_anchors and not reparam:
            raise ValueError("PlainDETR: match_anchors=True needs reparam=True")
        if isinstance(backbone, str):
            builder: Any = SWINS.get(backbone)
            options = dict(backbone_options or {})
            body: Any = builder(**options) if builder else TimmBackbone(backbone, **options)
        else:
            body = backbone
        self.body = body
        self.queries, self.queries_many = queries, queries_many
        self.reparam = reparam
        self.stride = upsample_stride
        self.proposal_strides = tuple(proposal_strides)
        self.proposal_size = proposal_size if proposal_size is not None else (50.0 if reparam else 0.05)
        self.look_forward_twice = look_forward_twice
        self.padding = padding
        self.query_content = query_content
        self.proposal_classes = proposal_classes
        self.top_k = top_k
        self.num_classes = num_classes
        self.criterion = HybridCriterion(
            repeats=repeats,
            many_weight=many_weight,
            class_weight=class_weight,
            box_weight=1.0 if reparam else 5.0,
            proposal_classes=proposal_classes,
            match_anchors=match_anchors,
        )
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

        self.upsample = resampler(body.channels, body.stride, upsample_stride, halve=True)
        width = body.channels * upsample_stride // body.stride
        self.input_proj = nn.Sequential(nn.Conv2d(width, dim, 1), nn.GroupNorm(math.gcd(32, dim), dim))
        self.level_embed = nn.Parameter(torch.randn(1, dim))
        self.enc_output_proj = nn.ModuleList(resampler(dim, upsample_stride, s) for s in self.proposal_strides)
        self.enc_output = nn.Linear(dim, dim)
        self.enc_output_norm = nn.LayerNorm(dim)
        self.pos_trans = nn.Linear(2 * dim, 2 * dim)
        self.pos_trans_norm = nn.LayerNorm(2 * dim)
        self.query_embed = nn.Embedding(queries + queries_many, dim) if query_content == "learned" else None
        self.layers = nn.ModuleList(
            DecoderLayer(
                dim,
                num_heads,
                ffn_dim,
                BoxRPBAttention(
                    dim, num_heads, position_bias=position_bias, hidden_dim=rpb_hidden_dim, stride=upsample_stride
                ),
            )
            for _ in range(num_layers)
        )
        self.final_layer_norm = nn.LayerNorm(dim)
        # One pair of heads per layer, and the last for the proposals.
        self.class_embed = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(num_layers + 1))
        self.bbox_embed = nn.ModuleList(BoxHead(dim) for _ in range(num_layers + 1))
        self._initialize()

    def _initialize(self) -> None:
        for module in (self.enc_output_proj, self.enc_output, self.pos_trans, self.input_proj[0]):
            for parameter in module.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        nn.init.zeros_(self.input_proj[0].bias)  # pyright: ignore[reportArgumentType]
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for head in self.class_embed:
            nn.init.constant_(head.bias, -math.log(99))  # pyright: ignore[reportArgumentType]

    def forward(
        self,
        images: Sequence[Float[Tensor, "3 _ _"]] | Float[Tensor, "B 3 Y X"],
        targets: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training mode, detections in eval mode; of no pictures none."""
        if not self.training:
            if len(images) == 0:
                return []
            return self.detections(self.outputs(images), [(x.shape[-2], x.shape[-1]) for x in images])
        if targets is None or len(targets) != len(images):
            raise ValueError(
                f"PlainDETR: training needs one target per picture, got {None if targets is None else len(targets)} "
                f"for {len(images)} pictures; call eval() for predictions"
            )
        own = []
        for image, target in zip(images, targets, strict=True):
            labels, boxes = target["labels"], xyxy_to_cxcywh(target["boxes"].to(image.dtype))
            if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= self.num_classes):
                raise ValueError(
                    f"PlainDETR: labels must be in 0…{self.num_classes - 1}, got {int(labels.min())}…"
                    f"{int(labels.max())}; set num_classes"
                )
            if not self.reparam:
                boxes = boxes / boxes.new_tensor([image.shape[-1], image.shape[-2]] * 2)
            own.append({"labels": labels, "boxes": boxes})
        return self.criterion(self.outputs(images), own)

    def detections(self, outputs: Mapping[str, Any], sizes: Sizes) -> list[dict[str, Tensor]]:
        """The ``top_k`` best scores of `outputs` as xyxy boxes in pixels of pictures of these sizes (Y, X)."""
        last = outputs["layers"][-1]
        scores, labels, chosen = top_scores(last["pred_logits"], self.top_k)
        found = []
        for index, (height, width) in enumerate(sizes):
            boxes = cxcywh_to_xyxy(last["pred_boxes"][index][chosen[index]])
            limit = boxes.new_tensor([width, height] * 2)
            boxes = torch.minimum(boxes.clamp(min=0), limit) if self.reparam else boxes * limit
            found.append({"boxes": boxes, "scores": scores[index], "labels": labels[index]})
        return found

    def outputs(self, images: Sequence[Tensor] | Tensor) -> dict[str, Any]:
        """Raw outputs: ``layers`` and ``layers_many``, each a list of dicts per decoder layer, and ``proposals``.

        A dict holds ``pred_logits`` (B, Q, K) and ``pred_boxes`` (B, Q, 4) cxcywh: in [0, 1] of the picture, or with
        ``reparam`` in pixels, then also ``pred_deltas`` and ``pred_boxes_old``, the boxes they were applied to.
        """
        if not isinstance(images, Tensor) and len(images) == 0:  # the length of a tensor would fix an exported graph
            raise ValueError("PlainDETR: the batch holds no picture")
        memory, sizes = self._features(images)
        size = (memory.shape[2], memory.shape[3])
        padded = any(own != size for own in sizes)
        visible = _inside(size, sizes, memory.device) if padded else None
        tokens = memory.flatten(2).transpose(1, 2)
        proposals, reference, chosen, limit, groups = self._proposals(memory, sizes)
        position = self._map_position(size, visible, tokens)
        query_position = self.pos_trans_norm(self.pos_trans(sine_embedding(reference, tokens.shape[-1] // 2)))
        query_position, content = query_position.chunk(2, -1)
        if self.query_embed is not None:
            weight = self.query_embed.weight
            rows = [weight[: groups[0]], weight[self.queries : self.queries + groups[1]]]
            content = torch.cat(rows).expand(tokens.shape[0], -1, -1)
        elif self.query_content == "features":
            content = chosen

        pixels = None  # of normalized boxes, in the padded image
        if not self.reparam:
            pixels = (_extents(sizes, tokens) * self.stride).repeat(1, 2)[:, None]
        flat_visible = None if visible is None else visible.flatten(1)
        results: list[dict[str, Tensor]] = []
        x, previous = content, reference
        for layer, classify, box_head in zip(self.layers, self.class_embed, self.bbox_embed, strict=False):
            boxes = reference if pixels is None else reference * pixels
            x = layer(x, query_position, groups, boxes, tokens + position, tokens, size, flat_visible,
                      self.padding == "official")  # fmt: skip
            state = self.final_layer_norm(x)
            deltas = box_head(state)
            result = {"pred_logits": classify(state), "pred_boxes": self._refine(previous, deltas, limit)}
            if self.reparam:
                result |= {"pred_deltas": deltas, "pred_boxes_old": previous}
            results.append(result)
            previous = self._refine(reference, deltas, limit)
            reference = previous.detach()
            if not self.look_forward_twice:
                previous = reference
        one, many = groups
        return {
            "layers": [{name: value[:, :one] for name, value in result.items()} for result in results],
            "layers_many": [{name: value[:, one:] for name, value in result.items()} for result in results if many],
            "proposals": proposals,
        }

    def _refine(self, reference: Tensor, deltas: Tensor, limit: Tensor) -> Tensor:
        if self.reparam:
            return apply_deltas(reference, deltas, limit)
        return torch.sigmoid(deltas + inverse_sigmoid(reference))

    def _features(self, images: Sequence[Tensor] | Tensor) -> tuple[Float[Tensor, "B C y x"], Sizes]:
        """One map for all pictures, padded at the right and the bottom, and the rows and columns of each.

        Where all have the same size it is given once, so that an exported graph holds for any number of pictures.
        """
        if isinstance(images, Tensor):
            memory = self._embed((images - self.mean) / self.std)
            return memory, [(memory.shape[2], memory.shape[3])]
        shapes = [(image.shape[-2], image.shape[-1]) for image in images]
        if len(set(shapes)) == 1:
            return self._features(torch.stack(list(images)))
        normed = [(image - self.mean) / self.std for image in images]
        if self.padding == "official":
            height, width = (max(sides) for sides in zip(*shapes, strict=True))
            memory = self._embed(torch.stack([_pad(image, (height, width)) for image in normed]))
            rows, columns = memory.shape[2:]
            sizes = [(_kept(rows, height, h), _kept(columns, width, w)) for h, w in shapes]
            return memory, sizes
        maps: dict[int, Tensor] = {}
        for shape in dict.fromkeys(shapes):
            members = [index for index, own in enumerate(shapes) if own == shape]
            maps |= dict(zip(members, self._embed(torch.stack([normed[i] for i in members])), strict=True))
        sizes = [(maps[i].shape[1], maps[i].shape[2]) for i in range(len(shapes))]
        largest = (max(h for h, _ in sizes), max(w for _, w in sizes))
        return torch.stack([_pad(maps[i], largest) for i in range(len(shapes))]), sizes

    def _embed(self, batch: Tensor) -> Tensor:
        return self.input_proj(self.upsample(self.body(batch)))

    def _map_position(self, size: tuple[int, int], visible: Tensor | None, like: Tensor) -> Float[Tensor, "B M C"]:
        """Sine embedding of rows and columns, counted in cells or (without reparam) in shares of the picture."""
        shown = visible if visible is not None else torch.ones(1, *size, dtype=torch.bool, device=like.device)
        parts = []
        for axis in (1, 2):
            count = shown.cumsum(axis).to(like.dtype)
            place = count - 0.5
            if not self.reparam:
                place = place / (count.select(axis, -1).unsqueeze(axis) + 1e-6)
            parts.append(sine_embedding(place.flatten(1)[..., None], like.shape[-1] // 2))
        return torch.cat(parts, -1) + self.level_embed[0]

    def _proposals(
        self, memory: Float[Tensor, "B C y x"], sizes: Sizes
    ) -> tuple[dict[str, Tensor], Float[Tensor, "B N 4"], Float[Tensor, "B N C"], Tensor, tuple[int, int]]:
        """Outputs of the proposal stage; the queries' boxes and features; limits of boxes in pixels (B, 1, 4); lengths
        of the query groups."""
        tokens, anchors, hidden = [], [], []
        limit = corner = memory.new_empty(0)
        for level, (stride, resample) in enumerate(zip(self.proposal_strides, self.enc_output_proj, strict=True)):
            maps = resample(memory)
            rows, columns = maps.shape[2:]
            if len(sizes) == 1:
                own = [(rows, columns)]
            elif self.padding == "exact":
                own = [(h * self.stride // stride, w * self.stride // stride) for h, w in sizes]
            else:
                own = [(_kept(rows, memory.shape[2], h), _kept(columns, memory.shape[3], w)) for h, w in sizes]
            if level == 0:
                limit = (_extents(own, memory) * stride).repeat(1, 2)[:, None]
                full = own if self.padding == "exact" else [(rows, columns)]
                corner = (_extents(full, memory) * stride).amax(1).view(-1, 1, 1)
            y = torch.arange(rows, device=memory.device, dtype=memory.dtype) + 0.5
            x = torch.arange(columns, device=memory.device, dtype=memory.dtype) + 0.5
            center = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).flatten(0, 1)[None]
            if self.reparam:
                center = (center * stride).expand(len(own), -1, -1)
            else:
                center = center / _extents(own, memory)[:, None]
            anchors.append(torch.cat([center, torch.full_like(center, self.proposal_size * 2**level)], -1))
            tokens.append(maps.flatten(2).transpose(1, 2))
            inside = torch.ones_like(center[..., 0], dtype=torch.bool)
            hidden.append(~(inside if len(own) == 1 else _inside((rows, columns), own, memory.device).flatten(1)))
        anchor, padding = torch.cat(anchors, 1), torch.cat(hidden, 1)
        frame = limit if self.reparam else 1.0
        unusable = padding[..., None] | ~((anchor > 0.01 * frame) & (anchor < 0.99 * frame)).all(-1, keepdim=True)
        state = self.enc_output_norm(self.enc_output(torch.cat(tokens, 1).masked_fill(unusable, 0.0)))
        logits, deltas = self.class_embed[-1](state), self.bbox_embed[-1](state)
        if self.reparam:
            anchor = torch.where(unusable, corner, anchor).expand_as(deltas)
            boxes = apply_deltas(anchor, deltas, limit)
            outputs = {"pred_logits": logits, "pred_boxes": boxes, "pred_deltas": deltas, "pred_boxes_old": anchor}
        else:
            anchor = torch.where(unusable, 0.5, anchor)
            odds = torch.log(anchor / (1 - anchor)).masked_fill(unusable, float("inf"))
            boxes = torch.sigmoid(deltas + odds)
            outputs = {"pred_logits": logits, "pred_boxes": boxes}
        score = (logits.amax(-1) if self.proposal_classes else logits[..., 0]).detach()
        if self.padding == "exact":
            score = score.masked_fill(padding, float("-inf"))
        one = min(self.queries, score.shape[1])
        many = min(self.queries_many, score.shape[1] - one) if self.training else 0
        best = score.topk(one + many, dim=1).indices
        reference = boxes.detach().gather(1, best[..., None].expand(-1, -1, 4))
        chosen = state.gather(1, best[..., None].expand(-1, -1, state.shape[-1]))
        return outputs, reference, chosen, limit, (one, many)


def sine_embedding(positions: Float[Tensor, "B N D"], channels: int) -> Float[Tensor, "B N D*channels"]:
    """sin and cos of 2π·position at wavelengths up to 10,000·2π, ``channels`` for each coordinate."""
    pair = torch.arange(channels, device=positions.device) // 2
    wavelength = 10000 ** (2 * pair.to(positions.dtype) / channels)
    angle = (positions * (2 * math.pi))[..., None] / wavelength
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(2)


def _pad(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.pad(x, (0, size[1] - x.shape[2], 0, size[0] - x.shape[1]))


def _extents(sizes: Sizes, like: Tensor) -> Float[Tensor, "B 2"]:
    """Columns and rows of each; counted by ``arange``, so that one size stays dynamic in an exported graph."""
    if len(sizes) > 1:
        return like.new_tensor([(columns, rows) for rows, columns in sizes])
    counts = [torch.arange(1, length + 1, device=like.device, dtype=like.dtype)[-1] for length in sizes[0][::-1]]
    return torch.stack(counts)[None]


def _kept(cells: int, pixels: int, shown: int) -> int:
    """How many of ``cells`` are not padding after nearest-neighbor resizing of a mask with ``shown`` of ``pixels``."""
    return sum(cell * pixels // cells < shown for cell in range(cells))


def _inside(size: tuple[int, int], sizes: Sizes, device: torch.device) -> Bool[Tensor, "B y x"]:
    """True within each picture's own rows and columns."""
    own = torch.tensor(sizes, device=device)
    rows = torch.arange(size[0], device=device) < own[:, :1]
    columns = torch.arange(size[1], device=device) < own[:, 1:]
    return rows[:, :, None] & columns[:, None]


# Beginnings of the official names → ours; what stands twice there (heads under the decoder) is read once.
KEY_MAP = (
    (r"^backbone\.0\.(net\.)?body\.", "body."),
    (r"^backbone\.0\.upsample\.", "upsample."),
    (r"^input_proj\.0\.", "input_proj."),
    (r"^transformer\.decoder\.(layers|final_layer_norm)\.", r"\1."),
    (r"^transformer\.decoder\.(class_embed|bbox_embed)\.", r"\1."),
    (r"^transformer\.", ""),
)
_BUFFERS = ("relative_coords_table", "relative_position_index", "num_batches_tracked")


def our_name(official: str) -> str:
    """The name of an official parameter in `PlainDETR`, with a Swin V2 backbone or a ResNet."""
    for pattern, ours in KEY_MAP:
        renamed, count = re.subn(pattern, ours, official)
        if count:
            return renamed
    return official


def load_official(model: PlainDETR, source: Mapping[str, Any] | str | Path, *, ignore: Sequence[str] = ()) -> PlainDETR:
    """Copy an official checkpoint into ``model``, every parameter or none.

    Args:
        source: a file, ``hf://owner/repo/file``, or what such a file holds.
        ignore: beginnings of our names that may differ: ``("class_embed.",)`` for other classes.

    Raises: ValueError if the file is no checkpoint, or names and shapes do not fit; the message lists them.
    """
    checkpoint = weights.read(source, prefixes=("module.",))
    # timm's batch norms lie in ``bn1`` as torchvision's do, its FeatureListNet adds ``body.``.
    deep = any(name.startswith("body.body.") for name in model.state_dict())

    def find(official: str) -> str:
        ours = our_name(official)
        return f"body.{ours}" if deep and ours.startswith("body.") else ours

    return weights.fill(model, checkpoint, find, ignore=ignore, computed=_BUFFERS)


def load_backbone(model: PlainDETR, source: Mapping[str, Any] | str | Path) -> PlainDETR:
    """Copy a pre-trained Swin V2 (also SimMIM's, ``encoder.…``) into the backbone.

    Its classifier and masked-image head stay behind; the norm of the last map is trained with the detector.

    Raises: ValueError as `load_official`.
    """
    checkpoint = weights.read(source, prefixes=("module.", "encoder."))
    own = model.state_dict()

    def find(official: str) -> str | None:
        ours = "body." + official.replace("rpe_mlp", "cpb_mlp")
        return ours if ours in own else None

    others = [name for name in own if not name.startswith("body.")]
    return weights.fill(model, checkpoint, find, ignore=(*others, "body.norm3."), computed=_BUFFERS)


def test_plain_detr(**options: Any) -> PlainDETR:
    """A Plain-DETR for tests."""
    body = SwinV2(
        embed_dim=16,
        depths=(1, 1, 2, 2),
        num_heads=(1, 1, 2, 2),
        window=4,
        pretrained_window=(4, 4, 4, 2),
        mlp_ratio=1.0,
        drop_path=0.0,
    )
    small = {"dim": 32, "num_heads": 2, "ffn_dim": 32, "num_layers": 2, "queries": 10, "queries_many": 12, "repeats": 2}
    return PlainDETR(**{"backbone": body, "num_classes": 10, "rpb_hidden_dim": 16, "top_k": 10, **small, **options})


test_plain_detr.__test__ = False  # pyright: ignore[reportFunctionMemberAccess]  # pytest would take the name for a test's
VIT = {"options": {"dynamic_img_size": True, "dynamic_img_pad": True}, "drop_path": 0.1}
SIMMIM = partial(PlainDETR, backbone_options={"pretrained_window": 12})
CARD = Card(
    family="Plain-DETR",
    paper="2308.01904",
    code="https://github.com/impiga/Plain-DETR",
    license="MIT",
    test="models/plain_detr/test_peer.py",
)
ENTRIES = [
    Entry(
        "plain_detr_swin_v2_small_ape",
        partial(PlainDETR, position_bias="none"),
        CARD("62.6 M parameters, Swin V2-S supervised, no box bias: sup_pt_ape", "AP 37.2"),
    ),
    Entry(
        "plain_detr_swin_v2_small_sup",
        PlainDETR,
        CARD("62.7 M parameters, Swin V2-S supervised, BoxRPB: sup_pt_boxrpe", "AP 46.1"),
    ),
    Entry(
        "plain_detr_swin_v2_small_mim",
        SIMMIM,
        CARD("62.7 M parameters, Swin V2-S pre-trained by SimMIM, BoxRPB: mim_pt_boxrpe", "AP 48.7"),
    ),
    Entry(
        "plain_detr_swin_v2_small_mim_reparam",
        partial(SIMMIM, reparam=True),
        CARD("62.7 M parameters, the same with boxes in pixels: mim_pt_boxrpe_reparam", "AP 50.9"),
    ),
    Entry(
        "plain_detr_resnet50",
        partial(PlainDETR, "resnet50", reparam=True),
        CARD("44.6 M parameters, ResNet-50 with frozen batch norm, boxes in pixels"),
    ),
    Entry(
        "plain_detr_swin_v2_large",
        partial(PlainDETR, "swin_v2_large", reparam=True),
        CARD("213 M parameters, Swin V2-L, boxes in pixels; the paper's 59.8 has 12 more window layers, not released"),
    ),
    Entry(
        "plain_detr_vit_base",
        partial(PlainDETR, "vit_base_patch16_224", backbone_options=VIT, reparam=True),
        CARD("98 M parameters, timm's ViT-B/16 on pictures of any size, boxes in pixels; not released by the authors"),
    ),
    Entry("test_plain_detr", test_plain_detr, CARD("0.2 M parameters, for tests"), accepts=(PlainDETR,)),
]
