"""``vlm-tools info``: what the tables say about a method or model."""

from collections.abc import Mapping

from vlm_tools.models import card, create_model, summary


def info(name: str) -> Mapping[str, object]:
    """Rows of a table about a method or model."""
    about = card(name)
    count = sum(parameter.numel() for parameter in create_model(name).parameters())
    return {
        "name": name,
        "what": summary(name),
        "parameters": f"{count:,}" if count else "none, nothing is trained",
        "paper": about.paper,
        "official code": about.code or "none",
    }
