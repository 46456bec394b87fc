"""What DeiT, PVT, Swin and CSwin share: attention of each block, tables that follow the image size, timm's settings."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from attn_core.catalog import Card
from vision_models.layers.agent import AgentMixing
from vision_models.layers.inline import InLineMixing
from vision_models.registration import pretrained_cfg

Attention = Literal["agent", "inline", "softmax"]
# One kind for all blocks, or an entry for each stage: a kind, or one for each of its blocks.
AttentionOption = Attention | Sequence[Attention | Sequence[Attention]]


def kinds_of_blocks(family: str, attention: AttentionOption, depths: Sequence[int]) -> list[list[Attention]]:
    """The kind of each block of each stage.

    Raises: ValueError for an unknown kind or a number of entries that does not fit ``depths``.
    """
    stages = [attention] * len(depths) if isinstance(attention, str) else list(attention)
    if len(stages) != len(depths):
        raise ValueError(
            f"{family}: attention must be one kind or have one entry for each of {len(depths)} stages, got {attention}"
        )
    kinds: list[list[Attention]] = [
        [stage] * depth if isinstance(stage, str) else list(stage)  # pyright: ignore[reportAssignmentType]
        for stage, depth in zip(stages, depths, strict=True)
    ]
    for blocks, depth in zip(kinds, depths, strict=True):
        unknown = [kind for kind in blocks if kind not in ("agent", "inline", "softmax")]
        if unknown:
            raise ValueError(f"{family}: attention must be 'agent', 'inline' or 'softmax', got {unknown[0]!r}")
        if len(blocks) != depth:
            raise ValueError(f"{family}: attention of a stage must name its {depth} blocks, got {len(blocks)}")
    return kinds


def token_mixing(
    kind: Attention,
    dim: int,
    num_heads: int,
    grid: tuple[int, int],
    agents: int,
    *,
    kv_grid: tuple[int, int] | None = None,
    agent_shape: tuple[int, int] | None = None,
    class_token: bool = False,
    lepe: bool = False,
    **dd: Any,
) -> AgentMixing | InLineMixing:
    """What stands between the projections of a block with agent or InLine attention."""
    if kind == "agent":  # its depthwise convolution is that of ``lepe``
        return AgentMixing(
            dim, num_heads, grid, agents, kv_grid=kv_grid, shape=agent_shape, class_token=class_token, **dd
        )
    return InLineMixing(dim, num_heads, lepe=lepe, **dd)


def image_grid(family: str, img_size: int | Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the image that tables are made for."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if min(height, width) < 1:
        raise ValueError(f"{family}: img_size must be positive, got img_size={img_size}")
    return height, width


# Biases of agent attention along rows or columns, and the official axis of length 1 between the others.
LINE_TABLES = {"ah_bias": 4, "aw_bias": 3, "ha_bias": 3, "wa_bias": 2}


def fit_table(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """A position table of another image size in the size of ours, stretched as the official code does at loading.

    Other parameters, and tables that differ in more than the size of the map, come back unchanged.
    """
    own = model.get_parameter(name)
    parent, _, table = name.rpartition(".")
    if table in LINE_TABLES and value.ndim == 5:
        value = value.squeeze(LINE_TABLES[table]).squeeze(0)  # the official axes of length 1
    if value.shape == own.shape or value.ndim != own.ndim:
        return value
    if table in LINE_TABLES:
        axis = 2 if table.startswith("a") else 1
        along, wanted = value.movedim(axis, -1), own.movedim(axis, -1)
        if along.shape[:-1] != wanted.shape[:-1]:
            return value
        return F.interpolate(along, size=wanted.shape[-1], mode="linear").movedim(-1, axis)
    if table == "relative_position_bias_table" and value.shape[1] == own.shape[1]:
        side = int(own.shape[0] ** 0.5)
        return _bicubic(value.T, int(value.shape[0] ** 0.5), (side, side)).T
    if table == "pos_embed" and value.shape[2] == own.shape[2]:
        grid: Any = model.get_submodule(parent).grid
        before = own.shape[1] - grid[0] * grid[1]
        cells = value[0, before:].T
        return torch.cat([value[0, :before], _bicubic(cells, int(cells.shape[1] ** 0.5), grid).T])[None]
    return value


def _bicubic(cells: Tensor, side: int, size: tuple[int, int]) -> Tensor:
    """(C, side²) → (C, rows·columns)."""
    if side * side != cells.shape[1]:
        return cells  # of a map that is no square: unknown how long its sides are
    maps = cells.reshape(1, cells.shape[0], side, side)
    return F.interpolate(maps, size=size, mode="bicubic")[0].flatten(1)


AGENT = Card(
    family="Agent Attention",
    paper="2312.08874",
    code="https://github.com/LeapLabTHU/Agent-Attention",
    license="",
    test="models/test_hosts.py",
)
INLINE = Card(
    family="InLine attention",
    paper="2412.06590",
    code="https://github.com/LeapLabTHU/InLine",
    license="",
    test="models/test_hosts.py",
)


def host_cfgs(
    variants: Mapping[str, Mapping[str, Any]], *, large_crop_pct: float = 0.875, **entries: Any
) -> dict[str, Any]:
    """timm's settings of all variants of a host; ``large_crop_pct`` is that of images larger than 224²."""

    def cfg(name: str, size: int) -> dict[str, Any]:
        card = INLINE if "inline" in name else AGENT
        return pretrained_cfg(
            size,
            crop_pct=large_crop_pct if size > 224 else 0.875,
            crop_mode="squash",
            license="none stated",
            paper_ids=f"arXiv:{card.paper}",
            origin_url=card.code,
            **entries,
        )

    return generate_default_cfgs({name: cfg(name, options.get("img_size", 224)) for name, options in variants.items()})
