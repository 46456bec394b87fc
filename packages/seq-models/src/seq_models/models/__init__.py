"""The models of this package by name; each file here is one paper and ends with its ``ENTRIES``."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from attn_core.catalog import Catalog

CATALOG: Catalog[nn.Module] = Catalog("seq_models.models")
list_models, card = CATALOG.names, CATALOG.card


def create_model(name: str, **options: Any) -> nn.Module:
    """Build a model of this package, with fresh weights.

    Args:
        name: one of :func:`list_models`.
        options: changes to the variant: arguments of its class, or fields of its configuration.

    Raises:
        ValueError: unknown name or option, with the nearest known one; a value that the class refuses.
    """
    return CATALOG.create(name, **options)


def info(name: str) -> Mapping[str, object]:
    """Rows of a table about a model.

    Raises:
        ValueError: unknown name, with the nearest known one.
    """
    return {**CATALOG.info(name), "parameters": f"{CATALOG.parameters(name):,}"}
