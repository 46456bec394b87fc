"""A second stream equals a computation without cache at every step."""

from typing import Any

import pytest
import torch

from vlm_tools import AGLA, VCD, Method, intervene
from vlm_tools.methods.agla import keep_salient
from vlm_tools.methods.vcd import diffuse
from vlm_tools.testing.random_models import random_inputs, random_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", ["test_llava", "test_qwen2_5_vl", "test_paligemma", "test_gemma3"])
@pytest.mark.parametrize(
    ("method", "view", "combine"),
    [
        (VCD(1.5, plausibility=1e-9), lambda x: diffuse(x, 500), lambda z, other: 2.5 * z - 1.5 * other),
        (AGLA(alpha=2.0, plausibility=1e-9), lambda x: keep_salient(x, 0.6), lambda z, other: z + 2 * other),
    ],
    ids=["vcd", "agla"],
)
def test_second_stream_equals_an_uncached_one(name: str, method: Method, view: Any, combine: Any) -> None:
    torch.manual_seed(0)
    model: Any = random_model(name)
    inputs = random_inputs(name)
    noisy = {**inputs, "pixel_values": view(inputs["pixel_values"])}  # one image: all rows are its own
    with intervene(model, method):
        out = model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
    sequence = out.sequences[:1]
    length = inputs["input_ids"].shape[1]
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
        want = combine(*grown).log_softmax(-1)
        torch.testing.assert_close(got, want, atol=5e-4, rtol=0)
