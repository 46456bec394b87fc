"""Every option of every method changes the scores of tokens, and none stands without a case here."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm_tools import intervene
from vlm_tools.models import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")
# method → options of the base, and for each option another value
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "act": (
        {"threshold": 0.06, "min_rows": 3},
        {"threshold": 0.09, "relative": 1.2, "beta": 0.1, "heads": {2: [1]}, "min_rows": 9, "layers": [3]},
    ),
    "agla": ({}, {"alpha": 1.0, "plausibility": 1e-6, "keep": 0.2, "view": "zeros"}),
    "identity": ({}, {"layers": None}),
    "logit_boost": ({}, {"strength": 2.0, "layers": [3]}),
    "pai": ({}, {"alpha": 0.2, "gamma": 1.5, "plausibility": 1e-6, "layers": [3]}),
    "paint": (
        {},
        {"alpha": 0.1, "beta": 2.0, "local_share": 0.6, "gamma": 1.5, "head_weights": True, "layers": [3]},
    ),
    "var": (
        {"dims": [3, 5], "tau": 1.5, "summ": 0.1, "min_nonsink_ratio": 0.3},
        {"dims": [3], "tau": 1.0, "summ": 0.6, "min_nonsink_ratio": 0.6, "keep": 0.1, "layers": [2],
         "skip_last_layer": True},
    ),
    "vcd": ({}, {"alpha": 2.0, "plausibility": 1e-6, "step": 100, "seed": 1}),
}  # fmt: skip


def scores(setting: Any, method: str, options: dict[str, Any]) -> Tensor:
    """Scores that two greedy tokens are chosen by."""
    if options.get("view") == "zeros":
        options = {**options, "view": torch.zeros_like(setting.inputs["pixel_values"])}
    with intervene(setting.model, METHODS.create(method, **options)):
        out = setting.model.generate(
            **setting.inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_scores=True
        )
    return torch.cat(out.scores).double().clamp_min(-1e3)


@pytest.mark.parametrize("method", CASES)
def test_every_option_changes_the_scores(method: str, setting: Any) -> None:
    base, changes = CASES[method]
    want = scores(setting, method, base)
    for name, value in changes.items():
        changed = scores(setting, method, {**base, name: value})
        difference = float((changed - want).abs().max())
        assert difference > 1e-6 or method == "identity", f"{name}={value} changes nothing"


def test_no_option_is_left_out() -> None:
    for name in METHODS.names():
        options = set(inspect.signature(METHODS.entry(name).build).parameters)
        assert options == set(CASES[name][1]), name
