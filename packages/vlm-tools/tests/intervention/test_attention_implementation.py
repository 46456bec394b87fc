"""Vision-language models over attn_core.attention, towers and text: SDPA's logits, padded, cached, compiled."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_core.compat import transformers_attention
from vlm_tools import LogitBoost, intervene
from vlm_tools.testing.random_models import random_inputs, random_model

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own deprecations
# grouped heads; heads of the text's own position code and windows in the tower; windows and image blocks; a prefix
FAMILIES = ("test_llava", "test_qwen2_5_vl", "test_gemma3", "test_paligemma")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, Any]:
    torch.manual_seed(0)
    return request.param, random_model(request.param)


def logits(model: Any, inputs: dict[str, Any], **options: Any) -> Tensor:
    out = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )
    return torch.stack(out.logits)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
def test_a_model_generates_as_over_sdpa_padded_and_from_its_cache(
    family: tuple[str, Any], options: dict[str, Any]
) -> None:
    name, model = family
    inputs = random_inputs(name, batch=2, padding=3)
    plain = logits(model, inputs, **options)
    model.set_attn_implementation(transformers_attention())
    try:
        assert model.get_decoder().config._attn_implementation == "attn_core"
        assert float((plain - logits(model, inputs, **options)).abs().max()) <= 1e-5
        with intervene(model, LogitBoost(2.0)):
            changed = logits(model, inputs, **options)
        assert model.get_decoder().config._attn_implementation == "attn_core"
    finally:
        model.set_attn_implementation("sdpa")
    assert float((plain[0] - changed[0]).abs().max()) > 1e-3


def compiled_difference(name: str) -> float:
    torch.manual_seed(0)
    model: Any = random_model(name)
    inputs = random_inputs(name, batch=2, padding=3)
    shown = inputs["attention_mask"].bool()
    torch._dynamo.reset()
    with torch.no_grad():
        plain = model(**inputs).logits[shown]
        model.set_attn_implementation(transformers_attention())
        # The image's place in the text depends on the tokens, so that a whole model is not one graph.
        decoder = model.get_decoder()
        decoder.forward = torch.compile(decoder.forward, backend="eager")
        return float((plain - model(**inputs, use_cache=False).logits[shown]).abs().max())


@pytest.mark.compile
def test_a_compiled_text_tower_gives_the_logits_of_sdpa() -> None:
    assert compiled_difference("test_llava") <= 1e-5


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_compiled_text_tower_gives_the_logits_of_sdpa(name: str) -> None:
    assert compiled_difference(name) <= 1e-5
