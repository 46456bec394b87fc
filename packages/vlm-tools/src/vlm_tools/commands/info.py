"""``vlm-tools info``: what the tables say about a method or model."""

from collections.abc import Mapping

from vlm_tools.models import CATALOG


def info(name: str) -> Mapping[str, object]:
    """Rows of a table about a method or model."""
    count = CATALOG.parameters(name)
    return {**CATALOG.info(name), "parameters": f"{count:,}" if count else "none, nothing is trained"}
