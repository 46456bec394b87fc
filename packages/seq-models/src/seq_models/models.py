"""The models of this package by name."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from attn_core.registry import ModelCard, did_you_mean
from seq_models.language import landmark, routing_transformer, titans, transnormer
from seq_models.language.landmark import LandmarkConfig, LandmarkForCausalLM
from seq_models.language.routing_transformer import RoutingConfig, RoutingForCausalLM
from seq_models.language.titans import TitansConfig, TitansForCausalLM
from seq_models.language.transnormer import TransNormerConfig, TransNormerForCausalLM
from seq_models.pointing import pointer_network
from seq_models.pointing.pointer_network import PointerNetwork


@dataclass(frozen=True)
class Family:
    """A published system: the module that holds its ``VARIANTS`` (name → options), and what the tables say about it.

    Attributes:
        build: options → model.
        options: what ``build`` takes; those of the class or of its configuration.
    """

    name: str
    module: ModuleType
    build: Callable[..., nn.Module]
    options: Callable[..., object]
    summary: str
    paper: str
    code: str = ""
    license: str = ""


def _causal(module: ModuleType, config: type, model: type[nn.Module], what: str, **about: str) -> Family:
    """A family of Hugging Face language models."""
    return Family(
        module=module,
        build=lambda **options: model(config(**options)),
        options=config,
        summary=f"causal language model, {what}",
        **about,
    )


FAMILIES = [
    Family(
        name="Pointer Networks",
        module=pointer_network,
        build=PointerNetwork,
        options=PointerNetwork,
        summary="points in the plane → indices of points",
        paper="1506.03134",
    ),
    _causal(
        landmark, LandmarkConfig, LandmarkForCausalLM, "blocks read through landmarks",
        name="Landmark attention", paper="2305.16300",
        code="https://github.com/epfml/landmark-attention", license="Apache-2.0",
    ),
    _causal(
        routing_transformer, RoutingConfig, RoutingForCausalLM, "local heads and k-means attention",
        name="Routing Transformer", paper="2003.05997",
        code="https://github.com/google-research/google-research/tree/master/routing_transformer", license="Apache-2.0",
    ),
    _causal(
        titans, TitansConfig, TitansForCausalLM, "memory learned at test time",
        name="Titans", paper="2501.00663",
    ),
    _causal(
        transnormer, TransNormerConfig, TransNormerForCausalLM, "lightning attention",
        name="TransNormerLLM", paper="2307.14995",
        code="https://github.com/OpenNLPLab/TransnormerLLM", license="Apache-2.0",
    ),
]  # fmt: skip
REGISTRY: dict[str, Family] = {name: family for family in FAMILIES for name in family.module.VARIANTS}


def list_models() -> list[str]:
    """Names that :func:`create_model` takes, sorted."""
    return sorted(REGISTRY)


def _family(name: str, caller: str) -> Family:
    if name not in REGISTRY:
        raise ValueError(f"{caller}: unknown model {name!r}{did_you_mean(name, REGISTRY)}")
    return REGISTRY[name]


def create_model(name: str, **options: Any) -> nn.Module:
    """Build a model of this package.

    Args:
        name: one of :func:`list_models`.
        options: changes to the variant: arguments of its class, or fields of its configuration.

    Raises:
        ValueError: unknown name or option, with the nearest known one; a value that the class refuses.
    """
    family = _family(name, "create_model")
    known = set(inspect.signature(family.options).parameters)
    for option in options:
        if option not in known:
            raise ValueError(f"create_model: {name} has no option {option!r}{did_you_mean(option, known)}")
    return family.build(**{**family.module.VARIANTS[name], **options})


def card(name: str) -> ModelCard:
    """What the tables say about a model.

    Raises:
        ValueError: unknown name, with the nearest known one.
    """
    family = _family(name, "card")
    variant: dict[str, Any] = family.module.VARIANTS[name]
    sizes = ", ".join(f"{key}={value}" for key, value in variant.items())
    return ModelCard(
        family=family.name,
        summary=f"{family.summary}; {sizes}",
        paper=family.paper,
        code=family.code,
        license=family.license,
        test="/test_".join(family.module.__name__.split(".")[-2:]) + ".py",
    )
