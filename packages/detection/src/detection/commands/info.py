"""``detection list`` and ``detection info``: detectors, and what is added to them or stands beside them."""

from collections.abc import Mapping

from detection.models import CATALOG, MODULES, SCANPATHS

EVERYTHING = (CATALOG, MODULES, SCANPATHS)


def names() -> list[str]:
    """Names that :func:`info` takes, sorted."""
    return sorted(name for catalog in EVERYTHING for name in catalog.names())


def info(name: str) -> Mapping[str, object]:
    """Rows of a table about a name of any catalogue.

    Raises: ValueError: unknown name, with the nearest known one.
    """
    return next((catalog for catalog in EVERYTHING if name in catalog.names()), CATALOG).info(name)
