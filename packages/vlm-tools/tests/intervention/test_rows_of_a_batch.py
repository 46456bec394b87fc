"""A row of a batch is as alone: every method × decoding × cache, images and prompts equal or different, padded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm_tools import ACT, AGLA, PAI, PAINT, VAR, VCD, Identity, LogitBoost, Method, intervene
from vlm_tools.testing.random_models import batched, random_inputs, random_model

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own deprecations
METHODS: dict[str, Callable[[], Method]] = {
    "identity": Identity,
    "var": lambda: VAR(dims=(3, 5), tau=1.5, summ=0.0, min_nonsink_ratio=0.0),
    "act": lambda: ACT(threshold=0.05, min_rows=2),
    "act_relative": lambda: ACT(relative=1.5, min_rows=2),
    "pai": lambda: PAI(0.5, plausibility=1e-6),
    "paint": lambda: PAINT(),
    "logit_boost": lambda: LogitBoost(1.0),
    "vcd": lambda: VCD(1.0, plausibility=1e-6),
    "agla": lambda: AGLA(plausibility=1e-6),
}
DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
    "several beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
}
NEW = 3
# Decoding and cache: two of them with every method, the others when slow tests are asked for.
WAYS = [
    ("several samples", False),
    ("several beams", True),
    *(
        pytest.param(decoding, cache, marks=pytest.mark.slow)
        for decoding, cache in [
            ("greedy", True),
            ("greedy", False),
            ("several samples", True),
            ("several beams", False),
        ]
    ),
]


@pytest.fixture
def _rows_draw_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling that depends on a row's own probabilities alone, not on its place in the batch."""

    def draw(probabilities: Tensor, num_samples: int = 1, **_: Any) -> Tensor:
        assert num_samples == 1
        return (probabilities.cumsum(-1) > 0.6).int().argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", draw)


def prompts(name: str, seed: int) -> list[dict[str, Any]]:
    """A prompt; the same words under another image; other and fewer words under the first image."""
    first = random_inputs(name, words=6, seed=seed)
    other = random_inputs(name, words=6, seed=seed + 100)
    fewer = random_inputs(name, words=3, seed=seed + 200)
    return [first, {**first, "pixel_values": other["pixel_values"]}, {**fewer, "pixel_values": first["pixel_values"]}]


def answers(model: Any, inputs: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    """New tokens, and the scores they were chosen by: of every token, or of whole beams."""
    out = model.generate(**inputs, return_dict_in_generate=True, output_scores=True, **options)
    beams = options.get("num_beams", 1) > 1
    return out.sequences[:, -options["max_new_tokens"] :], out.sequences_scores if beams else torch.stack(
        out.scores, dim=1
    )


def check(name: str, method: str, decoding: str, *, cache: bool, seed: int = 0, new: int = NEW) -> None:
    torch.manual_seed(seed)
    model = random_model(name)
    single = prompts(name, seed)
    options = {**DECODING[decoding], "use_cache": cache, "max_new_tokens": new}
    with torch.no_grad(), intervene(model, METHODS[method]()):
        tokens, scores = answers(model, batched(*single), **options)
        each = len(tokens) // len(single)
        for row, inputs in enumerate(single):
            own_tokens, own_scores = answers(model, inputs, **options)
            mine = slice(row * each, (row + 1) * each)
            torch.testing.assert_close(
                scores[mine], own_scores, atol=2e-4, rtol=0, msg=lambda m, r=row: f"row {r}: {m}"
            )
            assert torch.equal(tokens[mine], own_tokens), f"row {row}"


@pytest.mark.usefixtures("_rows_draw_alike")
@pytest.mark.parametrize(("decoding", "cache"), WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_a_batch_is_as_alone(method: str, decoding: str, cache: bool) -> None:
    check("test_llava", method, decoding, cache=cache)


@pytest.mark.parametrize("name", ["test_qwen2_5_vl", "test_internvl", "test_paligemma"])
@pytest.mark.parametrize("method", ["act_relative", "paint", "vcd", "agla"])
def test_a_row_of_a_batch_is_as_alone_where_pixels_or_positions_are_packed(name: str, method: str) -> None:
    check(name, method, "several beams", cache=True)


@pytest.mark.parametrize("method", ["vcd", "agla", "pai"])
def test_beams_that_change_places_keep_their_own_image(method: str) -> None:
    for seed in range(1, 4):
        check("test_llava", method, "several beams", cache=True, seed=seed, new=4)
