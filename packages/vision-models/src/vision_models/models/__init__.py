"""The models of this package by name: every file of this folder ends with its own ``ENTRIES``.

So does every layer that can be added to other networks; :func:`vision_models.insert` takes their names.
"""

from typing import TYPE_CHECKING, Any

from attn_core.catalog import Card, Catalog

if TYPE_CHECKING:  # they import timm, which a command's --help does without
    from torch import nn

    from vision_models.backbone import StagedBackbone

CATALOG: "Catalog[StagedBackbone]" = Catalog("vision_models.models")
MODULES: "Catalog[nn.Module]" = Catalog("vision_models.layers", kind="module", caller="insert")
LOCALIZERS: "Catalog[nn.Module]" = Catalog("vision_models.localization", kind="localizer", caller="create_localizer")


def list_models() -> list[str]:
    """Names that :func:`create_model` takes, sorted."""
    return CATALOG.names()


def card(name: str) -> Card:
    """What the tables say about a model."""
    return CATALOG.card(name)


def create_model(name: str, **options: Any) -> "StagedBackbone":
    """Build a model of this package under its paper's name, as ``timm.create_model``; errors name the mistake.

    Args:
        name: one of :func:`list_models`.
        options: constructor arguments of the class, or timm's (``features_only``, ``out_indices``, ``pretrained_cfg``,
            ``checkpoint_path``, …).

    Raises:
        ValueError: unknown name or option, with the nearest known one.
    """
    return CATALOG.create(name, **options)


def timm_name(name: str) -> str:
    """The name of a model in timm's registry: its own, or ``attn_…`` where timm has a model of that name."""
    return CATALOG.entry(name).timm_name  # pyright: ignore[reportAttributeAccessIssue]


def family(name: str) -> "type[StagedBackbone]":
    """The class of a model."""
    return CATALOG.entry(name).family  # pyright: ignore[reportAttributeAccessIssue]
