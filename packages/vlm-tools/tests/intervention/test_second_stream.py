"""A second stream equals a computation without cache at every step."""

from typing import Any

import pytest
import torch

from vlm_tools import VCD, intervene
from vlm_tools.methods.vcd import contrast, diffuse
from vlm_tools.testing.random_models import random_inputs, random_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", ["test_llava", "test_qwen2_5_vl", "test_paligemma", "test_gemma3"])
@pytest.mark.parametrize("beams", [1, 2])
def test_second_stream_equals_an_uncached_one(name: str, beams: int) -> None:
    torch.manual_seed(0)
    model: Any = random_model(name)
    inputs = random_inputs(name)
    method = VCD(1.0, plausibility=1e-6)
    noisy = {**inputs, "pixel_values": diffuse(inputs["pixel_values"], 500)}
    with intervene(model, method):
        out = model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            num_beams=beams,
            return_dict_in_generate=True,
            output_scores=True,
        )
    sequence = out.sequences[:1]
    length = inputs["input_ids"].shape[1]
    if beams > 1:
        assert sequence.shape[1] == length + 4
        return
    for step, got in enumerate(out.scores):
        grown = []
        for prompt in (inputs, noisy):
            longer = dict(prompt)
            for key in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
                if key in longer:
                    filler = (
                        longer[key][:, -1:] if key != "mm_token_type_ids" else torch.zeros_like(longer[key][:, -1:])
                    )
                    longer[key] = torch.cat([longer[key], filler.expand(-1, step)], dim=1)
            longer["input_ids"] = sequence[:, : length + step]
            if name == "test_paligemma" and step:
                longer["token_type_ids"][:, length:] = 1
            with torch.no_grad():
                grown.append(model(**longer).logits[:, -1].float())
        want = contrast(*grown, 1.0, 1e-6).log_softmax(-1)
        torch.testing.assert_close(got, want, atol=5e-4, rtol=0)
