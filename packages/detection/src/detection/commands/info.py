"""``detection info``: the rows about a model."""

from collections.abc import Mapping

from detection.models import card, create_model


def info(name: str) -> Mapping[str, object]:
    """Rows of a table about a registered model."""
    model, about = create_model(name), card(name)
    return {
        "model": name,
        "what": about.summary,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "paper": f"arXiv {about.paper}",
        "official code": f"{about.code} ({about.license})",
        "published": about.published or "nothing for this variant",
    }
