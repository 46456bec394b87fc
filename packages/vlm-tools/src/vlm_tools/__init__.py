"""See and repair what a vision-language model looks at."""

from .act import ACT
from .agla import AGLA
from .intervention import Run, intervene
from .logit_boost import LogitBoost
from .method import Identity, Method
from .models import card, create_model, list_models, method_of
from .pai import PAI
from .paint import PAINT
from .sinks import find_sinks, register_sinks
from .var import VAR
from .vcd import VCD

__all__ = [
    "ACT",
    "AGLA",
    "PAI",
    "PAINT",
    "VAR",
    "VCD",
    "Identity",
    "LogitBoost",
    "Method",
    "Run",
    "card",
    "create_model",
    "find_sinks",
    "intervene",
    "list_models",
    "method_of",
    "register_sinks",
]
