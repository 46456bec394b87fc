"""timm's contract for backbones of shrinking maps, of tokens, and for dense ones: written once, for every family."""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from timm.layers import ClassifierHead, LayerNorm2d, NormMlpClassifierHead, get_device_dtype
from timm.models import checkpoint, checkpoint_seq, register_notrace_function
from timm.models._features import feature_take_indices  # timm exports it nowhere else
from torch import Tensor, nn

from attn_core.weights import KeyMap
from vision_models.initialization import trunc_normal_


@register_notrace_function  # decides by the size, which FX must not follow
def prepared(x: Tensor, family: str, in_chans: int, min_side: int) -> Tensor:
    """The images in the memory order of all later maps: torch's CPU convolutions are several times faster in it.

    Raises: ValueError: no batch of images, other channels than the stem's, or smaller than ``min_side``.
    """
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"{family}: images must be (B, {in_chans}, Y, X), got {tuple(x.shape)}")
    if min(x.shape[2], x.shape[3]) < min_side:
        raise ValueError(
            f"{family}: image {x.shape[2]}×{x.shape[3]} is smaller than {min_side}×{min_side}, of which one token is "
            "left in the last stage; enlarge it"
        )
    return x.contiguous(memory_format=torch.channels_last)


# Of networks whose windows or stripes are padded and cut (``fixed_size``).
WINDOWS = "windows are counted on the map, and torch.export ties its shapes to how many there were"


class Stage(nn.Module):
    """Downsampling, then blocks on the channels-last map. (B, C, Y, X) → (B, dim, Y', X')."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, Y, X) → (B, dim, Y', X'); with ``grad_checkpointing`` the blocks' activations are computed twice."""
        x = self.downsample(x).permute(0, 2, 3, 1).contiguous()
        if self.grad_checkpointing:
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2)


