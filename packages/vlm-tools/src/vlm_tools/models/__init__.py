"""Methods, the digits-world LLaVA, and small random siblings of the supported families, by name."""

import inspect
from typing import Any, TypeVar

from attn_core.registry import ModelCard, did_you_mean
from vlm_tools.intervention.method import Method
from vlm_tools.methods.act import ACT
from vlm_tools.methods.agla import AGLA
from vlm_tools.methods.identity import Identity
from vlm_tools.methods.logit_boost import LogitBoost
from vlm_tools.methods.pai import PAI
from vlm_tools.methods.paint import PAINT
from vlm_tools.methods.var import VAR
from vlm_tools.methods.vcd import VCD
from vlm_tools.testing.random_models import FAMILIES, random_model

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (VAR, ACT, PAI, PAINT, LogitBoost, VCD, AGLA, Identity)
}
DIGITS = "digits_world_llava"
_GITHUB = "https://github.com"
_CARDS = {
    "var": ("VAR", "2503.03321", f"{_GITHUB}/seilk/VisAttnSink", "", "methods/test_var.py"),
    "act": ("ACT", "2406.15765", f"{_GITHUB}/GATECH-EIC/ACT", "", "methods/test_act.py"),
    "pai": ("PAI", "2407.21771", f"{_GITHUB}/LALBJ/PAI", "MIT", "methods/test_pai.py"),
    "paint": ("PAINT", "2501.12206", f"{_GITHUB}/hasanar1f/llava-hallunication-fix", "", "methods/test_pai.py"),
    "logit_boost": ("Logit boost", "2407.21771", "", "", "methods/test_pai.py"),
    "vcd": ("VCD", "2311.16922", f"{_GITHUB}/DAMO-NLP-SG/VCD", "Apache-2.0", "intervention/test_second_stream.py"),
    "agla": ("AGLA", "2406.12718", f"{_GITHUB}/Lackel/AGLA", "", "intervention/test_second_stream.py"),
    "identity": ("Identity", "1706.03762", "", "", "intervention/test_every_family.py"),
    DIGITS: ("LLaVA", "2304.08485", f"{_GITHUB}/haotian-liu/LLaVA", "Apache-2.0", "digits/test_digits_world.py"),
}
T = TypeVar("T")


def list_models() -> list[str]:
    """Names that `create_model` takes, sorted."""
    return sorted([*METHODS, DIGITS, *FAMILIES])


def create_model(name: str, **options: Any) -> Any:
    """A method, the digits-world LLaVA or a random sibling (``test_…``) with random weights.

    Args:
        name: one of `list_models`.
        options: keyword arguments of the method's class or of ``digits_world_llava``.

    Raises:
        ValueError: unknown name or option, with the nearest known one.
    """
    if name in FAMILIES:
        return _built(name, random_model, {**options, "name": name})
    if name == DIGITS:
        from vlm_tools.digits.llava import digits_world_llava  # needs the extra [train]

        return _built(name, digits_world_llava, options)
    if name not in METHODS:
        raise ValueError(f"create_model: unknown model {name!r}{did_you_mean(name, list_models())}")
    return _built(name, METHODS[name], options)


def method_of(name: str, **options: Any) -> Method:
    """A method by name.

    Raises:
        ValueError: unknown method or option, with the nearest known one.
    """
    if name not in METHODS:
        raise ValueError(f"method_of: unknown method {name!r}{did_you_mean(name, METHODS)}")
    return _built(name, METHODS[name], options)


def card(name: str) -> ModelCard:
    """What the tables say about a model."""
    if name in FAMILIES:
        return ModelCard(name, "random sibling for tests", "2304.08485", "", "", "intervention/test_every_family.py")
    family, paper, code, license_, test = _CARDS[name]
    return ModelCard(family, summary(name), paper, code, license_, test)


def summary(name: str) -> str:
    """What a model is, in one line."""
    if name in FAMILIES:
        return f"random sibling of {name.removeprefix('test_')}"
    if name == DIGITS:
        return "the built-in model that hallucinates, trained by the recipe llava_digits"
    return (inspect.getdoc(METHODS[name]) or "").split("\n", 1)[0].rstrip(".")


def _built(name: str, builder: Any, options: dict[str, Any]) -> Any:
    known = set(inspect.signature(builder).parameters)
    for option in options:
        if option not in known:
            raise ValueError(f"create_model: {name} has no option {option!r}{did_you_mean(option, known)}")
    return builder(**options)
