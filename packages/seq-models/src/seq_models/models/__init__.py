"""The models of this package by name; each file here is one paper and ends with its ``ENTRIES``."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from attn_core import weights
from attn_core.catalog import Catalog

Model = TypeVar("Model", bound=nn.Module)

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


def load_official(model: Model, source: Mapping[str, Any] | str | Path, *, ignore: Sequence[str] = ()) -> Model:
    """Copy released weights into a model: TransNormerLLM's, landmark attention's (``lm_benchmark``), or our own.

    Args:
        source: a file, ``hf://owner/repo/file``, or what such a file holds.
        ignore: beginnings of our parameter names that may differ or be missing, such as ``("lm_head",)``.

    Raises:
        ValueError: a file that does not load safely; names or shapes that do not fit, all of them listed.
    """
    family = sys.modules[type(model).__module__]
    checkpoint = weights.read(source, prefixes=("module.", "_orig_mod."))
    names = weights.fitting_names(model, getattr(family, "KEY_MAP", {}), checkpoint)
    return weights.fill(model, checkpoint, names, ignore=ignore, computed=getattr(family, "COMPUTED", ()))


def info(name: str) -> Mapping[str, object]:
    """Rows of a table about a model.

    Raises:
        ValueError: unknown name, with the nearest known one.
    """
    return {**CATALOG.info(name), "parameters": f"{CATALOG.parameters(name):,}"}