class StagedBackbone(nn.Module):
    """What timm asks of a model whose maps shrink from stage to stage.

    A family sets ``stem``, ``stages`` (a top-level ``Sequential``; each has ``grad_checkpointing``), ``norm``, ``head``
    (timm's ``ClassifierHead``), ``in_chans``, ``num_classes``, ``num_features``, ``head_hidden_size``, one entry of
    ``feature_info`` for each stage, and what of ``min_side``, ``undecayed`` and ``official_buffers`` differs.

    Shapes: image (B, in_chans, Y, X) → logits (B, num_classes).
    """

    # How the names of buffers end that official checkpoints hold and we compute.
    official_buffers: tuple[str, ...] = ()
    # How the names of parameters end that weight decay would harm, beyond biases and norms.
    undecayed: tuple[str, ...] = ()
    min_side = 1  # of an image, in pixels

    feature_info: list[dict[str, Any]]
    in_chans: int
    num_classes: int
    num_features: int
    head_hidden_size: int
    stem: nn.Module
    stages: nn.Sequential
    norm: nn.Module
    head: ClassifierHead | NormMlpClassifierHead
    key_map: KeyMap  # of the class: how official checkpoints name the parameters

    @property
    def fixed_size(self) -> str:
        """Why an exported graph holds for the height and width alone that it was traced with; empty: for all."""
        return ""

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed, as timm asks."""
        return {name for name, _ in self.named_parameters() if self.undecayed and name.endswith(self.undecayed)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the layer groups for decay of the learning rate with depth, as timm asks; coarse: stages."""
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def fit_table(self, name: str, value: Tensor) -> Tensor:  # noqa: ARG002  for families with tables
        """A checkpoint's value of a parameter; position tables of another image size stretched to ours."""
        return value

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for the backward pass: less memory, one more forward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # pyright: ignore[reportArgumentType]

    def get_classifier(self) -> nn.Module:
        """The layer that makes logits; the identity where ``num_classes`` is 0."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """A new classifier on the model's device; 0 classes gives pooled features, with ``global_pool=""`` the map."""
        self.num_classes = num_classes
        dd: dict[str, Any] = get_device_dtype(self)
        self.head.reset(num_classes, global_pool, reset_other=reset_other, in_features=self.num_features, **dd)
        self.head_hidden_size = self.head.num_features

    def prepared(self, x: Tensor) -> Tensor:
        """What the stem takes. Raises: ValueError for images that the network cannot see."""
        return prepared(x, type(self).__name__, self.in_chans, self.min_side)

    def forward_features(self, x: Tensor) -> Tensor:
        """The normed map (B, num_features, Y/32, X/32)."""
        return self.norm(self.stages(self.stem(self.prepared(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map (B, C, y, x) → logits (B, num_classes), or pooled features (B, head_hidden_size)."""
        return self.head(x, pre_logits=pre_logits) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, Y, X) → logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stage outputs, and the final map unless ``intermediates_only``.

        Args:
            indices: the last n stages if int, all if None.
            norm: apply the output norm to the last stage's map, the only one it fits.
            stop_early: leave out the stages behind the last one asked for; the final map is then that stage's.
            output_fmt: ``"NCHW"`` or ``"NHWC"``.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(
                f"forward_intermediates: output_fmt must be 'NCHW' or 'NHWC', got output_fmt={output_fmt!r}"
            )
        take, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(self.prepared(x))
        intermediates = []
        stages = self.stages[: last + 1] if stop_early else self.stages
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take:
                tap = self.norm(x) if norm and i == len(self.stages) - 1 else x
                intermediates.append(tap if output_fmt == "NCHW" else tap.permute(0, 2, 3, 1))
        if intermediates_only:
            return intermediates
        return (self.norm(x) if len(stages) == len(self.stages) else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last one asked for; returns the absolute indices."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "", reset_other=True)
        return take


class TokenBackbone(StagedBackbone, ABC):
    """What timm asks of a model whose tokens keep their number: a class token first, then the patches row by row.

    ``forward_features`` gives tokens, ``features_only`` works through ``feature_cls="getter"``, and the features of a
    block are its patches as a map. A family sets ``blocks`` (each takes tokens and their grid), ``norm``, ``in_chans``
    and what of ``min_side`` and ``undecayed`` differs, calls :meth:`add_head` last, and writes :meth:`tokens`.
    """

    blocks: nn.ModuleList
    head: nn.Module  # pyright: ignore[reportIncompatibleVariableOverride]

    def add_head(
        self, width: int, patch_size: int, num_classes: int, global_pool: str, drop_rate: float, **dd: Any
    ) -> None:
        """The classifier, and what timm reads about the network: ``width`` of tokens, pixels that a patch covers."""
        check_pool(type(self).__name__, global_pool)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = width
        self.global_pool = global_pool
        self.grad_checkpointing = False
        self.feature_info = [
            {"num_chs": width, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(len(self.blocks))
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(width, num_classes, **dd) if num_classes > 0 else nn.Identity()

    @abstractmethod
    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images → what enters the first block, and the rows and columns of its patches."""

    def finished(self, x: Tensor) -> Tensor:
        """What leaves the last block → class token and patches (B, 1 + N, num_features), normed."""
        return self.norm(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """The normed tokens (B, 1 + N, num_features)."""
        x, grid = self.tokens(x)
        for block in self.blocks:
            if self.grad_checkpointing:
                x = checkpoint(block, x, grid)
            else:
                x = block(x, grid)
        return self.finished(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, 1 + N, C) → logits (B, num_classes), or the pooled features (B, C)."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, 1:].mean(1)
        return x if pre_logits else self.head(self.head_drop(x))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for the backward pass: less memory, one more forward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The layer that makes logits; the identity where ``num_classes`` is 0."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:  # noqa: ARG002  timm's signature
        """A new classifier on the model's device; 0 classes gives pooled features, with ``global_pool=""`` tokens."""
        if global_pool is not None:
            check_pool(type(self).__name__, global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        dd: dict[str, Any] = get_device_dtype(self)
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes, **dd)  # pyright: ignore[reportIncompatibleVariableOverride]
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Patches after each block as maps, and the final tokens unless ``intermediates_only``.

        Args: as :meth:`StagedBackbone.forward_intermediates`; ``norm`` finishes all maps, which it fits here.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(
                f"forward_intermediates: output_fmt must be 'NCHW' or 'NHWC', got output_fmt={output_fmt!r}"
            )
        take, last = feature_take_indices(len(self.blocks), indices)
        x, grid = self.tokens(x)
        intermediates = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = block(x, grid)
            if i in take:
                tap = self.finished(x) if norm else x
                tap = tap[:, tap.shape[1] - grid[0] * grid[1] :].unflatten(1, grid)
                intermediates.append(tap if output_fmt == "NHWC" else tap.permute(0, 3, 1, 2))
        return intermediates if intermediates_only else (self.finished(x), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks behind the last one asked for; returns the absolute indices."""
        take, last = feature_take_indices(len(self.blocks), indices)
        shortened = last < len(self.blocks) - 1
        self.blocks = self.blocks[: last + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: ARG002  timm's signature
        """Patterns of the layer groups for layer-wise decay, as timm asks; ``coarse`` changes nothing."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


def check_pool(family: str, global_pool: str) -> None:
    """Raises: ValueError: no way for a classifier to read tokens."""
    if global_pool not in ("token", "avg", ""):
        raise ValueError(f"{family}: global_pool must be 'token', 'avg' or '', got global_pool={global_pool!r}")


class Dense(StagedBackbone):
    """Backbone for detection and segmentation: four maps, each with a LayerNorm of its own on the way out.

    The un-normed map feeds the next stage. A family mixes it in before its class: ``class SwinDense(Dense, Swin)``.

    Args:
        variant: name of the classification variant to start from; ``options`` override its constructor arguments.

    Shapes: image (B, in_chans, Y, X) → tuple of (B, C_i, Y/s, X/s), s = 4, 8, 16, 32, rounded as the family does.
    Raises: ValueError for an unknown variant.
    """

    variants: ClassVar[Mapping[str, Mapping[str, Any]]]  # of the family
    out_eps: ClassVar[float]  # of the norms, as official

    def __init__(self, variant: str, **options: Any) -> None:
        name = type(self).__name__
        if variant not in self.variants:
            raise ValueError(f"{name}: variant must be one of {sorted(self.variants)}, got variant={variant!r}")
        super().__init__(**{**self.variants[variant], **options, "num_classes": 0, "global_pool": ""})
        dd: dict[str, Any] = get_device_dtype(self)
        self.norm = nn.Identity()
        self.out_norms = nn.ModuleList(
            LayerNorm2d(info["num_chs"], eps=self.out_eps, **dd) for info in self.feature_info
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Images (B, in_chans, Y, X) → one normed map (B, C, y, x) for each stage, finest first."""
        x = self.stem(self.prepared(x))
        maps: list[Tensor] = []
        for stage, norm in zip(self.stages, self.out_norms, strict=True):
            x = stage(x)
            maps.append(norm(x))
        return tuple(maps)
