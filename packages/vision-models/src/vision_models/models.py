"""The models of this package by name."""

import difflib
import inspect
from typing import Any

import timm

from . import biformer
from .biformer import BiFormer

REGISTRY = dict.fromkeys(biformer.VARIANTS, BiFormer)


def list_models() -> list[str]:
    """Names that :func:`create_model` takes, sorted."""
    return sorted(REGISTRY)


def create_model(name: str, **options: Any) -> BiFormer:
    """Build a model of this package; equal to ``timm.create_model``, with errors that name the mistake.

    Args:
        name: one of :func:`list_models`.
        options: constructor arguments of the class, or timm's (``features_only``, ``out_indices``, ``pretrained_cfg``,
            ``checkpoint_path``, …).

    Raises:
        ValueError: unknown name or option, with the nearest known one.
    """
    if name not in REGISTRY:
        raise ValueError(f"create_model: unknown model {name!r}{_suggestion(name, list_models())}")
    known = {*inspect.signature(REGISTRY[name]).parameters, *inspect.signature(timm.create_model).parameters}
    known |= {"features_only", "out_indices", "feature_cls", "output_fmt", "pretrained_strict"}
    for option in options:
        if option not in known:
            raise ValueError(f"create_model: {name} has no option {option!r}{_suggestion(option, sorted(known))}")
    return timm.create_model(name, **options)  # pyright: ignore[reportReturnType]


def _suggestion(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"
