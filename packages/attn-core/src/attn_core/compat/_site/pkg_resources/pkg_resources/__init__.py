"""The part of pkg_resources, gone with setuptools 82, that old code asks for, over importlib.metadata."""

import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

__attn_core_compat__ = True


class DistributionNotFound(Exception):
    """No distribution of that name is installed."""


class VersionConflict(Exception):
    """Never raised here: requirements are not compared."""


class Distribution:
    """Name and version of what is installed."""

    def __init__(self, found: importlib.metadata.Distribution) -> None:
        self.project_name = self.key = found.metadata["Name"]
        self.version = found.version
        self.location = str(found.locate_file(""))


def get_distribution(dist: str) -> Distribution:
    """The installed distribution of a requirement such as ``"torch>=1.3"``, whose bounds are not compared."""
    name = re.split(r"[\s<>=!~;\[]", dist.strip(), maxsplit=1)[0]
    try:
        return Distribution(importlib.metadata.distribution(name))
    except importlib.metadata.PackageNotFoundError:
        raise DistributionNotFound(f"The {name!r} distribution was not found") from None


def require(*requirements: str) -> list[Distribution]:
    """The distributions of several requirements."""
    return [get_distribution(requirement) for requirement in requirements]


def parse_version(version: str) -> Any:
    """A version that compares."""
    from packaging.version import parse

    return parse(version)


def resource_filename(package_or_requirement: str, resource_name: str) -> str:
    """Path of a file beside a package."""
    spec = importlib.util.find_spec(package_or_requirement)
    if spec is None or spec.origin is None:
        raise DistributionNotFound(f"there is no package {package_or_requirement!r}")
    return os.fspath(Path(spec.origin).parent / resource_name)


def iter_entry_points(group: str, name: str | None = None) -> Any:
    """Entry points of a group."""
    return iter([e for e in importlib.metadata.entry_points(group=group) if name in (None, e.name)])


def __getattr__(name: str) -> Any:
    raise AttributeError(f"pkg_resources.{name} is not provided by attn_core's repair")
